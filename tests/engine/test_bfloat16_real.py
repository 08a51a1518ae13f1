"""What training in bfloat16 keeps on SmolLM2 and real rows: gradients, and the loss of twenty steps."""

import numpy as np
import pytest

from mbf_mlx.config import DataConfig, LoRAConfig, TrainConfig
from mbf_mlx.data.batches import make_batch
from mbf_mlx.data.encode import Encoder
from mbf_mlx.data.task import read_task
from mbf_mlx.device import backend, bfloat16
from tests.conftest import ROOT

pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")

from mbf_mlx.learning.learner import load_learner
from mbf_mlx.learning.train import Sums, train
from mbf_mlx.learning.tuning import Tuning
from mbf_mlx.methods import empty_state, make

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bfloat16.library() is None, reason=bfloat16.reason())]
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("keys", [("q_proj", "v_proj"), ALL], ids=["q and v", "all"])
def test_gradients_and_losses_are_float32s_within_the_bounds(smollm2, keys):
    backend.setup("cpu")
    learner = load_learner(smollm2, LoRAConfig(keys=keys))
    task = read_task(ROOT / "mbf_mlx/quickstart/inbox")
    rows = Encoder(learner.tokenizer, DataConfig()).all(task.train, task.path)
    method, config = make("sequential"), TrainConfig(iters=20, batch_size=8, learning_rate=5e-4)
    curves, gradients, start = {}, {}, None
    for precision in ("float32", "bfloat16"):
        learner.engine.multiply_in(precision)
        tuning = Tuning(learner.base.model, method, empty_state(learner.layers, 8))
        gradients[precision] = [gradient(tuning, learner.engine, rows)]
        curves[precision] = train(tuning, learner.engine, rows, [], config).progress.losses
        start = start or tuning.named()
        tuning.take(start)  # the same place for both
        gradients[precision].append(gradient(tuning, learner.engine, rows))
    cosines = [cosine(one, other) for one, other in zip(gradients["float32"], gradients["bfloat16"], strict=True)]
    assert cosines[0] >= 0.999 and cosines[1] >= 0.99  # after the steps, most of the gradient has cancelled out
    one, other = gradients["float32"][0], gradients["bfloat16"][0]
    assert np.linalg.norm(one - other) <= 0.02 * np.linalg.norm(one)
    assert np.mean(curves["bfloat16"]) == pytest.approx(np.mean(curves["float32"]), rel=0.01)


def cosine(one, other):
    return one @ other / np.linalg.norm(one) / np.linalg.norm(other)


def gradient(tuning, engine, rows):
    """The gradient of eight rows, as one vector."""
    _, found = Sums(tuning, engine, rows)([make_batch(rows, range(8))])
    return np.concatenate([np.array(found[name]).ravel() for name in sorted(found)])
