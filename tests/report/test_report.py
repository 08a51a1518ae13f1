"""Reports as HTML: nothing is fetched, every number stands in a table, every text is escaped."""

import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from mbf_mlx.commands import app
from mbf_mlx.methods import make
from mbf_mlx.report.results_page import results_page
from mbf_mlx.report.stream_page import MOST, shown_places, stream_page
from mbf_mlx.stream.status import course, status_document
from tests.conftest import ROOT
from tests.support.cells import row
from tests.support.streams import learn, new_stream, record, tune


class Page(HTMLParser):
    """What a page holds: cells of tables, plots, tags, and whatever could be fetched."""

    def __init__(self, text):
        super().__init__()
        self.cells, self.tags, self.fetched, self.open = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "srcset", "action") and not value.startswith("#"):
                self.fetched.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th", "code"):
            self.cells[-1] += data


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """A stream of three tasks, one with a name that must be escaped and that mathtext would choke on."""
    made, method = new_stream(tmp_path_factory.mktemp("report") / "assistant"), make("slao")
    for t, name in enumerate(["mail", "a <b>& $x", "diary"], 1):
        with made.writer():
            state = made.state()
            tuned = tune(state, method.start(state))
            made.commit(
                made.current(), method.finish(state, tuned), record(t, name), "models/tiny", {"train": {"epochs": 3}}
            )
    return made


@pytest.fixture(scope="module")
def page(stream):
    return stream_page(status_document(stream), course(stream, MOST))


def cells():
    fields = {"options": {"weight": "1/t"}}
    other = {**fields, "trainings": ["x", "z"]}
    return [row(seed, label=label, **use) for label, use in (("slao", fields), ("<i>", other)) for seed in (0, 1)]


def shown(names, width, scores=None):
    """Return the lines of the matrix on a terminal of `width` characters."""
    from rich.console import Console

    from mbf_mlx.report.terminal import matrix

    scores = scores or [[t / 100 if j <= t else None for j in range(len(names))] for t in range(len(names))]
    console = Console(width=width, soft_wrap=True, record=True, file=io.StringIO())
    tasks = [{"name": name, "t": t, "average": None} for t, name in enumerate(names, 1)]
    console.print(matrix({"tasks": tasks, "scores": scores, "learned": len(names)}, width))
    return console.export_text().splitlines()


def test_the_matrix_in_the_terminal_shows_every_task_where_there_is_room():
    lines = shown(["mail", "notes", "diary"], 80)
    assert lines[0] == "score on each task after each task, in %" and len(lines) == 8
    assert [cell.strip() for cell in lines[-2].split("│")] == ["", "3. diary", "2.0", "2.0", "2.0", "2.0", ""]


@pytest.mark.parametrize(("count", "width", "newest"), [(100, 200, 12), (100, 80, 4), (6, 80, 5)])
def test_the_matrix_in_the_terminal_shows_the_newest_tasks_where_there_are_many(count, width, newest):
    lines = shown([f"task{n}" for n in range(1, count + 1)], width)
    assert lines[0] == f"score on each task after each task, in %, newest {newest} of {count} (--json: all)"
    assert len(lines) == newest + 5
    heads = [cell.strip() for cell in lines[2].split("┃")[1:-1]]
    expected = [f"task{n}" for n in range(count - newest + 1, count + 1)]
    assert heads == ["after learning", "earlier", *expected, "average"]
    last = [cell.strip() for cell in lines[-2].split("│")[1:-1]]
    assert last == [f"{count}. task{count}", *[f"{count - 1}.0"] * (newest + 2)]
    assert max(map(len, lines)) <= width


def test_earlier_tasks_that_were_not_scored_have_no_mean():
    scores = [[0.5] + [None] * 14] + [[None] * t + [0.25] + [None] * (14 - t) for t in range(1, 15)]
    lines = shown([f"t{n}" for n in range(15)], 200, scores)
    cells = [cell.strip() for cell in lines[-2].split("│")[1:-1]]
    assert cells[:2] == ["15. t14", "-"] and cells[-2:] == ["25.0", "25.0"]


def test_a_page_is_whole_and_fetches_nothing(page):
    for text in (page, results_page("five", cells())):
        found = Page(text)
        assert found.open == [] and found.fetched == []
        assert "script" not in found.tags and "link" not in found.tags and "img" not in found.tags
        assert "default-src 'none'" in text and "@import" not in text
        assert "url(http" not in text and text.count("<title>") == 1


def test_a_streams_page_has_its_plots_and_every_number_in_a_table(stream, page):
    found, document = Page(page), status_document(stream)
    assert found.tags.count("svg") == 4  # matrix, score over time, training, memory
    for scores in document["scores"]:
        for value in scores:
            if value is not None:
                assert f"{100 * value:.1f}" in found.cells
    for task in document["tasks"]:
        assert task["sha256"] in found.cells
        for step, loss in task["curve"]:
            assert f"{step:g}" in found.cells and f"{loss:.3f}" in found.cells
    assert f"{document['kept_bytes']:,}" in found.cells and document["id"] in found.cells
    assert "<h1>assistant</h1>" in page and str(stream.path) not in page


def test_a_page_of_many_tasks_shows_some_of_them_and_says_so(stream):
    """It stays as large as a page of MOST tasks, whatever the stream has learned; numbers count all tasks."""
    one = status_document(stream)

    def many(count):
        first = max(0, count - 200)  # a long stream's status has the newest tasks alone
        tasks = [
            one["tasks"][0] | {"name": f"t{t}", "t": t, "sha256": f"{t:064d}"} for t in range(first + 1, count + 1)
        ]
        scores = [[0.9 - 0.001 * (i - j) if j <= i else None for j in range(len(tasks))] for i in range(len(tasks))]
        known = {"tasks": tasks, "scores": scores, "learned": count, "average_accuracy": 0.4, "forgetting": 0.1}
        return stream_page(one | known, [(1, 0.9), (count // 2, 0.123), (count, 0.4)])

    pages = {count: many(count) for count in (MOST, MOST + 1, 100, 400)}
    assert "evenly spread" not in pages[MOST] and "This stream has learned 400 tasks" in pages[400]
    assert f"The page shows {MOST} of them, evenly spread" in pages[MOST + 1]
    assert f"The page shows {MOST} of them, the newest" in pages[400] and "history/" in pages[400]
    found = {count: Page(page) for count, page in pages.items()}
    for count, shown_tasks in ((100, [place + 1 for place in shown_places(100, 100)]), (400, range(377, 401))):
        for t in shown_tasks:
            assert f"{t}. t{t}" in found[count].cells and f"{t:064d}" in found[count].cells
    assert "2. t2" not in found[100].cells and {"1. t1", "100. t100"} <= set(found[100].cells)
    assert "376. t376" not in found[400].cells
    assert "12.3" in found[400].cells and "12.3" not in found[MOST].cells  # the mean over all of them, over time
    assert found[400].tags.count("svg") == found[MOST].tags.count("svg") + 1
    assert len(pages[400]) < 1.2 * len(pages[MOST])


@pytest.mark.parametrize("count", [0, 1, MOST - 1, MOST, MOST + 1, 2 * MOST, 100])
def test_shown_tasks_are_in_order_and_hold_the_first_and_the_last(count):
    places = shown_places(count, count)
    assert places == sorted(set(places)) and len(places) == min(count, MOST)
    assert not count or (places[0], places[-1]) == (0, count - 1)


def test_of_more_tasks_than_are_all_scored_the_newest_are_shown():
    assert shown_places(101, 101) == list(range(101 - MOST, 101))
    assert shown_places(10_000, 130) == list(range(130 - MOST, 130))


def test_names_are_escaped_in_tables_and_plots(page):
    assert "<b>&" not in page and "a &lt;b&gt;&amp; $x" in page
    assert "<i>" not in results_page("five", cells())


def test_an_experiments_page_compares_methods_and_shares_curves(page):
    text = results_page("five", cells())
    found = Page(text)
    # two comparisons, score over time, two matrices, training, memory
    assert found.tags.count("svg") == 7
    assert "70.0 ± 0.0" not in found.cells and "75.0 ± 0.0" in found.cells
    assert {"80.0", "60.0", "90.0"} <= set(found.cells)
    assert "slaoab0" in found.cells and "0.750" in found.cells
    assert "1/t" in found.cells and "1 method" not in text


def test_scores_on_other_rows_are_never_compared():
    text = results_page("five", [row(), row(label="other", setting="high", scored_on="valid")])
    assert "<h3>ab, 200 test rows</h3>" in text and "<h3>ab, 200 valid rows</h3>" in text and "all orders" not in text
    assert "2 cells: 2 methods, 1 order, 1 seed." in text
    assert "valid rows" not in results_page("five", [row(scored_on="valid")])
    more = results_page("five", [row(), row(rows={"train": 320, "valid": 0, "test": 0})])
    assert "<h3>ab, 200 test rows</h3>" in more and "<h3>ab, all test rows</h3>" in more and ">all<" not in more


def test_plots_beside_each_other_have_one_scale():
    rows = [row(label=f"m{n}", scores=((0.42,), (0.35 + n / 20, 0.45 + n / 20))) for n in range(9)]
    first, second = re.findall(r"<svg.*?</svg>", results_page("five", rows), re.DOTALL)[2:4]

    def ticks(svg):  # of both axes: tasks learned, scores
        return re.findall(r">(\d+)</text>", svg)

    assert ticks(first) == ticks(second) and {"40", "80"} <= set(ticks(first)) and "0" not in ticks(first)
    assert "Mean score, ab 1" in first and "Mean score, ab 2" in second


def test_the_same_report_has_the_same_bytes_and_its_colours_are_the_pages(stream, page):
    assert stream_page(status_document(stream), course(stream, MOST)) == page
    assert "var(--c0)" in page and "#0a0" not in page and "var(--heat)" in page


def test_the_command_writes_a_file_and_says_where(stream, tmp_path):
    out = tmp_path / "x.html"
    done = CliRunner().invoke(app, ["report", str(stream.path), "--out", str(out), "--json"])
    assert json.loads(done.stdout) == {"kind": "stream", "file": str(out), "bytes": out.stat().st_size}
    (tmp_path / "five-results").mkdir()
    (tmp_path / "five-results" / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in cells()))
    done = CliRunner().invoke(app, ["report", str(tmp_path / "five-results"), "--out", str(out)])
    assert done.exit_code == 0 and "<h1>five</h1>" in out.read_text()
    done = CliRunner().invoke(app, ["report", str(tmp_path), "--out", str(out)])
    assert done.exit_code == 1
    assert "expected a stream or the results of mbf experiment" in done.output
    done = CliRunner().invoke(app, ["report", str(stream.path), "--out", str(tmp_path / "no" / "x.html")])
    assert done.exit_code == 1 and "expected its parent folder to exist" in done.output


def test_a_report_never_takes_the_place_of_something_else(stream, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    before = (stream.path / "stream.json").read_bytes()
    for out in (
        tmp_path / "notes.txt",
        tmp_path,
        tmp_path / "loop",
        stream.path / "stream.json",
        stream.path / "x.html",
    ):
        done = CliRunner().invoke(app, ["report", str(stream.path), "--out", str(out)])
        assert done.exit_code == 1 and done.stderr.startswith(f"error: {out}"), done.output
    assert (tmp_path / "notes.txt").read_text() == "mine" and (stream.path / "stream.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loop", "notes.txt"]


def test_matplotlib_is_loaded_for_a_plot_alone():
    code = "import sys, mbf_mlx.report.stream_page, mbf_mlx.report.results_page; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False", done.stderr


def test_a_page_of_the_users_is_never_replaced_and_ours_is(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    monkeypatch.chdir(tmp_path)
    learn(new_stream(tmp_path / "index"), 1)
    (tmp_path / "index.html").write_text("<!doctype html><title>my site</title>")
    refused = CliRunner().invoke(app, ["report", "index"], prog_name="mbf")
    assert refused.exit_code != 0 and (tmp_path / "index.html").read_text().endswith("my site</title>")
    for _ in range(2):
        done = CliRunner().invoke(app, ["report", "index", "--out", "s.html"], prog_name="mbf")
        assert done.exit_code == 0, done.output
