"""The `ollama` target: a folder with a GGUF file and the Modelfile that `ollama create` reads.

Ollama does not read the chat template inside a GGUF file; it needs a Go template. We recognise the model's template by
the text that it makes of a conversation, and write the Go template that makes the same text. Ollama gets no safetensors
adapter from us: its converter reorders the factors of q and k wrongly and ignores the scale.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mbf_mlx.base.chat_templates import with_date, writes_date
from mbf_mlx.base.renderer import Refused, renderer
from mbf_mlx.base.sources import read_config
from mbf_mlx.errors import MissingPackageError, quoted
from mbf_mlx.export.gguf.vocabulary import Vocabulary, read_vocabulary
from mbf_mlx.export.gguf.write import GGUFReport, write_gguf
from mbf_mlx.export.job import Job
from mbf_mlx.export.place import fresh_folder
from mbf_mlx.export.weights.rounding import Rounders, no_rounder

MAX_CONTEXT = 8192  # tokens that Ollama makes room for; its own default is less and cuts longer texts silently
RAW = "{{ .Prompt }}"
MARK = "\0"  # stands for a system prompt
TALK = [  # the conversation on which templates are compared
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?"},
]


@dataclass(frozen=True)
class Family:
    """A kind of chat template, in Python and as a Go template."""

    name: str
    go: str  # the Go template of a conversation, up to where the answer begins
    stop: tuple[str, ...]  # texts that end an answer, besides the model's own end token
    render: Callable[[list[dict[str, str]]], str]  # the same in Python, without the token that begins a text


def _chatml(messages: list[dict[str, str]]) -> str:
    turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
    return "".join(turns) + "<|im_start|>assistant\n"


def _llama3(messages: list[dict[str, str]]) -> str:
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    turns = [head.format(message["role"]) + message["content"] + "<|eot_id|>" for message in messages]
    return "".join(turns) + head.format("assistant")


def _llama2(messages: list[dict[str, str]]) -> str:
    text, system = "", ""
    for message in messages:
        if message["role"] == "system":
            system = f"<<SYS>>\n{message['content']}\n<</SYS>>\n\n"
        elif message["role"] == "user":
            text, system = text + f"{'<s>' if text else ''}[INST] {system}{message['content']} [/INST]", ""
        else:
            text += f" {message['content']} </s>"
    return text


# In `go`, LEAD is replaced by the text before every system prompt (Llama 3.1: the date), and ALONE by the block for a
# conversation without a system prompt.
FAMILIES = (
    Family(
        name="ChatML",
        go="ALONE{{ range .Messages }}<|im_start|>{{ .Role }}\nLEAD{{ .Content }}<|im_end|>\n{{ end }}"
        "<|im_start|>assistant\n",
        stop=("<|im_start|>", "<|im_end|>"),
        render=_chatml,
    ),
    Family(
        name="Llama 3",
        go="ALONE{{ range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\nLEAD{{ .Content }}<|eot_id|>"
        "{{ end }}<|start_header_id|>assistant<|end_header_id|>\n\n",
        stop=("<|start_header_id|>", "<|eot_id|>"),
        render=_llama3,
    ),
    Family(
        name="Llama 2",
        go='{{ $system := "" }}{{ $later := false }}{{ range .Messages }}'
        '{{ if eq .Role "system" }}{{ $system = .Content }}'
        '{{ else if eq .Role "user" }}{{ if $later }}<s>{{ end }}[INST] {{ if $system }}<<SYS>>\n{{ $system }}\n'
        '<</SYS>>\n\n{{ $system = "" }}{{ end }}{{ .Content }} [/INST]{{ $later = true }}'
        "{{ else }} {{ .Content }} </s>{{ end }}{{ end }}",
        stop=("[INST]", "</s>"),
        render=_llama2,
    ),
)


@dataclass(frozen=True)
class Recognised:
    """A model's chat template, expressed as one of the families."""

    family: Family
    go: str
    system: str  # the system prompt for conversations that have none of their own


@dataclass(frozen=True)
class OllamaReport:
    """What an `ollama` export did."""

    gguf: GGUFReport
    template: str  # "ChatML", "Llama 3", "Llama 2", "none" (prompts as they are), "unknown"
    notes: list[str] = field(default_factory=list)  # about the Modelfile; `gguf` has its own


def write_ollama(
    job: Job, rounders: Rounders = no_rounder, finish: Callable[[Path, OllamaReport], None] | None = None
) -> OllamaReport:
    """Write a folder with a GGUF file and a Modelfile. The folder's name is the model's name in Ollama.

    Args:
        job: The export; `job.template` decides whether prompts go through the model's chat template.
        rounders: As for `write_gguf`.
        finish: Called with the folder before it gets its name.

    Raises:
        InputError: what `write_gguf` refuses.
    """
    file, config = f"{job.out.name}.gguf", read_config(job.base)
    vocabulary = read_vocabulary(job.base, config, job.chat_template, job.template == "none")
    modelfile, template, notes = make_modelfile(file, config, vocabulary, job.template)
    with fresh_folder(job.out, force=job.force, forbidden=job.off_limits) as folder:
        written = write_gguf(replace(job, out=folder / file), rounders)
        (folder / "Modelfile").write_text(modelfile, encoding="utf-8")
        report = OllamaReport(written, template, notes)
        if finish:
            finish(folder, report)
    return report


def commands(out: str, base: str) -> list[str]:
    """Return the command that gives the folder `out` to Ollama, and the one that runs it."""
    name = quoted(Path(out).name)
    return [f"ollama create {name} -f {quoted(f'{out}/Modelfile')}", f"ollama run {name}"]


def make_modelfile(
    file: str, config: dict[str, Any], vocabulary: Vocabulary, template: str = "chat"
) -> tuple[str, str, list[str]]:
    """Return a Modelfile, the name of the template in it, and notes for its user.

    Args:
        file: Name of the GGUF file beside it.
        config: The base's config.json.
        vocabulary: The base's vocabulary.
        template: "chat" or "none", as the model was trained.
    """
    lines, notes, name, stops = [f"FROM ./{file}"], [], "none", list[str]()
    if "eos" in vocabulary.special:
        stops.append(vocabulary.tokens[vocabulary.special["eos"]])
    if template == "none" or vocabulary.chat_template is None:
        lines.append(f"TEMPLATE {_quoted(RAW)}")
    elif found := recognise(vocabulary):
        name = found.family.name
        lines.append(f"TEMPLATE {_quoted(found.go)}")
        lines += [f"SYSTEM {_quoted(found.system)}"] if found.system else []
        stops += found.family.stop
        if writes_date(vocabulary.chat_template):
            notes.append(
                "the model's chat template writes today's date; the Modelfile always writes the date of the export"
            )
    else:
        name = "unknown"
        notes.append(
            "we cannot write the model's chat template for Ollama: check the one that Ollama chose with "
            "`ollama show --template`, or add a TEMPLATE to the Modelfile"
        )
    lines += [f'PARAMETER stop "{text}"' for text in dict.fromkeys(stops)]
    lines.append(f"PARAMETER num_ctx {min(config.get('max_position_embeddings') or MAX_CONTEXT, MAX_CONTEXT)}")
    # Scores were measured greedily and without a penalty; Ollama's defaults would change short answers.
    lines += ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1"]
    return "\n".join(lines) + "\n", name, notes


def _quoted(text: str) -> str:
    return f'"""{text}"""'


def recognise(vocabulary: Vocabulary) -> Recognised | None:
    """Return the family of a vocabulary's chat template; None if it belongs to none."""
    render = _jinja(vocabulary)
    bos = vocabulary.tokens[vocabulary.special["bos"]] if "bos" in vocabulary.special else ""
    talk, bare = render(TALK), render(TALK[1:])
    if talk is None or bare is None:
        return None
    for family in FAMILIES:
        before, _, after = family.render([{"role": "system", "content": MARK}, *TALK[1:]]).partition(MARK)
        for begin in dict.fromkeys(("", bos)):
            found, after_prompt = _between(talk, begin + before, after), TALK[0]["content"]
            if found is None or not found.endswith(after_prompt):
                continue
            lead = found.removesuffix(after_prompt)
            alone = "" if bare == begin + family.render(TALK[1:]) else _between(bare, begin + before, after)
            if alone is None or not alone.startswith(lead) or (lead and "LEAD" not in family.go):
                continue
            # llama.cpp may add the begin token itself; then the template must not.
            written = "" if vocabulary.add_bos else begin
            return Recognised(family, written + _fill(family.go, before, lead, alone), alone.removeprefix(lead))
    return None


def _between(text: str, before: str, after: str) -> str | None:
    fits = text.startswith(before) and text.endswith(after) and len(text) >= len(before) + len(after)
    return text[len(before) : len(text) - len(after)] if fits else None


def _fill(go: str, before: str, lead: str, alone: str) -> str:
    """Return a Go template with the text before system prompts filled in, and the block for no system prompt."""
    if not lead:
        return go.replace("ALONE", "").replace("LEAD", "")
    end = go.partition("{{ .Content }}")[2].partition("{{ end }}")[0]
    block = f"{{{{ if not .System }}}}{before}{lead}{end}{{{{ end }}}}" if alone == lead else ""
    return go.replace("ALONE", block).replace("LEAD", f'{{{{ if eq .Role "system" }}}}{lead}{{{{ end }}}}')


def _jinja(vocabulary: Vocabulary) -> Callable[[list[dict[str, str]]], str | None]:
    """Return a function that renders the chat template up to where an answer begins; it returns None on an error."""
    if find_spec("jinja2") is None:
        raise MissingPackageError("reading a chat template needs jinja2: pip install jinja2")
    template = vocabulary.chat_template
    if isinstance(template, list):
        template = next((one["template"] for one in template if one["name"] == "default"), "")
    today = with_date(str(template), date.today().isoformat())
    special = {
        f"{kind}_token": vocabulary.tokens[vocabulary.special[kind]]
        for kind in ("bos", "eos", "unk", "pad")
        if kind in vocabulary.special
    }

    def render(messages: list[dict[str, str]]) -> str | None:
        talk = json.dumps({"messages": messages, "add_generation_prompt": True})
        try:
            return renderer.render(today, special, [talk])[0]
        except Refused:
            return None

    return render
