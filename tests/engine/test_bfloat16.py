"""Training with the frozen weights in bfloat16: near float32's gradients; scores are float32's own."""

from functools import partial

import numpy as np
import pytest

from mbf_mlx.data.batches import make_batch
from mbf_mlx.device import bfloat16
from mbf_mlx.errors import InputError

pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from mbf_mlx.engine.choose import prepare
from tests.support.llamas import LLAMA, build, rows_with

LIBRARY = bfloat16.library()
needs_library = pytest.mark.skipif(LIBRARY is None, reason=bfloat16.reason())
ALL = tuple(f"self_attn.{letter}_proj" for letter in "qkvo") + tuple(
    f"mlp.{part}_proj" for part in ("gate", "up", "down")
)


def gradients(model, loss, *args):
    value, grads = nn.value_and_grad(model, loss)(*args)
    mx.eval(value, grads)
    return value.item(), {name: np.array(each) for name, each in tree_flatten(grads)}


@needs_library
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": False}, {"attention_bias": True, "mlp_bias": True}, {"num_key_value_heads": 4}],
)
@pytest.mark.parametrize("prefix", [0, 24])
def test_gradients_are_near_those_of_float32(changes, checkpoint, prefix):
    model = build(LLAMA, keys=ALL, **changes)
    engine = prepare(model, checkpoint=checkpoint)
    batch = make_batch(rows_with(prefix, [9, 30, 17, 40]), range(4))
    expected, right = gradients(model, engine.loss_sum, batch)
    engine.multiply_in("bfloat16")
    value, found = gradients(model, engine.loss_sum, batch)
    assert value == pytest.approx(expected, rel=0.01) and value != expected
    one, other = (np.concatenate([grads[name].ravel() for name in sorted(right)]) for grads in (right, found))
    assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) >= 0.998  # random layers make rounding grow
    assert np.linalg.norm(one - other) <= 0.05 * np.linalg.norm(one)
    engine.multiply_in("float32")
    assert gradients(model, engine.loss_sum, batch)[0] == expected


@needs_library
def test_scores_stay_in_float32():
    model = build(LLAMA)
    engine = prepare(model)
    batch = make_batch(rows_with(8, [9, 30]), range(2))
    right = engine.score(batch)
    engine.multiply_in("bfloat16")
    for one, other in zip(right, engine.score(batch), strict=True):
        np.testing.assert_array_equal(one, other)


@needs_library
def test_what_is_measured_is_multiplied_alike():
    def note(found, place, name, x, d_y, row_of):
        found[place, name] = (np.array(x), np.array(d_y))

    model, seen = build(LLAMA), {}
    engine = prepare(model)
    rows = rows_with(0, [12, 20])
    for precision in ("float32", "bfloat16"):
        engine.multiply_in(precision)
        seen[precision] = {}
        engine.watch(engine.watched_together(rows, 0, 1), partial(note, seen[precision]))
    assert seen["float32"].keys() == seen["bfloat16"].keys()
    for key, pair in seen["float32"].items():
        for one, other in zip(pair, seen["bfloat16"][key], strict=True):
            assert np.linalg.norm(one - other) <= 0.03 * np.linalg.norm(one), key
    assert any((one[1] != seen["bfloat16"][key][1]).any() for key, one in seen["float32"].items())


def test_an_engine_that_cannot_says_so():
    engine = prepare(build(LLAMA), by_hand=False)
    engine.multiply_in("float32")
    with pytest.raises(InputError, match="precision: expected float32, got bfloat16, which is for a Llama on a CPU"):
        engine.multiply_in("bfloat16")
