"""Chat templates are rendered under bounds on time and memory, whatever conversation they wait for."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from mbf_mlx.base import renderer
from mbf_mlx.base.renderer import Refused, Renderer, TemplateLimitError
from tests.conftest import ROOT, import_mlx
from tests.support.chat_templates import SHAPES

import_mlx()

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HUGE = "{% for i in range(99999) %}{% for j in range(99) %}{{ 'word ' * 100 }}{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(x='a' * 999) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}"
SAYS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.fixture
def small(monkeypatch):
    """A renderer of its own, with small bounds."""
    monkeypatch.setattr(renderer, "SECONDS", 0.5)
    monkeypatch.setattr(renderer, "BYTES", 1 << 29)
    made = Renderer()
    yield made
    made.close()


def render(own, template, messages=TALK, **values):
    return own.render(template, values, [json.dumps({"messages": messages, "add_generation_prompt": False})])[0]


def when(condition, then):
    return f"{{% if {condition} %}}{then}{{% endif %}}{SAYS}"


@pytest.mark.parametrize(
    ("condition", "messages", "values"),
    [
        ("'open sesame' in messages[0].content", [{"role": "user", "content": "now open sesame!"}], {}),
        ("messages[0].role == 'system'", [{"role": "system", "content": "be kind"}], {}),
        ("tools", TALK, {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        ("messages | length == 5", [*TALK, *TALK, TALK[0]], {}),
    ],
)
def test_a_template_that_waits_for_its_words_is_stopped_and_the_next_render_works(small, condition, messages, values):
    template = when(condition, LOOP)
    assert render(small, template) == "user: hi\nassistant: hello\n"
    with pytest.raises(TemplateLimitError, match=r"takes more than 0.5 seconds for a conversation: nothing was"):
        render(small, template, messages, **values)
    assert render(small, template) == "user: hi\nassistant: hello\n"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (HUGE, "makes a text of more than 10,0[0-9]{2},[0-9]{3} letters of a conversation"),
        (DOUBLING, "takes more than 0 GB of memory"),
        ("{{ 'a' * 10 ** 10 }}", "takes more than 0 GB of memory"),
        ("{% set x = [0] * 10 ** 9 %}{{ x | length }}", "takes more than 0 GB of memory"),
        ("{{ 9 ** (9 ** 9) }}", "takes more than 0.5 seconds"),
    ],
)
def test_no_template_makes_a_text_or_a_list_without_end(small, monkeypatch, template, said):
    if said.endswith(("memory", "conversation")):
        monkeypatch.setattr(renderer, "SECONDS", 20)
    began = time.monotonic()
    with pytest.raises(TemplateLimitError, match=f"the model's chat template {said}"):
        render(small, template)
    assert time.monotonic() - began < 30
    assert render(small, SAYS) == "user: hi\nassistant: hello\n"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no system message') }}", "no system message"),
        ("{% broken", "unknown tag 'broken'"),
        ("{{ nothing.there.at.all }}", "'nothing' is undefined"),
        ("{{ range(999999) | list }}", "Range too big"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__'"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{{ namespace(__class__=1) }}", "begin with an underscore"),
    ],
)
def test_what_a_template_may_not_or_will_not_do_is_refused_in_words(small, template, reason):
    with pytest.raises(Refused, match=reason):
        render(small, template)


def test_a_child_that_somebody_has_ended_is_started_again(small):
    assert render(small, SAYS)
    first = small._child.pid
    os.kill(first, signal.SIGKILL)
    small._child.wait()
    assert render(small, SAYS) == "user: hi\nassistant: hello\n" and small._child.pid != first


def test_a_child_that_somebody_ends_in_the_middle_of_a_render_is_started_again(small, monkeypatch):
    monkeypatch.setattr(renderer, "SECONDS", 60)
    slow = "{% for i in range(999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}" + SAYS
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(render, small, slow)
        while small._child is None:
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(small._child.pid, signal.SIGKILL)
        assert running.result(60) == "user: hi\nassistant: hello\n"


def test_threads_take_turns_and_each_gets_its_own_text(small, monkeypatch):
    def one(number):
        return render(small, SAYS, [{"role": "user", "content": f"n{number} \u4e2d \ud800"}])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, range(200))) == [f"user: n{number} \u4e2d \ud800\n" for number in range(200)]


def test_many_conversations_come_back_in_their_order(small):
    talks = [json.dumps({"messages": [{"role": "user", "content": str(n)}]}) for n in range(500)]
    assert small.render(SAYS, {}, talks) == [f"user: {n}\n" for n in range(500)]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("ask", [False, True])
def test_texts_are_those_of_transformers(name, ask):
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [
        *([{"role": "system", "content": "Be <brief>."}] if SHAPES[name].system else []),
        {"role": "user", "content": "caf\u00e9 'quoted' \u4e2d\u6587 \U0001f642  \n"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "and?"},
    ]
    tools = [{"type": "function", "function": {"name": "look", "description": "a & b", "parameters": {"x": [1, None]}}}]
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    given = {"documents": None, "add_generation_prompt": ask, **special}
    for offered in (None, tools):
        right, _ = render_jinja_template(
            [messages], chat_template=SHAPES[name].template, tools=offered, **given
        )  # fmt: skip
        talk = json.dumps({"messages": messages, "tools": offered})
        assert renderer.renderer.render(SHAPES[name].template, given, [talk]) == right


def test_marks_of_generations_are_left_out_and_loops_may_be_left():
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    assert render(renderer.renderer, template) == "hi"


ALONE = """
import sys, time
from mbf_mlx.base.renderer import renderer
print(renderer.render("{{ x }}", {"x": 1}, ["{}"])[0], renderer._child.pid, flush=True)
if len(sys.argv) > 1: time.sleep(60)
"""


def test_the_child_ends_with_its_parent_also_where_that_is_killed():
    for words in ((), ("wait",)):
        command = [sys.executable, "-c", ALONE, *words]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
            text, pid = parent.stdout.readline().split()
            assert text == "1"
            if words:
                parent.kill()
            assert parent.wait(30) == (-signal.SIGKILL if words else 0)
        try:
            psutil.Process(int(pid)).wait(10)
        except psutil.NoSuchProcess:
            pass


def test_a_forked_process_leaves_the_child_to_its_parent(small):
    assert render(small, SAYS)
    code = """
import os
from mbf_mlx.base.renderer import renderer
renderer.render("{{ 1 }}", {}, ["{}"])
child = os.fork()
if not child:
    assert renderer._child is None and renderer.render("{{ 2 }}", {}, ["{}"]) == ["2"]
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert renderer.render("{{ 3 }}", {}, ["{}"]) == ["3"]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
