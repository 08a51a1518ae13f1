"""The record of a stream's tasks: a hundred are all scored, of thousands a fixed number; a commit costs the same."""

import json
import math
import random
import shutil
from collections import Counter
from dataclasses import replace

import pytest

from mbf_mlx import metrics
from mbf_mlx.errors import InputError
from mbf_mlx.methods import make
from mbf_mlx.stream import repair
from mbf_mlx.stream.folder import StreamFolder
from mbf_mlx.stream.generations import HistoryFiles
from mbf_mlx.stream.history import SPAN
from mbf_mlx.stream.records import ALL_SCORED, LINE_BYTES, NEWEST_SCORED, TaskRecord, score_columns, spans_to_score
from mbf_mlx.stream.status import course, status_document
from mbf_mlx.stream.task_scores import TaskScores, digest
from tests.support.streams import new_stream, record, tune

LONG = 2 * SPAN + 5  # tasks of a stream with earlier history


def commit(stream, records):
    """Commit records with one state, which makes no difference to the history."""
    method = make(stream.identity.method, stream.identity.method_options)
    with stream.writer():
        for one in records:
            state = stream.state()
            tuned = tune(state, method.start(state))
            stream.commit(stream.current(), method.finish(state, tuned), one, "models/tiny", {"train": {}})
    return stream


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return commit(new_stream(tmp_path_factory.mktemp("long") / "s"), map(record, range(1, LONG + 1))).path


@pytest.fixture
def long_stream(made, quick_path):
    shutil.copytree(made, quick_path / "s", symlinks=True)
    return StreamFolder.open(quick_path / "s")


def tasks_of(spans):
    return [task for first, last in spans for task in range(first, last + 1)]


def test_up_to_a_hundred_tasks_are_all_scored_and_of_more_as_many():
    for t in (1, 2, ALL_SCORED - 1, ALL_SCORED):
        assert tasks_of(spans_to_score(t)) == list(range(1, t + 1))
    for t in (ALL_SCORED + 1, 150, 151, 1000, 9999, 10_000):
        tasks = tasks_of(spans_to_score(t))
        assert tasks == sorted(set(tasks)) and len(tasks) <= ALL_SCORED
        assert tasks[0] >= 1 and tasks[-NEWEST_SCORED:] == list(range(t - NEWEST_SCORED + 1, t + 1))
    assert tasks_of(spans_to_score(500, newest=3)) == [498, 499, 500]
    assert tasks_of(spans_to_score(2, newest=3)) == [1, 2]


@pytest.mark.parametrize("count", [ALL_SCORED + 1, 180, 1000])
def test_every_old_task_gets_its_turn(count):
    """While the stream goes on learning, no task waits longer than the number of groups and a little."""
    groups = -(-(count - NEWEST_SCORED) // (ALL_SCORED - NEWEST_SCORED))
    seen = Counter(task for t in range(count, count + 2 * groups + 4) for task in tasks_of(spans_to_score(t)))
    assert all(seen[task] for task in range(1, count + 1))


def test_averages_are_those_of_the_matrix():
    """For any matrix with gaps, the table gives what the definitions in metrics.py give."""
    rng = random.Random(7)
    for _ in range(50):
        count, table, scores = rng.randint(1, 12), TaskScores(), []
        for t in range(1, count + 1):
            scores.append([None if rng.random() < 0.2 else round(rng.random(), 3) for _ in range(t)])
            table.add(record(t, scores=scores[-1], losses=[None] * t))
        for ours, theirs in zip(
            table.averages(),
            (metrics.average_accuracy(scores), metrics.backward_transfer(scores), metrics.forgetting(scores)),
            strict=True,
        ):
            assert ours == pytest.approx(theirs.value, abs=1e-12)


def test_a_task_that_is_not_scored_again_counts_with_its_newest_score():
    table = TaskScores()
    table.add(record(1, scores=[0.9], losses=[None]))
    table.add(record(2, scores=[0.5, 0.8], losses=[None, None]))
    table.add(record(3, scores=[0.6], losses=[None], scored=((3, 3),)))
    assert table.averages().accuracy == pytest.approx((0.5 + 0.8 + 0.6) / 3)
    assert table.averages().backward_transfer == pytest.approx((0.5 - 0.9 + 0.8 - 0.8) / 2)
    assert table.averages().forgetting == pytest.approx(0.4)  # of task 1; task 2 has no earlier score
    table.add(record(4, scores=[None, 0.7], losses=[None, None], scored=((2, 2), (4, 4))))  # the rows of 2 are gone
    assert table.averages().accuracy == pytest.approx((0.5 + 0.6 + 0.7) / 3) and table.newest(2) is None


def test_the_table_as_a_file_is_the_same_table(quick_path):
    table = TaskScores()
    for t in range(1, 30):
        table.add(record(t, metric=("exact_match", "rouge_l", "loss")[t % 3]))
    again = TaskScores.from_bytes(table.to_bytes(), 29, quick_path)
    assert again.averages() == table.averages() and again.metrics() == {"exact_match", "rouge_l"}
    assert again.contents_of("task7") == [digest(f"{7:064d}")] and again.contents_of("task70") == []
    with pytest.raises(InputError, match="expected 30 numbers of type F64"):
        TaskScores.from_bytes(table.to_bytes(), 30, quick_path)


def test_a_record_of_many_tasks_keeps_the_scores_of_a_hundred():
    one = record(400).bounded()
    assert len(one.scores) == len(one.losses) <= ALL_SCORED and one.scored == spans_to_score(400)
    assert {task: score for task, score, _ in one.scored_tasks()} == {
        task: record(400).scores[task - 1] for task in tasks_of(one.scored)
    }
    assert record(100).bounded() == record(100)
    assert record(400, scores=[None] * 400, losses=[None] * 400).bounded().scored == ()
    assert len(one.to_json()) < LINE_BYTES + 32 * 2 * ALL_SCORED
    assert "scored" not in json.loads(record(100).to_json()) and TaskRecord(**json.loads(one.to_json())) == one


@pytest.mark.parametrize("spans", [((0, 1),), ((2, 1),), ((3, 4),), ((1, 3),)])
def test_spans_that_do_not_fit_a_record_are_refused(spans):
    with pytest.raises(ValueError, match="scored: expected"):
        record(3, scores=[0.5, 0.5], losses=[0.5, 0.5], scored=spans)


def test_scores_have_a_place_for_each_task_of_a_short_stream_alone():
    assert score_columns(3, ((3, 3),), [0.5]) == [None, None, 0.5]
    assert score_columns(ALL_SCORED + 1, ((3, 4),), [0.5, None]) == [0.5, None]


def test_a_short_stream_has_all_of_it_in_its_generations(quick_path):
    stream = commit(new_stream(quick_path / "s"), map(record, range(1, 4)))
    assert not (stream.path / "history").exists() and stream.current().manifest.format_version == 1
    assert [one.t for one in stream.newest_tasks()] == [1, 2, 3]


def test_a_long_stream_has_every_record_and_the_same_averages(long_stream):
    history = long_stream.history()
    assert [one.t for one in history] == list(range(1, LONG + 1))
    assert history[:ALL_SCORED] == [record(t) for t in range(1, ALL_SCORED + 1)]
    assert [one.model_copy(update={"average": None}) for one in history] == [
        record(t).bounded() for t in range(1, LONG + 1)
    ]
    table = TaskScores()
    for one in history:
        table.add(one)
        assert one.scored is None or one.average == pytest.approx(table.averages().accuracy)
    assert long_stream.task_scores().averages() == table.averages()
    document = status_document(long_stream)
    assert document["learned"] == LONG and len(document["tasks"]) == LONG - SPAN
    assert document["average_accuracy"] == table.averages().accuracy
    assert document["scores"][-1][-1] == record(LONG).scores[-1] and len(document["scores"][0]) == LONG - SPAN
    assert len(long_stream.current().manifest.earlier) == 1 and long_stream.current().manifest.format_version == 2


def test_any_tasks_are_read_across_the_files(long_stream):
    for spans in ([(1, 1)], [(SPAN, SPAN + 1)], [(3, 5), (SPAN - 1, LONG)], [(LONG, LONG)], [(1, LONG)], [(1, 0)]):
        assert [one.t for one in long_stream.tasks(spans)] == tasks_of(spans)
    shown = course(long_stream, 24)
    assert len(shown) == 24 and (shown[0][0], shown[-1][0]) == (1, LONG)
    assert all(mean is not None and not math.isnan(mean) for _, mean in shown)


def test_what_is_recent_is_read_without_the_earlier_history(long_stream):
    shutil.rmtree(long_stream.path / "history")
    stream = commit(StreamFolder.open(long_stream.path), [record(LONG + 1)])
    assert status_document(stream)["learned"] == LONG + 1 and stream.task_scores().contents_of("task3")
    with pytest.raises(InputError, match="000001-000128.jsonl: damaged: missing\nhint: .*learns and answers without"):
        stream.history()


def test_a_damaged_earlier_history_is_found_by_verify(long_stream):
    repair.verify_all(long_stream)
    file = long_stream.path / "history/000001-000128.jsonl"
    file.write_bytes(file.read_bytes().replace(b"task7", b"task8", 1))
    with pytest.raises(InputError, match="000001-000128.jsonl: damaged: its content is not what was committed"):
        repair.verify_all(long_stream)


def test_undo_over_the_border_of_a_file_and_back(quick_path, made):
    """The commit that moves lines out of the generation is undone; the same task makes the same stream again."""
    stream = commit(new_stream(quick_path / "s"), map(record, range(1, 2 * SPAN)))
    assert not (stream.path / "history").exists()
    commit(stream, [record(2 * SPAN)])
    (file,) = (stream.path / "history").iterdir()
    content, newest = file.read_bytes(), stream.newest_tasks()
    with stream.writer():
        assert stream.undo().t == 2 * SPAN
    assert [one.t for one in stream.history()] == list(range(1, 2 * SPAN)) and not stream.current().manifest.earlier
    commit(stream, [record(2 * SPAN)])
    assert file.read_bytes() == content and stream.newest_tasks() == newest


def test_a_stream_that_scored_everything_goes_on(quick_path):
    """Before, every task was scored after every other one, and all lines lay in the generation."""
    stream, count = new_stream(quick_path / "s"), 2 * SPAN + 40
    lines = b"".join(record(t).to_json() for t in range(1, count + 1))
    dense = commit(stream, [record(1)]).current()
    with stream.writer():
        stream.generations.write(count, replace(stream.state(), t=count), HistoryFiles(lines), "models/tiny", {})
        stream.generations.make_current(count)
    assert dense.number == 1 and len(stream.newest_tasks()) == count
    expected = metrics.average_accuracy([record(t).scores for t in range(1, count + 1)]).value
    assert status_document(stream)["average_accuracy"] == pytest.approx(expected)
    commit(stream, [record(count + 1)])
    assert [one.t for one in stream.history()] == list(range(1, count + 2))
    assert len(stream.newest_tasks()) < 2 * SPAN and stream.history()[count - 1] == record(count)


def test_a_generation_keeps_its_size_however_many_tasks(long_stream):
    """Of the record it holds the newest lines, and 41 bytes for each older task."""
    sizes = []
    for t in range(LONG + 1, LONG + 1 + 2 * SPAN):
        commit(long_stream, [record(t)])
        sizes.append(sum(file.bytes for file in long_stream.current().manifest.files.values()))
    assert max(sizes[SPAN:]) < 1.04 * max(sizes[:SPAN])
