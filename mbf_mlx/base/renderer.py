"""Renders chat templates in one process of its own, with bounds on time and memory.

A chat template is a stranger's program: it may loop for ever or fill the memory, perhaps for certain conversations
only. So none is compiled or rendered in this process. template_child.py runs in the other one, which is started once,
and again after it had to be ended. It ends by itself when this process does, in whatever way.
"""

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from mbf_mlx.base import template_child
from mbf_mlx.base.chat_templates import writes_date
from mbf_mlx.errors import InputError

SECONDS = 10  # of computing for one request
WAIT = 120  # seconds after which a process that does not even compute is ended
LOOK = 0.1  # seconds between two looks at its memory
BYTES = 2 << 30  # of memory
LETTERS = 10_000_000  # of a text, beside those that come from a long conversation
TOGETHER = 64, 100_000  # conversations in one request, and their letters
_ENCODER = json.JSONEncoder(ensure_ascii=False)  # made once


class Refused(ValueError):
    """A template refuses a conversation, or is none; the message is the template's or jinja's."""


class TemplateLimitError(InputError):
    """A template takes more time or memory for a conversation than any real one does."""


class _Ended(Exception):
    """The process has ended in the middle of a render."""


class Renderer:
    """The other process, and the requests to it. Threads take turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process, if it does not run, so that it is ready when the first render comes."""
        with self._lock:
            self._running()

    def render(self, template: str, values: dict[str, Any], conversations: Sequence[str]) -> list[str]:
        """Return a text for each conversation.

        Args:
            template: The source of a chat template.
            values: What the template is given for all of them, as JSON has it.
            conversations: What it is given for each, a JSON object as text.

        Raises:
            Refused: the template refuses a conversation.
            TemplateLimitError: it takes too much time or memory, or its text is too long.
        """
        now = datetime.now().isoformat() if writes_date(template) else ""
        head = _ENCODER.encode({"template": template, "values": values, "now": now})[:-1]
        texts: list[str] = []
        for group in _groups(conversations):
            texts += self._answer(f'{head}, "conversations": [{", ".join(group)}]}}\n'.encode("utf-8", "surrogatepass"))
        return texts

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def forget(self) -> None:
        """Leave the other process to the process that this one was forked from."""
        self._lock, self._child = threading.Lock(), None

    def _answer(self, line: bytes) -> list[str]:
        with self._lock:
            try:
                answer = self._ask(line)
            except _Ended:  # not by our bounds: perhaps somebody ended it
                try:
                    answer = self._ask(line)
                except _Ended as error:
                    raise _too_much(f"ends the process that renders it ({error})") from None
        kind, said = json.loads(answer.decode("utf-8", "surrogatepass"))
        if kind == "refused":
            raise Refused(said)
        if kind == "memory":
            self.close()  # what is left of its memory may be in pieces
            raise _too_much(f"takes more than {BYTES >> 30} GB of memory for a conversation")
        if kind == "long":
            raise _too_much(f"makes a text of more than {said:,} letters of a conversation")
        texts: list[str] = said
        return texts

    def _ask(self, line: bytes) -> bytes:
        """Return the answer to a line; whatever else happens, no half-read answer is left behind."""
        child = self._running()
        try:
            return _exchange(child, line)
        except BaseException:
            self._end()
            raise

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is not None:
            self._end()
        if self._child is None:
            words = [sys.executable, "-P", str(Path(template_child.__file__)), str(SECONDS), str(BYTES), str(LETTERS)]
            # A group of its own: Ctrl-C in a terminal goes to the parent alone.
            self._child = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
                process_group=0,
            )  # fmt: skip
        return self._child

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            with suppress(OSError):
                pipe.close() if pipe is not None else None


def _groups(conversations: Sequence[str]) -> list[list[str]]:
    """Put conversations together into requests: each costs a change to the other process and back."""
    most, letters = TOGETHER
    groups, room = list[list[str]](), 0
    for one in conversations:
        if not groups or len(groups[-1]) == most or len(one) > room:
            groups.append([])
            room = letters
        groups[-1].append(one)
        room -= len(one)
    return groups


def _exchange(child: subprocess.Popen[bytes], line: bytes) -> bytes:
    """Send a line and return the answer.

    Raises:
        _Ended: the process has ended, and not because it computed too long.
        TemplateLimitError: it computed too long, or took too much memory.
    """
    assert child.stdin is not None and child.stdout is not None
    try:
        rest = memoryview(line)
        while rest:
            rest = rest[child.stdin.write(rest) :]
    except BrokenPipeError:
        raise _Ended(_how(child.wait())) from None
    poll, parts, waited = select.poll(), list[bytes](), 0.0
    poll.register(child.stdout, select.POLLIN)
    while not (parts and parts[-1].endswith(b"\n")):
        if poll.poll(LOOK * 1000):
            part = os.read(child.stdout.fileno(), 1 << 20)
            if not part:
                _raise_end(child.wait())
            parts.append(part)
            continue
        waited += LOOK
        if waited > WAIT:
            raise _too_much(f"gives no answer for {WAIT} seconds")
        with suppress(psutil.Error):
            if psutil.Process(child.pid).memory_info().rss > BYTES:
                raise _too_much(f"takes more than {BYTES >> 30} GB of memory for a conversation")
    return b"".join(parts)


def _raise_end(code: int) -> None:
    if code == -signal.SIGPROF:
        raise _too_much(f"takes more than {SECONDS} seconds for a conversation")
    raise _Ended(_how(code))


def _how(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit status {code}"


def _too_much(what: str) -> TemplateLimitError:
    return TemplateLimitError(
        f"the model's chat template {what}: nothing was rendered"
        "\nhint: look at the template, or take the model from another source"
    )


renderer = Renderer()
atexit.register(renderer.close)
os.register_at_fork(after_in_child=renderer.forget)
