"""Case c: scoring short and long answers against mlx-lm's generation row by row, and the time to a first answer.

Short: one teacher-forced pass against generating 200 one-word answers.

The model has learned from the rows for a few steps, so that it is right on some of them. The verdicts have to be the
same row by row; a row whose top two logits are within 1e-4 is a close call, counted apart.

Long (`--long FOLDER`, the folder of a SuperNI task): answers to 64 test rows, generated in batches as scoring does it,
against generating them row by row, and what scoring takes in all. Texts that differ are counted.

    python benchmarks/scoring.py [--rows 200] [--repeats 5] [--model FOLDER] [--out FILE]
    python benchmarks/scoring.py --long superni/TASK [--rows 64] [--repeats 3] [--model FOLDER] [--out FILE]
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import common

STEPS = 8  # of learning
LABELS = ("sports", "music", "travel", "cooking", "news")


def rows_of(count: int) -> list[dict[str, str]]:
    """Return questions with one-word answers."""
    words = ["goal", "song", "train", "onion", "paper", "match", "choir", "coast", "butter", "vote"]
    question = "Answer with one word of sports, music, travel, cooking, news. Which fits: {}?"
    return [
        {"prompt": question.format(f"{words[i % 10]} number {i}"), "completion": LABELS[i % 10 % 5]}
        for i in range(count)
    ]


def first_answers(model: Path, repeats: int) -> list[float]:
    """Return the seconds that `mbf generate` takes for one token, process included."""
    with tempfile.TemporaryDirectory() as place:
        stream, task = Path(place) / "s", Path(place) / "t.jsonl"
        task.write_text("".join(json.dumps(row) + "\n" for row in rows_of(20)))
        common.command_seconds(common.mbf("learn", stream, task, "--model", model, "--iters", 1))
        command = common.mbf("generate", stream, "Which word?", "--max-tokens", 1)
        return [common.command_seconds(command) for _ in range(repeats)]


def long_answers(folder: Path, count: int, repeats: int, model: Path, out: Path | None) -> None:
    """Compare generating long answers in batches with generating them row by row."""
    from mlx_lm import stream_generate

    from mbf_mlx.config import DataConfig, LoRAConfig
    from mbf_mlx.data.encode import Encoder
    from mbf_mlx.data.task import read_task
    from mbf_mlx.device.machine import freed_memory_kept
    from mbf_mlx.learning.evaluate import generated, longest_answer, score
    from mbf_mlx.learning.learner import load_learner

    learner, task = load_learner(model, LoRAConfig()), read_task(folder)
    rows = Encoder(learner.tokenizer, DataConfig(mask_prompt=True)).all(task.test[:count], task.path)
    learner.base.model.eval()
    texts: dict[str, list[str]] = {}

    @freed_memory_kept()
    def ours() -> float:
        started = time.perf_counter()
        texts["ours"] = generated(learner.engine, learner.tokenizer, rows)
        return time.perf_counter() - started

    def one_by_one() -> float:
        started = time.perf_counter()
        texts["one by one"] = []
        for row in rows:
            prompt = row.tokens[: row.prompt_length].tolist()
            parts = stream_generate(learner.base.model, learner.tokenizer, prompt, max_tokens=longest_answer(row))
            texts["one by one"].append("".join(part.text for part in parts))
        return time.perf_counter() - started

    def whole_score() -> float:
        return common.seconds(lambda: score(learner.engine, rows, "rouge_l", tokenizer=learner.tokenizer))

    ours()  # the first call is slower: threads start, memory is allocated
    kept, found = common.Kept("scoring_long", out), {"ours": [], "one by one": [], "whole score": []}
    for number in range(repeats):
        for name, way in {"ours": ours, "one by one": one_by_one, "whole score": whole_score}.items():
            found[name].append(way())
            print(f"{number}: {name} {found[name][-1]:.2f}", file=sys.stderr)
        kept.save("rounds", found)
    summary = common.compared(found, "ours")
    differ = [i for i, (a, b) in enumerate(zip(texts["ours"], texts["one by one"], strict=True)) if a != b]
    names = {
        "ours": "in batches",
        "one by one": "mlx-lm's generation, row by row",
        "whole score": "scoring in all: in batches, and the loss",
    }
    tokens = sum(len(learner.tokenizer.encode(text, add_special_tokens=False)) for text in texts["ours"])
    results = {"rows": len(rows), "task": folder.name, "answers": summary, "texts_that_differ": differ}
    results |= {"prompt_tokens": sum(row.prompt_length for row in rows), "answer_tokens": tokens}
    lines = common.table(summary, f"s for {len(rows)} rows", names)
    lines += ["", f"{folder.name}: {results['prompt_tokens']} tokens of prompts, {tokens} of answers"]
    lines.append(f"texts that differ: {len(differ)} of {len(rows)}")
    common.finish(common.document("scoring_long", results), lines, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--long", type=Path, metavar="FOLDER")
    parser.add_argument("--model", type=Path, default=common.SMOLLM2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    from mbf_mlx.device import backend

    backend.setup("cpu" if sys.platform == "linux" else None)
    if options.long:
        return long_answers(options.long, options.rows or 64, options.repeats or 3, options.model, options.out)
    options.rows, options.repeats = options.rows or 200, options.repeats or 5
    from mlx_lm import stream_generate

    from mbf_mlx.config import DataConfig, LoRAConfig, TrainConfig
    from mbf_mlx.data.encode import Encoder
    from mbf_mlx.data.task import read_task
    from mbf_mlx.learning.evaluate import score
    from mbf_mlx.learning.learner import load_learner
    from mbf_mlx.learning.train import train
    from mbf_mlx.learning.tuning import Tuning

    learner = load_learner(options.model, LoRAConfig())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.jsonl"
        path.write_text(
            "".join(json.dumps(row) + "\n" for row in [*rows_of(options.rows), {"prompt": "a", "completion": "b"}])
        )
        task = read_task(path)
        rows = Encoder(learner.tokenizer, DataConfig()).all([*task.train, *task.test][: options.rows], path)
    train(Tuning(learner.base.model), learner.engine, rows, [], TrainConfig(iters=STEPS, learning_rate=1e-3))
    learner.base.model.eval()
    verdicts: dict[str, list[bool]] = {}
    close: tuple[int, ...] = ()

    def forced() -> float:
        nonlocal close
        started = time.perf_counter()
        result = score(learner.engine, rows, "exact_match")
        verdicts["ours"], close = list(result.verdicts), result.close_calls
        return time.perf_counter() - started

    def generated() -> float:
        started = time.perf_counter()
        right = []
        for row in rows:
            wanted = row.tokens[row.prompt_length :].tolist()
            prompt = row.tokens[: row.prompt_length].tolist()
            parts = stream_generate(learner.base.model, learner.tokenizer, prompt, max_tokens=len(wanted))
            right.append([part.token for part in parts] == wanted)
        verdicts["generation"] = right
        return time.perf_counter() - started

    kept = common.Kept("scoring", options.out)
    found = common.alternating({"ours": forced, "generation": generated}, options.repeats, kept)
    if not verdicts:  # all rounds were measured before an interruption
        forced(), generated()
    summary = common.compared(found, "ours")
    differ = [i for i, (a, b) in enumerate(zip(verdicts["ours"], verdicts["generation"], strict=True)) if a != b]
    results = {"rows": len(rows), "scores": summary, "verdicts_that_differ": differ, "close_calls": list(close)}
    results["right"] = sum(verdicts["ours"])
    names = {"ours": "one teacher-forced pass", "generation": "mlx-lm's generation, the same model in the same dtype"}
    lines = common.table(summary, f"s for {len(rows)} rows", names)
    lines += ["", f"{results['right']} rows right; verdicts that differ: {len(differ)}; close calls: {len(close)}"]
    answers = kept.once("first_answer_seconds", lambda: first_answers(options.model, options.repeats))
    results["first_answer_seconds"] = answers
    lines.append(f"mbf generate, from its start to its first token: {common.spread(answers)} s")
    common.finish(common.document("scoring", results), lines, options.out)
    if set(differ) - set(close):
        raise SystemExit("a verdict differs")


if __name__ == "__main__":
    main()
