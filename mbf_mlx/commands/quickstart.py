"""`mbf quickstart`: do everything once, with a small model."""

import json as json_library
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mbf_mlx import units
from mbf_mlx.commands import console
from mbf_mlx.commands.flags import Given, takes
from mbf_mlx.commands.options import Json
from mbf_mlx.commands.shown import show_progress
from mbf_mlx.config import TrainConfig
from mbf_mlx.errors import quoted

if TYPE_CHECKING:
    from mbf_mlx.api import Stream

MODEL = "smollm2-135m-instruct"
FOLDER = Path(__file__).parents[1] / "quickstart"
TASKS = ("home", "inbox", "bins")
RIVAL = "sequential"
EPOCHS = 2  # chosen on three seeds, like the recipe's LoRA settings; see quickstart/README.md
FAST_LEARNING_RATE = 3e-3  # --fast has one epoch of three steps a task
FAST_ROWS = {"train": 24, "test": 6}  # of a task


@takes("seed")
def quickstart(
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Folder for the streams and the fused model.")
    ] = Path("quickstart"),
    fast: Annotated[
        bool, typer.Option("--fast", help="Train once on a fifth of the rows: shows that it runs, not what it can do.")
    ] = False,
    *,
    given: Given,
    json: Json = False,
) -> None:
    """Do everything once, with SmolLM2-135M: fetch it, learn three tasks, show the matrix, export, ask it.

    Example: mbf quickstart --fast
    """
    from mbf_mlx.api import Stream
    from mbf_mlx.files.storage import Files

    started = time.monotonic()
    seed = given.make(TrainConfig).seed
    Files().make_folder(out)
    base = str(fetched())
    folders = [FOLDER / name for name in TASKS]
    if fast:
        folders = [_shortened(folder, out / "tasks" / folder.name) for folder in folders]
    suffix = "-fast" if fast else ""
    assistant = Stream.open(out / f"assistant{suffix}", base=base, seed=seed)
    before = _base_scores(assistant, folders, out / f"base{suffix}.json")
    rate = FAST_LEARNING_RATE if fast else assistant.learning_rate
    train = TrainConfig(seed=seed, epochs=1 if fast else EPOCHS, learning_rate=rate)
    console.err.print("three tasks, one after another:")
    with show_progress() as events:
        assistant.learn(*folders, train=train, events=events)
    console.err.print(f"the same tasks and seed with plain LoRA training ({RIVAL}), to compare:")
    rival = Stream.open(out / f"{RIVAL}{suffix}", base=base, method=RIVAL, seed=seed)
    with show_progress() as events:
        rival.learn(*folders, train=train, events=events)
    console.err.print("fusing what was learned into a model folder:")
    fused = out / f"fused{suffix}"
    export = assistant.export("mlx", fused, force=True)
    question = json_library.loads((folders[0] / "test.jsonl").read_text(encoding="utf-8").splitlines()[0])
    answer = _ask(fused, question["prompt"])
    result = {
        "assistant": assistant.status(),
        RIVAL: rival.status(),
        "base_scores": before,
        "export": export,
        "question": question["prompt"],
        "expected": question["completion"],
        "answer": answer,
        "seconds": round(time.monotonic() - started, 1),
    }
    if json:
        console.print_json(result)
        return
    _print(result, out / f"assistant{suffix}", fused)


def fetched() -> Path:
    """Return the folder of the small model; fetch it if it is missing."""
    from mbf_mlx.base.sources import resolve_base

    return resolve_base(MODEL, report=console.err.print).path


def _shortened(folder: Path, target: Path) -> Path:
    """Return a copy of a task that has only its first rows."""
    target.mkdir(parents=True, exist_ok=True)
    for split, count in FAST_ROWS.items():
        rows = (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (target / f"{split}.jsonl").write_text("".join(rows[:count]), encoding="utf-8")
    return target


def _base_scores(stream: "Stream", folders: list[Path], cache: Path) -> dict[str, float]:
    """Return what the base model scores on each task before it has learned anything."""
    if stream.status()["tasks"] and cache.exists():
        known: dict[str, float] = json_library.loads(cache.read_text())
        return known
    scores = {task["name"]: task["score"] for task in stream.evaluate(*folders)["tasks"]}
    cache.write_text(json_library.dumps(scores))
    return scores


def _ask(model: Path, prompt: str) -> str:
    """Return the fused model's answer; only mlx-lm is used."""
    from mlx_lm import generate

    from mbf_mlx.base.load import load_to_answer

    loaded, tokenizer = load_to_answer(model)
    tokens = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
    return str(generate(loaded, tokenizer, tokens, max_tokens=32))


def _print(result: dict[str, Any], stream: Path, fused: Path) -> None:
    from rich.columns import Columns

    from mbf_mlx.report.terminal import matrix, percent, summary

    before = ", ".join(f"{name} {percent(score)} %" for name, score in result["base_scores"].items())
    console.out.print(f"\nthe base model before: {before}")
    console.out.print("score on each task after each task, in %:\n")
    tables = []
    for name, title in (("assistant", "mbf learn, task after task"), (RIVAL, "plain LoRA, task after task")):
        table = matrix(result[name], console.out.width)
        table.title = title
        tables.append(table)
    console.out.print(Columns(tables, padding=(0, 2)))  # side by side if the terminal is wide enough
    for line in summary(result["assistant"]):
        console.out.print(line)
    own, other = (result[name]["average_accuracy"] for name in ("assistant", RIVAL))
    console.out.print(f"average after three tasks: {percent(own)} %, {percent(other)} % with plain LoRA training")
    console.out.print(f"\nfused model, touched layers at 8 bits: {fused}")
    console.out.print(f"asked: {result['question']}")
    console.out.print(f"it answers: {result['answer']}   (right: {result['expected']})")
    console.out.print(f"\ndone in {units.duration(result['seconds'])}. Next:")
    console.out.print(f"  mbf learn {quoted(stream)} YOUR-TASK.jsonl")
    console.out.print(f"  mbf chat {quoted(stream)}")
    console.out.print(f"  mlx_lm.generate --model {fused} --prompt '...'")
