import subprocess
import sys

import pytest

from mbf_mlx.config import LoRAConfig, TrainConfig
from tests.conftest import ROOT
from tests.test_train import rows_of

pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")

from mbf_mlx import Stream

PROMPTS = ["red cold old new", "tell me of the train to the coast"]


@pytest.fixture(scope="module")
def taught(tiny_llama, tmp_path_factory):
    """A stream that has learned one small task so well that its answers differ from the base's."""
    import json

    folder = tmp_path_factory.mktemp("taught")
    (folder / "words").mkdir()
    for split, count in (("train", 16), ("test", 4)):
        rows = "".join(json.dumps(row) + "\n" for row in rows_of(count, seed=count))
        (folder / "words" / f"{split}.jsonl").write_text(rows)
    stream = Stream.open(folder / "s", base=str(tiny_llama), lora=LoRAConfig(rank=4))
    stream.learn(folder / "words", train=TrainConfig(epochs=15, batch_size=4, learning_rate=2e-2))
    return stream


def run(*words, **options):
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, cwd=ROOT, **options)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_mlx_lm_generate_gives_the_same_text_as_mbf_generate(taught, tiny_llama, prompt):
    path = taught.folder.path
    ours = run("cli.py", "generate", path, prompt, "--max-tokens", 20)
    assert ours.returncode == 0, ours.stderr
    words = ["--model", tiny_llama, "--adapter-path", path / "adapter", "--prompt", prompt]
    theirs = run("-m", "mlx_lm", "generate", *words, "--max-tokens", 20, "--temp", 0, "--verbose", False)
    assert theirs.returncode == 0, theirs.stderr
    assert ours.stdout.strip() == theirs.stdout.strip() != ""


def test_generate_reads_a_prompt_from_stdin(taught):
    piped = run("cli.py", "generate", taught.folder.path, "-", "--max-tokens", 8, input=PROMPTS[0])
    assert piped.stdout == run("cli.py", "generate", taught.folder.path, PROMPTS[0], "--max-tokens", 8).stdout
    empty = run("cli.py", "generate", taught.folder.path, "-", input=" \n")
    assert empty.returncode == 1 and "error: prompt: expected some text, got none" in empty.stderr


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
    done = run(
        "cli.py", "chat", taught.folder.path, "--max-tokens", 8, input="red cold old new\n/new\n\nred cold old new\n"
    )
    assert done.returncode == 0, done.stderr
    answers = [line.replace("> ", "") for line in done.stdout.splitlines() if line.replace("> ", "").strip()]
    assert len(answers) == 2 and answers[0] == answers[1]
    assert "with the adapter of 1 task" in done.stderr


def test_a_prompt_or_setting_that_does_not_fit_is_one_clear_error(taught):
    done = run("cli.py", "generate", taught.folder.path, "hi", "--temp", "-1")
    assert done.returncode == 1
    assert done.stderr == "error: expected --max-tokens of at least 1, --temp of at least 0, --top-p in [0, 1]\n"
