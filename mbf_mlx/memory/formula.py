"""How much memory training takes: a formula in bytes, from the shape of the model and the shape of a batch.

Letters, as in engine/llama_pass.py: T tokens that a batch computes (the shared prefix's P once, then R rows of at most
W); N supervised positions; D the hidden size; I the MLP's hidden size; H heads and G groups of heads that share keys
and values; d the size of a head; V the vocabulary; r the rank; b the bytes of a number (4 on a CPU, else the model's
own 2).

    peak = process + weights + factors + inputs + activations + logits

    process       Python, mlx, the tokenizer; a measured constant
    weights       on a CPU every number in float32, or packed as in the file, with one piece unpacked at a time; for
                  products in bfloat16 two more copies of linear layers and head, of 2 bytes a number
    factors       16 r (in + out) for each layer: the factors, their gradient, AdamW's two moments, all in float32
    inputs        12 bytes for each number that a method measures of the inputs after training: the directions, the sum
                  so far, and what the current batches add
    activations   what the blocks keep for the backward pass, as below, and what one block's backward pass adds
    logits        4 V bytes for each position and array, within a fixed budget for any N. But through mlx-lm's own pass
                  without --grad-checkpoint it is 3 arrays of all N: mlx allocates ahead, so all chunks are in memory

On a CPU (engine/llama_pass.py) a block keeps 4 bytes times
    T (4 D + H d + 2 I) + (P + R W) (H + 2 G) d, and its attention weights H W (R W + P R) + H P P if they are small.
Through mlx-lm's own pass it keeps b times T (5 D + (H + 2 G) d + 2 H (P + W) + 4 I). On a CPU the last block keeps
most of this for N tokens only. On several cores each computes a part of the rows, and the first computes the prefix for
all. With --grad-checkpoint every block keeps T D, and one block at a time keeps everything.

Scoring long answers, which are generated, may take more: at most 1 GiB (budgets.KEPT_TOKENS) and half of what is left.

`benchmarks/memory.py` compares this with measurements. This file does not use mlx and reads no files.
"""

from dataclasses import dataclass, replace

import numpy as np

from mbf_mlx.data.batches import Batch, parts_of
from mbf_mlx.device.budgets import KEPT_WEIGHTS, LOGITS_BYTES, LOGITS_COPIES, PIECE_BYTES

PROCESS_BYTES = 410_000_000  # measured on Linux with mlx 0.32 and transformers 5
DOWN, MLP = "down_proj", ("gate_proj", "up_proj")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The numbers of a Llama-like model that memory depends on."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    blocks: int
    vocabulary: int
    tied: bool  # whether the embedding is also the head
    file_bytes: int  # all weights as they are stored
    packed_bytes: int  # the same with scales and norms in float32, as a CPU holds packed weights
    plain_bytes: int  # every number in float32

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """The (out, in) of a block's linear layers by name."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (q, self.hidden),
            "k_proj": (kv, self.hidden),
            "v_proj": (kv, self.hidden),
            "o_proj": (self.hidden, q),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }

    @property
    def block_values(self) -> int:
        """Numbers in the linear layers of one block."""
        return sum(out * inner for out, inner in self.layers.values())


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a model is trained, as far as memory depends on it."""

    rank: int
    keys: tuple[str, ...]  # names of the layers with factors, without their path
    num_layers: int  # blocks with factors
    by_hand: bool  # whether engine/llama_pass.py computes the pass, in float32
    packed: bool  # whether quantized weights stay packed
    checkpoint: bool  # whether blocks are computed again in the backward pass
    bfloat16: bool = False  # whether products with the unpacked weights are in bfloat16
    cores: int = 1  # how many parts of a batch are computed side by side
    measured: int = 0  # numbers in the directions in which a method measures the layers' inputs


@dataclass(frozen=True, kw_only=True)
class Load:
    """The shape of one batch."""

    rows: int  # R
    width: int  # W, tokens of the longest row after the prefix
    prefix: int  # P
    tokens: int  # T
    supervised: int  # N
    most_supervised: int  # supervised positions of the row that has most

    @classmethod
    def of(cls, batch: Batch) -> "Load":
        """Return the shape of a batch."""
        rows, width = batch.tokens.shape
        prefix = len(batch.prefix)
        tokens = prefix + int(batch.lengths.sum())
        return cls(rows=rows, width=width, prefix=prefix, tokens=tokens, supervised=len(batch.targets),
                   most_supervised=int(np.bincount(batch.row_of, minlength=1).max()))  # fmt: skip

    @classmethod
    def full(cls, rows: int, length: int, answer: int | None = None) -> "Load":
        """Return the largest batch: all rows have `length` tokens, the last `answer` of them (or all) supervised."""
        width, each = length - 1, min(length - 1, answer or length - 1)
        return cls(rows=rows, width=width, prefix=0, tokens=rows * width, supervised=rows * each, most_supervised=each)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The parts of the peak, in bytes."""

    process: int
    weights: int
    factors: int
    inputs: int
    activations: int
    logits: int
    loading: int  # what loading adds at most to process and weights; freed before training begins

    @property
    def held(self) -> int:
        """What is held between batches."""
        return self.process + self.weights + self.factors + self.inputs

    @property
    def batch(self) -> int:
        """What one batch adds."""
        return self.activations + self.logits

    @property
    def peak(self) -> int:
        """The most that is held at any time."""
        return max(self.held + self.batch, self.process + self.weights + self.loading)


def predict(shape: Shape, run: Run, load: Load, *, training: bool = True) -> Memory:
    """Return what training on a batch of this shape takes at its peak, or scoring it."""
    largest = 4 * max(shape.vocabulary * shape.hidden, shape.hidden * shape.intermediate)
    if not run.by_hand:
        weights, loading = shape.file_bytes, 0
    elif run.packed:
        weights, loading = shape.packed_bytes, largest // 8
    else:
        halves = 4 * (shape.blocks * shape.block_values + shape.vocabulary * shape.hidden)
        weights, loading = shape.plain_bytes + run.bfloat16 * halves, largest * 4 // 5
    return Memory(
        process=PROCESS_BYTES,
        weights=weights,
        factors=_factors(shape, run),
        inputs=12 * run.measured,
        activations=_activations(shape, run, load, training),
        logits=_logits(shape, run, load),
        loading=loading,
    )


def _factors(shape: Shape, run: Run) -> int:
    lines = sum(sum(shape.layers[key]) for key in run.keys if key in shape.layers)
    return 16 * run.rank * lines * run.num_layers


def _activations(shape: Shape, run: Run, load: Load, training: bool) -> int:
    kept, once = _by_hand(shape, run, load) if run.by_hand else _through_mlx(shape, load)
    size = 4 if run.by_hand else 2
    stays = load.tokens * shape.hidden if run.checkpoint else kept
    last = _by_hand_last(shape, load) if run.by_hand else kept
    if not training:
        return size * (kept + once)
    if run.checkpoint:
        return size * (run.num_layers * stays + max(kept, last) + once)
    return size * ((run.num_layers - 1) * stays + last + once)


def _by_hand(shape: Shape, run: Run, load: Load) -> tuple[int, int]:
    """Return how many numbers one block keeps, and how many its backward pass adds."""
    parts = parts_of(load.rows, load.prefix, load.tokens - load.prefix, run.cores)
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    padded = load.prefix + load.rows * load.width
    weights = shape.heads * load.width * load.rows * (load.width + load.prefix)
    weights = weights if 4 * weights <= parts * KEPT_WEIGHTS else 0
    kept = load.tokens * (3 * shape.hidden + query + 2 * shape.intermediate) + padded * (query + 2 * key) + weights
    kept += shape.heads * load.prefix * load.prefix
    kept += load.tokens * shape.hidden * any(name in run.keys for name in MLP)
    kept += load.tokens * shape.intermediate * (DOWN in run.keys)
    scores = shape.heads * load.width * load.rows * (load.width + load.prefix)
    once = load.tokens * (shape.intermediate + 4 * shape.hidden + 2 * (query + 2 * key))
    once += scores if weights else 2 * scores
    if run.packed:  # one unpacked piece, and its codes while it is unpacked
        largest = max(shape.vocabulary * shape.hidden, shape.hidden * shape.intermediate)
        once += parts * min(PIECE_BYTES // 4, largest) * 2
    return kept, once


def _by_hand_last(shape: Shape, load: Load) -> int:
    """Return how many numbers the last block keeps: keys and values for all tokens, the rest for supervised ones."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    queries = load.rows * load.most_supervised
    kept = load.tokens * 2 * shape.hidden + (load.prefix + load.rows * load.width) * 2 * key
    kept += load.supervised * (3 * shape.hidden + query + 2 * shape.intermediate) + queries * query
    return kept + shape.heads * queries * (load.width + load.prefix)


def _through_mlx(shape: Shape, load: Load) -> tuple[int, int]:
    """Return the same numbers for mlx-lm's own pass with mlx's gradients."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    tokens, seen = load.prefix + load.rows * load.width, load.prefix + load.width
    kept = tokens * (5 * shape.hidden + query + 2 * key + 2 * shape.heads * seen + 4 * shape.intermediate)
    once = load.tokens * (shape.intermediate + 4 * shape.hidden + 2 * (query + 2 * key) + shape.heads * seen)
    return kept, once


def _logits(shape: Shape, run: Run, load: Load) -> int:
    line, states = 4 * shape.vocabulary, 12 * load.supervised * shape.hidden
    chunk = min(load.supervised, max(1, LOGITS_BYTES // (LOGITS_COPIES * line))) * line
    if run.by_hand:
        return chunk + states
    # mlx's own functions do not work in place.
    return LOGITS_COPIES * (chunk if run.checkpoint else line * load.supervised) + states


def ways_to_fit(shape: Shape, run: Run, load: Load, limit: int) -> list[str]:
    """Return sets of flags with which such a batch would fit into `limit` bytes, the fastest first."""
    others = [run]
    if not run.checkpoint:
        others.append(replace(run, checkpoint=True))
    if run.bfloat16:
        others += [replace(other, bfloat16=False) for other in list(others)]
    if run.by_hand and not run.packed and shape.packed_bytes < shape.plain_bytes:
        others += [replace(other, packed=True) for other in others if not other.bfloat16]
    found: list[str] = []
    for other in others:
        flags = ["--grad-checkpoint"] * (other.checkpoint and not run.checkpoint)
        flags += ["--precision float32"] * (run.bfloat16 and not other.bfloat16)
        flags += ["--keep-quantized"] * (other.packed and not run.packed)
        for rows in range(load.rows, 0, -1):
            if predict(shape, other, _smaller(load, rows)).peak <= limit:
                flags += [f"--batch-size {rows}"] * (rows < load.rows)
                found.append(" ".join(flags))
                break
    if not found:
        for parts in (2, 4, 8, 16, 32):
            short = _shorter(_smaller(load, 1), parts)
            if predict(shape, others[-1], short).peak <= limit:
                flags = ["--grad-checkpoint"] * (not run.checkpoint)
                flags += ["--precision float32"] * (run.bfloat16 and not others[-1].bfloat16)
                flags += ["--keep-quantized"] * (others[-1].packed and not run.packed)
                found.append(" ".join([*flags, f"--batch-size 1 --max-seq-length {short.prefix + short.width + 1}"]))
                break
    return found


def _smaller(load: Load, rows: int) -> Load:
    share = rows / load.rows
    return replace(
        load,
        rows=rows,
        tokens=load.prefix + round((load.tokens - load.prefix) * share),
        supervised=max(1, round(load.supervised * share)),
    )


def _shorter(load: Load, parts: int) -> Load:
    width = max(1, load.width // parts)
    return replace(
        load,
        width=width,
        prefix=load.prefix // parts,
        tokens=load.prefix // parts + load.rows * width,
        supervised=min(load.supervised, load.rows * width),
        most_supervised=min(load.most_supervised, width),
    )
