"""The hashes of results that were computed before: a cell that was run is never run again."""

from mbf_mlx.config import DataConfig, LoRAConfig, TrainConfig
from mbf_mlx.data.task import Task
from mbf_mlx.experiment.hashes import of_cell
from mbf_mlx.experiment.plan_file import Cell, ExperimentFile, ExperimentPlan
from mbf_mlx.experiment.results import RESULTS, read_results
from mbf_mlx.files.log import Log
from tests.conftest import ROOT

FIVE = ROOT / "benchmarks" / "results" / "five"


def task(name, sha256):
    return Task(
        name, ROOT, "prompt/completion", sha256, train=(), valid=(), test=(), labels=(), warnings=(), held_out=0
    )


def hash_of(row):
    """Return a row's hash, computed again from the settings that stand in it."""
    machine = {key: value for key, value in row["machine"].items() if key not in ("processor", "threads")}
    always = {"format": 1, "mbf_mlx": "0.1.0", "base": row["base"]["fingerprint"], **machine}
    settings = row["settings"]
    cell = Cell(
        **{name: row[name] for name in ("label", "method", "options", "setting", "order", "seed")},
        tasks=tuple(row["tasks"]),
        lora=LoRAConfig(**settings["lora"]),
        train=TrainConfig(**settings["train"]),
        data=DataConfig(**settings["data"]),
        only_last=row["trainings"][0] == "",
    )
    file = ExperimentFile(
        base="any",
        methods=[{"method": "slao"}],
        **{f"{split}_rows": count for split, count in row["rows"].items()},
        score_on=row["scored_on"],
        metric="auto",
        forward_transfer=bool(row["before"]),
    )
    tasks = {name: task(name, sha256) for name, sha256 in zip(row["tasks"], row["task_hashes"], strict=True)}
    plan = ExperimentPlan(name="any", file=file, tasks=tasks, cells=(cell,), memory_limit=0)
    return of_cell(always, plan, cell)


def test_the_committed_results_are_read_and_keep_their_hashes():
    rows = Log(FIVE / RESULTS).read()
    assert len(rows) >= 190 and read_results(FIVE)
    assert [row["hash"] for row in rows if hash_of(row) != row["hash"]] == []
