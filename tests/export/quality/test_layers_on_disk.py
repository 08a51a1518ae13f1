"""Layers that stay in their file: the same logits as from memory, and nothing of the weights held."""

import numpy as np
import pytest

from mbf_mlx.config import LoRAConfig
from mbf_mlx.export.quality import layers_on_disk as on_disk
from mbf_mlx.export.weights.checkpoint import Checkpoint
from tests.support.tiny_llama import write_tiny_llama

TOKENS = [[5, 17, 200, 31, 5, 99, 250, 12], [1, 2, 3, 4, 5, 6, 7, 8]]


def leaving(folder, prepare=lambda model: None):
    """What `load_base` is given to leave all layers of a folder in its files."""
    checkpoint = Checkpoint(folder)
    layers = {name: checkpoint.layer(name) for name in checkpoint.layer_names()}

    def leave(model):
        prepare(model)
        on_disk.leave_on_disk(model, layers)

    return leave


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bits": None},
        {"bits": None, "tie_word_embeddings": True},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
    ],
    ids=str,
)
def test_a_model_on_disk_gives_the_logits_of_the_one_in_memory(tmp_path, mx, monkeypatch, changes):
    from mlx.utils import tree_flatten

    from mbf_mlx.base.load import load_base

    monkeypatch.setattr(on_disk, "PIECE_ELEMENTS", 64 * 50)  # several pieces, the last of them smaller
    folder = write_tiny_llama(tmp_path / "base", **changes)
    expected = np.array(load_base(folder, dequantize=True, dtype="float32").model(mx.array(TOKENS)))
    model = load_base(folder, dtype="float32", prepare=leaving(folder)).model
    np.testing.assert_allclose(np.array(model(mx.array(TOKENS))), expected, rtol=1e-4, atol=1e-4)
    assert all(value.ndim < 2 for _, value in tree_flatten(model.parameters()))


def test_factors_work_beside_a_layer_on_disk(tiny_llama, mx):
    from mbf_mlx.base.load import load_base
    from mbf_mlx.engine.lora_layers import attach, write_factors
    from tests.support.factors import SCALE, make_factors

    config, factors = LoRAConfig(rank=4, scale=SCALE), make_factors(tiny_llama, size=0.2)

    def answer(**options):
        base = load_base(tiny_llama, dtype="float32", **options)
        if not options:
            attach(base.model, config)
        write_factors(base.model, factors)
        return np.array(base.model(mx.array(TOKENS)))

    left = answer(prepare=leaving(tiny_llama, lambda model: attach(model, config)))
    np.testing.assert_allclose(left, answer(), rtol=1e-4, atol=1e-4)


def test_a_weight_that_the_model_lacks_or_has_in_another_shape_is_left_out(tiny_llama, mx):
    from mbf_mlx.base.load import load_base

    layer = Checkpoint(tiny_llama).layer("model.layers.0.self_attn.v_proj")
    wrong = {"model.layers.0.self_attn.q_proj": layer, "model.layers.7.nothing": layer, "model.norm": layer}
    expected = np.array(load_base(tiny_llama, dtype="float32").model(mx.array(TOKENS)))
    base = load_base(tiny_llama, dtype="float32", prepare=lambda model: on_disk.leave_on_disk(model, wrong))
    np.testing.assert_array_equal(np.array(base.model(mx.array(TOKENS))), expected)
