"""The engine's loss, gradients and scores against a plain computation with all logits.

Long, because every case runs both engines through the same helpers above it.
"""

import copy
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mbf_mlx.data.batches import make_batch, split

pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.utils import dequantize_model

from mbf_mlx.base.unpack import keep_packed
from mbf_mlx.device.backend import stay_on_cpu
from mbf_mlx.engine import cpu_ops, llama_layout
from mbf_mlx.engine import llama_attention as attention
from mbf_mlx.engine.by_hand import ByHand
from mbf_mlx.engine.choose import prepare
from mbf_mlx.engine.llama_pass import fits
from mbf_mlx.engine.through_mlx import ThroughMlx, seed_of_now
from tests.support.llamas import KEYS, LLAMA, VOCABULARY, Row, build, plain_loss, rows_with

GEMMA2 = LLAMA | {
    "model_type": "gemma2",
    "head_dim": 16,
    "final_logit_softcapping": 5.0,
    "attn_logit_softcapping": 50.0,
    "query_pre_attn_scalar": 16,
}
COHERE = LLAMA | {"model_type": "cohere", "logit_scale": 0.0625, "layer_norm_eps": 1e-5, "use_qk_norm": False}


def exact(model):
    """The same model in float64, so that a difference is a fault of the engine and not of rounding in the reference."""
    twin = copy.deepcopy(model)
    twin = dequantize_model(twin)
    twin.set_dtype(mx.float64)
    return twin


def gradients(model, loss, *args):
    value, grads = nn.value_and_grad(model, loss)(*args)
    mx.eval(value, grads)
    return value.item(), dict(tree_flatten(grads))


def assert_same_as_plain(model, rows, **options):
    """Check both engines, the second where it fits the model; return the one through mlx."""
    ways = [assert_way_is_plain(model, rows, by_hand=by_hand, **options) for by_hand in {False, fits(model)}]
    return next(prepared for prepared in ways if not prepared.by_hand)


def assert_way_is_plain(model, rows, *, share=True, tolerance=1e-5, **options):
    with mx.stream(mx.cpu):
        twin = exact(model)
        expected, of_all = gradients(twin, lambda: plain_loss(twin, rows))
    expected_grads = {name: of_all[name] for name, _ in tree_flatten(model.trainable_parameters())}
    prepared = prepare(model, **options)
    batch = make_batch(rows, range(len(rows)), share_prefix=share)
    value, grads = gradients(model, prepared.loss_sum, batch)
    assert value == pytest.approx(expected, rel=tolerance)
    assert grads and grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        right, got = np.array(grad), np.array(grads[name])
        assert np.abs(got - right).max() <= tolerance * np.abs(right).max(), name
    assert any(np.array(grad).any() for grad in expected_grads.values())
    assert_scores_are_the_rows_own(twin, rows, *prepared.score(batch))
    return prepared


def assert_scores_are_the_rows_own(model, rows, losses, best, margin):
    n = 0
    for row in rows:
        with mx.stream(mx.cpu):
            logits = np.array(model(mx.array(row.tokens[None, :-1]))[0])
        for place in np.flatnonzero(row.supervised[1:]):
            second, first = np.sort(logits[place])[-2:]
            loss = np.logaddexp.reduce(logits[place]) - logits[place, row.tokens[place + 1]]
            assert losses[n] == pytest.approx(loss, rel=1e-5, abs=1e-6)
            assert margin[n] == pytest.approx(first - second, abs=1e-4)
            assert best[n] == logits[place].argmax()
            n += 1
    assert n == len(losses) == len(best) == len(margin) > 0


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("bits", [0, 4])
def test_loss_and_gradients_equal_all_logits_on_a_padded_batch(bits, share, checkpoint):
    rows = rows_with(9, [4, 11, 7])
    prepared = assert_same_as_plain(build(LLAMA, bits=bits), rows, share=share, checkpoint=checkpoint)
    assert prepared.forward.picks_positions and prepared.forward.shares_prefix


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("budget", [1, 3 * 4 * VOCABULARY * 5])
def test_logits_in_chunks_give_the_same_loss(budget, checkpoint):
    assert_same_as_plain(build(LLAMA), rows_with(3, [9, 4, 8]), logits_bytes=budget, checkpoint=checkpoint)


def test_with_checkpointing_logits_keep_to_their_budget_on_mlx_lms_way_too():
    model = build(LLAMA, vocab_size=30_000)
    rows = [Row(np.arange(1, 130, dtype=np.int32) + i, np.arange(129) > 0) for i in range(2)]
    batch = make_batch(rows, range(2))
    one_array = 4 * 30_000 * len(batch.targets)
    peaks, values = [], []
    for budget in (10**12, one_array * 3 // 16):
        way = prepare(model, checkpoint=True, logits_bytes=budget, by_hand=False)
        gradients(model, way.loss_sum, batch)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        values.append(gradients(model, way.loss_sum, batch))
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[0] > 2 * one_array and peaks[1] < 0.75 * one_array
    assert values[0][0] == pytest.approx(values[1][0], rel=1e-5)


def test_the_pass_apart_drops_the_same_inputs():
    model = build(LLAMA)
    for block in model.layers:
        block.self_attn.q_proj.dropout = nn.Dropout(0.3)
    model.train()
    way, rows = prepare(model, logits_bytes=1, by_hand=False), rows_with(3, [9, 4, 8])
    batch, targets = make_batch(rows, range(3)), mx.array(make_batch(rows, range(3)).targets)
    mx.random.seed(7)
    seed = seed_of_now()
    found = [gradients(model, lambda: way._loss_within_budget(batch, targets))]
    mx.random.seed(seed)
    found.append(gradients(model, way.loss_sum, batch))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for name, gradient in found[0][1].items():
        np.testing.assert_allclose(np.array(found[1][1][name]), np.array(gradient), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_compiled_steps_are_the_plain_ones_and_a_shape_is_traced_once(checkpoint, compiler):
    model, traces = build(LLAMA, bits=4), []
    start = dict(tree_flatten(model.trainable_parameters()))

    def apply(arrays):
        traces.append(next(iter(arrays.values())))
        model.load_weights(list(arrays.items()), strict=False)

    plain, compiled = (
        prepare(model, checkpoint=checkpoint, by_hand=False, compiled=each).loss_and_grad(apply)
        for each in (False, True)
    )
    calls = 0
    for number, tails in enumerate(([16, 17, 11], [18, 12, 18], [14, 17, 12])):
        batch = make_batch(rows_with(33, tails, seed=number), range(3))
        changed = {name: (1 + number) * array for name, array in start.items()}
        expected, of_all = plain(changed, batch)
        traces.clear()
        loss, found = compiled(changed, batch)
        calls += len(traces)
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)
        for name, gradient in of_all.items():
            np.testing.assert_allclose(np.array(found[name]), np.array(gradient), rtol=1e-4, atol=1e-5)
        assert mx.array_equal(
            model.layers[0].self_attn.q_proj.lora_a, changed["model.layers.0.self_attn.q_proj.lora_a"]
        )
    assert calls == 3 + 1  # each call applies the arrays at its end, and the one trace once


def test_compiled_dropout_is_the_plain_ones_and_another_in_each_step(compiler):
    model = build(LLAMA)
    for block in model.layers:
        block.self_attn.q_proj.dropout = nn.Dropout(0.3)
    model.train()
    arrays = dict(tree_flatten(model.trainable_parameters()))
    batch, losses = make_batch(rows_with(8, [16, 16]), range(2)), {}
    for compiled in (False, True):
        way = prepare(model, by_hand=False, compiled=compiled)
        assert way.forward.picks_positions and way.forward.shares_prefix and model.training
        step = way.loss_and_grad(lambda arrays: model.load_weights(list(arrays.items()), strict=False))
        losses[compiled] = []
        for seed in (1, 2, 1):
            mx.random.seed(seed)
            losses[compiled].append(float(step(arrays, batch)[0]))
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    assert losses[True][0] == losses[True][2] != losses[True][1]


def test_what_cannot_be_compiled_is_computed_plainly(compiler):
    model = build(LLAMA)
    arrays = dict(tree_flatten(model.trainable_parameters()))
    rows = [*rows_with(3, [9, 4, 8]), Row(np.array([1, 2, 3], np.int32), np.zeros(3, bool))]
    way = prepare(model, by_hand=False, compiled=True, checkpoint=True, logits_bytes=1)
    step = way.loss_and_grad(lambda arrays: model.load_weights(list(arrays.items()), strict=False))
    expected, _ = gradients(model, lambda: plain_loss(model, rows))
    assert float(step(arrays, make_batch(rows, range(3)))[0]) == pytest.approx(expected, rel=1e-5)
    assert float(step(arrays, make_batch(rows, [3]))[0]) == 0


@pytest.mark.parametrize(
    ("prefix", "tails", "supervised"),
    [(9, [4, 4], 9), (1, [1, 1, 1], 1), (12, [0, 0, 0], 3), (0, [5, 2], 2), (20, [3], 2)],
    ids=["the prefix would swallow targets", "rows of two tokens", "equal rows", "nothing shared", "one row"],
)
def test_the_prefix_never_changes_the_result(prefix, tails, supervised):
    assert_same_as_plain(build(LLAMA, bits=4), rows_with(prefix, tails, supervised))


def test_all_linear_layers_and_an_untied_head():
    keys = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    keys += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert_same_as_plain(build(LLAMA, keys=keys), rows_with(8, [4, 11, 7]))
    assert_same_as_plain(build(LLAMA, bits=8, tie_word_embeddings=False), rows_with(8, [4, 11, 7]))


@pytest.mark.parametrize("key", ["lm_head", "model.embed_tokens"])
def test_a_trained_head_gets_its_own_gradient(key):
    model = build(LLAMA, keys=[*KEYS, key], tie_word_embeddings=key != "lm_head")
    assert_same_as_plain(model, rows_with(6, [4, 7]), logits_bytes=1)


@pytest.mark.parametrize("config", [GEMMA2, COHERE], ids=["soft-capped", "scaled"])
def test_a_head_that_does_more_is_computed_as_the_model_does(config):
    prepared = assert_same_as_plain(build(config), rows_with(6, [4, 7]))
    assert prepared.forward.picks_positions


def test_a_sliding_window_keeps_its_prefix_in_every_row():
    model = build(LLAMA, sliding_window=4, layer_types=["full_attention", "sliding_attention"])
    prepared = assert_same_as_plain(model, rows_with(9, [4, 7]))
    assert prepared.forward.picks_positions and not prepared.forward.shares_prefix


def test_a_model_that_hides_its_backbone_goes_through_all_logits():
    class Hidden(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        @property
        def layers(self):
            return self.inner.layers

        def __call__(self, tokens, cache=None):
            return self.inner(tokens, cache)

    for checkpoint in (False, True):
        model = Hidden(build(LLAMA))
        prepared = assert_same_as_plain(model, rows_with(6, [4, 7]), checkpoint=checkpoint)
        assert not prepared.forward.picks_positions


def test_the_pass_by_hand_is_chosen_for_a_llama_on_a_cpu_and_for_nothing_else():
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    assert type(prepare(build(LLAMA))) is (ByHand if on_cpu else ThroughMlx)
    assert type(prepare(build(GEMMA2))) is ThroughMlx
    assert (ByHand.by_hand, ThroughMlx.by_hand) == (True, False)
    with mx.stream(mx.cpu):
        dropping = build(LLAMA)
        dropping.layers[0].self_attn.q_proj.dropout = nn.Dropout(0.5)
        others = [build(GEMMA2), build(COHERE), build(LLAMA, rope_traditional=True), dropping]
        others += [build(LLAMA, keys=[*KEYS, "lm_head"], tie_word_embeddings=False)]
        others += [build(LLAMA, sliding_window=4, layer_types=["full_attention", "sliding_attention"])]
        assert not any(fits(model) for model in others)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_layers_below_the_first_trained_one_get_no_gradient_and_need_none(num_layers):
    model = build(LLAMA, num_hidden_layers=3, trained=num_layers)
    assert_same_as_plain(model, rows_with(9, [4, 11, 7]))


def test_scaled_rotary_angles_biases_and_ungrouped_heads():
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    }
    model = build(LLAMA, rope_scaling=scaling, attention_bias=True, mlp_bias=True, num_key_value_heads=4)
    assert fits(model)
    assert_same_as_plain(model, rows_with(9, [4, 11, 7]))


def test_any_supervised_tokens_of_a_row_may_ask_in_the_last_block():
    rng = np.random.default_rng(3)
    rows = [Row(row.tokens, rng.random(len(row.tokens)) < 0.4) for row in rows_with(5, [9, 3, 14, 7])]
    rows.append(Row(rows[0].tokens, np.zeros(len(rows[0].tokens), bool)))
    for share in (False, True):
        assert_same_as_plain(build(LLAMA), rows, share=share)


def test_attention_weights_too_large_to_keep_are_computed_again(monkeypatch):
    monkeypatch.setattr(attention, "KEPT_WEIGHTS", 0)
    assert_same_as_plain(build(LLAMA), rows_with(5, [9, 3, 14, 7]))


def test_factors_that_are_not_trained_still_count():
    model = build(LLAMA)
    model.layers[0].freeze()
    assert_same_as_plain(model, rows_with(6, [4, 7]))


def test_weights_that_stay_packed_are_unpacked_on_the_way():
    model = build(LLAMA, bits=4)
    for module in model.modules():
        if type(module) in (nn.QuantizedLinear, nn.QuantizedEmbedding):
            keep_packed(module)
    assert fits(model)
    assert_same_as_plain(model, rows_with(9, [4, 11, 7]))


@pytest.mark.parametrize("checkpoint", [False, True])
def test_no_more_than_one_unpacked_weight_is_alive_on_the_way_back_either(checkpoint):
    model = build(LLAMA, bits=4, hidden_size=256, intermediate_size=8192, num_hidden_layers=4)
    for _, module in model.named_modules():
        if type(module) in (nn.QuantizedLinear, nn.QuantizedEmbedding):
            keep_packed(module)
    prepared = prepare(model, checkpoint=checkpoint, by_hand=True)
    batch = make_batch(rows_with(1, [7]), [0])
    gradients(model, prepared.loss_sum, batch)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    gradients(model, prepared.loss_sum, batch)
    weight = 4 * 256 * 8192
    # It is made of its codes, one number each; mlx, where it takes gradients, would keep six arrays of this size.
    assert weight < mx.get_peak_memory() - before < 2.5 * weight


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_batch_without_targets_moves_nothing(by_hand):
    model = build(LLAMA)
    batch = make_batch([Row(np.array([1, 2, 3], np.int32), np.zeros(3, bool))], [0])
    prepared = prepare(model, by_hand=by_hand)
    value, grads = gradients(model, prepared.loss_sum, batch)
    assert value == 0 and all(mx.abs(grad).max().item() == 0 for grad in grads.values())
    assert [len(each) for each in prepared.score(batch)] == [0, 0, 0]


@pytest.mark.parametrize("by_hand", [False, True])
def test_checkpointing_leaves_the_model_as_it_was(by_hand):
    model = build(LLAMA)
    classes = [type(block) for block in model.layers]
    prepared = prepare(model, checkpoint=True, by_hand=by_hand)
    gradients(model, prepared.loss_sum, make_batch(rows_with(6, [4, 7]), [0, 1]))
    assert [type(block) for block in model.layers] == classes


@pytest.mark.parametrize("cores", [2, 3])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_parts_of_a_batch_share_the_prefix_that_the_first_computes(monkeypatch, cores, checkpoint):
    several(monkeypatch, cores)
    computed = []
    embed = llama_layout.Layout.__init__

    def count(layout, batch, angles):
        embed(layout, batch, angles)
        computed.append(len(layout.tokens))

    monkeypatch.setattr(llama_layout.Layout, "__init__", count)
    rows = rows_with(9, (5, 9, 7, 6, 8, 5, 9))
    model = build(LLAMA)
    prepared = assert_way_is_plain(model, rows, by_hand=True, checkpoint=checkpoint)
    assert prepared.cores == cores
    batch = make_batch(rows, range(len(rows)))
    assert len(batch.prefix) == 9
    assert len(computed) == 2 * cores  # a loss and a score
    assert sum(computed) == 2 * (9 + batch.lengths.sum())


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("training", [True, False])
def test_a_part_of_a_batch_that_fails_leaves_none_waiting(monkeypatch, failing, training):
    several(monkeypatch, 2)
    rotate, fails = attention.to_rows, "no more memory"

    def refuse(x, rows, *args):
        if len(x) == lengths[failing]:
            raise MemoryError(fails)
        return rotate(x, rows, *args)

    rows = rows_with(9, (5, 9, 7, 6, 8, 5, 9))
    batch = make_batch(rows, range(len(rows)))
    model = build(LLAMA)
    prepared = prepare(model, by_hand=True)
    lengths = [len(part.prefix) * (part.part == 0) + part.lengths.sum() for part in split(batch, 2)]
    assert lengths[0] != lengths[1]
    monkeypatch.setattr(attention, "to_rows", refuse)
    with pytest.raises(MemoryError, match=fails):
        gradients(model, prepared.loss_sum, batch) if training else prepared.score(batch)
    monkeypatch.setattr(attention, "to_rows", rotate)
    assert np.isfinite(gradients(model, prepared.loss_sum, batch)[0])


def several(monkeypatch, cores):
    """Let a batch be computed in parts, on however many cores the tests run."""
    threads = [ThreadPoolExecutor(1, initializer=stay_on_cpu) for _ in range(cores)]
    monkeypatch.setattr(cpu_ops, "_threads", threads)
    made = ByHand.__init__

    def init(self, *args, **options):
        made(self, *args, **options)
        self.cores = cores

    monkeypatch.setattr(ByHand, "__init__", init)


def test_masked_and_far_apart_scores_stay_finite():
    scores = mx.array([[[[1e4, -1e4], [-1e4, 1e4]]]])  # (1, 1, keys, queries)
    mask = np.array([[[0, 0], [-np.inf, 0]]], np.float32)
    mx.eval(scores)
    attention.softmax_(mask, scores)
    assert scores.tolist() == [[[[1, 0], [0, 1]]]]


def test_silu_of_large_numbers_is_zero_or_the_number():
    gate, up = mx.array([[-1e4, 1e4, 0.0, -90.0]]), mx.ones((1, 4))
    assert np.array(cpu_ops.swiglu(gate, up)).tolist() == [[0, 1e4, 0, 0]]


@pytest.mark.parametrize("by_hand", [False, True])
def test_the_loss_of_a_half_precision_model_is_in_float32(by_hand):
    model = build(LLAMA)
    model.set_dtype(mx.bfloat16)
    rows = rows_with(9, [4, 11, 7])
    prepared = prepare(model, by_hand=by_hand)
    assert by_hand or (prepared.forward.picks_positions and prepared.forward.shares_prefix)
    loss = prepared.loss_sum(make_batch(rows, [0, 1, 2]))
    assert loss.dtype == mx.float32
    assert loss.item() == pytest.approx(plain_loss(model, rows).item(), rel=0.05)
