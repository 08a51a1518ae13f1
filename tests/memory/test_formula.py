"""The memory formula against what mlx counts, and against numbers worked out by hand."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from mbf_mlx.data.batches import make_batch
from mbf_mlx.device.budgets import LOGITS_BYTES
from mbf_mlx.memory.formula import Load, Run, Shape, predict, ways_to_fit
from tests.conftest import ROOT
from tests.support.tiny_llama import write_tiny_llama

SHAPE = Shape(
    hidden=256,
    intermediate=768,
    heads=4,
    kv_heads=2,
    head_dim=64,
    blocks=4,
    vocabulary=512,
    tied=True,
    file_bytes=2_000_000,
    packed_bytes=2_500_000,
    plain_bytes=12_000_000,
)
RUN = Run(rank=4, keys=("q_proj", "v_proj"), num_layers=4, by_hand=True, packed=False, checkpoint=False)


def test_factors_take_sixteen_bytes_a_number():
    # q: 256 + 256, v: 128 + 256; rank 4; four blocks; the values, their gradients and two moments
    assert predict(SHAPE, RUN, Load.full(1, 9)).factors == 4 * 4 * (512 + 384) * 4 * 4


def test_what_a_method_measures_is_held_besides():
    load = Load.full(1, 9)
    without, measured = (predict(SHAPE, Run(**{**RUN.__dict__, "measured": n}), load) for n in (0, 1_000_000))
    assert without.inputs == 0 and measured.peak - without.peak == 12_000_000


def test_a_block_keeps_what_the_docstring_says():
    one, two = (predict(SHAPE, Run(**{**RUN.__dict__, "num_layers": n}), Load.full(2, 33)) for n in (3, 4))
    tokens, kv = 2 * 32, 2 * 128
    kept = tokens * (3 * 256 + 256 + 2 * 768) + tokens * (256 + kv) + 4 * 32 * 32 * 2
    assert two.activations - one.activations == 4 * kept


def test_checkpointing_and_packed_weights_take_less():
    load = Load.full(8, 129)
    plain, checkpoint = (predict(SHAPE, Run(**{**RUN.__dict__, "checkpoint": c}), load) for c in (False, True))
    assert checkpoint.activations < 0.75 * plain.activations  # four blocks; the more there are, the less remains
    packed = predict(SHAPE, Run(**{**RUN.__dict__, "packed": True}), load)
    assert packed.weights == SHAPE.packed_bytes < plain.weights == SHAPE.plain_bytes


def test_logits_never_take_more_than_their_budget():
    shape = Shape(**{**SHAPE.__dict__, "vocabulary": 128_256})
    few, many = (predict(shape, RUN, Load.full(rows, 513)).logits for rows in (1, 64))
    assert few < many < LOGITS_BYTES + 12 * 64 * 512 * 256
    through_mlx = Run(**{**RUN.__dict__, "by_hand": False, "checkpoint": True})
    assert predict(shape, through_mlx, Load.full(64, 513)).logits < LOGITS_BYTES + 12 * 64 * 512 * 256


def test_the_flags_that_would_fit_really_fit_and_the_cheapest_comes_first():
    load = Load.full(8, 513)
    limit = predict(SHAPE, RUN, load).peak - 60_000_000
    ways = ways_to_fit(SHAPE, RUN, load, limit)
    assert ways[0].startswith("--batch-size ") and "--grad-checkpoint" in ways
    rows = int(ways[0].split()[-1])
    assert predict(SHAPE, RUN, Load.full(rows, 513)).peak <= limit < predict(SHAPE, RUN, Load.full(rows + 1, 513)).peak


def test_where_no_batch_of_that_length_fits_shorter_rows_are_named():
    held = predict(SHAPE, Run(**{**RUN.__dict__, "packed": True}), Load.full(1, 2)).held
    (way,) = ways_to_fit(SHAPE, RUN, Load.full(2, 4097), held + 20_000_000)
    assert way.startswith("--grad-checkpoint --keep-quantized --batch-size 1 --max-seq-length ")
    assert ways_to_fit(SHAPE, RUN, Load.full(2, 4097), 1000) == []


@pytest.mark.parametrize(("rows", "length", "answer"), [(8, 65, 8), (4, 257, 256), (2, 257, 4)])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_formula_is_what_mlx_counts_in_a_training_step(rows, length, answer, checkpoint):
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")
    if mx.default_device() != mx.Device(mx.cpu):
        pytest.skip("the formula's pass by hand is for CPUs")
    from mlx import nn

    from mbf_mlx.engine.choose import prepare
    from tests.support.llamas import LLAMA, Row, build

    facts = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2,
             "num_hidden_layers": 4, "vocab_size": 512}  # fmt: skip
    model = build(LLAMA, **facts)
    engine = prepare(model, checkpoint=checkpoint)
    tokens = np.random.default_rng(0).integers(1, 512, (rows, length)).astype(np.int32)
    batch = make_batch([Row(line, np.arange(length) >= length - answer) for line in tokens], range(rows))
    loss_and_grad = nn.value_and_grad(model, engine.loss_sum)
    mx.eval(loss_and_grad(batch))
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(loss_and_grad(batch))
    taken = mx.get_peak_memory() - before
    run = Run(**{**RUN.__dict__, "checkpoint": checkpoint})
    assert predict(SHAPE, run, Load.of(batch)).batch == pytest.approx(taken, rel=0.3)


LOAD = """
import sys
from dataclasses import replace
from pathlib import Path
from mbf_mlx.device import backend
backend.setup("cpu")
from mbf_mlx.device.machine import resident_peak
from mbf_mlx.base.load import load_base
folder, small, dequantize = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "plain"
load_base(small, dequantize=dequantize)  # imports, buffers, threads
before = resident_peak()
base = load_base(folder, dequantize=dequantize)
print(resident_peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what a process held at most")
@pytest.mark.parametrize("way", ["packed", "plain"])
def test_weights_are_never_in_memory_twice_while_they_are_loaded(tiny_llama, tmp_path, way):
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 10, "num_attention_heads": 8}
    folder = write_tiny_llama(tmp_path / "base", **sizes)
    weights = 10 * (2 * 1024 * 1024 + 2 * 256 * 1024 + 3 * 1024 * 2816) + 2 * 300 * 1024
    size = 4 * weights if way == "plain" else (folder / "model.safetensors").stat().st_size
    done = subprocess.run(
        [sys.executable, "-c", LOAD, folder, tiny_llama, way], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert 0.8 * size < int(done.stdout) < 1.25 * size


def test_products_in_bfloat16_take_two_more_copies_and_float32_is_a_way_to_fit():
    halves, load = replace(RUN, bfloat16=True), Load.full(2, 64)
    more = predict(SHAPE, halves, load).weights - predict(SHAPE, RUN, load).weights
    assert more == 2 * 2 * (SHAPE.blocks * SHAPE.block_values + SHAPE.vocabulary * SHAPE.hidden)
    assert "--precision float32" in ways_to_fit(SHAPE, halves, load, predict(SHAPE, RUN, load).peak)
    assert not any("--precision" in way for way in ways_to_fit(SHAPE, RUN, load, predict(SHAPE, RUN, load).peak))
