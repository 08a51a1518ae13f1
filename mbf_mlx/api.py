"""class Stream, the public Python face: what the commands do, without a terminal.

stream = Stream.open("assistant", base="models/smollm2-135m-instruct")
stream.learn("tasks/mail.jsonl", epochs=3)
stream.status()["average_accuracy"]
stream.export("mlx", "assistant-fused")
"""

import hashlib
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mbf_mlx.adapters import mlx_lm as adapter
from mbf_mlx.config import DataConfig, LearnConfig, LoRAConfig, ServeConfig, TrainConfig, settings_of
from mbf_mlx.data.task import Task, read_task
from mbf_mlx.device import backend
from mbf_mlx.errors import InputError
from mbf_mlx.learning.events import Events
from mbf_mlx.learning.team import Team
from mbf_mlx.methods import Factors, Layers, Method, Seen, State, make
from mbf_mlx.methods.registry import DEFAULT_METHOD, UNLOADED_METHOD
from mbf_mlx.stream.folder import StreamFolder
from mbf_mlx.stream.records import FORMAT_VERSION, BaseRecord, Identity, TaskRecord
from mbf_mlx.stream.status import status_document

if TYPE_CHECKING:
    from mbf_mlx.base.sources import BaseFolder
    from mbf_mlx.exchange import Absorbed

    Find = Callable[[str], BaseFolder]  # where the base model of a name is


class Stream:
    """One base model that learns task after task into one folder."""

    def __init__(
        self, folder: StreamFolder, find: "Find", base: str | None = None, keep_quantized: bool = False
    ) -> None:
        self.folder, self._find = folder, find
        self._base_name, self._keep_quantized = base, keep_quantized
        self._learner: Any = None

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
        report: Callable[[str], None] = lambda line: None,
    ) -> "Stream":
        """Open a stream, or make one where there is none and `base` says on which model.

        Args:
            path: The stream's folder.
            base: A recipe's name, a model folder, a GGUF file or a hub id; for a stream that is there
                already it must be its own base, and tells where that has moved to.
            method, method_options, lora, template: Fixed when a stream is made; where given for one that is there
                already, they have to be its own. The method is DEFAULT_METHOD, or UNLOADED_METHOD without `load`.
                `lora` is all of its settings, or those that differ from what we have tried for this base.
            seed: Of the first A.
            keep_quantized: On a CPU, keep quantized weights as they are: less memory, much slower.
            quantize: Bits for those tensors of a GGUF base whose type MLX lacks; 0 refuses such a file.
            load: Whether a new stream's base is loaded and tried; without it no mlx is needed.
            report: Told in one line what takes time: a download, a conversion.

        Raises:
            InputError: no such stream and no base, a base or setting that is not the stream's, damage.
        """
        path = Path(path)

        def find(name: str) -> "BaseFolder":
            from mbf_mlx.base.sources import resolve_base

            return resolve_base(name, quantize=quantize if name == base else 0, report=report)

        if (path / "stream.json").exists() or base is None:
            stream = cls(StreamFolder.open(path), find, base, keep_quantized)
            stream._check_fixed(method, method_options, lora, template)
            return stream
        data = DataConfig(template=template) if template else DataConfig()
        chosen = make(method or (DEFAULT_METHOD if load else UNLOADED_METHOD), method_options)
        if load:
            backend.setup()  # before anything of the base's is converted or loaded
        else:
            from mbf_mlx.exchange import check_method

            check_method(chosen)
        from mbf_mlx.base.recipe import lora_config
        from mbf_mlx.base.sources import tried

        source = find(base)
        if not isinstance(lora, LoRAConfig):
            lora = lora_config(tried(source.path), lora or {})
        if load:
            identity, learner = cls._loaded(source, chosen, lora, data, keep_quantized)
        else:
            identity, learner = cls._unloaded(source, chosen, lora, data), None
        stream = cls(StreamFolder.create(path, identity, str(source.path), seed), find, base, keep_quantized)
        stream._learner = learner
        return stream

    @staticmethod
    def _loaded(
        source: "BaseFolder", method: Method, lora: LoRAConfig, data: DataConfig, keep_quantized: bool
    ) -> tuple[Identity, Any]:
        """Return what a new stream is, of a base that is loaded and tried, and the learner."""
        from mbf_mlx.learning.learner import load_learner

        learner = load_learner(source.path, lora, keep_quantized)
        loaded, layers = learner.base, learner.layers
        template = loaded.tokenizer.chat_template if data.template == "chat" else None
        record = BaseRecord(
            name=source.name,
            fingerprint=loaded.fingerprint,
            quantization=loaded.quantization,
            architecture=str(loaded.config.get("model_type")),
            num_layers=len(loaded.model.layers),
        )
        return _identity(record, method, lora, layers, template), learner

    @staticmethod
    def _unloaded(source: "BaseFolder", method: Method, lora: LoRAConfig, data: DataConfig) -> Identity:
        """Return what a new stream is, from the base's files alone."""
        from mbf_mlx.base import folder as outline
        from mbf_mlx.base.fingerprint import fingerprint
        from mbf_mlx.base.sources import read_config

        config = read_config(source.path)
        layers, blocks = outline.chosen_layers(source.path, lora.keys, lora.num_layers)
        record = BaseRecord(
            name=source.name,
            fingerprint=fingerprint(source.path),
            quantization=outline.describe_quantization(config),
            architecture=str(config.get("model_type")),
            num_layers=blocks,
        )
        template = outline.template_text(source.path) if data.template == "chat" else None
        return _identity(record, method, lora, layers, template)

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
            tasks: Files or folders, or tasks that were read already.
            name: Of a single task, in place of its file's.
            config: How; the template is the stream's whatever it says. Without it, the rate is `learning_rate`.
            events: An `events.Events` that is told what happens.
            team: Processes that share each step's rows, `parallel.joined()`; this one is the first, the others work.
            overrides: Fields of LearnConfig, TrainConfig and DataConfig, in place of those of `config`:
                `learn("mail.jsonl", epochs=5, again=True)`.

        Returns:
            The records of the tasks that were learned now; one that the stream has already is skipped.

        Raises:
            InputError: anything of the user's that does not fit; the stream keeps what was committed before.
            TypeError: an override that is no such field.
        """
        backend.setup()
        from mbf_mlx.learning import learn as learning
        from mbf_mlx.learning.scores import TestRows

        if name is not None and len(tasks) != 1:
            raise InputError(f"--name: expected one task to name, got {len(tasks)}")
        config = config or LearnConfig(train=TrainConfig(learning_rate=self.learning_rate))
        settings = _with(config, {**overrides, "template": self.folder.identity.template})
        events = events or Events()
        read = [task if isinstance(task, Task) else read_task(Path(task), name=name) for task in tasks]
        todo = [task for task in read if not self._skip(task, settings.again, events)]
        records = []
        if not todo:
            self.folder.tidy()  # a run killed just after its last commit is over with this
        else:
            with self.folder.writer():
                learner = self._load()
                method = make(self.folder.identity.method, self.folder.identity.method_options)
                tests = TestRows(learner.tokenizer, settings.data.template, self.folder.path)
                for number, task in enumerate(todo):
                    if self._skip(task, settings.again, events):
                        continue  # another process has learned it meanwhile, or it is named twice
                    chosen = replace(settings, restart=settings.restart and number == 0)
                    records.append(learning.learn_task(self.folder, learner, method, task, chosen, events, tests, team))
        return records

    def absorb(
        self, adapter: str | Path, name: str, *, task: str | Path = "", force: bool = False, again: bool = False
    ) -> "Absorbed":
        """Merge an adapter tuned elsewhere as the next task: see `exchange.absorb`.

        Args:
            adapter: Its folder, in PEFT's or mlx-lm's layout.
            name: The task's.
            task: Its file or folder, to be scored on later; a method that measures a task's inputs needs it.
            force, again: As for `mbf absorb`.

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
            )

    def _look(self, method: Method, state: State, tuned: Factors, source: str) -> dict[str, Seen]:
        """Return the inputs that a method measures in a task's training rows; runs the model."""
        backend.setup()
        from mbf_mlx.learning.measure import inputs_of_task

        template = self.folder.identity.template
        return inputs_of_task(self._load(), method, state, tuned, Path(source), template, self.folder.path)

    def _skip(self, task: Task, again: bool, events: Any) -> bool:
        from mbf_mlx.learning.learn import known

        if not known(self.folder, task, again):
            return False
        events.note(f"{task.name}: learned already, skipped (--again learns it once more)")
        return True

    def status(self) -> dict[str, Any]:
        """Return the document that `mbf status --json` prints: tasks, scores, sizes, settings."""
        return status_document(self.folder)

    def evaluate(
        self, *tasks: str | Path | Task, events: Any = None, data: DataConfig | None = None, score_rows: int = 0
    ) -> dict[str, Any]:
        """Score the deployed adapter on the test rows of the given tasks, or of all that were learned.

        Returns:
            {"tasks": [{"name", "metric", "score", "loss", "rows"}], "average_accuracy"}; a score is None where the
            rows are gone. A task that was learned is scored on the rows, and at the length, that it was learned with.
        """
        backend.setup()
        from mbf_mlx.engine.lora_layers import write_factors
        from mbf_mlx.learning.evaluate import Score, metric_of
        from mbf_mlx.learning.scores import TestRows, score_all

        settings = LearnConfig(
            data=replace(data or DataConfig(), template=self.folder.identity.template), score_rows=score_rows
        )
        events = events or Events()
        given = [task if isinstance(task, Task) else read_task(Path(task)) for task in tasks]
        history, state = self.folder.history(), self.folder.state()
        if not given and not history:
            raise InputError(f"{self.folder.path}: nothing to score: it has learned no task")
        learner = self._load()
        learner.base.model.eval()
        if state.t:
            write_factors(learner.base.model, state.deployed)
        tests = TestRows(learner.tokenizer, settings.data.template, limit=score_rows)
        scores: list[Score | None] = []
        names: list[str] = []
        kinds: list[str] = []
        learned = {record.sha256: record for record in history}  # a task is scored as it was learned
        for each in given or history:
            record = learned.get(each.sha256) if isinstance(each, Task) else each
            if record is None and isinstance(each, Task):
                scores += score_all([], each, learner, settings, events, tests)
                kinds.append(metric_of(tests.of_task(each, settings.data, score_rows)))
            elif record is not None:
                scores += score_all([record], None, learner, settings, events, tests)
                kinds.append(record.metric)
            names.append(each.name)
        rows = [
            {
                "name": name,
                "metric": score.metric if score else kind,
                "score": score.value if score else None,
                "loss": score.loss if score else None,
                "rows": score.rows if score else 0,
            }
            for name, kind, score in zip(names, kinds, scores, strict=True)
        ]
        values = [score.value for score in scores if score and score.value is not None]
        return {"tasks": rows, "average_accuracy": sum(values) / len(values) if values else None}

    def undo(self) -> TaskRecord:
        """Go back to before the last task; returns what was undone."""
        with self.folder.writer():
            return self.folder.undo()

    def speaker(self) -> Any:
        """Return what answers with the deployed adapter, loaded as mlx-lm loads it; see `serving.speaker.Speaker`."""
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
        """The peak rate tried for this base, where a recipe vouches for it; else the default."""
        from mbf_mlx.base.sources import tried

        known = tried(self.base_path)
        return known.learning_rate if known else TrainConfig.learning_rate

    @property
    def base_path(self) -> str:
        """Where the base model is: what the caller said, or where the stream last found it."""
        return self._base_name or self.folder.current().manifest.base_path

    def _load(self) -> Any:
        """Return the learner, loading the base model once and checking that it is the stream's own."""
        if self._learner is None:
            from mbf_mlx.learning.learner import load_learner

            identity = self.folder.identity
            lora = LoRAConfig(
                rank=identity.rank,
                scale=identity.scale,
                keys=tuple(identity.keys),
                num_layers=identity.num_layers,
                dropout=identity.dropout,
            )
            source = self.base_folder()
            self._learner = load_learner(source.path, lora, self._keep_quantized)
        return self._learner

    def base_folder(self) -> "BaseFolder":
        """Return where the stream's own base model is.

        Raises:
            InputError: it is not where it was, another model is, or it has another chat template now.
        """
        from mbf_mlx.base.fingerprint import fingerprint
        from mbf_mlx.base.folder import check_template

        own = self.folder.identity.base
        try:
            source = self._find(self.base_path)
        except InputError as error:
            if self._base_name is not None:
                raise
            raise InputError(
                f"{self.folder.path}: its base model {own.name} is not where it was ({self.base_path})"
                "\nhint: say where it is now with --model"
            ) from error
        found = fingerprint(source.path)
        if found != own.fingerprint:
            raise InputError(
                f"{source.path} is not the base model of {self.folder.path}: expected {own.name} with fingerprint"
                f" {own.fingerprint[:12]}, got {found[:12]}\nhint: --model names the base that the stream was made with"
            )
        check_template(source.path, self.folder.identity.template_sha256, self.folder.path)
        return source

    def _check_fixed(
        self,
        method: str | None,
        options: dict[str, Any] | None,
        lora: LoRAConfig | Mapping[str, Any] | None,
        template: str | None,
    ) -> None:
        identity, wrong = self.folder.identity, []
        asked: list[tuple[str, Any, Any]] = [("method", method, identity.method)]
        if options is not None:
            asked.append(("method options", make(identity.method, options).options, identity.method_options))
        if template is not None:
            asked.append(("template", template, identity.template))
        given: dict[str, Any] = settings_of(lora) if isinstance(lora, LoRAConfig) else dict(lora or {})
        asked += [(key, given.get(key), getattr(identity, key)) for key in ("rank", "scale", "dropout")]
        if given.get("num_layers", -1) != -1:
            asked.append(("num_layers", given["num_layers"], identity.num_layers))
        short = {key.rpartition(".")[2] for key in identity.keys}
        if not set(given.get("keys", ())) <= short | set(identity.keys):
            asked.append(("keys", list(given["keys"]), identity.keys))
        wrong = [f"  {key}: expected {has!r}, got {want!r}" for key, want, has in asked if want not in (None, has)]
        if wrong:
            raise InputError(
                f"{self.folder.path} was made with other settings, which stay for its life:\n"
                + "\n".join(wrong)
                + "\nhint: leave them out, or learn into a new stream"
            )


def _identity(base: BaseRecord, method: Method, lora: LoRAConfig, layers: Layers, template: str | None) -> Identity:
    lora.check_rank(layers)
    return Identity(
        format_version=FORMAT_VERSION,
        id=uuid.uuid4().hex,
        base=base,
        method=method.name,
        method_options=method.options,
        rank=lora.rank,
        scale=lora.scale,
        keys=list(adapter.block_keys(layers)),
        num_layers=lora.num_layers if lora.num_layers > 0 else base.num_layers,
        dropout=lora.dropout,
        template="chat" if template else "none",
        template_sha256=hashlib.sha256(str(template or "").encode()).hexdigest(),
        layers=layers,
    )


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
