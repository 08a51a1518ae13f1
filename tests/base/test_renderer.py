"""No chat template, whatever it waits for, takes more than its bounds on time and memory; and it ends nobody else."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from mbf_mlx.base import renderer as module
from mbf_mlx.base.renderer import Refused, Renderer, TemplateLimitError
from tests.conftest import ROOT

pytest.importorskip("jinja2", reason="jinja2 is not installed: pip install 'mbf-mlx[cpu]'")

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
GROWS = "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}"
TALKS = "{% for i in range(99999) %}{% for j in range(999) %}{{ 'word ' * 10 }}{% endfor %}{% endfor %}"
SECONDS = "takes more than 1 seconds for a conversation"
MEMORY = "takes more than 2 GB of memory for a conversation"
LETTERS = r"makes a text of more than 10,\d\d\d,\d\d\d letters"
BAD = {
    "a loop without an end": (LOOP, SECONDS),
    "a text that doubles": (GROWS, f"({MEMORY}|{SECONDS})"),
    "a text of 1 GB from a loop": (TALKS, LETTERS),
    "a huge text that is known when it is compiled": ("{{ 'a' * 10**10 }}", MEMORY),
    "a huge list": ("{% set x = [0] * 10**9 %}{{ x | length }}", MEMORY),
    "a long way through one function": ("{{ lipsum(n=10000000) }}", SECONDS),
    "a power that takes for ever": ("{% set n = 10 ** (10 ** 9) %}", SECONDS),
}
WAITS = {
    "a word": ("{% if 'boom' in messages[-1].content %}", {"messages": [{"role": "user", "content": "boom"}]}),
    "a system message": ("{% if messages[0].role == 'system' %}", {"messages": [{"role": "system", "content": "a"}]}),
    "tools": ("{% if tools %}", {"tools": [{"name": "f"}]}),
    "the fifth turn": ("{% if messages | length > 4 %}", {"messages": [{"role": "user", "content": "a"}] * 5}),
}
PLAIN = {"messages": [{"role": "user", "content": "Hello."}], "tools": None, "add_generation_prompt": True}


@pytest.fixture
def renderer(monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 1)
    own = Renderer()
    yield own
    own.close()


def render(renderer, template, **values):
    return renderer.render(template, {}, [json.dumps(PLAIN | values)])[0]


@pytest.mark.parametrize("case", BAD)
def test_a_template_that_takes_too_much_is_ended_and_the_next_one_is_rendered(renderer, case):
    template, said = BAD[case]
    began = time.monotonic()
    with pytest.raises(TemplateLimitError, match=f"the model's chat template {said}.*\nhint: ") as caught:
        render(renderer, template)
    assert str(caught.value).count("\n") == 1 and time.monotonic() - began < 30
    assert render(renderer, "{{ messages[0].content }}") == "Hello."


@pytest.mark.parametrize("case", WAITS)
def test_a_template_that_waits_for_another_conversation_is_ended_then(renderer, case):
    condition, values = WAITS[case]
    template = condition + LOOP + "{% endif %}fine"
    assert render(renderer, template) == "fine"
    with pytest.raises(TemplateLimitError, match=SECONDS):
        render(renderer, template, **values)
    assert render(renderer, template) == "fine"


def test_where_the_system_limits_no_memory_what_the_process_holds_is_watched(renderer, monkeypatch):
    # As on macOS: the limit is far away. The list is made slowly enough to be seen.
    monkeypatch.setattr(module, "BYTES", 200 << 30)
    renderer.start()
    monkeypatch.setattr(module, "BYTES", 300 << 20)
    more = "{% set ns.x = ns.x + [range(99999) | list] %}"
    slow = "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}" + more + "{% endfor %}"
    with pytest.raises(TemplateLimitError, match=r"takes more than \d GB of memory"):
        render(renderer, slow)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('no') }}", "^no$"),
        ("{% broken", "unknown tag"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{{ raise_exception('a' * 10**6) }}", "^a{2000}$"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% for i in range(10**6) %}{% endfor %}", "Range too big"),
    ],
)
def test_what_a_template_says_against_a_conversation_comes_back(renderer, template, said):
    with pytest.raises(Refused, match=said):
        render(renderer, template)
    (child,) = [renderer._child]
    assert render(renderer, "x") == "x" and renderer._child is child  # the same process goes on


def test_every_letter_comes_back_as_it_was(renderer):
    texts = ["\ud83d\ude00", "\U0001f600", "\u2028\x00\r\n\x1b", "日本", '"\\{{ a }}']
    for text in texts:
        talk = json.dumps({"text": text}, ensure_ascii=False)
        assert renderer.render("{{ text }}|{{ own }}", {"own": text}, [talk]) == [f"{text}|{text}"]


def test_a_long_conversation_and_many_of_them_come_back_in_order(renderer):
    long = "word " * 1_000_000  # more than a pipe holds
    talks = [json.dumps({"text": f"{number} {long if number == 70 else ''}"}) for number in range(150)]
    found = renderer.render("{{ text }}{{ text }}{{ text }}", {}, talks)
    assert [text.split()[0] for text in found] == [str(number) for number in range(150)]
    assert len(found[70]) == 3 * (len(long) + 3)


def test_a_process_that_is_killed_in_the_middle_is_started_again(renderer):
    slow = "{% for i in range(99999) %}{% for j in range(40) %}{% endfor %}{% endfor %}done"
    for number in (signal.SIGKILL, signal.SIGTERM):
        render(renderer, "x")
        child = renderer._child
        timer = threading.Timer(0.02, child.send_signal, [number])
        timer.start()
        assert render(renderer, slow) == "done"
        timer.join()
        assert child.poll() is not None and renderer._child is not child


def test_a_process_that_is_always_killed_is_told_of(renderer, monkeypatch):
    def killed(child, line):
        child.kill()
        return exchange(child, line)

    exchange = module._exchange
    monkeypatch.setattr(module, "_exchange", killed)
    with pytest.raises(TemplateLimitError, match=r"ends the process that renders it \(signal 9\)"):
        render(renderer, LOOP)


def test_threads_get_their_own_texts(renderer):
    def one(number):
        if number == 33:
            with pytest.raises(TemplateLimitError):
                render(renderer, LOOP)
            return "33"
        return render(renderer, f"{{{{ messages[0].content }}}} {number % 20}", messages=[{"content": str(number)}])

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(one, range(400)))
    assert texts == ["33" if number == 33 else f"{number} {number % 20}" for number in range(400)]


def test_an_interrupted_render_leaves_no_answer_behind(renderer):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(5):
            render(renderer, "x")
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(KeyboardInterrupt):
                render(renderer, LOOP)
            assert render(renderer, "next") == "next"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


PARENT = """
import os, signal, sys, time
from mbf_mlx.base.renderer import renderer
print(renderer.render("{{ a }}", {"a": 1}, ["{}"])[0], renderer._child.pid, flush=True)
END
"""


def parent(end):
    code, environment = PARENT.replace("END", end), {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=-1, stderr=-1, text=True, env=environment, start_new_session=True
    ) as process:
        said, pid = process.stdout.readline().split()
        assert said == "1"
        yield process, int(pid)
        assert process.stderr.read() == ""
    for _ in range(100):
        if not psutil.pid_exists(int(pid)) or psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.05)
    raise AssertionError(f"{pid} lives on")


@pytest.mark.parametrize("end", ["pass", "os._exit(0)", "os.kill(os.getpid(), signal.SIGKILL)", "sys.exit(3)"])
def test_the_process_ends_with_its_parent(end):
    for process, _ in parent(end):
        process.wait()


def test_the_process_ends_when_its_parent_is_killed_in_the_middle_of_a_render():
    for process, _ in parent(f"renderer.render({LOOP.replace('99999', '5000')!r}, {{}}, ['{{}}'])"):
        time.sleep(0.2)
        process.kill()


def test_ctrl_c_is_the_parents_matter_alone():
    end = (
        "try: time.sleep(60)\n"
        "except KeyboardInterrupt: print(renderer.render('on', {}, ['{}'])[0], renderer._child.pid)"
    )
    for process, pid in parent(end):
        time.sleep(0.5)  # until it sleeps
        os.killpg(process.pid, signal.SIGINT)
        assert process.stdout.read().split() == ["on", str(pid)]


def test_a_forked_process_has_a_renderer_of_its_own():
    end = (
        "child = os.fork()\n"
        "text = renderer.render('{{ a }}', {'a': bool(child)}, ['{}'])[0]\n"
        "own = renderer._child.pid\n"
        "if not child: os._exit(0 if text == 'False' else 1)\n"
        "print(text, own, os.waitpid(child, 0)[1])"
    )
    for process, pid in parent(end):
        assert process.stdout.read().split() == ["True", str(pid), "0"]
