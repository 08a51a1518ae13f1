"""What Ollama and LM Studio are given: the file, a template that makes the same text, the folder, the next command."""

import json
import os
import re
import shutil
import subprocess

import pytest

from mbf_mlx.errors import InputError
from mbf_mlx.export.gguf.vocabulary import Vocabulary
from mbf_mlx.export.lmstudio import gguf_commands, mlx_commands, write_lmstudio
from mbf_mlx.export.ollama import FAMILIES, TALK, make_modelfile, recognise, write_ollama
from mbf_mlx.export.ollama import commands as ollama_commands
from tests.support.factors import logits, make_factors
from tests.support.gguf_files import read
from tests.support.jobs import job_of, mean_retention
from tests.support.tiny_llama import TEMPLATE

CHATML_WITH_DEFAULT = (
    "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% set t = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' %}"
    "{% set t = t + m['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set t = bos_token + t %}{% endif %}{{ t }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA3_WITH_DATE = (
    "{{- bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + strftime_now('%Y') + '\n\n' }}"
    "{{- system + '<|eot_id|>' }}"
    "{% for m in messages %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}"
    "{% endfor %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('take turns') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') }}"
    "{{ m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
UNKNOWN = "{% for m in messages %}### {{ m.role }}: {{ m.content }}\n{% endfor %}### assistant:"
TALKS = [
    TALK,
    TALK[1:],
    [{"role": "user", "content": 'quotes " and {{ braces }}'}],
    [TALK[0], {"role": "user", "content": "émoji 🦙\nline"}],
]


def vocabulary(template, *, texts=("<s>", "</s>", "<|eot_id|>", "<|im_end|>"), eos=3, add_bos=True):
    return Vocabulary(
        "gpt2", "gpt-2", list(texts), [3] * 4, special={"bos": 0, "eos": eos}, add_bos=add_bos, chat_template=template
    )


def test_a_folder_for_ollama_holds_the_fused_model(tiny_llama, tmp_path):
    factors, out = make_factors(tiny_llama), tmp_path / "mail"
    report = write_ollama(job_of(tiny_llama, factors, out, kind="Q8_0"))
    assert sorted(path.name for path in out.iterdir()) == ["Modelfile", "mail.gguf", "mbf_export.json"]
    modelfile = (out / "Modelfile").read_text()
    assert modelfile.startswith("FROM ./mail.gguf\n")
    assert 'PARAMETER stop "<|im_end|>"' in modelfile and "PARAMETER num_ctx 512" in modelfile
    assert report.template == "ChatML"
    assert mean_retention(report.gguf) > 0.98
    assert read(out / "mail.gguf")[1]["general.name"] == "mail"
    (out / "mail.gguf").rename(out / "old.gguf")
    (out / "mbf_export.json").write_text((out / "mbf_export.json").read_text().replace("mail.gguf", "old.gguf"))
    with pytest.raises(InputError, match="exists"):
        write_ollama(job_of(tiny_llama, factors, out))
    write_ollama(job_of(tiny_llama, factors, out, force=True))
    assert (out / "mail.gguf").exists() and not (out / "old.gguf").exists()


def test_what_to_type_names_the_folder_and_quotes_it():
    assert ollama_commands("a/mail", "base") == ["ollama create mail -f a/mail/Modelfile", "ollama run mail"]
    assert ollama_commands("my mail", "base")[0] == "ollama create 'my mail' -f 'my mail/Modelfile'"
    file = "a/mail/mbf/mail/mail.gguf"
    assert gguf_commands("a/mail", "base") == [
        f"lms import {file} --user-repo mbf/mail --copy --yes",
        "lms load mbf/mail",
    ]
    copy = "mkdir -p ~/.lmstudio/models && cp -R a/mail/mbf ~/.lmstudio/models/"
    assert mlx_commands("a/mail", "base") == [copy, "lms load mbf/mail"]


@pytest.mark.parametrize(
    ("template", "name", "system"),
    [
        (TEMPLATE, "ChatML", ""),
        (CHATML_WITH_DEFAULT, "ChatML", "Be kind."),
        (LLAMA3, "Llama 3", ""),
        (LLAMA3_WITH_DATE, "Llama 3", ""),
        (LLAMA2, "Llama 2", ""),
        ([{"name": "tool_use", "template": UNKNOWN}, {"name": "default", "template": TEMPLATE}], "ChatML", ""),
    ],
)
def test_a_template_is_known_by_the_text_that_it_makes(template, name, system):
    found = recognise(vocabulary(template, eos=1 if template == LLAMA2 else 3))
    assert (found.family.name, found.system) == (name, system)


def test_the_default_system_prompt_becomes_ollamas():
    text, name, notes = make_modelfile("m.gguf", {}, vocabulary(CHATML_WITH_DEFAULT))
    assert '\nSYSTEM """Be kind."""\n' in text
    assert (name, notes) == ("ChatML", [])
    assert "PARAMETER num_ctx 8192\nPARAMETER temperature 0\nPARAMETER repeat_penalty 1\n" in text


def test_the_first_token_is_written_only_where_llama_cpp_does_not_add_it():
    assert recognise(vocabulary(LLAMA3)).go.startswith("{{ range")
    assert recognise(vocabulary(LLAMA3, add_bos=False)).go.startswith("<s>{{ range")


def test_a_date_before_the_system_prompt_is_kept_and_said():
    text, name, notes = make_modelfile("m.gguf", {}, vocabulary(LLAMA3_WITH_DATE))
    assert name == "Llama 3" and "SYSTEM" not in text
    assert re.search(
        r"if not .System }}<.start_header_id.>system<.end_header_id.>\n\nToday Date: 20\d\d\n\n<.eot_id", text
    )
    assert "always writes the date of the export" in notes[0]


@pytest.mark.parametrize("template", [UNKNOWN, "{{ raise_exception('no') }}", "{% bad", LLAMA3 + "!"])
def test_a_template_of_another_kind_is_left_to_ollama_with_a_word(template):
    text, name, notes = make_modelfile("m.gguf", {}, vocabulary(template))
    assert "TEMPLATE" not in text
    assert name == "unknown" and "ollama show --template" in notes[0]


@pytest.mark.parametrize(("template", "trained"), [(None, "chat"), (TEMPLATE, "none")])
def test_a_model_that_was_trained_on_raw_text_gets_raw_text(template, trained):
    text, name, _ = make_modelfile("m.gguf", {}, vocabulary(template), trained)
    assert 'TEMPLATE """{{ .Prompt }}"""' in text and name == "none"


GO = """package main
import ("encoding/json"; "os"; "strings"; "text/template")
type Message struct{ Role, Content string }
type Case struct{ Go, System string; Messages []Message }
func main() {
	var cases []Case
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
	var made []string
	for _, c := range cases {
		var text strings.Builder
		if err := template.Must(template.New("").Parse(c.Go)).Execute(&text, c); err != nil { panic(err) }
		made = append(made, text.String())
	}
	json.NewEncoder(os.Stdout).Encode(made)
}
"""


@pytest.mark.slow
def test_the_go_templates_make_the_text_of_the_models_own(tmp_path):
    go = os.environ.get("GO") or shutil.which("go")
    if go is None:
        pytest.skip("no `go` to run Go templates with; GO names one")
    cases, expected = [], []
    for template in (TEMPLATE, CHATML_WITH_DEFAULT, LLAMA3, LLAMA3_WITH_DATE, LLAMA2):
        words = vocabulary(template, eos=1 if template == LLAMA2 else 3)
        found = recognise(words)
        for talk in TALKS:
            system = [message["content"] for message in talk if message["role"] == "system"] or [found.system]
            # Ollama puts the Modelfile's SYSTEM before conversations that have none.
            own = (
                talk
                if talk[0]["role"] == "system" or not found.system
                else [{**TALK[0], "content": found.system}, *talk]
            )
            messages = [{"Role": message["role"], "Content": message["content"]} for message in own]
            cases.append({"Go": found.go, "System": system[0], "Messages": messages})
            expected.append(_rendered(template, talk).removeprefix("<s>"))
    (tmp_path / "main.go").write_text(GO)
    environment = {**os.environ, "GOCACHE": str(tmp_path / "cache"), "GO111MODULE": "off", "HOME": str(tmp_path)}
    command = [go, "run", str(tmp_path / "main.go")]
    done = subprocess.run(command, input=json.dumps(cases), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


def _rendered(template, talk):
    """The text that transformers makes of a conversation."""
    from transformers.utils.chat_template_utils import render_jinja_template

    special = {"bos_token": "<s>", "eos_token": "</s>"}
    return render_jinja_template([talk], chat_template=template, add_generation_prompt=True, **special)[0][0]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_is_recognised_as_itself(family):
    """A template that only hands over the text: what `render` makes has to be told apart from the other families."""
    others = [other for other in FAMILIES if other.render(TALK) == family.render(TALK)]
    assert others == [family]
    assert "ALONE" not in recognise(vocabulary(TEMPLATE)).go


def test_a_folder_for_lm_studio_has_its_layout(tiny_llama, tmp_path):
    factors, out = make_factors(tiny_llama), tmp_path / "mail"
    report = write_lmstudio(job_of(tiny_llama, factors, out))
    assert (out / report.model).is_file() and report.model.as_posix() == "mbf/mail/mail.gguf"
    assert mean_retention(report.written) > 0.98


def test_lm_studios_mlx_engine_gets_a_folder_that_mlx_lm_loads(tiny_llama, tmp_path):
    factors, out = make_factors(tiny_llama), tmp_path / "mail"
    report = write_lmstudio(job_of(tiny_llama, factors, out, kind="MLX"))
    assert report.model.as_posix() == "mbf/mail"
    difference = abs(logits(out / report.model) - logits(tiny_llama, factors)).max()
    assert difference < 0.1 < abs(logits(tiny_llama) - logits(tiny_llama, factors)).max()


@pytest.mark.parametrize("name", [".mail", "a\\b"])
def test_a_folder_name_that_lm_studio_cannot_use_is_refused(tiny_llama, tmp_path, name):
    with pytest.raises(InputError, match="LM Studio calls the model as this folder: expected a plain name"):
        write_lmstudio(job_of(tiny_llama, {}, tmp_path / name))
    assert not (tmp_path / name).exists()
