"""The flags that set fields of a settings class, and what `--help` says of every command."""

import re
from dataclasses import fields

import pytest
import typer
from typer.testing import CliRunner

from mbf_mlx import commands
from mbf_mlx.commands import learn, plan, serve
from mbf_mlx.commands.flags import FLAGS, Given, takes
from mbf_mlx.commands.help import FIRST
from mbf_mlx.config import DataConfig, LearnConfig, LoRAConfig, ServeConfig, TrainConfig
from mbf_mlx.errors import InputError

CONFIGS = (LoRAConfig, DataConfig, TrainConfig, LearnConfig, ServeConfig)


@pytest.fixture
def call():
    """`call("--rank", "2")` returns what a command with every flag is given."""
    seen = []

    @takes(*FLAGS)
    def command(word: str = "", *, given: Given) -> None:
        seen.append(given)

    app = typer.Typer()
    app.command()(command)

    def run(*words):
        done = CliRunner().invoke(app, words, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return seen.pop()

    return run


def shown(name, columns=80):
    return CliRunner().invoke(commands.app, [name, "--help"], prog_name="mbf", env={"COLUMNS": str(columns)}).output


def sections(text):
    """Return heading -> names of its options."""
    parts = re.split(r"^(\S.*):\n", text, flags=re.MULTILINE)[1:]
    return {
        title: re.findall(r"^  (?:-\w, )?(--\S+)", body, re.MULTILINE) for title, body in zip(parts[::2], parts[1::2])
    }


def test_every_field_of_the_settings_has_a_flag_and_every_flag_a_field():
    names = {field.name for config in CONFIGS for field in fields(config)} - {"train", "data"}  # parts of LearnConfig
    assert names == set(FLAGS)
    assert sum(len(fields(config)) for config in CONFIGS) == len(FLAGS) + 2, "two fields have one name"


def test_the_settings_of_no_flags_are_the_defaults(call):
    given = call()
    assert [given.make(config) for config in CONFIGS] == [config() for config in CONFIGS]
    assert given["rank"] is None and given.fields_of(LoRAConfig) == {}


def test_a_flag_sets_its_own_field_and_no_other(call):
    words = ["--keys", "q_proj, o_proj,", "--no-mask-prompt", "--grad-checkpoint", "--memory-limit", "6GB"]
    given = call(
        *words, "--learning-rate", "1e-3", "-m", "9", "--allowed-origins", "https://a.example,https://b.example"
    )
    assert given.make(LoRAConfig) == LoRAConfig(keys=("q_proj", "o_proj"))
    assert given.make(DataConfig) == DataConfig(mask_prompt=False)
    assert given.make(TrainConfig) == TrainConfig(grad_checkpoint=True, learning_rate=1e-3)
    assert given.make(LearnConfig, train=TrainConfig(seed=3)).memory_limit == 6_000_000_000
    assert given.make(ServeConfig) == ServeConfig(
        max_tokens=9, allowed_origins=("https://a.example", "https://b.example")
    )


def test_a_value_that_does_not_fit_is_refused_by_the_settings(call):
    with pytest.raises(InputError, match="LoRAConfig.rank: expected a whole number of at least 1, got 0"):
        call("--rank", "0").make(LoRAConfig)
    with pytest.raises(InputError, match="--memory-limit: expected a size as in 16GB or 900MB, got 'lots'"):
        call("--memory-limit", "lots")


def test_learn_and_serve_take_every_field_of_their_settings():
    learned = {field.name for config in CONFIGS[:4] for field in fields(config)} - {"train", "data"}
    assert set(learn._FLAGS) == learned
    assert set(serve._FLAGS) == {field.name for field in fields(ServeConfig)}
    assert set(plan._FLAGS) < learned


@pytest.mark.parametrize("name", commands.available())
def test_the_help_of_a_command_has_no_python_in_it(name):
    text = shown(name)
    assert not re.search(r"<|>|list\[|None|True|False|Path\b|\{|\]\.\.\.|\[\[", text), text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("name", "usage"),
    [
        ("learn", "STREAM TASK... [OPTIONS]"),
        ("plan", "STREAM TASK... [OPTIONS]"),
        ("check", "TASK... [OPTIONS]"),
        ("eval", "STREAM [TASK...] [OPTIONS]"),
        ("fetch", "[NAME] [OPTIONS]"),
        ("export", "STREAM TARGET OUT [OPTIONS]"),
        ("doctor", "[OPTIONS]"),
    ],
)
def test_the_usage_is_one_plain_line(name, usage):
    assert shown(name).splitlines()[0] == f"Usage: mbf {name} {usage}"


def test_the_ten_flags_that_people_use_come_first_and_the_others_in_groups():
    found = sections(shown("learn"))
    first = ["--model", "--name", "--method", "--epochs", "--learning-rate", "--batch-size", "--max-seq-length"]
    assert found[FIRST] == [*first, "--rank", "--seed", "--json", "--help"]
    groups = ["Arguments", FIRST, "For a new stream, fixed for its life", "Training", "Memory and power"]
    assert list(found) == [*groups, "Saving and scoring", "Learning again", "Other options"]
    assert "--[no-]mask-prompt" in found["Training"] and "--save-every" in found["Saving and scoring"]
    assert "--method-options" not in shown("learn")


@pytest.mark.parametrize("name", commands.available())
@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_default_stands_on_one_line(name, columns):
    text = shown(name, columns)
    assert not re.search(r"\[default:[^]]*$", text, re.MULTILINE)
    assert "\N{NO-BREAK SPACE}" not in text and "\N{NON-BREAKING HYPHEN}" not in text


@pytest.mark.parametrize("name", commands.available())
def test_every_word_of_help_can_be_understood_alone(name):
    command = typer.main.get_command(commands.app).get_command(None, name)
    for each in command.params:
        assert re.match(r"[A-Z]|mlx:", each.help), f"{name} {each.name}: {each.help}"
        assert not re.match(r"(Of|Its|Their|Likewise|Theirs)\b", each.help), f"{name} {each.name}: {each.help}"
