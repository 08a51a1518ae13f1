"""One process of a run of several, as `mbf learn` is one, that writes down every step's loss: JSON STREAM BASE TASK.

tests/learning/test_team.py starts it.
"""

import json
import sys
from pathlib import Path

from mbf_mlx import Stream
from mbf_mlx.base.sources import resolve_base
from mbf_mlx.config import LoRAConfig
from mbf_mlx.learning.events import Events
from mbf_mlx.learning.team import joined
from mbf_mlx.learning.worker import work

SETTINGS = {"epochs": 2, "batch_size": 5, "grad_accumulation_steps": 2, "learning_rate": 5e-3}


class Losses(Events):
    def __init__(self):
        self.all = []

    def step(self, name, step, peak_memory):
        self.all.append(step.loss)


def learn(stream, base, task, team=None):
    """Return the loss of every step."""
    losses = Losses()
    opened = Stream.open(stream, base=str(base), lora=LoRAConfig(rank=4))
    opened.learn(task, team=team, events=losses, **SETTINGS)
    return losses.all


if __name__ == "__main__":
    out, stream, base, *tasks = sys.argv[1:]
    with joined() as team:
        if team.rank:
            work(team, resolve_base, base)
        else:
            losses = [learn(stream, base, task, team) for task in tasks]
            Path(out).write_text(json.dumps({"size": team.size, "losses": losses}))
