"""A Llama's training pass for CPUs, forward and backward by hand: the same function as mlx-lm's, with less work.

mlx does the matrix products, cpu_ops.py what lies between them. Against mlx-lm's forward pass and mlx's gradients:

- hidden states are packed, (T, D) without padding; only attention knows rows, and only it pads them;
- the shared prefix is computed once, and every row attends to its keys and values: on several cores, too, where each
  computes a part of the rows (attention.Shared);
- the last block computes only keys and values, and the rest where a token is supervised;
- the backward pass stops at the first layer that is trained.

Letters: T tokens of a batch, the prefix's P first and then each row's; N supervised positions; D the hidden size; heads
come in G groups of the same keys and values, m queries to a group; d is a head's size; R rows of at most W tokens.
A gradient's name starts with d_. Weights stay in the modules of mlx-lm's model. `fits` says which models this is for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models import llama, rope_utils
from mlx_lm.tuner.lora import LoRALinear

from mbf_mlx.base.unpack import UnpackingEmbedding, UnpackingLinear, product, product_back
from mbf_mlx.data.batches import Batch
from mbf_mlx.engine import cpu_ops
from mbf_mlx.engine import llama_attention as attention
from mbf_mlx.engine.cpu_ops import blank, view
from mbf_mlx.engine.llama_attention import Layout, Shared, together

ROPES = (nn.RoPE, rope_utils.Llama3RoPE)  # those whose angles depend on nothing but the position
LINEAR = (nn.Linear, nn.QuantizedLinear, UnpackingLinear)

Factors = dict[
    str, mx.array
]  # by the names that `trainable_parameters` has, "….lora_a" (in, r) and "….lora_b" (r, out)
Note = Callable[
    [str, mx.array, mx.array], None
]  # a layer, its inputs (T, in) and the gradients of its outputs (T, out)


def fits(model: nn.Module) -> bool:
    """Say whether this pass computes what `model` does."""
    if type(model) is not llama.Model or not all(_block_fits(block) for block in model.layers):
        return False
    trained = [name for name, _ in tree_flatten(model.trainable_parameters())]
    return all(name.endswith((".lora_a", ".lora_b")) and name.startswith("model.layers.") for name in trained)


def _block_fits(block: nn.Module) -> bool:
    attention, mlp = block.self_attn, block.mlp
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    linears = [attention[name] for name in names] + [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    # Dropout is left to mlx: a layer keeps its share of kept inputs there, 1 for none.
    bases = [each.linear if type(each) is LoRALinear and each.dropout._p_1 == 1 else each for each in linears]
    rope = attention.rope
    return (
        type(block) is llama.TransformerBlock
        and not block.use_sliding
        and all(type(base) in LINEAR for base in bases)
        and (type(rope) in ROPES and not rope.traditional and rope.dims == attention.head_dim)
    )


class Pass:
    """One batch's way through the model, and back.

    Args:
        model: One that `fits`.
        factors: The values of the parameters that gradients are wanted for; others are read from the modules.
        checkpoint: Keep only each block's input for the way back and compute the block again.
        keep: Whether there is a way back.
        shared: By block, how the parts of a batch come by its prefix, where `batch` is one of several. They have to
            run at the same time, each in a thread of its own.
        note: Told of each layer that is trained, on the way back.
    """

    def __init__(
        self,
        model: nn.Module,
        factors: Factors,
        batch: Batch,
        *,
        checkpoint: bool = False,
        keep: bool = True,
        shared: Sequence[Shared] = (),
        note: Note | None = None,
    ):
        heads = model.layers[0].self_attn
        self.checkpoint, self.keep = checkpoint, keep
        self.norm = model.model.norm
        self.blocks = [_Block(block, f"model.layers.{i}", factors, note) for i, block in enumerate(model.layers)]
        self.first = next((i for i, block in enumerate(self.blocks) if block.is_trained), len(self.blocks))
        self.layout = Layout(batch, _angles(heads, batch))
        self.embed = model.model.embed_tokens
        self.shared: Sequence[Shared | None] = shared or [None] * len(self.blocks)
        self.saved: list[Any] = []

    def forward(self) -> mx.array:
        """Return the hidden states at the supervised positions, (N, D), after the last norm."""
        with together(self.shared):
            return self._forward()

    def _forward(self) -> mx.array:
        x = self.embed(mx.array(self.layout.tokens)).astype(mx.float32)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            y, saved = block.forward(x, self.layout, self.shared[i], picked=i == last)
            if self.keep and i >= self.first:
                self.saved.append(x if self.checkpoint else saved)
            x = y
            del saved  # before the next block makes its own
        out, inverse = cpu_ops.rms_norm(x, _weight(self.norm), self.norm.eps)
        self.saved.append((x, inverse))
        return out

    def backward(self, d_out: mx.array) -> Factors:
        """Return the gradients of all factors, from that of the hidden states, (N, D).

        To be called once: it overwrites what `forward` has saved, and frees it on the way. And in a thread in which mlx
        takes no gradients (`cpu_ops.side_by_side`), or all that is computed on the way would stay.
        """
        with together(self.shared):
            return self._backward(d_out)

    def _backward(self, d_out: mx.array) -> Factors:
        gradients: Factors = {}
        x, inverse = self.saved.pop()
        copy = d_out + 0  # for the norm to write into
        d_x: mx.array | None = cpu_ops.rms_norm_backward_(copy, x, inverse, _weight(self.norm), blank(*x.shape))
        for i in reversed(range(self.first, len(self.blocks))):
            block, picked, saved = self.blocks[i], i == len(self.blocks) - 1, self.saved.pop()
            if self.checkpoint:
                _, saved = block.forward(saved, self.layout, self.shared[i], picked=picked)
            assert d_x is not None, "only the first trained block stops"
            d_x = block.backward(d_x, saved, self.layout, self.shared[i], picked, gradients, stop=i == self.first)
        return gradients


class Head:
    """What follows the last norm: the embedding once more, or a linear layer of its own."""

    def __init__(self, model: nn.Module):
        tied = model.args.tie_word_embeddings
        self.module = model.model.embed_tokens if tied else model.lm_head
        self.call = self.module.as_linear if tied else self.module
        self.unpacks = type(self.module) in (UnpackingEmbedding, UnpackingLinear)

    @property
    def vocabulary(self) -> int:
        """How many tokens there are, V."""
        return int(self.module.weight.shape[0])

    def __call__(self, hidden: mx.array) -> mx.array:
        """Return the logits (N, V) of hidden states (N, D)."""
        return product(self.module, hidden) if self.unpacks else self.call(hidden)

    def backward(self, hidden: mx.array, d_logits: mx.array) -> mx.array:
        """Return the gradient of the hidden states (N, D)."""
        if self.unpacks:
            return product_back(self.module, d_logits)
        if type(self.module) in (nn.Embedding, nn.Linear):
            return d_logits @ self.module.weight.astype(mx.float32)
        return mx.vjp(self.call, [hidden], [d_logits])[1][0]


class _Linear:
    """One linear layer: a frozen weight, and its factors where it is trained."""

    def __init__(self, module: nn.Module, name: str, factors: Factors, note: Note | None):
        self.note = note
        self.base = module.linear if isinstance(module, LoRALinear) else module
        self.name = name
        self.is_trained = f"{name}.lora_a" in factors or f"{name}.lora_b" in factors
        self.has_factors = isinstance(module, LoRALinear)
        columns = self.base.weight.shape[1]
        self.in_dims = columns * 32 // self.base.bits if isinstance(self.base, nn.QuantizedLinear) else columns
        if self.has_factors:
            self.scale = module.scale
            self.a = factors.get(f"{name}.lora_a", module.lora_a)
            self.b = self.scale * factors.get(f"{name}.lora_b", module.lora_b)

    def __call__(self, x: mx.array, onto: mx.array | None = None) -> mx.array:
        """Return x (T, in) through the layer, (T, out), added to `onto`."""
        if type(self.base) is nn.Linear:
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
        """Return the gradient of x, (T, in), added to `onto`."""
        if type(self.base) is nn.Linear:
            weight = self.base.weight.astype(mx.float32)
            d_x = d_y @ weight if onto is None else mx.addmm(onto, d_y, weight)
        elif type(self.base) is UnpackingLinear:
            d_x = product_back(self.base, d_y) if onto is None else onto + product_back(self.base, d_y)
        else:
            anywhere = mx.zeros((len(d_y), self.in_dims))  # a linear layer's gradient is the same for every input
            (d_x,) = mx.vjp(self.base, [anywhere], [d_y])[1]
            d_x = d_x if onto is None else onto + d_x
        return mx.addmm(d_x, d_y @ self.b.T, self.a.T) if self.has_factors else d_x

    def d_factors(self, x: mx.array | None, d_y: mx.array) -> Factors:
        """Return the gradients of the factors, where there are any to train."""
        if not self.is_trained or x is None:
            return {}
        if self.note:
            self.note(self.name, x, d_y)
        d_b = self.scale * ((x @ self.a).T @ d_y)
        return {f"{self.name}.lora_a": x.T @ (d_y @ self.b.T), f"{self.name}.lora_b": d_b}


@dataclass
class _Saved:
    """What the way back through one block needs."""

    x: mx.array
    inverse: np.ndarray
    normed: mx.array
    normed_q: mx.array  # `normed` where queries are
    attended: attention.Attended
    mixed: mx.array
    middle: mx.array
    middle_inverse: np.ndarray
    middle_normed: mx.array | None
    gate: mx.array
    up: mx.array
    acted: mx.array | None


class _Block:
    def __init__(self, block: nn.Module, name: str, factors: Factors, note: Note | None):
        self.block = block
        self.size = block.self_attn.head_dim
        self.groups = block.self_attn.n_kv_heads
        attention, mlp = block.self_attn, block.mlp
        self.q, self.k, self.v, self.o = (
            _Linear(attention[each], f"{name}.self_attn.{each}", factors, note)
            for each in ("q_proj", "k_proj", "v_proj", "o_proj")
        )
        self.gate, self.up, self.down = (
            _Linear(mlp[each], f"{name}.mlp.{each}", factors, note) for each in ("gate_proj", "up_proj", "down_proj")
        )
        self.is_trained = any(
            each.is_trained for each in (self.q, self.k, self.v, self.o, self.gate, self.up, self.down)
        )

    def forward(self, x: mx.array, layout: Layout, shared: Shared | None, *, picked: bool) -> tuple[mx.array, _Saved]:
        """Return what the block makes of x (T, D), everywhere or where a token is `picked`, and what was saved."""
        asking = layout.supervised if picked else layout.all
        norm = self.block.input_layernorm
        normed, inverse = cpu_ops.rms_norm(x, _weight(norm), norm.eps)
        k, v = self.k(normed), self.v(normed)
        middle, normed_q = (x[mx.array(layout.picked)], normed[mx.array(layout.picked)]) if picked else (x, normed)
        q = self.q(normed_q)
        mx.eval(q, k, v)
        mixed, attended = attention.attend(q, k, v, asking, layout.all, self.groups, self.size, shared)
        middle = self.o(mixed, onto=middle)
        norm = self.block.post_attention_layernorm
        middle_normed, middle_inverse = cpu_ops.rms_norm(middle, _weight(norm), norm.eps)
        gate, up = self.gate(middle_normed), self.up(middle_normed)
        mx.eval(gate, up)
        acted = cpu_ops.swiglu(gate, up)
        out = self.down(acted, onto=middle)
        mx.eval(out)
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

    def backward(
        self,
        d_out: mx.array,
        saved: _Saved,
        layout: Layout,
        shared: Shared | None,
        picked: bool,
        gradients: Factors,
        stop: bool,
    ) -> mx.array | None:
        """Return the gradient of x (T, D), or None where nothing below is trained (`stop`)."""
        asking = layout.supervised if picked else layout.all
        # The MLP. What is overwritten must be evaluated first, and so must all that is made of it.
        d_acted, found = self.down.d_input(d_out), self.down.d_factors(saved.acted, d_out)
        mx.eval(d_acted, found)
        d_gate, d_up = cpu_ops.swiglu_backward_(d_acted, saved.gate, saved.up)
        d_normed = self.up.d_input(d_up, onto=self.gate.d_input(d_gate))
        found |= self.gate.d_factors(saved.middle_normed, d_gate) | self.up.d_factors(saved.middle_normed, d_up)
        mx.eval(d_normed, found)
        weight = _weight(self.block.post_attention_layernorm)
        d_middle = cpu_ops.rms_norm_backward_(d_normed, saved.middle, saved.middle_inverse, weight, d_out)
        # Attention.
        d_mixed = self.o.d_input(d_middle)
        found |= self.o.d_factors(saved.mixed, d_middle)
        mx.eval(d_mixed, found)
        d_q, d_k, d_v = attention.attend_backward(d_mixed, saved.attended, asking, layout.all, shared, layout.part)
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
        weight = _weight(self.block.input_layernorm)
        return cpu_ops.rms_norm_backward_(d_normed, saved.x, saved.inverse, weight, d_middle)


def _angles(heads: nn.Module, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Return the rotary angles of every position of a batch as the model has them: cosines, sines, (P + W, d / 2)."""
    # What its own module makes of ones in a head's first half and zeros in the second: cosines, then sines.
    longest, half = len(batch.prefix) + batch.tokens.shape[1], heads.head_dim // 2
    ones = mx.concatenate([mx.ones((1, 1, longest, half)), mx.zeros((1, 1, longest, half))], axis=-1)
    turned = np.array(heads.rope(ones)[0, 0])
    return np.ascontiguousarray(turned[:, :half]), np.ascontiguousarray(turned[:, half:])


def _weight(norm: nn.Module) -> np.ndarray:
    return np.array(norm.weight.astype(mx.float32))
