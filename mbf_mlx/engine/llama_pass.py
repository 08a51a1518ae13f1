"""A Llama's training pass for CPUs, forward and backward by hand: the same function as mlx-lm's, with less work.

mlx computes the matrix products, cpu_ops.py what lies between them. This pass does less than mlx-lm's with mlx's
gradients:

- Hidden states are packed, (T, D) without padding. Only attention knows rows, and only it pads them.
- The shared prefix is computed once, and every row attends to its keys and values. On several cores, where each
  computes a part of the rows, it is still computed once (llama_attention.PrefixHandover).
- The last block computes keys and values for all tokens, and the rest only for supervised ones.
- The backward pass stops at the first layer that is trained.

Letters: T tokens of a batch, the prefix's P first and then each row's; W tokens of the longest row; N supervised
positions; D the hidden size; V the vocabulary; r the rank; d the size of a head. The name of a gradient starts with d_.
Weights stay in the modules of mlx-lm's model. `fits` says for which models this pass works.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx_lm.models import llama, rope_utils
from mlx_lm.tuner.lora import LoRALinear

from mbf_mlx.base.unpack import UnpackingEmbedding, UnpackingLinear, product, product_back
from mbf_mlx.data.batches import Batch
from mbf_mlx.engine import cpu_ops
from mbf_mlx.engine import llama_attention as attention
from mbf_mlx.engine.bfloat16_weights import Bfloat16Weights, Rounded, rounded
from mbf_mlx.engine.cpu_ops import blank, view
from mbf_mlx.engine.engine import Arrays
from mbf_mlx.engine.llama_attention import PrefixHandover, failing_together
from mbf_mlx.engine.llama_layout import Layout
from mbf_mlx.engine.lora_layers import LINEAR, in_dims, trained_arrays

ROPES = (nn.RoPE, rope_utils.Llama3RoPE)  # those whose angles depend on nothing but the position

# Arrays of factors and of their gradients go by mlx's parameter names: "….lora_a" (in, r), "….lora_b" (r, out).
LayerNote = Callable[[str, mx.array, mx.array], None]  # a layer, its inputs (T, in), the gradients of its outputs


def fits(model: nn.Module) -> bool:
    """Return whether this pass computes what `model` does."""
    if type(model) is not llama.Model or not all(_block_fits(block) for block in model.layers):
        return False
    trained = trained_arrays(model)
    return all(name.endswith((".lora_a", ".lora_b")) and name.startswith("model.layers.") for name in trained)


def _block_fits(block: nn.Module) -> bool:
    # Dropout is left to mlx. Its layer stores the share of inputs that it keeps: 1 means no dropout.
    linears = linears_of(block)
    bases = [each.linear if type(each) is LoRALinear and each.dropout._p_1 == 1 else each for each in linears]
    rope = block.self_attn.rope
    return (
        type(block) is llama.TransformerBlock
        and not block.use_sliding
        and all(type(base) in LINEAR for base in bases)
        and (type(rope) in ROPES and not rope.traditional and rope.dims == block.self_attn.head_dim)
    )


class Pass:
    """One batch's forward and backward pass.

    Args:
        model: One that `fits` accepts.
        factors: Values of the parameters to compute gradients for. Other factors are read from the modules.
        batch: A batch, or one of its parts.
        checkpoint: Keep only each block's input for the backward pass, and compute the block again there.
        keep: Whether there will be a backward pass.
        handovers: For each block, how the parts of a batch share its prefix, if `batch` is one of several parts. They
            have to run at the same time, each in a thread of its own.
        note: Called for each trained layer in the backward pass.
        bfloat16: The frozen weights to multiply with in bfloat16; None multiplies in float32.
        attended: Called in the forward pass with each block's number and its keys and values.
    """

    def __init__(
        self,
        model: nn.Module,
        factors: Arrays,
        batch: Batch,
        *,
        checkpoint: bool = False,
        keep: bool = True,
        handovers: Sequence[PrefixHandover] = (),
        note: LayerNote | None = None,
        bfloat16: Bfloat16Weights | None = None,
        attended: Callable[[int, attention.Attended], None] | None = None,
    ):
        heads = model.layers[0].self_attn
        self.checkpoint, self.keep, self.attended = checkpoint, keep, attended
        self.norm = model.model.norm
        self.blocks = [
            Block(block, f"model.layers.{i}", factors, note, bfloat16) for i, block in enumerate(model.layers)
        ]
        self.first = next((i for i, block in enumerate(self.blocks) if block.is_trained), len(self.blocks))
        self.layout = Layout(batch, angles(heads, len(batch.prefix) + batch.tokens.shape[1]))
        self.embed = model.model.embed_tokens
        self.handovers: Sequence[PrefixHandover | None] = handovers or [None] * len(self.blocks)
        self._saved: list[_Saved | mx.array] = []  # by trained block; with `checkpoint` only the block's input
        self._last: list[tuple[mx.array, np.ndarray]] = []  # of the last norm: its input, and the inverse of its root

    def forward(self) -> mx.array:
        """Return the hidden states at the supervised positions, (N, D), after the last norm."""
        with failing_together(self.handovers):
            return self._forward()

    def _forward(self) -> mx.array:
        x = self.embed(mx.array(self.layout.tokens)).astype(mx.float32)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            y, saved = block.forward(x, self.layout, self.handovers[i], picked=i == last)
            if self.attended:
                self.attended(i, saved.attended)
            if self.keep and i >= self.first:
                self._saved.append(x if self.checkpoint else saved)
            x = y
            del saved  # before the next block makes its own
        out, inverse = cpu_ops.rms_norm(x, weight_of(self.norm), self.norm.eps)
        self._last.append((x, inverse))
        return out

    def backward(self, d_out: mx.array) -> Arrays:
        """Return the gradients of all factors, given the gradient of the hidden states, (N, D).

        Call it once: it overwrites and frees what `forward` has saved. Call it in a thread in which mlx takes no
        gradients (`cpu_ops.on_own_cores`): otherwise mlx would keep everything that is computed here.
        """
        with failing_together(self.handovers):
            return self._backward(d_out)

    def _backward(self, d_out: mx.array) -> Arrays:
        gradients: Arrays = {}
        x, inverse = self._last.pop()
        copy = d_out + 0  # for the norm to write into
        d_x: mx.array | None = cpu_ops.rms_norm_backward_(copy, x, inverse, weight_of(self.norm), blank(*x.shape))
        for i in reversed(range(self.first, len(self.blocks))):
            block, picked, saved = self.blocks[i], i == len(self.blocks) - 1, self._saved.pop()
            if isinstance(saved, mx.array):
                saved = block.forward(saved, self.layout, self.handovers[i], picked=picked)[1]
            assert d_x is not None, "only the first trained block has no gradient to pass on"
            d_x = block.backward(d_x, saved, self.layout, self.handovers[i], picked, gradients, stop=i == self.first)
        return gradients


class Head:
    """What makes logits of the last norm's output: the embedding, if it is tied, or a linear layer of its own."""

    def __init__(self, model: nn.Module):
        tied = model.args.tie_word_embeddings
        self.module = model.model.embed_tokens if tied else model.lm_head
        self.call = self.module.as_linear if tied else self.module
        self.unpacks = type(self.module) in (UnpackingEmbedding, UnpackingLinear)

    @property
    def vocabulary(self) -> int:
        """The number of tokens that the model knows, V."""
        return int(self.module.weight.shape[0])

    def __call__(self, hidden: mx.array, bfloat16: Bfloat16Weights | None = None) -> mx.array:
        """Return the logits (N, V) of hidden states (N, D)."""
        if bfloat16 and (packed := bfloat16.of(self.module)):
            return packed.product(hidden)
        return product(self.module, hidden) if self.unpacks else self.call(hidden)

    def backward(self, hidden: mx.array, d_logits: mx.array, bfloat16: Bfloat16Weights | None = None) -> mx.array:
        """Return the gradient of the hidden states (N, D)."""
        if bfloat16 and (packed := bfloat16.of(self.module)):
            return packed.product_back(d_logits)
        if self.unpacks:
            return product_back(self.module, d_logits)
        if type(self.module) in (nn.Embedding, nn.Linear):
            weight: mx.array = self.module.weight
            return d_logits @ weight.astype(mx.float32)
        return mx.vjp(self.call, [hidden], [d_logits])[1][0]


class _Linear:
    """One linear layer: a frozen weight, and its factors if it has some."""

    def __init__(
        self,
        module: nn.Module,
        name: str,
        factors: Arrays,
        note: LayerNote | None,
        bfloat16: Bfloat16Weights | None,
    ):
        self.note = note
        self.base = base_of(module)
        self.packed = bfloat16.of(self.base) if bfloat16 else None
        self.name = name
        self.is_trained = f"{name}.lora_a" in factors or f"{name}.lora_b" in factors
        self.has_factors = isinstance(module, LoRALinear)
        self.in_dims = in_dims(self.base)
        if self.has_factors:
            self.scale = module.scale
            self.a = factors.get(f"{name}.lora_a", module.lora_a)
            self.b = self.scale * factors.get(f"{name}.lora_b", module.lora_b)

    def __call__(self, x: mx.array, onto: mx.array | None = None, halves: Rounded | None = None) -> mx.array:
        """Return x (T, in) through the layer, (T, out), added to `onto`; `halves` is x rounded to bfloat16."""
        if self.packed:
            y = self.packed.product(x if halves is None else halves, onto)
            y = y + self.base.bias if "bias" in self.base else y
        elif type(self.base) is nn.Linear:
            weight = self.base.weight.astype(mx.float32).T
            y = x @ weight if onto is None else mx.addmm(onto, x, weight)
            y = y + self.base.bias if "bias" in self.base else y
        elif type(self.base) is UnpackingLinear:
            y = product(self.base, x) if onto is None else onto + product(self.base, x)
            y = y + self.base.bias if "bias" in self.base else y
        else:
            y = self.base(x) if onto is None else onto + self.base(x)
        return mx.addmm(y, x @ self.a, self.b) if self.has_factors else y

    def d_input(self, d_y: mx.array, onto: mx.array | None = None) -> mx.array:
        """Return the gradient of x, (T, in), given that of the output, added to `onto`."""
        if self.packed:
            d_x = self.packed.product_back(d_y, onto)
        elif type(self.base) is nn.Linear:
            weight = self.base.weight.astype(mx.float32)
            d_x = d_y @ weight if onto is None else mx.addmm(onto, d_y, weight)
        elif type(self.base) is UnpackingLinear:
            d_x = product_back(self.base, d_y) if onto is None else onto + product_back(self.base, d_y)
        else:
            anywhere = mx.zeros((len(d_y), self.in_dims))  # a linear layer's gradient does not depend on its input
            (d_x,) = mx.vjp(self.base, [anywhere], [d_y])[1]
            d_x = d_x if onto is None else onto + d_x
        return mx.addmm(d_x, d_y @ self.b.T, self.a.T) if self.has_factors else d_x

    def d_factors(self, x: mx.array | None, d_y: mx.array) -> Arrays:
        """Return the gradients of the layer's factors by name, nothing if it is not trained."""
        if not self.is_trained or x is None:
            return {}
        if self.note:
            self.note(self.name, x, d_y)
        d_b = self.scale * ((x @ self.a).T @ d_y)
        return {f"{self.name}.lora_a": x.T @ (d_y @ self.b.T), f"{self.name}.lora_b": d_b}


@dataclass
class _Saved:
    """What one block's backward pass needs."""

    x: mx.array
    inverse: np.ndarray
    normed: mx.array
    normed_q: mx.array  # `normed` at the query tokens
    attended: attention.Attended
    mixed: mx.array
    middle: mx.array
    middle_inverse: np.ndarray
    middle_normed: mx.array | None
    gate: mx.array
    up: mx.array
    acted: mx.array | None


class Block:
    """One block's forward and backward pass, and those of its parts."""

    def __init__(
        self,
        block: nn.Module,
        name: str,
        factors: Arrays,
        note: LayerNote | None,
        bfloat16: Bfloat16Weights | None,
    ):
        heads, mlp = block.self_attn, block.mlp
        self.block, self.size, self.groups = block, heads.head_dim, heads.n_kv_heads
        self.q, self.k, self.v, self.o = (
            _Linear(heads[each], f"{name}.self_attn.{each}", factors, note, bfloat16)
            for each in ("q_proj", "k_proj", "v_proj", "o_proj")
        )
        self.gate, self.up, self.down = (
            _Linear(mlp[each], f"{name}.mlp.{each}", factors, note, bfloat16)
            for each in ("gate_proj", "up_proj", "down_proj")
        )
        self.is_trained = any(
            each.is_trained for each in (self.q, self.k, self.v, self.o, self.gate, self.up, self.down)
        )

    def forward(
        self, x: mx.array, layout: Layout, handover: PrefixHandover | None, *, picked: bool
    ) -> tuple[mx.array, _Saved]:
        """Return the block's output for x (T, D), at all tokens or at supervised ones (`picked`), and what to save."""
        queries = layout.supervised if picked else layout.all
        norm = self.block.input_layernorm
        normed, inverse = cpu_ops.rms_norm(x, weight_of(norm), norm.eps)
        if picked:
            middle, normed_q = x[mx.array(layout.picked)], normed[mx.array(layout.picked)]
            (k, v), (q,) = together(normed, self.k, self.v), together(normed_q, self.q)
        else:
            middle, normed_q = x, normed
            k, v, q = together(normed, self.k, self.v, self.q)
        mx.eval(q, k, v)
        mixed, attended = attention.attend(q, k, v, queries, layout.all, self.groups, self.size, handover)
        middle = self.o(mixed, onto=middle)
        out, middle_normed, middle_inverse, gate, up, acted = self.mlp(middle)
        saved = _Saved(
            x=x,
            inverse=inverse,
            normed=normed,
            normed_q=normed_q,
            attended=attended,
            mixed=mixed,
            middle=middle,
            middle_inverse=middle_inverse,
            middle_normed=middle_normed if self.gate.is_trained or self.up.is_trained else None,
            gate=gate,
            up=up,
            acted=acted if self.down.is_trained else None,
        )
        return out, saved

    def mlp(self, middle: mx.array) -> tuple[mx.array, mx.array, np.ndarray, mx.array, mx.array, mx.array]:
        """Return `middle` (T, D) with the MLP's output added, (T, D), and what the backward pass needs of the MLP."""
        norm = self.block.post_attention_layernorm
        normed, inverse = cpu_ops.rms_norm(middle, weight_of(norm), norm.eps)
        gate, up = together(normed, self.gate, self.up)
        mx.eval(gate, up)
        acted = cpu_ops.swiglu(gate, up)
        out = self.down(acted, onto=middle)
        mx.eval(out)
        return out, normed, inverse, gate, up, acted

    def backward(
        self,
        d_out: mx.array,
        saved: _Saved,
        layout: Layout,
        handover: PrefixHandover | None,
        picked: bool,
        gradients: Arrays,
        stop: bool,
    ) -> mx.array | None:
        """Return the gradient of x (T, D), or None if no layer below is trained (`stop`).

        Adds the gradients of the block's factors to `gradients`.
        """
        queries = layout.supervised if picked else layout.all
        # The MLP. Evaluate what is overwritten before, and all that is made of it.
        d_acted, found = self.down.d_input(d_out), self.down.d_factors(saved.acted, d_out)
        mx.eval(d_acted, found)
        d_gate, d_up = cpu_ops.swiglu_backward_(d_acted, saved.gate, saved.up)
        d_normed = self.up.d_input(d_up, onto=self.gate.d_input(d_gate))
        found |= self.gate.d_factors(saved.middle_normed, d_gate) | self.up.d_factors(saved.middle_normed, d_up)
        mx.eval(d_normed, found)
        weight = weight_of(self.block.post_attention_layernorm)
        d_middle = cpu_ops.rms_norm_backward_(d_normed, saved.middle, saved.middle_inverse, weight, d_out)
        # Attention.
        d_mixed = self.o.d_input(d_middle)
        found |= self.o.d_factors(saved.mixed, d_middle)
        mx.eval(d_mixed, found)
        d_q, d_k, d_v = attention.attend_backward(d_mixed, saved.attended, queries, layout.all, handover, layout.part)
        found |= self.q.d_factors(saved.normed_q, d_q)
        found |= self.k.d_factors(saved.normed, d_k) | self.v.d_factors(saved.normed, d_v)
        mx.eval(found)
        gradients.update(found)
        if stop:
            return None
        d_normed = self.v.d_input(d_v, onto=self.k.d_input(d_k))
        if picked:
            d_normed_q = self.q.d_input(d_q)
            mx.eval(d_normed_q, d_normed)
            view(d_normed)[layout.picked] += view(d_normed_q)
            d_here, d_middle = d_middle, blank(*saved.x.shape)
            view(d_middle)[layout.picked] = view(d_here)
        else:
            d_normed = self.q.d_input(d_q, onto=d_normed)
        weight = weight_of(self.block.input_layernorm)
        return cpu_ops.rms_norm_backward_(d_normed, saved.x, saved.inverse, weight, d_middle)


def base_of(module: nn.Module) -> nn.Module:
    """Return the frozen layer of a linear layer, which may have factors."""
    return module.linear if isinstance(module, LoRALinear) else module


def linears_of(block: nn.Module) -> list[nn.Module]:
    """Return a block's linear layers: those of attention, then those of the MLP."""
    attention, mlp = block.self_attn, block.mlp
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    return [*(attention[name] for name in names), mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def together(x: mx.array, *layers: _Linear) -> list[mx.array]:
    """Return x (T, in) through each of several layers; it is rounded once for all that multiply in bfloat16."""
    halves = rounded(x) if any(layer.packed for layer in layers) else None
    return [layer(x, halves=halves) for layer in layers]


def angles(heads: nn.Module, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the cosines and sines of the rotary angles at the first `longest` positions, (longest, d / 2) each."""
    # The model's own module turns ones in a head's first half and zeros in the second into cosines, then sines.
    half = heads.head_dim // 2
    ones = mx.concatenate([mx.ones((1, 1, longest, half)), mx.zeros((1, 1, longest, half))], axis=-1)
    turned = np.array(heads.rope(ones)[0, 0])
    return np.ascontiguousarray(turned[:, :half]), np.ascontiguousarray(turned[:, half:])


def weight_of(norm: nn.Module) -> np.ndarray:
    """Return a norm's weight in float32, (D,)."""
    return np.array(norm.weight.astype(mx.float32))
