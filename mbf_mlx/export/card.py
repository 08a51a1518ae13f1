"""The model card of an export: what it is and learned (by name), how it scored, how to serve it; never the data."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mbf_mlx import __version__

NAME = "README.md"
_FIELD = re.compile(r"^(license|base_model):\s*([^\s#].*)$", re.MULTILINE)


@dataclass(frozen=True)
class About:
    """What a card says of the stream that was exported."""

    base: str  # as the user called it
    status: dict[str, Any] = field(default_factory=dict)  # what `mbf status --json` prints
    licence: str | None = None  # of the base, an SPDX id where it is one
    original: str | None = None  # the unquantized model that the base was made from, a hub id


def read_base_card(folder: Path) -> tuple[str | None, str | None]:
    """Return the licence and the original model that a base folder's own card names, each None where it does not."""
    path = folder / NAME
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    head = text.split("---")[1] if text.startswith("---") and text.count("---") >= 2 else ""
    found = {match[1]: match[2].strip().strip("\"'") for match in _FIELD.finditer(head)}
    return found.get("license"), found.get("base_model")


def text(about: About, target: str, serve: list[str], survived: list[str]) -> str:
    """Return a card in Markdown.

    Args:
        about: The stream.
        target: "mlx", "adapter", "peft", ...
        serve: Commands that serve the export.
        survived: Sentences on what the export kept of the update.
    """
    status = about.status
    settings = status.get("settings", {})
    head = {
        "base_model": about.original or about.base,
        "license": about.licence,
        "library_name": "peft" if target == "peft" else "mlx" if target in ("mlx", "adapter") else None,
        "pipeline_tag": "text-generation",
    }
    lines = ["---", *(f"{key}: {_quoted(value)}" for key, value in head.items() if value)]
    lines += ["tags:", "- continual-learning", "- lora", "- mbf-mlx", "---", ""]
    count = len(status.get("tasks", []))
    lines += [f"# {Path(about.base).name}, taught {count} task{'' if count == 1 else 's'}", ""]
    lines += [
        f"Made by mbf-mlx {__version__} from `{about.base}`: one LoRA adapter that learned the tasks one after another"
        f" (method {status.get('method', 'slao')}).",
        "",
    ]
    lines += _tasks(status)
    if settings:
        lines += ["## Settings", "", *(f"- {key}: {value}" for key, value in settings.items()), ""]
    if survived:
        lines += ["## What the export kept", "", *(f"- {sentence}" for sentence in survived), ""]
    if serve:
        lines += ["## Serve it", "", "```", *serve, "```", ""]
    if about.licence:
        lines += ["## Licence", "", f"That of the base model: {about.licence}.", ""]
    return "\n".join(lines)


def _quoted(value: str) -> str:
    return value if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]*", value) else '"' + value.replace('"', "'") + '"'


def _tasks(status: dict[str, Any]) -> list[str]:
    """Return the table of tasks with the scores after each, and the three numbers that sum it up."""
    tasks, scores = status.get("tasks", []), status.get("scores", [])
    if not tasks:
        return []
    lines = ["## Tasks", "", "| | " + " | ".join(_cell(task["name"]) for task in tasks) + " |"]
    lines += ["|---|" + "---|" * len(tasks)]
    for task, row in zip(tasks, scores, strict=False):
        cells = ["" if score is None else f"{100 * score:.1f}" for score in row]
        cells += [""] * (len(tasks) - len(cells))
        lines.append(f"| after {_cell(task['name'])} | " + " | ".join(cells) + " |")
    metrics = sorted({task["metric"] for task in tasks})
    lines += ["", f"Scores in percent on held-out rows ({', '.join(metrics)})."]
    names = {"average_accuracy": "Average", "backward_transfer": "Backward transfer", "forgetting": "Forgetting"}
    numbers = [f"{name} {100 * status[key]:.1f}" for key, name in names.items() if status.get(key) is not None]
    return [*lines, ", ".join(numbers) + "." if numbers else "", ""]


def _cell(name: str) -> str:
    return name.replace("|", "\\|")
