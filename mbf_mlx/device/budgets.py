"""Memory budgets: how many bytes one piece of work may take at a time."""

LOGITS_BYTES = 256 * 2**20  # all arrays of the size of the logits, together
LOGITS_COPIES = 3  # how many such arrays there are: logits, their exponentials, their gradient; all in float32
KEPT_WEIGHTS = 32 * 2**20  # larger attention weights of one block are computed again in the backward pass
KEPT_TOKENS = 2**30  # keys and values of the rows that are answered together
PIECE_BYTES = 64 * 2**20  # how much of a weight a layer that stays packed unpacks at a time
