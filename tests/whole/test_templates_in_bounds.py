"""Commands and the server with a model whose chat template waits for a word, and then takes any time or memory."""

import json
import os
import shutil
import threading
import time
from contextlib import contextmanager

import pytest

from tests.support.chat_templates import base_with
from tests.support.command_line import mbf
from tests.support.rows import rows_of
from tests.support.served import HI, chat, error_of, is_well, running

pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")

from mbf_mlx import Stream
from mbf_mlx.base import renderer

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
FULL = "{{ 'a' * 10**10 }}"
TEMPLATE = (
    "{% for m in messages %}{% if 'slowly' in m.content %}" + LOOP + "{% elif 'hugely' in m.content %}"
    "{{ m.content * 10**10 }}{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LEARN = ("--iters", 2, "--learning-rate", 5e-3, "--method", "sequential")
SLOWLY = "the model's chat template takes more than 10 seconds for a conversation: nothing was rendered"
HUGELY = "the model's chat template takes more than 2 GB of memory for a conversation: nothing was rendered"


@pytest.fixture(scope="module")
def base(tiny_llama, tmp_path_factory):
    return base_with(TEMPLATE, tiny_llama, tmp_path_factory.mktemp("waits") / "base")


def write_task(folder, word="", line=7):
    rows = rows_of(12)
    rows[line - 1]["prompt"] += word
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(4, seed=1)))
    return folder


@pytest.fixture(scope="module")
def stream(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("waits")
    done = mbf("learn", folder / "s", write_task(folder / "words"), "--model", base, *LEARN, "--date", "2026-12-01")
    assert done.returncode == 0, done.stderr
    return folder / "s"


def refused(done, said):
    assert done.returncode == 1 and f"{said}\nhint: look at the template" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error: ") == 1


def test_check_and_learn_name_the_row_and_change_nothing(base, stream, tmp_path):
    task = write_task(tmp_path / "task", "hugely")
    said = f"error: {task}/train.jsonl:7: {HUGELY}"
    before = sorted(stream.rglob("*"))
    other = write_task(tmp_path / "other", "hugely")
    done = mbf("check", task, other, "--model", base)
    refused(done, said)
    assert str(other) not in done.stderr  # each further task would take as long
    refused(mbf("learn", stream, task, *LEARN), said)
    assert sorted(stream.rglob("*")) == before
    refused(mbf("learn", tmp_path / "new", task, "--model", base, *LEARN), said)
    assert not (tmp_path / "new").exists()


def test_generate_and_chat_say_so_and_chat_goes_on(stream):
    refused(mbf("generate", stream, "hugely"), HUGELY)
    refused(mbf("generate", stream, "slowly"), SLOWLY)
    done = mbf("chat", stream, "-m", 4, input="hugely\nred green\n")
    assert done.returncode == 0 and HUGELY in done.stderr and "Traceback" not in done.stderr


@contextmanager
def one_second(monkeypatch):
    """Renders of this process take a second at most."""
    monkeypatch.setattr(renderer, "SECONDS", 1)
    renderer.renderer.close()
    yield SLOWLY.replace("10 seconds", "1 seconds")
    renderer.renderer.close()


def test_the_server_refuses_such_a_request_and_answers_the_next_ones(stream, monkeypatch):
    with one_second(monkeypatch) as slowly, running(Stream.open(stream)) as (server, _):
        for word, said in (("hugely", HUGELY), ("slowly", slowly)):
            for messages in ([{"role": "user", "content": word}], [{"role": "system", "content": word}, *HI]):
                status, document = chat(server, messages=messages)
                assert status == 400 and error_of(document) == f"messages: {said}"
                is_well(server)
        # Requests that wait behind a slow one are answered after it.
        slow = threading.Thread(
            target=chat, args=(server,), kwargs={"messages": [{"role": "user", "content": "slowly"}]}
        )
        slow.start()
        time.sleep(0.2)
        is_well(server)
        slow.join()


@pytest.mark.parametrize("template", [FULL, [{"name": "default", "template": FULL}]])
def test_a_template_that_always_takes_too_much_is_refused_at_its_first_use(base, tmp_path, template):
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    place = folder / "tokenizer_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"chat_template": template}))
    refused(mbf("check", write_task(tmp_path / "task"), "--model", folder), HUGELY)


def test_an_export_for_ollama_is_refused_where_the_template_never_ends(tmp_path):
    from mbf_mlx.export.gguf.vocabulary import Vocabulary
    from mbf_mlx.export.ollama import recognise

    vocabulary = Vocabulary("gpt2", "llama-bpe", ["a"], [1])
    vocabulary.chat_template = FULL
    with pytest.raises(renderer.TemplateLimitError, match="takes more than 2 GB of memory"):
        recognise(vocabulary)


PANICS = r"([^\p{L}]|[^\p{N}])*\x{10FFFD}$"  # no text of the first try has this letter


def test_a_tokenizer_that_fails_for_another_text_ends_a_command_with_one_sentence(base, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    place = folder / "tokenizer.json"
    split = {"type": "Split", "pattern": {"Regex": PANICS}, "behavior": "Isolated", "invert": False}
    place.write_text(json.dumps(json.loads(place.read_text()) | {"pre_tokenizer": split}))
    task = write_task(tmp_path / "task", "!? " * 40 + "\U0010fffd!")
    done = mbf("check", task, "--model", folder, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "caches")})
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "error: the model's tokenizer fails for a text: Onig: Regex search error" in done.stderr
