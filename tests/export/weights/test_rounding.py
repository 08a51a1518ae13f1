"""Few bits that keep a small update: by chance right on average, with the inputs known far better than that."""

from dataclasses import replace

import numpy as np
import pytest

from mbf_mlx.engine.lora_layers import attach, lora_layers
from mbf_mlx.export import run
from mbf_mlx.export.job import ExportRows
from mbf_mlx.export.mlx_folder import write_mlx_folder
from mbf_mlx.export.weights import affine
from mbf_mlx.export.weights.checkpoint import Checkpoint
from mbf_mlx.export.weights.rounding import Rounder, by_chance
from tests.support.factors import make_factors
from tests.support.jobs import job_of, mean_retention
from tests.support.token_rows import token_rows


@pytest.fixture
def layer():
    """Weights on a 4-bit grid, a small update of rank 4, and inputs of which few directions matter."""
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(48, 128)).astype(np.float32)
    scales, offsets = affine.fit(weight, 4, 64, "F16")
    codes = affine.nearest(weight, scales, offsets, 4)
    on_grid = affine.decode(codes, scales, offsets)
    delta = (generator.normal(size=(48, 4)) @ generator.normal(size=(4, 128))).astype(np.float32)
    delta *= 0.03 * np.linalg.norm(on_grid) / np.linalg.norm(delta)
    inputs = generator.normal(size=(2000, 12)) @ generator.normal(size=(12, 128)) + 0.2 * generator.normal(
        size=(2000, 128)
    )
    return codes, (scales, offsets), on_grid, delta, inputs


def second_moment(inputs):
    return (inputs.T @ inputs / len(inputs)).astype(np.float32)


def output_error(codes, grid, target, moment):
    """tr(E H E^T) of codes for W'."""
    wrong = affine.decode(codes, *grid) - target
    return float(np.einsum("ij,ij->", wrong @ moment, wrong, dtype=np.float64))


def test_a_base_on_its_grid_keeps_its_codes_where_nothing_is_added(layer):
    codes, grid, on_grid, _, inputs = layer
    np.testing.assert_array_equal(Rounder(second_moment(inputs))(on_grid, grid, 4), codes)


def test_with_its_inputs_known_a_layer_puts_out_the_update_on_inputs_it_was_not_fitted_to(layer):
    _, grid, on_grid, delta, inputs = layer
    fitted, unseen = second_moment(inputs[:1000]), second_moment(inputs[1000:])
    meant = float(np.einsum("ij,ij->", delta @ unseen, delta))

    def error(codes):
        return output_error(codes, grid, on_grid + delta, unseen) / meant

    rounded = error(Rounder(fitted)(on_grid + delta, grid, 4))
    plain = error(affine.nearest(on_grid + delta, *grid, 4))
    chance = np.mean([error(by_chance(on_grid + delta, grid, 4, [seed])) for seed in range(5)])
    assert rounded < 0.2
    assert rounded < 0.2 * min(plain, chance)


def test_going_over_the_codes_again_never_makes_the_outputs_worse(layer, monkeypatch):
    _, grid, on_grid, delta, inputs = layer
    moment, target = second_moment(inputs), on_grid + delta
    again = output_error(Rounder(moment, 1e-6)(target, grid, 4), grid, target, moment)
    monkeypatch.setattr("mbf_mlx.export.weights.rounding.SWEEPS", 0)
    once = output_error(Rounder(moment, 1e-6)(target, grid, 4), grid, target, moment)
    assert again <= once * (1 + 1e-4)


def test_chance_is_right_on_average_and_the_same_for_the_same_seed(layer):
    _, grid, on_grid, delta, _ = layer
    target = on_grid + delta
    drawn = [affine.decode(by_chance(target, grid, 4, [seed]), *grid) for seed in range(40)]
    retention = ((np.mean(drawn, axis=0) - on_grid) * delta).sum() / (delta * delta).sum()
    assert retention == pytest.approx(1, abs=0.1)
    np.testing.assert_array_equal(by_chance(target, grid, 4, [3]), by_chance(target, grid, 4, [3]))


def test_a_group_without_width_and_inputs_that_are_never_seen_do_no_harm():
    weight = np.full((4, 64), 0.5, np.float32)
    grid = (np.zeros((4, 1), np.float32), np.full((4, 1), 0.5, np.float32))
    for codes in (Rounder(np.zeros((64, 64), np.float32))(weight, grid, 4), by_chance(weight, grid, 4, [0])):
        np.testing.assert_array_equal(affine.decode(codes, *grid), weight)


def test_the_same_bits_take_the_same_bytes_and_stay_on_the_bases_grid(tiny_llama, tmp_path):
    factors = make_factors(tiny_llama)
    report = write_mlx_folder(job_of(tiny_llama, factors, tmp_path / "one", bits=4))
    assert report.bytes_out == report.bytes_base
    before, after = Checkpoint(tiny_llama), Checkpoint(tmp_path / "one")
    for name in factors:
        for part in ("scales", "biases"):
            assert after.tensors[f"{name}.{part}"].rows().tobytes() == before.tensors[f"{name}.{part}"].rows().tobytes()
    assert mean_retention(report) == pytest.approx(1, abs=0.5)
    write_mlx_folder(job_of(tiny_llama, factors, tmp_path / "two", bits=4))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]


def test_moments_are_those_of_the_inputs_and_shared_by_layers_that_share_them(tiny_llama, mx, monkeypatch):
    from mbf_mlx.base.load import load_base
    from mbf_mlx.config import LoRAConfig
    from mbf_mlx.export.quality import input_moments

    base = load_base(tiny_llama, dtype="float32").model
    attach(base, LoRAConfig(rank=4))
    rows = [*token_rows(3), *token_rows(2, seed=5, length=7)]
    whole = list(input_moments.moments(base, lora_layers(base), rows))
    assert [names for names, _ in whole] == [
        [f"model.layers.{block}.self_attn.{key}" for key in ("q_proj", "v_proj")] for block in (0, 1)
    ]
    first = base.model.layers[0].input_layernorm
    inputs = np.concatenate([np.array(first(base.model.embed_tokens(mx.array(row.tokens)))) for row in rows])
    np.testing.assert_allclose(whole[0][1], inputs.T @ inputs / len(inputs), rtol=1e-3, atol=1e-4)
    monkeypatch.setattr(input_moments, "BUDGET_BYTES", 1)
    apart = dict((names[0], matrix) for names, matrix in input_moments.moments(base, lora_layers(base), rows))
    for names, matrix in whole:
        np.testing.assert_allclose(apart[names[0]], matrix, rtol=1e-5)


def test_matrices_on_the_shelf_come_back_and_are_shared_and_leave_no_file(tmp_path, mx):
    from mbf_mlx.export.quality.input_moments import Shelf

    shelf, rng = Shelf(tmp_path), np.random.default_rng(0)
    one, other = rng.standard_normal((5, 5)), rng.standard_normal((3, 3)).astype(np.float32).T
    shelf.put(["q", "v"], one)
    shelf.put(["o"], other)
    np.testing.assert_array_equal(shelf.get("q"), one.astype(np.float32))
    np.testing.assert_array_equal(shelf.get("o"), other)
    assert shelf.place("q") == shelf.place("v") != shelf.place("o")
    assert shelf.place("k") is None and not list(tmp_path.iterdir())


def test_an_export_at_the_bases_own_bits_is_fitted_to_the_rows_and_measured_on_others(tiny_llama, tmp_path):
    job = job_of(
        tiny_llama,
        make_factors(tiny_llama, size=0.05),
        tmp_path / "fitted",
        bits=4,
        allow_loss=True,
        read_rows=lambda: ExportRows(token_rows(64, seed=1), token_rows(32), "made-up rows"),
    )
    fitted = run(job, "mlx")["quality"]
    unfitted = run(replace(job, out=tmp_path / "not", read_rows=lambda: ExportRows((), token_rows(32), "rows")), "mlx")
    assert fitted["kl"] < unfitted["quality"]["kl"]
