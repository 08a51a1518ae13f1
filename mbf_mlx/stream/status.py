"""The document that `mbf status --json` prints. It is made from a stream's small files; no model is loaded."""

from typing import Any

from mbf_mlx import metrics
from mbf_mlx.adapters.layout import WEIGHTS
from mbf_mlx.errors import InputError
from mbf_mlx.stream.folder import StreamFolder
from mbf_mlx.stream.records import STATE, TaskRecord


def status_document(folder: StreamFolder) -> dict[str, Any]:
    """Return what a stream's files say about it, as plain values.

    Raises:
        InputError: a file is damaged.
    """
    generation, history = folder.current(), folder.history()
    manifest, identity = generation.manifest, folder.identity
    scores = [list(record.scores) for record in history]
    square = [row + [None] * (len(history) - len(row)) for row in scores]
    kinds = {record.metric for record in history if record.metric != "loss"}
    files = manifest.files
    can_undo, damage = _way_back(folder)
    weights = files.get(f"adapter/{WEIGHTS}")
    return {
        "stream": str(folder.path),
        "tasks": [_task_of(record) for record in history],
        "scores": square,
        "losses": [list(record.losses) + [None] * (len(history) - len(record.losses)) for record in history],
        "average_accuracy": metrics.average_accuracy(scores).value if kinds else None,
        "backward_transfer": metrics.backward_transfer(scores).value if kinds else None,
        "forgetting": metrics.forgetting(scores).value if kinds else None,
        "mixed_metrics": len(kinds) > 1,
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


def _task_of(record: TaskRecord) -> dict[str, Any]:
    return record.model_dump(mode="json", exclude={"scores", "losses"})


def _way_back(folder: StreamFolder) -> tuple[bool, str | None]:
    """Return whether the last task can be undone, and what is damaged in the generation that undo would go back to."""
    try:
        return folder.current().number > 0 and folder.previous() is not None, None
    except InputError as error:
        return False, str(error)
