"""The program of the process that renders chat templates. renderer.py starts it; it needs jinja2 and nothing of ours.

A request is a line of JSON: {"template", "values", "conversations", "now"}. The answer is a line of JSON, too: ["text",
a text for each conversation], or "refused" with the reason, or "memory", or "long" with the letters that a text may
have. A render that computes too long ends the process: the kernel sends SIGPROF. At the end of its input the process
ends, so none stays behind when its parent is killed.

The environment is the one that transformers gives to chat templates; a test compares the two.
"""

import json
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from typing import Any

KEPT = 16  # compiled templates
REASON = 2000  # letters that are kept of what a template says against a conversation
EACH = 20  # a text may have this many letters for each byte of the request, beyond those that every text may have


def make_environment(now: Callable[[], datetime]) -> Any:
    """Return the sandbox for chat templates.

    Args:
        now: Gives the time that `strftime_now` writes.
    """
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):  # type: ignore[misc]
        """`{% generation %}` marks what the assistant says; the text between the marks is written as it is."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

        def _written(self, caller: Callable[[], str]) -> str:
            return caller()

    class Names(Namespace):  # type: ignore[misc]
        """A namespace without names that lead into Python."""

        def __init__(*args: Any, **named: Any) -> None:
            # The first argument has no name, so that a template may store one that is called "self".
            own, *pairs = args
            found = dict(*pairs, **named)
            for name in found:
                _check_name(name)
            Namespace.__init__(own, found)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            super().__setitem__(name, value)

    def _check_name(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace stores no names that begin with an underscore, got {name!r}")

    class Dict:
        """`dict` without the attributes of a class."""

        def __call__(self, *pairs: Any, **named: Any) -> dict[Any, Any]:
            return dict(*pairs, **named)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda format: now().strftime(format),
        "dict": Dict(),
        "namespace": Names,
    }
    return environment


class _Long(Exception):
    """A text has more letters than it may have."""


class Answering:
    """Answers requests.

    Args:
        letters: That a text may have, beside those that come from a long request.
    """

    def __init__(self, letters: int) -> None:
        self._letters, self._now = letters, datetime.now()
        self._environment = make_environment(lambda: self._now)
        self._compiled: dict[str, Any] = {}

    def answer(self, line: bytes) -> list[Any]:
        """Return the answer to one line."""
        most = self._letters + EACH * len(line)
        try:
            request = json.loads(line.decode("utf-8", "surrogatepass"))
            self._now = datetime.fromisoformat(request["now"]) if request["now"] else datetime.now()
            template = self._template(request["template"])
            return ["text", [_render(template, request["values"] | each, most) for each in request["conversations"]]]
        except MemoryError:
            return ["memory", ""]
        except _Long:
            return ["long", most]
        except Exception as error:  # a template may raise anything
            return ["refused", (str(error) or type(error).__name__)[:REASON]]

    def _template(self, source: str) -> Any:
        if source not in self._compiled:
            if len(self._compiled) == KEPT:
                del self._compiled[next(iter(self._compiled))]
            self._compiled[source] = self._environment.from_string(source)
        return self._compiled[source]


def _render(template: Any, values: dict[str, Any], most: int) -> str:
    pieces, made = [], 0
    for piece in template.generate(values):
        made += len(piece)
        if made > most:
            raise _Long
        pieces.append(piece)
    return "".join(pieces)


def _limit_memory(size: int) -> None:
    import resource

    for kind, most in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_AS, size)):
        with suppress(OSError, ValueError):  # some systems have no such limit: the parent watches the memory, too
            resource.setrlimit(kind, (most, most))


def main() -> None:
    """Answer line by line until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's matter
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process in the middle of whatever it computes
    seconds, size, letters = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    _limit_memory(size)
    answering, encoder, out = Answering(letters), json.JSONEncoder(ensure_ascii=False), sys.stdout.buffer
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        answer = encoder.encode(answering.answer(line))
        out.write(answer.encode("utf-8", "surrogatepass") + b"\n")
        out.flush()


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        main()
