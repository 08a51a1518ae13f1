"""Kills `mbf learn` on three tasks by SIGKILL at random moments, and holds its end to a run that was never killed.

The model is the tests' two-layer Llama; the run uses what has to survive: accumulation, dropout, validation with the
best step kept, a save after every step. Each kill aims at a part of the run (loading, training, saving, merging,
scoring, committing, pruning) and comes after a random share of that part's time; where it really fell is what the
table counts. After each kill the stream has to open with every byte as it was committed, and the same command has to
go on. Every run that gets to its end is compared with the one that was never killed: adapter, state and history (its
timings aside), bit for bit; then the next one starts.

    python benchmarks/soak.py [--kills 200] [--seed 0] [--minutes 0] [--out benchmarks/results/soak.json]

Beside the JSON file goes a Markdown table of the same name. Exit code 1 where anything differs.
"""

import argparse
import contextlib
import ctypes
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # pinned: the last bits depend on it
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # no threads before a fork

PARTS = ("loading", "training", "saving", "merging", "scoring", "committing", "pruning")
FLAGS = "--rank 4 --batch-size 2 --grad-accumulation-steps 2 --epochs 2 --val-every 2 --dropout 0.1 --save-every 1"
TIMINGS = ("seconds", "tokens_per_second", "peak_memory_bytes", "path")
WAIT = 120  # seconds that one run may take

Clock = Any  # of multiprocessing: which part a child is in, and the seconds that each part took last


def learn(stream: Path, tasks: list[Path], base: Path, part: Clock, spent: Clock) -> None:
    """Run the command in this process, telling at every moment which part of the run it is in."""
    import mbf_mlx.learning.learn as learning
    from mbf_mlx.commands import main
    from mbf_mlx.stream.folder import StreamFolder
    from mbf_mlx.stream.saves import Working

    def tell(name: str, owner: Any, method: str) -> None:
        inner: Callable[..., Any] = getattr(owner, method)

        def timed(*arguments: Any, **options: Any) -> Any:
            before, began = part.value, time.monotonic()
            part.value = PARTS.index(name)
            try:
                return inner(*arguments, **options)
            finally:
                part.value = before
                spent[PARTS.index(name)] = time.monotonic() - began

        setattr(owner, method, timed)

    tell("training", learning, "train")
    tell("saving", Working, "save")
    tell("merging", learning, "after_training")
    tell("scoring", learning, "score_all")
    tell("committing", StreamFolder, "commit")
    tell("pruning", StreamFolder, "clean")
    part.value = PARTS.index("loading")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    sys.argv = ["mbf", "learn", str(stream), *map(str, tasks), "--model", str(base), *FLAGS.split()]
    main()


def contents(stream: Path) -> dict[str, Any]:
    """What a finished stream holds, timings aside."""
    from mbf_mlx.stream.folder import StreamFolder
    from mbf_mlx.stream.repair import verify_all

    folder = StreamFolder.open(stream)
    verify_all(folder)
    current = folder.current().folder
    found: dict[str, Any] = {
        str(path.relative_to(current)): path.read_bytes()
        for path in sorted(current.rglob("*"))
        if path.suffix == ".safetensors" or path.name == "adapter_config.json"
    }
    found["history"] = [
        {key: value for key, value in record.model_dump().items() if key not in TIMINGS} for record in folder.history()
    ]
    found["folder"] = sorted(path.name for path in stream.iterdir())
    return found


def soak(kills: int, seed: int, minutes: float, place: Path) -> dict[str, Any]:
    """Kill `kills` times and return the result's document."""
    sys.path.insert(0, str(ROOT))
    from mbf_mlx.device import backend

    backend.setup()
    import mbf_mlx.api
    import mbf_mlx.base.load  # a forked child has imported all of it
    import mbf_mlx.commands.learn
    import mbf_mlx.learning.learn
    import mbf_mlx.report.terminal
    from tests.support.tiny_llama import write_tiny_llama

    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    writer = context.Process(target=write_tiny_llama, args=(place / "base",))  # no mlx computation before a fork
    writer.start()
    writer.join()
    mbf_mlx.base.load.load_tokenizer(place / "base")  # what that imports takes longer than the run
    tasks = write_tasks(place)
    part, spent = context.Value(ctypes.c_int, 0, lock=False), context.Array(ctypes.c_double, len(PARTS), lock=False)

    def start(stream: Path) -> Any:
        part.value = 0
        child = context.Process(target=learn, args=(stream, tasks, place / "base", part, spent))
        child.start()
        return child

    child, began = start(place / "whole"), time.monotonic()
    child.join(WAIT)
    assert child.exitcode == 0, "the run that is not killed failed"
    whole_seconds, expected = time.monotonic() - began, contents(place / "whole")
    spent[PARTS.index("loading")] = 0.1 * whole_seconds

    dice, fell, aimed, runs, problems = random.Random(seed), Counter[str](), 0, 0, []
    stream, began = place / "run-0", time.monotonic()
    while sum(fell.values()) < kills and not 0 < minutes * 60 < time.monotonic() - began:
        aim = aimed % len(PARTS)
        child = start(stream)
        if kill(child, dice, aim, part, spent):
            aimed += 1
            fell[PARTS[part.value]] += 1
            problems += [f"kill {sum(fell.values())} in {PARTS[part.value]}: {p}" for p in look(stream)]
            continue
        runs += 1
        if child.exitcode != 0:
            problems.append(f"run {runs}: exit code {child.exitcode} after {dict(fell)}")
        elif (found := contents(stream)) != expected:
            differ = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
            problems.append(f"run {runs}: differs in {', '.join(differ)}")
        shutil.rmtree(stream, ignore_errors=True)
        stream = place / f"run-{runs}"
    last = start(stream)  # the run under way gets to its end, too
    last.join(WAIT)
    runs += 1
    if last.exitcode != 0 or contents(stream) != expected:
        problems.append(f"run {runs}: exit code {last.exitcode}, or another end")
    return {
        "date": str(date.today()),
        "command": f"python benchmarks/soak.py --kills {kills} --seed {seed} --minutes {minutes:g}",
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
        "flags": FLAGS,
        "kills": sum(fell.values()),
        "fell_in": {name: fell[name] for name in PARTS},
        "runs_finished": runs,
        "seconds": round(time.monotonic() - began, 1),
        "seconds_of_a_run_not_killed": round(whole_seconds, 2),
        "problems": problems,
    }


def kill(child: Any, dice: random.Random, aim: int, part: Clock, spent: Clock) -> bool:
    """Kill a child at a random moment of the part `aim`; return False where it came to its end before."""
    skip, end = dice.choice([0, 0, 1, 2, 5]), time.monotonic() + WAIT
    inside, share = False, dice.random()
    while child.is_alive() and time.monotonic() < end:
        now = part.value == aim
        if now and not inside:
            if skip == 0 or aim == 0:
                time.sleep(share * spent[aim])
                child.kill()
                break
            skip -= 1
        inside = now
        time.sleep(0.0002)
    child.join(WAIT)
    if child.exitcode is None:
        raise SystemExit(f"a run takes longer than {WAIT} seconds")
    return child.exitcode == -signal.SIGKILL


def look(stream: Path) -> Iterator[str]:
    """Yield what is wrong with a stream just after a kill."""
    from mbf_mlx.errors import InputError
    from mbf_mlx.stream.folder import StreamFolder
    from mbf_mlx.stream.repair import verify_all

    if not (stream / "stream.json").exists():
        return  # killed before it was made
    try:
        folder = StreamFolder.open(stream)
        verify_all(folder)
        assert folder.state().t == len(folder.history())
    except (InputError, OSError, AssertionError) as error:
        yield f"{type(error).__name__}: {error}"


def write_tasks(place: Path) -> list[Path]:
    """Write three small tasks: which of two words stands first in the alphabet, differently asked."""
    words = ["red", "green", "blue", "small", "large", "cold", "warm", "old", "new", "round"]
    folders = []
    for number, (yes, no) in enumerate((("yes", "no"), ("up", "down"), ("left", "right"))):
        dice = random.Random(number)
        folder = place / f"task{number}"
        folder.mkdir()
        for split, count in (("train", 24), ("valid", 4), ("test", 6)):
            rows = []
            for _ in range(count):
                line = dice.choices(words, k=4)
                rows.append({"prompt": " ".join(line), "completion": yes if line[0] < line[1] else no})
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        folders.append(folder)
    return folders


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("mlx", "mlx-lm", "numpy", "cmeel-openblas"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def markdown(document: dict[str, Any]) -> str:
    """Return the result as a small page."""
    head = " | ".join(document["fell_in"])
    counts = " | ".join(str(count) for count in document["fell_in"].values())
    verdict = "none" if not document["problems"] else "\n\n- " + "\n- ".join(document["problems"])
    return (
        f"# Kills\n\n`{document['command']}`, {document['date']}, {document['machine']},"
        f" {', '.join(f'{name} {number}' for name, number in document['versions'].items())}\n\n"
        f"{document['kills']} SIGKILLs in {document['seconds']:.0f} s; {document['runs_finished']} runs of three tasks"
        " came to their end between them, each compared bit for bit with a run that was never killed.\n\n"
        f"| {head} |\n|{'---|' * len(document['fell_in'])}\n| {counts} |\n\nProblems: {verdict}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=0, help="stop sooner; 0 never")
    parser.add_argument("--out", type=Path, help="a JSON file for the result; a Markdown page goes beside it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mbf-soak-") as folder:
        document = soak(options.kills, options.seed, options.minutes, Path(folder))
    page = markdown(document)
    print(page)
    if options.out:
        options.out.write_text(json.dumps(document, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(page)
    sys.exit(1 if document["problems"] else 0)


if __name__ == "__main__":
    main()
