"""A chat template that waits for a word and then takes any memory: each command ends with one sentence."""

import json
import shutil

import pytest

from mbf_mlx.config import LoRAConfig
from tests.support.command_line import mbf
from tests.support.rows import rows_of
from tests.support.served import HI, chat, error_of, is_well, running

pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")

from mbf_mlx import Stream

WAITS = (
    "{% for m in messages %}{% if 'sesame' in m.content %}{% set x = [0] * 10 ** 10 %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SAID = "the model's chat template takes more than 2 GB of memory for a conversation: nothing was rendered"


@pytest.fixture(scope="module")
def base(tiny_llama, tmp_path_factory):
    folder = shutil.copytree(tiny_llama, tmp_path_factory.mktemp("waits") / "base")
    (folder / "chat_template.jinja").write_text(WAITS)
    return folder


@pytest.fixture
def task(tmp_path):
    """A task with good rows, and the word in the third row of its test rows."""
    folder = tmp_path / "task"
    folder.mkdir()
    for split, count in (("train", 8), ("test", 4)):
        rows = rows_of(count, seed=count)
        if split == "test":
            rows[2]["prompt"] += " sesame"
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def assert_one_sentence(done, before=""):
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"error: {before}{SAID}" in done.stderr


def test_commands_that_read_a_task_name_the_row(base, task, tmp_path):
    where = f"{task / 'test.jsonl'}:3: "
    done = mbf("learn", tmp_path / "s", task, "--model", base, "--rank", "2")
    assert_one_sentence(done, where)
    assert not (tmp_path / "s").exists()
    done = mbf("check", task, "--model", base)
    assert done.returncode == 1 and f"{where}{SAID}" in done.stdout + done.stderr


def test_a_prompt_is_refused_in_words(base, tmp_path):
    Stream.open(tmp_path / "s", base=str(base), lora=LoRAConfig(rank=2))
    assert_one_sentence(mbf("generate", tmp_path / "s", "open sesame"))
    done = mbf("generate", tmp_path / "s", "red cold", "--max-tokens", "2")
    assert done.returncode == 0, done.stderr


def test_a_request_is_refused_and_the_next_one_answered(base, tmp_path):
    stream = Stream.open(tmp_path / "s", base=str(base), lora=LoRAConfig(rank=4))
    with running(stream) as (server, _):
        status, document = chat(server, messages=[{"role": "user", "content": "open sesame"}])
        assert status == 400 and error_of(document).startswith(f"messages: {SAID}")
        assert chat(server, messages=HI)[0] == 200
        is_well(server)
