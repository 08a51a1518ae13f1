"""A chat template that writes the date of the day: a stream keeps one date, whatever day its commands run on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from tests.support.chat_templates import base_with
from tests.support.command_line import mbf
from tests.support.rows import rows_of

pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")

from mbf_mlx import Stream
from mbf_mlx.base.chat_templates import dated, raw_template, with_date, writes_date

TEMPLATE = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
    "{%- endif %}{{ '<|im_start|>system\nToday: ' + date_string + '<|im_end|>\n' }}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The command line on another day: `datetime` and `time` as a computer with another clock has them.
ELSEWHEN = """
import datetime, sys
class Elsewhen(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz).replace(year={year}, month=3, day=4)
class Day(datetime.date):
    @classmethod
    def today(cls):
        return cls({year}, 3, 4)
datetime.datetime, datetime.date = Elsewhen, Day
sys.argv = ["mbf", *sys.argv[1:]]
from mbf_mlx.commands import main
main()
"""


@pytest.fixture(scope="module")
def base(tiny_llama, tmp_path_factory):
    return base_with(TEMPLATE, tiny_llama, tmp_path_factory.mktemp("dated") / "base")


@pytest.fixture
def task(write_jsonl):
    write_jsonl("words/test.jsonl", rows_of(6, seed=1))
    return write_jsonl("words/train.jsonl", rows_of(8)).parent


def on_a_day(year, *words, **options):
    command = [sys.executable, "-c", ELSEWHEN.format(year=year), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, **options)


def done(finished):
    assert finished.returncode == 0, finished.stderr
    return finished


LEARN = ("--iters", 4, "--learning-rate", 5e-3, "--method", "sequential")


def test_a_streams_prompts_say_the_same_date_on_every_day(base, task, write_jsonl, tmp_path):
    stream, other = tmp_path / "s", write_jsonl("more.jsonl", rows_of(8, 3))
    first = done(on_a_day(2031, "learn", stream, task, "--model", base, *LEARN))
    assert "the chat template writes a date: prompts of this stream say 2031-03-04 (--date)" in first.stderr
    status = done(mbf("status", stream))
    assert "prompts say the date 2031-03-04 (mbf learn --date changes it)" in status.stdout
    scored = [json.loads(done(on_a_day(year, "eval", stream, "--json")).stdout) for year in (2031, 2047)]
    assert scored[0] == scored[1]
    document = json.loads(mbf("status", stream, "--json").stdout)
    assert scored[0]["tasks"][0]["loss"] == pytest.approx(document["losses"][0][0], abs=1e-6)
    said = [done(on_a_day(year, "generate", stream, "red green", "-m", 8)).stdout for year in (2031, 2047)]
    assert said[0] == said[1]
    again = done(on_a_day(2047, "learn", stream, other, *LEARN[:4], "--json"))
    assert "prompts of this stream say" not in again.stderr
    assert json.loads(again.stdout)["settings"]["data"]["date"] == "2031-03-04"
    changed = done(on_a_day(2047, "learn", stream, other, *LEARN[:4], "--again", "--date", "2047-03-04"))
    assert "prompts of this stream say 2047-03-04" in changed.stderr
    text = Stream.open(stream).speaker()
    assert "Today: 04 Mar 2047" in text.tokenizer.decode(text.prompt("hello"))


def test_a_run_that_goes_on_on_the_next_day_ends_with_the_same_bits(base, task, tmp_path):
    whole = tmp_path / "whole"
    done(on_a_day(2031, "learn", whole, task, "--model", base, *LEARN, "--save-every", 1))
    killed = tmp_path / "killed"
    code = ELSEWHEN.format(year=2031).replace(
        "from mbf_mlx.commands",
        "import os, signal\nfrom mbf_mlx.stream import saves\nsave = saves.Working.save\n"
        "def stop(self, step, *rest):\n    save(self, step, *rest)\n"
        "    step == 2 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "saves.Working.save = stop\nfrom mbf_mlx.commands",
        1,
    )
    words = ["learn", killed, task, "--model", base, *LEARN, "--save-every", 1]
    cut = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, cwd=ROOT)
    assert cut.returncode == -signal.SIGKILL, cut.stderr
    resumed = done(on_a_day(2032, *words))
    assert "goes on after step 2" in resumed.stderr
    one, two = (Stream.open(path).folder for path in (whole, killed))
    for name, pair in one.state().deployed.items():
        assert pair.a.tobytes() == two.state().deployed[name].a.tobytes()
        assert pair.b.tobytes() == two.state().deployed[name].b.tobytes()


def test_a_date_is_refused_or_said_where_it_does_nothing(base, tiny_llama, task, tmp_path):
    wrong = mbf("learn", tmp_path / "s", task, "--model", base, "--date", "4.3.2031")
    assert wrong.returncode == 1 and "DataConfig.date: expected a day as in 2026-12-01, got '4.3.2031'" in wrong.stderr
    nothing = done(mbf("learn", tmp_path / "s", task, "--model", tiny_llama, "--iters", 1, "--date", "2031-03-04"))
    assert "--date without effect: prompts say no date" in nothing.stderr
    assert "date" not in json.loads(mbf("status", tmp_path / "s", "--json").stdout)["settings"]["data"]


def test_an_export_carries_the_date(base, task, tmp_path):
    from transformers import AutoTokenizer

    stream = tmp_path / "s"
    done(on_a_day(2031, "learn", stream, task, "--model", base, *LEARN))
    live = Stream.open(stream).speaker().prompt("hello")
    for target in ("mlx", "adapter", "peft"):
        done(mbf("export", stream, target, tmp_path / target))
        assert "04 Mar 2031" in (tmp_path / target / "chat_template.jinja").read_text()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "mlx")
    turn = [{"role": "user", "content": "hello"}]
    assert list(tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]) == live


def test_an_experiment_needs_a_date(base, task, tmp_path):
    plan = f"base = {str(base)!r}\ntasks = {str(task.parent)!r}\n[orders]\none = ['words']\n[train]\niters = 1\n"
    file, methods = tmp_path / "plan.toml", "[[methods]]\nmethod = 'sequential'\n"
    file.write_text(plan + methods)
    refused = mbf("experiment", file, "--out", tmp_path / "results")
    assert refused.returncode == 1 and "[data] date: the base's chat template writes a date; expected" in refused.stderr
    file.write_text(plan + "[data]\ndate = '2031-03-04'\n" + methods)
    done(mbf("experiment", file, "--out", tmp_path / "results"))


def test_a_template_that_asks_for_the_date_is_given_one(base):
    from mbf_mlx.base.load import load_tokenizer

    assert writes_date(TEMPLATE) and not writes_date("{{ messages }}") and not writes_date(None)
    with_one = with_date(TEMPLATE, "2031-03-04")
    assert not writes_date(with_one) and '"04 Mar 2031"' in with_one
    tokenizer = load_tokenizer(base)
    assert dated(tokenizer, "") == {} and dated(tokenizer, "2031-03-04") == {"chat_template": with_one}
    made_up = "{% set form = '%A, ' + '%d/%m/%Y' %}{% if strftime_now is defined %}{{ strftime_now(form) }}{% endif %}"
    template = with_date(made_up, "2031-03-04")
    said = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False, chat_template=template)
    assert said == "Tuesday, 04/03/2031"


def test_a_long_template_that_only_begins_to_ask_for_the_date_takes_no_time():
    began = time.monotonic()
    template = "strftime_now('" * 20_000
    assert with_date(template, "2031-03-04").endswith(template)
    # Over half a minute if each beginning looks for its end as far as the last letter.
    assert time.monotonic() - began < 10


def test_a_stream_of_raw_prompts_exports_a_template_that_changes_nothing(tiny_llama, task, tmp_path):
    from transformers import AutoTokenizer

    stream = tmp_path / "s"
    done(mbf("learn", stream, task, "--model", tiny_llama, "--template", "none", *LEARN))
    live = Stream.open(stream).speaker().prompt("red green")
    done(mbf("export", stream, "mlx", tmp_path / "mlx"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "mlx")
    turn = [{"role": "user", "content": "red green"}]
    assert list(tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]) == live
    assert tokenizer.apply_chat_template([*turn, *turn], tokenize=False) == "red green\nred green"
    adapter = done(mbf("export", stream, "adapter", tmp_path / "adapter"))
    assert '--prompt "..." --ignore-chat-template' in adapter.stderr
    assert f'--chat-template "$(cat {tmp_path}/adapter/chat_template.jinja)"' in adapter.stderr
    peft = done(mbf("export", stream, "peft", tmp_path / "peft"))
    assert f"--chat-template {tmp_path}/peft/chat_template.jinja" in peft.stderr
    assert (tmp_path / "peft/chat_template.jinja").read_text() == raw_template("")
    assert os.listdir(tmp_path / "mlx").count("chat_template.jinja") == 1
    if shutil.which("true"):
        gguf = done(mbf("export", stream, "gguf-adapter", tmp_path / "a.gguf"))
        assert "--jinja --chat-template" in gguf.stderr
