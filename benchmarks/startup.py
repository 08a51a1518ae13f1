"""Case f: seconds from a command's start to what it was started for, each in a fresh process, medians of several.

`mbf --help`, `mbf status` and `mbf check`: to the end. `mbf generate`: to the first token. `mbf learn`: to the end of
its first step, on eight short rows. `mbf chat`: until it says what it loads. Python keeps the compiled modules, as an
installation does.

python benchmarks/startup.py [--repeats 5] [--model FOLDER] [--out FILE]
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path

import common
import flatness

GOALS = {
    "mbf --help": 0.2,
    "mbf status": 0.4,
    "mbf generate, first token": 2.0,
    "mbf learn, first step": 3.0,
    "mbf chat, first words": 0.3,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", type=Path, default=common.SMOLLM2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        os.environ |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": f"{place}/compiled"}
        stream, other = Path(place) / "s", Path(place) / "other"
        task = flatness.write_task(Path(place), 0)
        settings = ("--iters", 1, "--score-rows", 1)
        common.command_seconds(common.mbf("learn", stream, task, *settings, "--model", options.model))

        def learn() -> float:
            shutil.rmtree(other, ignore_errors=True)
            shutil.copytree(stream, other)
            return common.seconds_until(common.mbf("learn", other, task, *settings, "--again"), b"1/1 steps")

        generate = common.mbf("generate", stream, "Say hello.", "--max-tokens", 2)
        ways = {
            "python -c pass": lambda: common.command_seconds([generate[0], "-c", "pass"]),
            "mbf --help": lambda: common.command_seconds(common.mbf("--help")),
            "mbf status": lambda: common.command_seconds(common.mbf("status", stream)),
            "mbf check": lambda: common.command_seconds(common.mbf("check", task)),
            "mbf check --model": lambda: common.command_seconds(common.mbf("check", task, "--model", options.model)),
            "mbf chat, first words": lambda: common.seconds_until(common.mbf("chat", stream), b"\n"),
            "mbf generate, first token": lambda: common.seconds_until(generate, b""),
            "mbf learn, first step": learn,
        }
        found = common.alternating(ways, options.repeats, common.Kept("startup", options.out))
    lines = ["| command | seconds | goal |", "|---|---|---|"]
    for name, values in found.items():
        lines.append(f"| {name} | {common.spread(values)} | {GOALS.get(name, '')} |")
    common.finish(common.document("startup", {"rounds": found}), lines, options.out)


if __name__ == "__main__":
    main()
