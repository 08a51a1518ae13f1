import json
import re
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from mbf_mlx import commands
from mbf_mlx.config import LoRAConfig, TrainConfig
from mbf_mlx.errors import InputError
from mbf_mlx.methods import make
from tests.conftest import ROOT
from tests.support.rows import rows_of
from tests.support.streams import record

pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")

from mbf_mlx import Stream

PROMPTS = ["red cold old new", "tell me of the train to the coast"]


@pytest.fixture(scope="module")
def taught(tiny_llama, tmp_path_factory):
    """A stream that has learned one small task so well that its answers differ from the base's."""
    folder = tmp_path_factory.mktemp("taught")
    (folder / "words").mkdir()
    for split, count in (("train", 16), ("test", 4)):
        rows = "".join(json.dumps(row) + "\n" for row in rows_of(count, seed=count))
        (folder / "words" / f"{split}.jsonl").write_text(rows)
    stream = Stream.open(folder / "s", base=str(tiny_llama), lora=LoRAConfig(rank=4))
    stream.learn(folder / "words", train=TrainConfig(epochs=15, batch_size=4, learning_rate=2e-2))
    return stream


def mbf(*words, typed=""):
    """Run a command in this process."""
    return CliRunner().invoke(commands.app, [str(word) for word in words], input=typed)


def test_mlx_lm_generate_gives_the_same_text_as_mbf_generate(taught, tiny_llama):
    path, prompt = taught.folder.path, PROMPTS[1]
    ours = mbf("generate", path, prompt, "--max-tokens", 20)
    assert ours.exit_code == 0, ours.stderr
    words = ["--model", tiny_llama, "--adapter-path", path / "adapter", "--prompt", prompt]
    words += ["--max-tokens", 20, "--temp", 0, "--verbose", False]
    command = [sys.executable, "-m", "mlx_lm", "generate", *map(str, words)]
    theirs = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert theirs.returncode == 0, theirs.stderr
    assert ours.stdout.strip() == theirs.stdout.strip() != ""


def test_generate_reads_a_prompt_from_stdin(taught):
    piped = mbf("generate", taught.folder.path, "-", "--max-tokens", 8, typed=PROMPTS[0])
    assert piped.stdout == mbf("generate", taught.folder.path, PROMPTS[0], "--max-tokens", 8).stdout
    empty = mbf("generate", taught.folder.path, "-", typed=" \n")
    assert empty.exit_code == 1 and "error: prompt: expected some text, got none" in empty.stderr


def test_a_conversation_answers_as_if_it_were_read_anew_each_time(taught):
    speaker = taught.speaker()
    messages, answers = [], []
    for line in ["red cold old new", "warm small large blue", "red cold old new"]:
        messages.append({"role": "user", "content": line})
        answers.append("".join(speaker.answer(messages, max_tokens=12)))
        assert answers[-1] == "".join(taught.speaker().answer(messages, max_tokens=12))
        messages.append({"role": "assistant", "content": answers[-1]})
    start_over = "".join(speaker.answer(messages[:1], max_tokens=12))
    assert start_over == answers[0]


def test_sampling_follows_its_seed(taught):
    def sampled(seed):
        return "".join(taught.generate(PROMPTS[1], max_tokens=20, temp=2.0, seed=seed))

    assert sampled(1) == sampled(1)
    assert len({sampled(seed) for seed in range(4)}) > 1


def test_chat_talks_until_the_input_ends(taught):
    typed = "red cold old new\n/new\n\nred cold old new\n"
    done = mbf("chat", taught.folder.path, "--max-tokens", 8, typed=typed)
    assert done.exit_code == 0, done.stderr
    answers = [line.replace("> ", "") for line in done.stdout.splitlines() if line.replace("> ", "").strip()]
    assert len(answers) == 2 and answers[0] == answers[1]


def test_a_prompt_or_setting_that_does_not_fit_is_one_clear_error(taught):
    done = mbf("generate", taught.folder.path, "hi", "--temp", "-1")
    assert done.exit_code == 1
    expected = "--max-tokens of at least 1, --temp of at least 0, --top-p in [0, 1], --seed from 0 to 4,294,967,295"
    assert done.stderr == f"error: expected {expected}\n"


def test_a_prompt_that_is_no_utf8_is_one_clear_error(taught):
    expected = "error: prompt: expected text in UTF-8, got bytes or half a surrogate pair that are no text\n"
    for done in (
        mbf("generate", taught.folder.path, "a\udcff"),
        mbf("generate", taught.folder.path, "-", typed=b"a\xff"),
    ):
        assert (done.exit_code, done.stderr) == (1, expected)


def test_a_prompt_that_is_longer_than_the_base_can_read_is_one_clear_error(taught):
    long = "red cold " * 3000
    config = json.loads((taught.base_folder().path / "config.json").read_text())
    expected = (
        rf"error: prompt: expected fewer than the {config['max_position_embeddings']:,} tokens that .+ can read, got "
    )
    done = mbf("generate", taught.folder.path, "-", typed=long)
    assert done.exit_code == 1 and re.match(expected, done.stderr)
    done = mbf("chat", taught.folder.path, "--max-tokens", 4, typed=f"{long}\nred cold\n")
    assert done.exit_code == 0 and re.search(expected, done.stderr)
    assert len([line for line in done.stdout.splitlines() if line.replace("> ", "").strip()]) == 1


def test_an_answer_ends_where_the_context_does(taught):
    speaker = taught.speaker()
    speaker.context = len(speaker.prompt("red cold")) + 2
    assert len("".join(speaker.answer("red cold", max_tokens=50)).split()) <= 2


def test_an_adapter_that_changes_nothing_is_noticed_before_the_first_answer(tiny_llama, tmp_path):
    stream = Stream.open(tmp_path / "s", base=str(tiny_llama), lora=LoRAConfig(rank=4), method="slao")
    assert "as it is: nothing was learned yet" in stream.speaker().proof
    method = make("slao")
    with stream.folder.writer():
        state = stream.folder.state()
        stream.folder.commit(
            stream.folder.current(), method.finish(state, method.start(state)), record(1), str(tiny_llama), {}
        )
    with pytest.raises(InputError, match="the adapter changes no logits of .*, so it would not answer"):
        stream.speaker()


def test_a_base_whose_chat_template_was_changed_is_refused(tiny_llama, tmp_path):
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    stream = Stream.open(tmp_path / "s", base=str(base), lora=LoRAConfig(rank=4))
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "chat_template.jinja").write_text(settings["chat_template"].replace("assistant", "model"))
    for use in (stream.speaker, stream.serving, stream.base_folder):
        with pytest.raises(InputError, match="its chat template is not the one that .* was taught with"):
            use()
