"""What every process but the first does in a run of several: hold the base model and compute its share of each step.

A worker touches no stream, reads no task file and prints nothing. Rows, method, state and factors come from process 0.
"""

from collections.abc import Callable
from pathlib import Path

from mbf_mlx.base.decisive_files import decisive_files
from mbf_mlx.base.fingerprint import fingerprint
from mbf_mlx.base.sources import BaseFolder, recorded_base
from mbf_mlx.config import LearnConfig, LoRAConfig, TrainConfig
from mbf_mlx.errors import InputError
from mbf_mlx.learning.learn import start_task
from mbf_mlx.learning.learner import Learner, load_learner
from mbf_mlx.learning.step_rules import seed_dropout
from mbf_mlx.learning.team import END, Message, Team
from mbf_mlx.learning.team_task import rows_of, state_of
from mbf_mlx.learning.train import Sums
from mbf_mlx.methods import make


def work(team: Team, find: Callable[[str], BaseFolder], base: str | None = None) -> None:
    """Compute shares of steps until process 0 ends the run.

    Args:
        team: The team, as a process that is not the first sees it.
        find: Returns where the base model of a given name is on this machine.
        base: The base's name on this machine; None takes the path that process 0 has.

    Raises:
        InputError: the base model is not here or is a different one, or process 0 is gone.
    """
    worker: _Worker | None = None
    learner: Learner | None = None
    while (message := team.hear()).kind != END:
        if message.kind == "task":
            learner = learner or _load(team, message, find, base)
            worker = _Worker(team, learner, message)
        elif worker is not None:
            worker.step(message)


class _Worker:
    """What the steps of one task need."""

    def __init__(self, team: Team, learner: Learner, message: Message) -> None:
        self.team, self.seed = team, message.values["seed"]
        train = TrainConfig(grad_checkpoint=message.values["checkpoint"], precision=message.values["precision"])
        settings = LearnConfig(train=train, memory_limit=message.values["memory_limit"])
        name, options = message.values["method"]
        self.tuning = start_task(learner, make(name, options), state_of(message), settings)
        self.tuning.model.train()
        self.sums = Sums(self.tuning, learner.engine, rows_of(message))

    def step(self, message: Message) -> None:
        """Compute our share of a step and add it to those of the others."""
        seed_dropout(self.seed, message.values["number"], self.team.rank)
        self.tuning.update(message.tensors)
        self.sums.over(self.team, message.values["batches"])


def _load(team: Team, message: Message, find: Callable[[str], BaseFolder], base: str | None) -> Learner:
    values = message.values["base"]
    here = f"process {team.rank} of {team.size}"
    try:
        folder = (find(base) if base else recorded_base(values["path"], Path("the run"))).path
    except InputError as error:
        raise InputError(f"{here}: {error}") from error
    if fingerprint(folder) != values["fingerprint"] or decisive_files(folder) != values["files"]:
        raise InputError(f"{here}: {folder} is not the base model that process 0 has\nhint: copy it, or say --model")
    lora = LoRAConfig(**{**values["lora"], "keys": tuple(values["lora"]["keys"])})
    return load_learner(folder, lora, values["packed"])
