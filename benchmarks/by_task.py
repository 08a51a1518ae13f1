"""Gains over one method, task by task, from an experiment's results: how far a gain depends on the choice of tasks.

python benchmarks/by_task.py RESULTS.jsonl --against LABEL

A line is a method, a column a task: the mean, over the orders and seeds that both methods have, of the difference of
their final scores on test rows, in points of percent. The standard error is that of the mean over tasks.
"""

import argparse
import json
import statistics
from collections.abc import Iterable
from pathlib import Path

Finals = dict[tuple[str, int, str], float]  # order, seed, task -> the score after the last task


def finals(lines: Iterable[str]) -> dict[str, Finals]:
    """Return each method's final scores on test rows, "slao [2e-3]" -> them."""
    found: dict[str, Finals] = {}
    for line in lines:
        row = json.loads(line)
        if row["scored_on"] == "test":
            cells = found.setdefault(f"{row['label']} [{row['setting']}]" if row["setting"] else row["label"], {})
            for task, score in zip(row["tasks"], row["scores"][-1], strict=True):
                cells[row["order"], row["seed"], task] = score
    return found


def gains(ours: Finals, theirs: Finals) -> dict[str, float]:
    """Return the mean difference on each task, in points of percent."""
    shared = [cell for cell in theirs if cell in ours]
    return {
        task: statistics.fmean(100 * (ours[cell] - theirs[cell]) for cell in shared if cell[2] == task)
        for task in dict.fromkeys(cell[2] for cell in shared)
    }


def main() -> None:
    """Print the table of the methods that have all cells of the one they are held against."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--against", required=True, help='As the table calls it: "slao [2e-3]".')
    options = parser.parse_args()
    methods = finals(options.results.read_text(encoding="utf-8").splitlines())
    if options.against not in methods:
        parser.error(f"--against: expected one of {', '.join(sorted(methods))}")
    reference = methods.pop(options.against)
    tables = {name: gains(cells, reference) for name, cells in methods.items() if reference.keys() <= cells.keys()}
    tasks = list(dict.fromkeys(cell[2] for cell in reference))
    print(f"| against {options.against} | {' | '.join(tasks)} | mean | standard error |")
    print(f"|---|{'---:|' * (len(tasks) + 2)}")
    for name, by_task in sorted(tables.items(), key=lambda item: -statistics.fmean(item[1].values())):
        values = [by_task[task] for task in tasks]
        error = statistics.stdev(values) / len(values) ** 0.5
        print(f"| {name} | {' | '.join(f'{v:+.1f}' for v in values)} | {statistics.fmean(values):+.1f} | {error:.1f} |")


if __name__ == "__main__":
    main()
