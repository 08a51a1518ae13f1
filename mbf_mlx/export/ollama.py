"""The `ollama` target: a folder with a GGUF file and the Modelfile that `ollama create` reads.

Ollama does not read the chat template inside a GGUF file; it wants one of its own kind (a Go template). The model's
template is recognised by what it makes of a conversation, and written as the Go template that makes the same. Not
handed to Ollama: safetensors adapters, whose q and k factors its converter turns wrongly, and whose scale it ignores.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from mbf_mlx.base.sources import read_config
from mbf_mlx.errors import MissingPackageError
from mbf_mlx.export.gguf.vocabulary import Vocabulary, read_vocabulary
from mbf_mlx.export.gguf.write import GGUFReport, Progress, write_gguf
from mbf_mlx.export.place import fresh_folder
from mbf_mlx.export.weights.rounding import Rounders, no_rounder
from mbf_mlx.methods import Factors

MAX_CONTEXT = 8192  # tokens that Ollama makes room for; its own default cuts longer texts off without a word
RAW = "{{ .Prompt }}"
MARK = "\0"  # stands for a system prompt
TALK = [  # on which templates are compared
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?"},
]


@dataclass(frozen=True)
class Family:
    """A kind of chat template, in Python and as a Go template."""

    name: str
    go: str  # of a conversation, up to where the answer begins
    stop: tuple[str, ...]  # beside the token that ends a turn
    render: Callable[[list[dict[str, str]]], str]  # what `go` makes, without the token that begins a text


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


# In `go`, LEAD stands for what a template puts before every system prompt (Llama 3.1: the date), and ALONE for the
# block that it puts where there is no system prompt.
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
    """A model's chat template, as one of the families makes it."""

    family: Family
    go: str
    system: str  # the prompt for conversations that have none of their own


@dataclass(frozen=True)
class OllamaReport:
    """What an `ollama` export did."""

    out: Path
    gguf: GGUFReport
    template: str  # "ChatML", "Llama 3", "Llama 2", "none" (prompts as they are), "unknown"
    next: list[str]  # commands to type
    notes: list[str] = field(default_factory=list)  # on the Modelfile; those on the file are the file's


def write_ollama(
    base_folder: Path,
    factors: Factors,
    scale: float,
    out: Path,
    *,
    name: str,
    kind: str | None = None,
    template: str = "chat",
    license_id: str | None = None,
    force: bool = False,
    forbidden: tuple[Path, ...] = (),
    rounders: Rounders = no_rounder,
    progress: Progress | None = None,
    finish: Callable[[Path, OllamaReport], None] | None = None,
) -> OllamaReport:
    """Write a folder with `<name>.gguf` and a Modelfile.

    Args:
        base_folder: As for `write_gguf`, like all arguments that are not named here.
        factors: The deployed pair of every layer.
        scale: delta = scale * B @ A.
        out: The folder to make.
        name: Of the model in Ollama and of the file.
        kind: Type of the matrices.
        template: "chat" where the model was trained with its chat template, "none" where prompts were raw text.
        license_id: SPDX id of the model's licence.
        force: Replace an earlier export.
        forbidden: Folders to stay out of beside the base.
        rounders: Layer -> the rounder of its inputs.
        progress: Called after each tensor.
        finish: Called with the folder before it gets its name.

    Raises:
        InputError: what `write_gguf` refuses.
    """
    config = read_config(base_folder)
    modelfile, recognised, notes = make_modelfile(
        f"{name}.gguf", config, read_vocabulary(base_folder, config), template
    )
    with fresh_folder(out, force=force, forbidden=(base_folder, *forbidden)) as folder:
        report = write_gguf(
            base_folder,
            factors,
            scale,
            folder / f"{name}.gguf",
            kind=kind,
            name=name,
            license_id=license_id,
            rounders=rounders,
            progress=progress,
        )
        (folder / "Modelfile").write_text(modelfile, encoding="utf-8")
        commands = [f"ollama create {shlex.quote(name)} -f {shlex.quote(str(out / 'Modelfile'))}"]
        commands.append(f"ollama run {shlex.quote(name)}")
        report = replace(report, out=out / report.out.name)
        whole = OllamaReport(out, report, recognised, commands, notes)
        if finish:
            finish(folder, whole)
    return whole


def make_modelfile(
    file: str, config: dict[str, Any], vocabulary: Vocabulary, template: str = "chat"
) -> tuple[str, str, list[str]]:
    """Return a Modelfile, the name of the template in it, and what its user should know.

    Args:
        file: Name of the GGUF file beside it.
        config: The base's config.json.
        vocabulary: Of the base.
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
        if "strftime_now" in str(vocabulary.chat_template):
            notes.append("the model's chat template writes the day's date; the Modelfile keeps the date of the export")
    else:
        name = "unknown"
        notes.append(
            "the model's chat template is none that we can write for Ollama: look at what Ollama took for it with "
            "`ollama show --template`, or give the Modelfile a TEMPLATE of its own"
        )
    lines += [f'PARAMETER stop "{text}"' for text in dict.fromkeys(stops)]
    lines.append(f"PARAMETER num_ctx {min(config.get('max_position_embeddings') or MAX_CONTEXT, MAX_CONTEXT)}")
    # Greedy and without a penalty, as scores were measured; Ollama's own defaults would change short answers.
    lines += ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1"]
    return "\n".join(lines) + "\n", name, notes


def _quoted(text: str) -> str:
    return f'"""{text}"""'


def recognise(vocabulary: Vocabulary) -> Recognised | None:
    """Return what a vocabulary's chat template is; None for one that is none of ours."""
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
            # What llama.cpp puts before every text by itself must not stand there twice.
            written = "" if vocabulary.add_bos else begin
            return Recognised(family, written + _fill(family.go, before, lead, alone), alone.removeprefix(lead))
    return None


def _between(text: str, before: str, after: str) -> str | None:
    fits = text.startswith(before) and text.endswith(after) and len(text) >= len(before) + len(after)
    return text[len(before) : len(text) - len(after)] if fits else None


def _fill(go: str, before: str, lead: str, alone: str) -> str:
    """Return a Go template with what stands before system prompts, and the block where there is none."""
    if not lead:
        return go.replace("ALONE", "").replace("LEAD", "")
    end = go.partition("{{ .Content }}")[2].partition("{{ end }}")[0]
    block = f"{{{{ if not .System }}}}{before}{lead}{end}{{{{ end }}}}" if alone == lead else ""
    return go.replace("ALONE", block).replace("LEAD", f'{{{{ if eq .Role "system" }}}}{lead}{{{{ end }}}}')


def _jinja(vocabulary: Vocabulary) -> Callable[[list[dict[str, str]]], str | None]:
    """Return a function that renders the chat template up to where an answer begins, or returns None if it refuses."""
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise MissingPackageError("a chat template has to be read: pip install jinja2") from None
    template = vocabulary.chat_template
    if isinstance(template, list):
        template = next((one["template"] for one in template if one["name"] == "default"), "")
    special = {
        f"{kind}_token": vocabulary.tokens[vocabulary.special[kind]]
        for kind in ("bos", "eos", "unk", "pad")
        if kind in vocabulary.special
    }

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def render(messages: list[dict[str, str]]) -> str | None:
        # The settings under which chat templates are written: those of transformers.
        settings = {"trim_blocks": True, "lstrip_blocks": True, "extensions": ["jinja2.ext.loopcontrols"]}
        environment = ImmutableSandboxedEnvironment(**settings)
        environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        try:
            text: str = environment.from_string(template).render(
                messages=messages, add_generation_prompt=True, **special
            )
        except (TemplateError, TypeError, ValueError, KeyError):
            return None
        return text

    return render
