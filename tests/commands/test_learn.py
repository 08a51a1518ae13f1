import json
import shutil

import pytest

from tests.support.command_line import mbf
from tests.support.rows import WORDS, rows_of

pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")


@pytest.fixture
def task(write_jsonl):
    write_jsonl("words/test.jsonl", rows_of(3, seed=1))
    return write_jsonl("words/train.jsonl", rows_of(6)).parent


def test_a_config_file_takes_the_place_of_flags_and_flags_win(tiny_llama, task, tmp_path):
    config = tmp_path / "learn.toml"
    config.write_text(
        f'model = "{tiny_llama}"\nrank = 4\nkeys = ["q_proj", "o_proj"]\niters = 2\nlearning-rate = 0.002\n'
        "mask_prompt = false\nscore_rows = 2\n"
    )
    done = mbf("learn", tmp_path / "s", task, "--config", config, "--rank", 2, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["settings"]["lora"]["rank"] == 2
    assert document["settings"]["lora"]["keys"] == ["self_attn.q_proj", "self_attn.o_proj"]
    assert document["settings"]["train"]["learning_rate"] == 0.002
    assert document["settings"]["train"]["iters"] == 2
    assert document["settings"]["data"]["mask_prompt"] is False
    assert document["tasks"][0]["steps"] == 2 and document["tasks"][0]["test_rows"] == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte = 1", "unknown setting 'learning_rte'; did you mean learning_rate?\nhint: mbf learn --help"),
        ("rank = ", "not readable as TOML: "),
    ],
)
def test_a_config_file_that_does_not_fit_is_named_before_anything_runs(task, tmp_path, text, message):
    config = tmp_path / "learn.toml"
    config.write_text(text)
    done = mbf("learn", tmp_path / "s", task, "--config", config)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {config}: {message}"), done.stderr
    assert not (tmp_path / "s").exists()


def test_a_config_file_that_is_not_there_is_an_error(task, tmp_path):
    done = mbf("learn", tmp_path / "s", task, "--config", tmp_path / "none.toml")
    assert done.returncode == 1
    assert "none.toml: no such file\nhint: --config takes a TOML file" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank", "0"], "LoRAConfig.rank: expected a whole number of at least 1, got 0"),
        (["--scale", "nan"], "LoRAConfig.scale: expected a number above 0, got nan"),
        (["--keys", ","], "LoRAConfig.keys: expected names of layers, got ()"),
        (["--num-layers", "0"], "LoRAConfig.num_layers: expected -1 or at least 1, got 0"),
        (["--dropout", "1"], "LoRAConfig.dropout: expected a number in [0, 1), got 1.0"),
        (["--epochs", "0"], "TrainConfig.epochs: expected a whole number of at least 1, got 0"),
        (["--iters", "-1"], "TrainConfig.iters: expected a whole number of at least 1, got -1"),
        (["--batch-size", "0"], "TrainConfig.batch_size: expected a whole number of at least 1, got 0"),
        (["--learning-rate", "0"], "TrainConfig.learning_rate: expected a number above 0, got 0.0"),
        (["--warmup", "1.5"], "TrainConfig.warmup: expected a share of the steps in [0, 1), got 1.5"),
        (["--save-every", "soon"], "TrainConfig.save_every: expected steps as in 200 or seconds as in 60s, got 'soon'"),
        (["--max-seq-length", "3"], "DataConfig.max_seq_length: expected a whole number of at least 8 tokens, got 3"),
        (["--template", "x"], "DataConfig.template: expected chat or none, got 'x'"),
        (["--method", "x"], "method: expected one of slao, sequential"),
        (["--score-rows", "-1"], "LearnConfig.score_rows: expected a whole number of at least 0 (all), got -1"),
    ],
)
def test_a_flag_that_does_not_fit_is_one_line_and_nothing_is_made(tiny_llama, task, tmp_path, flags, message):
    done = mbf("learn", tmp_path / "s", task, "--model", tiny_llama, *flags)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {message}") or message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "s/stream.json").exists()


REFUSES = "{% for m in messages %}{{ raise_exception('no talk') if m.role == 'user' }}{% endfor %}"


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "the model's chat template refuses the row: no talk"),
        (["--template", "none", "--learning-rate", "3e38", "--save-every", "0"], "is not finite"),
        (["--template", "none", "--memory-limit", "1MB"], "--memory-limit"),
    ],
)
def test_a_first_task_that_is_refused_late_leaves_no_stream(tiny_llama, task, tmp_path, flags, message, there):
    """The next try with another rank is bound to nothing."""
    base, stream = tmp_path / "base", tmp_path / "s"
    shutil.copytree(tiny_llama, base)
    tokenizer = base / "tokenizer_config.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"chat_template": REFUSES}))
    if there:
        stream.mkdir()
    done = mbf("learn", stream, task, "--model", base, *flags)
    assert done.returncode == 1 and message in done.stderr, done.stderr
    assert list(stream.iterdir()) == [] if there else not stream.exists()
    done = mbf("learn", stream, task, "--model", base, "--rank", 2, "--template", "none", "--iters", 1)
    assert done.returncode == 0, done.stderr


def test_a_start_that_cannot_be_written_leaves_no_stream(tiny_llama, tmp_path):
    stream = tmp_path / "s"
    for place, kind, message in (
        (stream / "start", "peft", "an export must be neither inside nor around"),
        (tmp_path / "start", "torch", "expected peft or mlx, got 'torch'"),
    ):
        done = mbf("next", stream, place, "--model", tiny_llama, "--format", kind)
        assert done.returncode == 1 and message in done.stderr, done.stderr
        assert not stream.exists()


def test_the_default_method_is_anchored_and_the_papers_where_no_model_is_loaded(tiny_llama, task, tmp_path):
    for name, words, method, hint in (
        (
            "here",
            ["learn", task, "--model", tiny_llama, "--template", "none", "--iters", 1],
            "anchored",
            "NAME --task ROWS",
        ),
        ("elsewhere", [], "slao", "NAME"),
    ):
        stream = tmp_path / name
        if words:
            done = mbf(words[0], stream, *words[1:])
            assert done.returncode == 0, done.stderr
        done = mbf("next", stream, tmp_path / f"start-{name}", "--model", tiny_llama)
        assert done.returncode == 0, done.stderr
        assert done.stdout.rstrip().endswith(f"TUNED --name {hint}")
        assert json.loads(mbf("status", stream, "--json").stdout)["method"] == method


def test_every_bad_row_of_every_task_is_said_before_a_model_is_loaded(write_jsonl, tmp_path):
    one = write_jsonl("one.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a"}])
    other = write_jsonl("other.jsonl", [{"text": ""}])
    done = mbf("learn", tmp_path / "s", one, other, "--model", "no-such-model")
    assert done.returncode == 1
    assert f"{one}:2" in done.stderr and f"{other}:1" in done.stderr


def test_a_name_for_two_tasks_is_refused(task, tmp_path):
    done = mbf("learn", tmp_path / "s", task, task, "--name", "mail")
    assert done.returncode == 1
    assert "error: --name: expected one task to name, got 2" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--keys", "q_proj"], "keys: expected ['self_attn.q_proj', 'self_attn.v_proj'], got ['q_proj']"),
        (["--keys", "q_proj,v_proj,o_proj"], "keys: expected ['self_attn.q_proj', 'self_attn.v_proj'], got"),
        (["--num-layers", "-1"], "num_layers: expected 1, got 2"),
        (["--iters", 2, "--epochs", 3], "--epochs and --iters: expected one of them, got both"),
    ],
)
def test_a_setting_that_would_have_no_effect_is_refused(tiny_llama, task, tmp_path, flags, message):
    made = mbf("learn", tmp_path / "s", task, "--model", tiny_llama, "--num-layers", 1, "--iters", 1)
    assert made.returncode == 0, made.stderr
    done = mbf("learn", tmp_path / "s", task, "--again", *flags)
    assert done.returncode == 1 and message in done.stderr, done.stderr
    again = mbf("learn", tmp_path / "s", task, "--again", "--iters", 1, "--keys", "v_proj,self_attn.q_proj")
    assert again.returncode == 0, again.stderr


def test_what_a_task_cannot_use_is_said(tiny_llama, task, write_jsonl, tmp_path):
    done = mbf(
        "learn", tmp_path / "s", task, "--model", tiny_llama, "--iters", 1, "--patience", 2, "--max-seq-length", 4096
    )
    assert done.returncode == 0, done.stderr
    assert "--patience without effect: the task has no valid rows" in done.stderr
    write_jsonl("texts/test.jsonl", [{"text": "red green"}])
    texts = write_jsonl("texts/train.jsonl", [{"text": "red green blue " * 300}, {"text": "cold"}]).parent
    long = mbf("learn", tmp_path / "s", texts, "--iters", 1, "--max-seq-length", 4096)
    assert long.returncode == 0, long.stderr
    assert "1 rows have more than the 512 tokens that the base can read" in " ".join(long.stderr.split())
    short = mbf("learn", tmp_path / "s", texts, "--iters", 1, "--max-seq-length", 64, "--again")
    assert "1 rows have more than 64 tokens: what comes after is not learned" in " ".join(short.stderr.split())


def test_a_run_that_ruins_its_task_is_refused_and_one_that_ruins_others_says_so(tiny_llama, write_jsonl, tmp_path):
    def rows(answers):
        return [{"prompt": word, "completion": answers[i % 2]} for i, word in enumerate(WORDS)]

    for name, answers in (("one", ("yes", "no")), ("two", ("no", "yes"))):
        write_jsonl(f"{name}/test.jsonl", rows(answers))
        write_jsonl(f"{name}/train.jsonl", [{**row, "prompt": f"now {row['prompt']}"} for row in rows(answers)])
    flags = ["--iters", 60, "--learning-rate", 0.02]
    keys = ["--keys", "q_proj,v_proj,o_proj,up_proj,down_proj"]
    base = ["--model", tiny_llama, "--method", "sequential", *keys]
    done = mbf("learn", tmp_path / "s", tmp_path / "one", *base, *flags, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["scores"][0][0] > 0.5, done.stderr
    ruin = mbf("learn", tmp_path / "s", tmp_path / "one", "--again", "--iters", 40, "--learning-rate", 50)
    assert ruin.returncode == 1 and "the stream is as it was before" in ruin.stderr, ruin.stderr
    assert len(json.loads(mbf("status", tmp_path / "s", "--json").stdout)["tasks"]) == 1
    turned = mbf("learn", tmp_path / "s", tmp_path / "two", *flags, "--restart")
    assert turned.returncode == 0, turned.stderr
    said = " ".join(turned.stderr.split())
    assert "this task made others worse: one from" in said and f"mbf undo {tmp_path / 's'} goes back" in said
