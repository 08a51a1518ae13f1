"""What an experiment's file may say, and that everything wrong is said before anything runs."""

import json

import pytest

from mbf_mlx.errors import InputError
from mbf_mlx.experiment.plan_file import read_plan
from mbf_mlx.experiment.suites import SUITES
from tests.conftest import ROOT
from tests.support.rows import rows_of

BASE = """base = "tiny"
tasks = "tasks"
seeds = [0, 1]
[orders]
ab = ["a", "b"]
ba = ["b", "a"]
"""
METHODS = """[[methods]]
method = "slao"
[[methods]]
method = "products"
options = {exponent = 0.7}
orders = ["ab"]
"""


@pytest.fixture
def write(tmp_path, write_jsonl):
    """`write(text)` writes an experiment's file beside a folder of two tasks and returns its path."""
    for name in "ab":
        write_jsonl(f"tasks/{name}/train.jsonl", rows_of(4))
        write_jsonl(f"tasks/{name}/test.jsonl", rows_of(2, seed=9))

    def write(text):
        path = tmp_path / "first.toml"
        path.write_text(text)
        return path

    return write


def test_cells_are_methods_times_orders_times_seeds_times_settings(write):
    plan = read_plan(write(BASE + METHODS + "[settings.low]\ntrain = {learning_rate = 1e-4}\n[settings.high]\n"))
    assert len(plan.cells) == 2 * (2 * 2 + 1 * 2)
    assert {(c.label, c.order) for c in plan.cells} == {
        ("slao", "ab"),
        ("slao", "ba"),
        ("products exponent=0.7", "ab"),
    }
    assert {(c.setting, c.train.learning_rate) for c in plan.cells} == {("low", 1e-4), ("high", 5e-4)}
    assert {(c.seed, c.train.seed) for c in plan.cells} == {(0, 0), (1, 1)}
    assert plan.name == "first" and set(plan.tasks) == {"a", "b"}


def test_a_memory_limit_is_a_size_as_people_write_it(write):
    assert read_plan(write("memory_limit = '6GB'\n" + BASE + METHODS)).memory_limit == 6 * 10**9
    assert read_plan(write(BASE + METHODS)).memory_limit == 0


def test_a_setting_may_count_steps_where_the_file_counts_epochs(write):
    text = BASE + METHODS + "[train]\nepochs = 2\n[settings.few]\ntrain = {iters = 5}\n[settings.all]\n"
    assert {(c.setting, c.train.iters) for c in read_plan(write(text)).cells} == {("few", 5), ("all", None)}


def test_a_method_may_be_run_with_some_of_the_settings_alone(write):
    plan = read_plan(write(BASE + METHODS + 'settings = ["high"]\n[settings.low]\n[settings.high]\n'))
    assert {(c.method, c.setting) for c in plan.cells} == {("slao", "low"), ("slao", "high"), ("products", "high")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed = [1]\n" + BASE + METHODS, "first.toml: seed: unknown setting; did you mean seeds?"),
        (BASE + METHODS + "option = {}", "methods.1.option: unknown setting; did you mean options?"),
        (BASE + "[[methods]]\nmethod = 'sloa'", "methods[0]: method: expected one of slao, .*got 'sloa'"),
        (BASE + "[[methods]]\nmethod = 'slao'\noptions = {start = 1}", "methods[0]: method slao: .*start"),
        (BASE + "[[methods]]\nmethod = 'slao'\nonly_last = true", "methods[0].only_last: expected a method .*got slao"),
        (
            BASE + METHODS + "[train]\nlearning_rat = 1",
            "train.learning_rat: unknown setting; did you mean learning_rate",
        ),
        (BASE + METHODS + "[train]\nseed = 1", "train.seed: unknown setting; seeds stand in `seeds`"),
        (BASE + METHODS + "[train]\nepochs = 0", "TrainConfig.epochs: expected a whole number of at least 1, got 0"),
        (BASE + METHODS + "[settings.x]\nlr = 1", "settings.x.lr: unknown setting"),
        (BASE + "c = ['a', 'nope']\n" + METHODS, "tasks/nope: No such file"),
        (BASE + "c = ['a', 'a']\n" + METHODS, "orders.c: a stands in it twice"),
        (BASE + METHODS.replace('"ab"', '"abc"'), "methods[1].orders: no order called abc; did you mean ab?"),
        (
            BASE + METHODS + 'settings = ["hi"]\n[settings.high]\n',
            "methods[1].settings: no setting called hi; did you mean high",
        ),
        (
            BASE + METHODS + 'settings = ["x"]\n',
            "methods[1].settings: no setting called x; the file has no settings",
        ),
        (BASE + METHODS + METHODS, "methods: two of them, or two equal seeds, are called 'slao'"),
        ("preset = 'standart'\n" + BASE + METHODS, "preset: expected one of standard, long, superni, got 'standart'"),
        ("score_on = 'valid'\n" + BASE + METHODS, "score_on is 'valid', and this task has no valid rows"),
        ("score_on = 'train'\n" + BASE + METHODS, "score_on: input should be 'test' or 'valid'"),
        ("valid_rows = 2\n" + BASE + METHODS, "tasks/a: valid_rows is 2, and this task has no valid rows"),
        (
            BASE + METHODS + "[train]\npatience = 2",
            "train.patience: has no effect without valid_rows, which choose the best step",
        ),
        (
            BASE + METHODS + "[settings.x]\ntrain = {val-every = 5}",
            "train.val_every: has no effect without valid_rows, which choose the best step",
        ),
        (
            BASE + METHODS + "[train]\nepochs = 2\niters = 5",
            "train.epochs: has no effect beside train.iters, which takes its place",
        ),
        (
            BASE + METHODS + "[train]\niters = 5\n[settings.x]\ntrain = {epochs = 2}",
            "settings.x.train.epochs: has no effect beside train.iters, which takes its place",
        ),
        ("memory_limit = 'much'\n" + BASE + METHODS, "memory_limit: expected a size as in 16GB or 900MB, got 'much'"),
        (BASE, "methods: field required"),
        ("base = ", "not readable as TOML"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_runs(write, text, message):
    path = write(text)
    with pytest.raises(InputError) as refusal:
        read_plan(path)
    import re

    assert re.search(message.replace("[", r"\[").replace("(", r"\(").replace("?", r"\?"), str(refusal.value))


def test_everything_wrong_is_said_at_once(write):
    with pytest.raises(InputError) as refusal:
        read_plan(write(BASE + "c = ['nope', 'nope']\n[[methods]]\nmethod = 'sloa'\n[train]\nepoch = 1\n"))
    assert len(str(refusal.value).splitlines()) >= 3


def test_a_preset_gives_orders_files_metric_and_training_and_the_file_wins(write, tmp_path):
    for group, name, labels in (("TC", "dbpedia", ["x", "y"]), ("SC", "amazon", ["x", "y"]), ("TC", "agnews", ["x"])):
        folder = tmp_path / "CL" / group / name
        folder.mkdir(parents=True)
        for split, count in (("train", 3), ("test", 2)):
            rows = [{"label": labels[0], "sentence": f"{split} {name} {i}"} for i in range(count)]
            (folder / f"{split}.json").write_text(json.dumps(rows))
        (folder / "labels.json").write_text(json.dumps(labels))
    text = "base = 'tiny'\ntasks = 'CL'\npreset = 'standard'\n[[methods]]\nmethod = 'slao'\norders = ['O1']\n"
    with pytest.raises(InputError, match=r"CL/TC/yahoo: No such file"):
        read_plan(write(text))
    plan = read_plan(
        write(text.replace("O1", "short") + "[orders]\nshort = ['dbpedia', 'agnews', 'amazon']\n[train]\nepochs = 2\n")
    )
    (cell,) = plan.cells
    assert cell.tasks == ("dbpedia", "agnews", "amazon")
    assert (cell.train.epochs, cell.train.learning_rate, cell.train.grad_accumulation_steps) == (2, 1e-4, 8)
    assert cell.data.template == "none" and plan.file.metric == "exact_match"
    assert plan.tasks["agnews"].train[0].prompt.startswith("What is the topic of the following paragraph?")


def test_the_suites_orders_are_permutations_of_the_same_tasks():
    counts = {"standard": 4, "long": 15, "superni": 15}
    for name, suite in SUITES.items():
        orders = list(suite.orders.values())
        assert {len(order) for order in orders} == {counts[name]}
        assert len({frozenset(order) for order in orders}) == 1
        assert len(set(orders)) == len(orders)
        assert set(orders[0]) <= set(suite.paths)


@pytest.mark.slow
def test_the_suites_read_the_published_files_where_they_are(task_data, tmp_path):
    """Yahoo is not among the files at hand, so the long order goes without it."""
    path = tmp_path / "p.toml"
    path.write_text("base = 'x'\npreset = 'superni'\n[[methods]]\nmethod = 'slao'\n")
    if not (task_data / "superni").is_dir() or not (task_data / "cl_benchmark").is_dir():
        pytest.skip("the published benchmarks are not there")
    plan = read_plan(path, task_data / "superni")
    assert len(plan.tasks) == 15 and len(plan.cells) == 2
    order = [name for name in SUITES["long"].orders["O4"] if name != "yahoo"]
    path.write_text(
        f"base = 'x'\npreset = 'long'\n[orders]\nmine = {order}\n[[methods]]\nmethod = 'slao'\norders = ['mine']\n"
    )
    assert len(read_plan(path, task_data / "cl_benchmark").tasks) == 14


def test_the_projects_own_experiment_files_on_its_own_tasks_are_plans():
    """Each of these names its tasks' folder itself, from where it lies."""
    files = sorted((ROOT / "benchmarks" / "experiments").glob("quickstart*.toml"))
    assert len(files) >= 2
    for file in files:
        assert read_plan(file).cells, file.name


def test_the_projects_own_experiment_files_on_the_text_tasks_are_plans(task_data):
    files = sorted((ROOT / "benchmarks" / "experiments").glob("*.toml"))
    assert len(files) >= 5
    for file in files:
        # superni is slow to read; the paper's orders are tested above
        if file.stem != "superni" and not file.stem.startswith("quickstart"):
            assert read_plan(file, task_data / "tasks").cells, file.name
