"""Bytes that one piece of work may take on this machine at a time."""

LOGITS_BYTES = 256 * 2**20  # what all arrays of the size of the logits may hold together


LOGITS_COPIES = 3  # of them at a time: logits, their exponentials, their gradient; all in float32


KEPT_WEIGHTS = 32 * 2**20  # up to this, a block keeps the attention weights of a part of a batch for the way back


PIECE_BYTES = 64 * 2**20  # of a weight unpacked at a time by the layers that stay packed
