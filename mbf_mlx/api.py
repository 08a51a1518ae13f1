"""class Stream, the public Python face: what the commands do, without a terminal.

stream = Stream.open("assistant", base="models/smollm2-135m-instruct")
stream.learn("tasks/mail.jsonl", epochs=3)
stream.status()["average_accuracy"]
stream.export("mlx", "assistant-fused")
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mbf_mlx.config import DataConfig, LearnConfig, LoRAConfig, ServeConfig, TrainConfig
from mbf_mlx.data.task import Task, read_task
from mbf_mlx.device import backend, lighter_imports
from mbf_mlx.errors import InputError
from mbf_mlx.learning.events import Events
from mbf_mlx.learning.team import Team
from mbf_mlx.methods import Factors, Method, Seen, State, make
from mbf_mlx.methods.registry import DEFAULT_METHOD, UNLOADED_METHOD
from mbf_mlx.stream.folder import StreamFolder
from mbf_mlx.stream.records import TaskRecord
from mbf_mlx.stream.status import status_document

if TYPE_CHECKING:
    from mbf_mlx.base.sources import BaseFolder
    from mbf_mlx.exchange import Absorbed
    from mbf_mlx.learning.learner import Learner, LoadLearner
    from mbf_mlx.serving.speaker import Speaker

    Find = Callable[[str], BaseFolder]  # from a base model's name to its folder


class Stream:
    """One base model that learns task after task into one folder. `Stream.open` returns one."""

    def __init__(
        self,
        folder: StreamFolder,
        find: "Find",
        base: str | None = None,
        keep_quantized: bool = False,
        load_learner: "LoadLearner | None" = None,
    ) -> None:
        self.folder, self._find = folder, find
        self._base_name, self._keep_quantized, self._load_learner = base, keep_quantized, load_learner
        self._learner: Learner | None = None

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        base: str | None = None,
        method: str | None = None,
        method_options: dict[str, Any] | None = None,
        lora: LoRAConfig | Mapping[str, Any] | None = None,
        template: str | None = None,
        seed: int = 0,
        keep_quantized: bool = False,
        quantize: int = 0,
        load: bool = True,
        load_learner: "LoadLearner | None" = None,
        report: Callable[[str], None] = lambda line: None,
    ) -> "Stream":
        """Open a stream, or make a new one if there is none and `base` names a model.

        Args:
            path: The stream's folder.
            base: A recipe's name, a model folder, a GGUF file or a hub id. A stream that exists has to have been made
                with this model; `base` then says where the model is now.
            method, method_options, lora, template: Fixed when a stream is made. If they are given for a stream that
                exists, they have to be its own. The default method is DEFAULT_METHOD, or UNLOADED_METHOD without
                `load`. `lora` holds all of its settings, or only those that differ from what was tried for this base.
            seed: The seed of the first A.
            keep_quantized: On a CPU, keep quantized weights packed: less memory, much slower.
            quantize: Bits for the tensors of a GGUF base whose type MLX lacks; 0 refuses such a file.
            load: Load and try the base of a new stream; without it no mlx is needed.
            load_learner: Loads the base with its factors, in place of `learning.learner.load_learner`; streams on one
                base can share one loaded model in this way.
            report: Called with one line before something that takes time: a download, a conversion.

        Raises:
            InputError: no stream and no base, a base or setting that is not the stream's own, damage.
        """
        path = Path(path)

        def find(name: str) -> "BaseFolder":
            from mbf_mlx.base.sources import resolve_base

            return resolve_base(name, quantize=quantize if name == base else 0, report=report)

        if (path / "stream.json").exists() or base is None:
            from mbf_mlx.learning.new_stream import check_fixed

            stream = cls(StreamFolder.open(path), find, base, keep_quantized, load_learner)
            check_fixed(stream.folder, method, method_options, lora, template)
            return stream
        data = DataConfig(template=template) if template else DataConfig()
        chosen = make(method or (DEFAULT_METHOD if load else UNLOADED_METHOD), method_options)
        if load:
            backend.setup()  # before anything of the base is converted or loaded
        else:
            from mbf_mlx.exchange import check_method

            check_method(chosen)
        from mbf_mlx.base.recipe import lora_config
        from mbf_mlx.base.sources import tried
        from mbf_mlx.learning.new_stream import identity_from_files, identity_from_learner

        source = find(base)
        if not isinstance(lora, LoRAConfig):
            lora = lora_config(tried(source.path), lora or {})
        learner = _load_with(load_learner, source.path, lora, keep_quantized) if load else None
        if learner is None:
            identity = identity_from_files(source, chosen, lora, data)
        else:
            identity = identity_from_learner(source, chosen, lora, data, learner)
        made = StreamFolder.create(path, identity, str(source.path), seed)
        stream = cls(made, find, base, keep_quantized, load_learner)
        stream._learner = learner
        return stream

    # What it does

    def learn(
        self,
        *tasks: str | Path | Task,
        name: str | None = None,
        config: LearnConfig | None = None,
        events: Events | None = None,
        team: Team | None = None,
        **overrides: Any,
    ) -> list[TaskRecord]:
        """Learn tasks in order; each is committed before the next one starts.

        Args:
            tasks: Files or folders, or tasks that have been read.
            name: The name of a single task, in place of its file's name.
            config: How tasks are learned; the template is always the stream's own. Without it, the rate is
                `learning_rate`.
            events: An `events.Events` that is told what happens.
            team: Processes that share each step's rows, from `team.joined()`; this process is the first of them.
            overrides: Fields of LearnConfig, TrainConfig and DataConfig, in place of those of `config`:
                `learn("mail.jsonl", epochs=5, again=True)`.

        Returns:
            The records of the tasks that were learned now; a task that the stream has already is skipped.

        Raises:
            InputError: something of the user's does not fit; the stream keeps what was committed before.
            TypeError: an override that is no such field.
        """
        backend.setup()
        from mbf_mlx.learning.learn import learn_all

        if name is not None and len(tasks) != 1:
            raise InputError(f"--name: expected one task to name, got {len(tasks)}")
        config = config or LearnConfig(train=TrainConfig(learning_rate=self.learning_rate))
        settings = _with(config, {**overrides, "template": self.folder.identity.template})
        read = [task if isinstance(task, Task) else read_task(Path(task), name=name) for task in tasks]
        return learn_all(self.folder, self._load, read, settings, events or Events(), team)

    def absorb(
        self, adapter: str | Path, name: str, *, task: str | Path = "", force: bool = False, again: bool = False
    ) -> "Absorbed":
        """Merge an adapter tuned elsewhere as the next task: see `exchange.absorb`.

        Args:
            adapter: The adapter's folder, in PEFT's or mlx-lm's layout.
            name: The task's name.
            task: The task's file or folder, to be scored on later; a method that measures a task's inputs needs it.
            force, again: The same as the flags of `mbf absorb`.

        Raises:
            InputError: an adapter that does not belong, a name that is taken; the stream is as it was.
        """
        from mbf_mlx import exchange
        from mbf_mlx.data.task import check_name

        with self.folder.writer():
            return exchange.absorb(
                self.folder,
                Path(adapter),
                check_name(name),
                source=str(task),
                force=force,
                again=again,
                look=self._look,
                choose_metric=self._choose_metric,
            )

    def _choose_metric(self, task: Task) -> str:
        """Return the metric that `mbf learn` would score a task by; where base or mlx are missing, by its words."""
        from mbf_mlx.data.words import metric_by_words

        try:
            backend.setup()
            from mbf_mlx.learning.scores import metric_of_task

            return metric_of_task(task, self.base_folder().path, self.folder.identity.template)
        except InputError:  # MissingPackageError is one, too
            return metric_by_words(task)

    def _look(self, method: Method, state: State, tuned: Factors, source: str) -> dict[str, Seen]:
        """Return the inputs that a method measures in a task's training rows; runs the model."""
        backend.setup()
        from mbf_mlx.learning.measure import inputs_of_task

        return inputs_of_task(self._load(), method, state, tuned, Path(source), self._data(), self.folder.path)

    def _data(self) -> DataConfig:
        """Return how rows and prompts of this stream become tokens, by default."""
        return DataConfig(template=self.folder.identity.template, date=self.folder.date())

    def status(self) -> dict[str, Any]:
        """Return the document that `mbf status --json` prints: tasks, scores, sizes, settings."""
        return status_document(self.folder)

    def evaluate(
        self,
        *tasks: str | Path | Task,
        events: Events | None = None,
        data: DataConfig | None = None,
        score_rows: int = 0,
    ) -> dict[str, Any]:
        """Score the deployed adapter on the test rows of the given tasks, or of all that were learned.

        Returns:
            {"tasks": [{"name", "metric", "score", "loss", "rows"}], "average_accuracy"}; a score is None where the
            rows are gone. A task that was learned is scored on the rows, and at the length, that it was learned with.
        """
        backend.setup()
        from mbf_mlx.learning.scores import evaluate_stream

        own = self._data()
        data = replace(data or own, template=own.template, date=own.date)
        settings = LearnConfig(data=data, score_rows=score_rows)
        given = [task if isinstance(task, Task) else read_task(Path(task)) for task in tasks]
        return evaluate_stream(self.folder, self._load, given, settings, events or Events())

    def undo(self) -> TaskRecord:
        """Go back to before the last task; returns what was undone."""
        with self.folder.writer():
            return self.folder.undo()

    def speaker(self) -> "Speaker":
        """Load the base with the deployed adapter, as mlx-lm does, to answer with; see `serving.speaker.Speaker`."""
        backend.setup()
        from mbf_mlx.serving.speaker import Speaker

        return Speaker(self.folder, self.base_folder())

    def generate(
        self, messages: str | list[dict[str, str]], *, max_tokens: int = 256, **sampling: Any
    ) -> Iterator[str]:
        """Yield the answer to a prompt or a conversation, piece by piece, as mlx-lm generates it.

        Args:
            messages: A prompt of the user's, or messages of a conversation.
            max_tokens: After so many the answer ends.
            sampling: `temp` and `top_p` as mlx-lm has them, `seed`; greedy without.
        """
        yield from self.speaker().answer(messages, max_tokens=max_tokens, **sampling)

    def serving(
        self, config: ServeConfig | None = None, *, fused: str | Path | None = None, say: Callable[[str], None] = print
    ) -> AbstractContextManager[Any]:
        """Return a block inside which `server.serve_forever()` answers OpenAI clients; see `serving.server.serving`.

        Args:
            config: Where it listens and how much it takes on.
            fused: An mlx export of this stream, served in place of base and adapter.
            say: Takes one line for whoever runs the server.
        """
        backend.setup()
        lighter_imports.complete()  # a server takes from transformers what mlx-lm's own server does
        from mbf_mlx.serving.server import serving

        return serving(
            self.folder, self.base_folder(), config or ServeConfig(), fused=Path(fused) if fused else None, say=say
        )

    def export(self, target: str, out: str | Path, **options: Any) -> dict[str, Any]:
        """Write the deployed model or adapter as `target` to `out`; see `mbf_mlx.export`."""
        from mbf_mlx.export import export

        return export(self, target, Path(out), **options)

    # How

    @property
    def learning_rate(self) -> float:
        """The peak rate that was tried for this base, if a recipe names one; else the default."""
        from mbf_mlx.base.sources import tried

        known = tried(self.base_path)
        return known.learning_rate if known else TrainConfig.learning_rate

    @property
    def base_path(self) -> str:
        """Where the base model is: what the caller said, or where the stream last found it."""
        return self._base_name or self.folder.current().manifest.base_path

    def _load(self) -> "Learner":
        """Return the learner. The base model is loaded once, after checking that it is the stream's own."""
        if self._learner is None:
            from mbf_mlx.learning.new_stream import lora_of

            path, lora = self.base_folder().path, lora_of(self.folder.identity)
            self._learner = _load_with(self._load_learner, path, lora, self._keep_quantized)
        return self._learner

    def base_folder(self) -> "BaseFolder":
        """Return the folder of the stream's own base model.

        Raises:
            InputError: it is not where it was, another model is there, or its chat template is another one now.
        """
        from mbf_mlx.base.sources import recorded_base
        from mbf_mlx.learning.new_stream import own_base

        if self._base_name is None:
            return own_base(self.folder, recorded_base(self.base_path, self.folder.path))
        return own_base(self.folder, self._find(self._base_name))


def _load_with(load: "LoadLearner | None", path: Path, lora: LoRAConfig, keep_quantized: bool) -> "Learner":
    from mbf_mlx.learning.learner import load_learner

    return (load or load_learner)(path, lora, keep_quantized)


def _with(config: LearnConfig, overrides: dict[str, Any]) -> LearnConfig:
    """Return `config` with the given fields of its own and of its parts replaced."""
    parts: dict[str, Any] = {"train": config.train, "data": config.data}
    own = {field.name for field in fields(LearnConfig)}
    taken = {name: value for name, value in overrides.items() if name in own}
    for part, value in parts.items():
        known = {field.name for field in fields(value)}
        chosen = {name: value for name, value in overrides.items() if name in known}
        taken[part] = replace(taken.get(part, value), **chosen)
        own |= known
    if unknown := sorted(overrides.keys() - own):
        raise TypeError(f"learn() has no argument {unknown[0]!r}; it takes {', '.join(sorted(own))}")
    return replace(config, **taken)
