"""Case f: seconds from a command's start to its end: `mbf --help`, `mbf status`; and `mbf learn` to its first step.

python benchmarks/startup.py [--repeats 5] [--model FOLDER] [--out FILE]
"""

import argparse
import tempfile
from pathlib import Path

import common
import flatness

GOALS = {"mbf --help": 0.2, "mbf status": 0.4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", type=Path, default=common.SMOLLM2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        task = flatness.write_task(folder, 0)
        command = common.mbf("learn", folder / "s", task, "--iters", 1, "--score-rows", 1, "--model", options.model)
        common.command_seconds(command)
        ways = {
            "python -c pass": lambda: common.command_seconds([command[0], "-c", "pass"]),
            "mbf --help": lambda: common.command_seconds(common.mbf("--help")),
            "mbf status": lambda: common.command_seconds(common.mbf("status", folder / "s")),
            "mbf learn, one step": lambda: common.command_seconds([*command, "--again"]),
        }
        found = common.alternating(ways, options.repeats, common.Kept("startup", options.out))
    lines = ["| command | seconds | goal |", "|---|---|---|"]
    for name, values in found.items():
        lines.append(f"| {name} | {common.spread(values)} | {GOALS.get(name, '')} |")
    common.finish(common.document("startup", {"rounds": found}), lines, options.out)


if __name__ == "__main__":
    main()
