"""GGUF files in the real llama.cpp: the same tokens, the same probabilities, the same answers as here."""

import importlib
import json
import random
import subprocess
import sys
import unicodedata
import zipfile

import numpy as np
import pytest

from mbf_mlx import Stream
from mbf_mlx.adapters.mlx_lm import read_adapter
from mbf_mlx.base.gguf.reader import read_gguf
from mbf_mlx.base.gguf.tokenizer import read_vocabulary as read_imported
from mbf_mlx.base.gguf.tokenizer import write_tokenizer as write_tokenizer_files
from mbf_mlx.config import DataConfig, LoRAConfig
from mbf_mlx.data.encode import Encoder
from mbf_mlx.data.task import read_task
from mbf_mlx.export.gguf.adapter import write_gguf_adapter
from mbf_mlx.export.gguf.vocabulary import TEKKEN, read_vocabulary
from mbf_mlx.export.gguf.write import write_gguf
from mbf_mlx.export.weights.checkpoint import Checkpoint
from tests.support import llama_cpp
from tests.support.factors import ALL_KEYS, logits, make_factors
from tests.support.gguf_files import LLAMA3_ROPE, import_gguf
from tests.support.jobs import job_of
from tests.support.mixed_text import mixed_rows
from tests.support.tiny_llama import CONFIG, write_tiny_llama, write_tokenizer
from tests.support.vocabularies import (
    BYTE_LEVEL,
    DIGITS,
    LLAMA3,
    PIECES,
    PLAIN_BYTES,
    QWEN2,
    change,
    sequence,
    split,
    train_bpe,
    train_sentencepiece,
    write_vocabulary,
)

pytestmark = pytest.mark.slow
PROMPT = [5, 17, 200, 31, 8, 99, 250, 12]
ANSWER = 8  # tokens


@pytest.fixture(autouse=True)
def installed():
    llama_cpp.install()


def next_token(tmp_path, model, **more):
    """The probability of each of 300 tokens to follow PROMPT, from llama.cpp."""
    found = np.zeros(300)
    for token, probability in llama_cpp.run(tmp_path, model=model, probe=PROMPT, **more)["probabilities"]:
        found[token] = probability
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"rope_scaling": LLAMA3_ROPE},
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 32},
        {"rope_traditional": True},
    ],
    ids=lambda changes: ", ".join(f"{key} {value}" for key, value in changes.items())[:40] or "plain",
)
def test_llama_cpp_gives_the_next_token_the_same_probability(tmp_path, changes):
    folder = write_tiny_llama(tmp_path / "base", **changes)
    factors = make_factors(folder, size=0.2)
    write_gguf(job_of(folder, factors, tmp_path / "model.gguf", kind="F32"))
    ours = np.exp(logits(folder, factors)[-1].astype(np.float64))
    np.testing.assert_allclose(next_token(tmp_path, tmp_path / "model.gguf"), ours / ours.sum(), atol=1e-3)


@pytest.mark.parametrize(("kind", "changes"), [("qwen2", {}), ("qwen3", {"head_dim": 16})])
def test_llama_cpp_gives_the_next_token_of_other_architectures_the_same_probability(tmp_path, kind, changes):
    folder = write_other(tmp_path / "base", kind, **changes)
    factors = make_factors(folder, size=0.2)
    write_gguf(job_of(folder, factors, tmp_path / "model.gguf", kind="F32"))
    ours = np.exp(logits(folder, factors)[-1].astype(np.float64))
    np.testing.assert_allclose(next_token(tmp_path, tmp_path / "model.gguf"), ours / ours.sum(), atol=1e-3)


def write_other(folder, kind, **changes):
    """Write a tiny model of another architecture of mlx-lm's."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_map

    module = importlib.import_module(f"mlx_lm.models.{kind}")
    config = {**CONFIG, "model_type": kind, **changes}
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(config))
    # Larger weights for clear winners; norms and biases that are not all alike, or a swapped one would go unseen.
    model.update(
        tree_map(lambda v: 2.5 * v if v.ndim == 2 else v + 0.1 * mx.random.normal(v.shape), model.parameters())
    )
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_smollm2_leaves_as_the_gguf_file_that_it_came_from(smollm2, tmp_path):
    write_gguf(job_of(smollm2, {}, tmp_path / "model.gguf"))
    import_gguf(tmp_path / "model.gguf", tmp_path / "again")
    first, again = Checkpoint(smollm2).tensors, Checkpoint(tmp_path / "again").tensors
    assert first.keys() == again.keys()
    for name in first:
        assert (first[name].dtype, first[name].rows().tobytes()) == (again[name].dtype, again[name].rows().tobytes()), (
            name
        )


def test_llama_cpp_cuts_a_thousand_mixed_rows_into_smollm2s_tokens(smollm2, tmp_path):
    from transformers import AutoTokenizer

    write_gguf(job_of(smollm2, {}, tmp_path / "model.gguf"))
    tokenizer, rng = AutoTokenizer.from_pretrained(smollm2), random.Random(0)
    rows = mixed_rows()
    assert len(rows) == 1000
    found = llama_cpp.run(tmp_path, model=tmp_path / "model.gguf", texts=rows)
    assert found["tokens"] == tokenizer(rows, add_special_tokens=False).input_ids
    assert (found["bos"], found["eos"], found["addBos"]) == (1, 2, False)
    specials = [token for token in tokenizer.get_added_vocab()]
    mixed = [rng.choice(specials) + row + rng.choice(specials) + rng.choice(rows) for row in rows]
    found = llama_cpp.run(tmp_path, model=tmp_path / "model.gguf", texts=mixed, special=True)
    assert found["tokens"] == tokenizer(mixed, add_special_tokens=False).input_ids


def test_llama_cpp_answers_as_the_live_adapter_does(smollm2, task_data, tmp_path):
    """A learned task: greedy answers to 100 test rows from the fused files and from base and adapter in llama.cpp."""
    from mbf_mlx.base.load import load_tokenizer

    stream = Stream.open(tmp_path / "stream", base=str(smollm2))
    task = read_task(task_data / "tasks" / "amazon")
    stream.learn(task, iters=24, learning_rate=1e-3, score_rows=16)
    deployed = read_adapter(tmp_path / "stream" / "adapter")
    rows = Encoder(load_tokenizer(smollm2), DataConfig()).all(list(task.test)[:100], task.path)
    prompts = [[int(token) for token in row.tokens[: row.prompt_length]] for row in rows]
    expected = live_answers(smollm2, deployed, prompts)
    assert len(set(map(tuple, expected))) > 1
    write_gguf(job_of(smollm2, {}, tmp_path / "base.gguf"))
    write_gguf_adapter(job_of(smollm2, deployed.factors, tmp_path / "adapter.gguf", scale=deployed.scale))
    base = {"model": tmp_path / "base.gguf"}
    found = {"untaught": llama_cpp.run(tmp_path, **base, prompts=prompts, maxTokens=ANSWER)}
    found["adapter"] = llama_cpp.run(
        tmp_path, **base, adapter=tmp_path / "adapter.gguf", prompts=prompts, maxTokens=ANSWER
    )
    for kind in ("F16", "Q8_0", None):
        file = tmp_path / f"{kind}.gguf"
        write_gguf(job_of(smollm2, deployed.factors, file, scale=deployed.scale, kind=kind))
        found[kind] = llama_cpp.run(tmp_path, model=file, prompts=prompts, maxTokens=ANSWER)
    agreement = {name: sum(map(list.__eq__, run["answers"], expected)) for name, run in found.items()}
    print("answers of 100 that are the live adapter's:", agreement)
    assert agreement["F16"] >= 98 and agreement["Q8_0"] >= 97
    assert agreement[None] >= 97 and agreement["adapter"] >= 97
    assert agreement["untaught"] < 50


def live_answers(folder, deployed, prompts):
    """Greedy answers of the model with its adapter attached, in float32, up to the token that ends them."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    from mbf_mlx.base.load import load_base
    from mbf_mlx.engine.lora_layers import attach, write_factors

    base = load_base(folder, dequantize=True, dtype="float32")
    attach(base.model, LoRAConfig(rank=deployed.rank, scale=deployed.scale, keys=deployed.keys))
    write_factors(base.model, deployed.factors)
    answers = []
    for prompt in prompts:
        cache, step, answer = make_prompt_cache(base.model), mx.array([prompt]), []
        while len(answer) < ANSWER and not (answer and answer[-1] in base.tokenizer.eos_token_ids):
            answer.append(int(base.model(step, cache=cache)[0, -1].argmax()))
            step = mx.array([answer[-1:]])
        answers.append(answer)
    return answers


def test_llama_cpp_answers_alike_with_the_adapter_and_with_the_fused_file(tmp_path):
    folder = write_tiny_llama(tmp_path / "base", attention_bias=True)
    factors = make_factors(folder, ALL_KEYS, size=0.2)
    base, fused, adapter = (tmp_path / f"{name}.gguf" for name in ("base", "fused", "adapter"))
    write_gguf(job_of(folder, {}, base, kind="F32"))
    write_gguf(job_of(folder, factors, fused, kind="F32"))
    write_gguf_adapter(job_of(folder, factors, adapter))
    alone, together = next_token(tmp_path, base), next_token(tmp_path, base, adapter=adapter)
    # llama.cpp keeps keys and values in float16.
    np.testing.assert_allclose(together, next_token(tmp_path, fused), atol=1e-3)
    assert np.abs(together - alone).max() > 0.05


def tokens_of(tmp_path, folder, size, rows, **more):
    """llama.cpp's tokens of rows of text, by a file that holds a folder's vocabulary and nothing else."""
    path = write_vocabulary(read_vocabulary(folder, {"vocab_size": size}), tmp_path / "vocabulary.gguf")
    return llama_cpp.run(tmp_path, model=path, texts=rows, **more)["tokens"]


@pytest.mark.parametrize(
    ("pre_tokenizer", "more"),
    [
        (sequence(split(LLAMA3), PLAIN_BYTES), {"ignore_merges": True}),
        (sequence(split(LLAMA3), PLAIN_BYTES), {}),
        (sequence(split(QWEN2), PLAIN_BYTES), {}),
        (BYTE_LEVEL, {}),
        (sequence(DIGITS, BYTE_LEVEL), {}),
    ],
    ids=["llama-bpe", "smaug-bpe", "qwen2", "gpt-2", "smollm"],
)
def test_llama_cpp_cuts_text_alike_under_every_name_that_we_give(tmp_path, pre_tokenizer, more):
    from tokenizers import Tokenizer

    rows = mixed_rows()
    train_bpe(tmp_path, pre_tokenizer, size=4000, text="\n".join(mixed_rows(seed=5)), **more)
    ours = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokens_of(tmp_path, tmp_path, 4000, rows) == [ours.encode(row).ids for row in rows]


def test_llama_cpps_tekken_cuts_latin_text_alike_and_says_that_it_does_not_cut_all_of_it(tmp_path):
    from tokenizers import Tokenizer

    rows = [row for row in mixed_rows() if all(ord(letter) < 0x250 or not letter.isalpha() for letter in row)]
    rows = [row for row in rows if not any(unicodedata.category(letter).startswith("M") for letter in row)]
    text = "\n".join(mixed_rows(seed=5))
    train_bpe(tmp_path, sequence(split(TEKKEN), PLAIN_BYTES), ignore_merges=True, size=4000, text=text)
    ours = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert len(rows) > 500
    assert tokens_of(tmp_path, tmp_path, 4000, rows) == [ours.encode(row).ids for row in rows]
    assert "combining marks" in read_vocabulary(tmp_path, {"vocab_size": 4000}).notes[0]


def test_text_in_unicodes_composed_form_is_cut_alike_where_the_tokenizer_composes_it(tmp_path):
    from tokenizers import Tokenizer

    rows = [unicodedata.normalize("NFC", row) for row in mixed_rows()]
    text = "\n".join(mixed_rows(seed=5))
    train_bpe(tmp_path, sequence(split(QWEN2), PLAIN_BYTES), normalizer={"type": "NFC"}, size=4000, text=text)
    ours = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokens_of(tmp_path, tmp_path, 4000, rows) == [ours.encode(row).ids for row in rows]


def test_llama_cpp_cuts_text_as_a_trained_sentencepiece_model_does(tmp_path):
    model, rows = train_sentencepiece(tmp_path), mixed_rows()
    assert tokens_of(tmp_path, tmp_path, PIECES, rows) == [model.encode(row) for row in rows]


@pytest.mark.parametrize("version", ["v1", "v3"])
def test_llama_cpp_cuts_text_as_a_real_llama_family_model_does(tmp_path, version):
    import sentencepiece

    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "-q",
        "mistral-common==1.13.1",
        "-d",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mistral-common, which has the vocabulary, cannot be downloaded: {done.stderr.strip()[-200:]}")
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(f".model.{version}"))
        (tmp_path / "tokenizer.model").write_bytes(wheel.read(name))
    model, rows = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")), mixed_rows()
    assert model.vocab_size() >= 32000
    assert tokens_of(tmp_path, tmp_path, model.vocab_size(), rows) == [model.encode(row) for row in rows]


def test_special_tokens_and_the_first_space_are_those_of_the_training(tmp_path):
    """A LlamaTokenizer of today's kind puts a space before text at the very beginning alone."""
    from transformers import AutoTokenizer

    train_sentencepiece(tmp_path / "sp")
    file = write_vocabulary(read_vocabulary(tmp_path / "sp", {"vocab_size": PIECES}), tmp_path / "v.gguf")
    imported = read_gguf(file)
    write_tokenizer_files(read_imported(imported.settings, file), tmp_path, 512)
    change(tmp_path, "tokenizer_config.json", tokenizer_class="LlamaTokenizer", legacy=False, chat_template="{{ x }}")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    rows = [f"<s>{row}</s>{row[::-1]}" for row in mixed_rows()]
    ours = tokenizer(rows, add_special_tokens=False).input_ids
    assert tokens_of(tmp_path, tmp_path, PIECES, rows, special=True) == ours
