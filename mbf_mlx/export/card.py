"""The model card of an export: what it is, what it learned (by name), how it scored, how to serve it; never the data.

A card is made to be passed on, so it names no path of this machine.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mbf_mlx import __version__
from mbf_mlx.base.card import front_matter

MOST_TASKS = 24  # that a card shows, the newest
LIBRARIES = {"peft": "peft", "mlx": "mlx", "adapter": "mlx"}  # target -> the hub's name of what loads it
WORDS = {
    "rank": "Rank",
    "scale": "Scale (delta = scale * B @ A)",
    "keys": "Layers with factors",
    "num_layers": "Blocks with factors, counted from the last",
    "dropout": "Dropout on the LoRA inputs",
    "template": "Prompts",
    "iters": "Optimizer steps",
    "grad_accumulation_steps": "Batches of one optimizer step",
    "learning_rate": "Peak learning rate",
    "warmup": "Warmup (share of the steps)",
    "max_grad_norm": "Longest gradient (norm)",
    "grad_checkpoint": "Activations computed again in the backward pass",
    "mask_prompt": "Answers alone are supervised",
    "max_seq_length": "Longest row (tokens)",
    "val_every": "Steps between validations",
    "patience": "Validations without a gain before training stops",
    "save_every": "Saved every",
}
MEANINGS = {
    ("num_layers", -1): "all",
    ("template", "chat"): "in the base's chat template",
    ("template", "none"): "as they are, without a template",
    ("val_every", 0): "one epoch",
    ("patience", 0): "off",
    ("max_grad_norm", 0): "off",
}


@dataclass(frozen=True)
class About:
    """What a card says about the stream that was exported."""

    base: str  # the base's hub id or the name of its folder, never a path
    status: dict[str, Any] = field(default_factory=dict)  # the document of `mbf status --json`
    licence: str | None = None  # of the base, as the hub abbreviates it
    original: str | None = None  # hub id of the unquantized model that the base was made from

    @property
    def hub_id(self) -> str | None:
        """The base's own hub id, else its original's, else None."""
        return self.base if "/" in self.base else self.original


def text(about: About, target: str, serve: list[str], survived: list[str]) -> str:
    """Return a card in Markdown.

    Args:
        about: The stream.
        target: One of `export.TARGETS`.
        serve: Commands that serve the export, as they are typed in the folder that holds it.
        survived: Sentences on what the export kept of the update.
    """
    status = about.status
    head = front_matter(
        base_model=about.original or about.hub_id,
        license=about.licence,
        library_name=LIBRARIES.get(target),
        pipeline_tag="text-generation",
        tags=["continual-learning", "lora", "mbf-mlx"],
    )
    count = len(status.get("tasks", []))
    lines = [f"# {about.base.rpartition('/')[2]}, taught {count} task{'' if count == 1 else 's'}", ""]
    lines += [f"Made by mbf-mlx {__version__} from `{about.base}`. One LoRA adapter learned the tasks in order.", ""]
    lines += [*_tasks(status), *_settings(status)]
    if survived:
        lines += ["## What the export kept", "", *(f"- {sentence}" for sentence in survived), ""]
    if serve:
        lines += ["## Serve it", "", "```", *serve, "```", ""]
    if about.licence:
        lines += ["## Licence", "", f"The licence of the base model applies: {about.licence}.", ""]
    return "\n".join([head, *lines])


def _tasks(status: dict[str, Any]) -> list[str]:
    """Return the table of scores after each task, and the three numbers that sum it up."""
    tasks = status.get("tasks", [])[-MOST_TASKS:]
    scores = [row[-len(tasks) :] for row in status.get("scores", [])[-len(tasks) :]]
    if not tasks:
        return []
    lines = ["## Tasks", ""]
    if (learned := status.get("learned", len(tasks))) > len(tasks):
        lines += [f"The newest {len(tasks)} of {learned:,} tasks. The numbers below the table count all of them.", ""]
    lines += ["| | " + " | ".join(_cell(task["name"]) for task in tasks) + " |"]
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


def _settings(status: dict[str, Any]) -> list[str]:
    """Return the table of settings: the stream's own, and those of its last task."""
    rows = [("Method", str(status["method"]))] if "method" in status else []
    rows += _flat({**status.get("method_options", {}), **status.get("settings", {})})
    if any(name == WORDS["iters"] for name, _ in rows):  # they take the place of the epochs
        rows = [(name, value) for name, value in rows if name != "Epochs"]
    rows = list(dict.fromkeys(rows))  # the template is a setting of the stream and of its rows
    if not rows:
        return []
    lines = [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows]
    return ["## Settings", "", "Training settings are those of the last task.", "", "| | |", "|---|---|", *lines, ""]


def _flat(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield name and value of every setting that is set, in words."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        elif value is not None:
            yield WORDS.get(key, key.replace("_", " ").capitalize()), _words(key, value)


def _words(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return MEANINGS.get((key, value), str(value))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
