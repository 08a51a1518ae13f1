"""The document that `mbf status --json` prints. It is made from a stream's small files; no model is loaded."""

from typing import Any

from mbf_mlx.adapters.layout import WEIGHTS
from mbf_mlx.errors import InputError
from mbf_mlx.stream.folder import StreamFolder
from mbf_mlx.stream.records import STATE, TaskRecord


def status_document(folder: StreamFolder) -> dict[str, Any]:
    """Return what a stream's files say about it, as plain values.

    Raises:
        InputError: a file is damaged.
    """
    generation, shown, table = folder.current(), folder.newest_tasks(), folder.task_scores()
    manifest, identity = generation.manifest, folder.identity
    averages, mixed = table.averages(), table.metrics()
    files = manifest.files
    can_undo, damage = _way_back(folder)
    weights = files.get(f"adapter/{WEIGHTS}")
    return {
        "stream": str(folder.path),
        "learned": len(table),
        "tasks": [_task_of(record) for record in shown],
        "scores": [_row(shown, {task: score for task, score, _ in record.scored_tasks()}) for record in shown],
        "losses": [_row(shown, {task: loss for task, _, loss in record.scored_tasks()}) for record in shown],
        "average_accuracy": averages.accuracy if mixed else None,
        "backward_transfer": averages.backward_transfer if mixed else None,
        "forgetting": averages.forgetting if mixed else None,
        "mixed_metrics": len(mixed) > 1,
        "adapter_bytes": weights.bytes if weights else 0,
        "state_bytes": files[STATE].bytes,
        "kept_bytes": folder.kept_bytes(),
        "base": {
            "name": identity.base.name,
            "fingerprint": identity.base.fingerprint,
            "quantization": identity.base.quantization,
            "path": manifest.base_path,
        },
        "method": identity.method,
        "method_options": identity.method_options,
        "settings": {
            "lora": {
                "rank": identity.rank,
                "scale": identity.scale,
                "keys": identity.keys,
                "num_layers": identity.num_layers,
                "dropout": identity.dropout,
            },
            "template": identity.template,
            **manifest.settings,
        },
        "generation": generation.number,
        "can_undo": can_undo,
        "damaged": damage,
        "interrupted": folder.interrupted(),
        "id": identity.id,
    }


def course(folder: StreamFolder, most: int) -> list[tuple[int, float | None]]:
    """Return the average accuracy after `most` tasks evenly spread over a stream, the first and the last among them.

    Returns:
        (task from 1, mean score of all tasks then) for each of them.

    Raises:
        InputError: a file is damaged.
    """
    count = folder.current().manifest.t
    chosen = sorted({1 + round(i * (count - 1) / (most - 1)) for i in range(most)}) if count else []
    return [(record.t, _average(record)) for record in folder.tasks([(t, t) for t in chosen])]


def _average(record: TaskRecord) -> float | None:
    if record.scored is not None:
        return record.average
    known = [score for score in record.scores if score is not None]
    return sum(known) / len(known) if known else None


def _task_of(record: TaskRecord) -> dict[str, Any]:
    return record.model_dump(mode="json", exclude={"scores", "losses", "scored"})


def _row(shown: list[TaskRecord], values: dict[int, float | None]) -> list[float | None]:
    return [values.get(record.t) for record in shown]


def _way_back(folder: StreamFolder) -> tuple[bool, str | None]:
    """Return whether the last task can be undone, and what is damaged in the generation that undo would go back to."""
    try:
        return folder.current().number > 0 and folder.previous() is not None, None
    except InputError as error:
        return False, str(error)
