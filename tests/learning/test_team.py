"""Several processes that share a step's rows: the same numbers as one, one that writes and prints, a clean end."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mbf_mlx.config import LearnConfig, TrainConfig
from mbf_mlx.errors import InputError
from mbf_mlx.learning.team import Message, joined, share
from mbf_mlx.learning.team_task import rows_of, state_of, task_message
from mbf_mlx.methods import Pair, State, make
from mbf_mlx.stream.folder import StreamFolder
from mbf_mlx.stream.repair import verify_all
from tests.conftest import ROOT

pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")

from mbf_mlx.data.batches import make_batch
from mbf_mlx.engine.choose import prepare
from mbf_mlx.learning.train import Sums
from mbf_mlx.learning.tuning import Tuning
from tests.support import bench as a_bench
from tests.support import ring
from tests.support.rows import rows_of as rows_like
from tests.support.tiny_llama import write_tiny_llama

bench = a_bench.bench


@pytest.fixture
def task(write_jsonl):
    write_jsonl("words/test.jsonl", rows_like(4, seed=1))
    return write_jsonl("words/train.jsonl", rows_like(22)).parent


def test_every_row_of_a_batch_is_in_exactly_one_share():
    assert [share([7, 3, 9, 1, 4], rank, 2) for rank in range(2)] == [[7, 3, 9], [1, 4]]
    assert [share([7], rank, 3) for rank in range(3)] == [[7], [], []]


@pytest.mark.parametrize("by_hand", [True, False])
def test_the_sums_of_the_shares_are_the_sums_of_the_batch(bench, by_hand, tolerance):
    tuning = Tuning(bench.base.model)
    tuning.update({name: np.random.default_rng(0).normal(size=a.shape) / 9 for name, a in tuning.arrays.items()})
    engine = prepare(bench.base.model, by_hand=by_hand)
    engine.cores = 1  # each core sums a part of the batch: rounded otherwise
    sums = Sums(tuning, engine, bench.rows)
    indices = [4, 0, 17, 9, 2]
    loss, gradients = sums([make_batch(bench.rows, indices)])
    parts = [sums([make_batch(bench.rows, share(indices, rank, 2))]) for rank in range(2)]
    np.testing.assert_allclose(float(parts[0][0]) + float(parts[1][0]), float(loss), **tolerance("loss"))
    for name, gradient in gradients.items():
        both = np.array(parts[0][1][name]) + np.array(parts[1][1][name])
        np.testing.assert_allclose(both, np.array(gradient), **tolerance("gradients"))


def test_a_process_without_rows_adds_nothing(bench):
    loss, gradients = Sums(Tuning(bench.base.model), bench.engine, bench.rows)([])
    assert float(loss) == 0 and all(not np.array(each).any() for each in gradients.values())


def test_what_a_task_depends_on_arrives_as_it_was_told(bench):
    generator = np.random.default_rng(0)
    pair = Pair(generator.normal(size=(2, 6)).astype(np.float32), generator.normal(size=(4, 2)).astype(np.float32))
    state = State(
        t=3, layers={"model.layers.0.q": (4, 6)}, rank=2, seed=5, deployed={"model.layers.0.q": pair},
        kept={"tuned_b": {"model.layers.0.q": pair.b.T}, "rows": {"stream": np.arange(5, dtype=np.int32)}},
    )  # fmt: skip
    settings = LearnConfig(train=TrainConfig(seed=9, grad_checkpoint=True))
    told = task_message({"path": "models/base"}, make("slao"), state, bench.rows, settings)
    heard = Message.from_bytes(told.to_bytes())
    assert heard.kind == "task" and heard.values["seed"] == 9 and heard.values["checkpoint"] is True
    assert heard.values["method"][0] == "slao"
    after = state_of(heard)
    assert (after.t, after.rank, after.seed, after.layers) == (3, 2, 5, state.layers)
    np.testing.assert_array_equal(after.deployed["model.layers.0.q"].b, pair.b)
    np.testing.assert_array_equal(after.kept["tuned_b"]["model.layers.0.q"], pair.b.T)
    np.testing.assert_array_equal(after.kept["rows"]["stream"], np.arange(5))
    for one, other in zip(rows_of(heard), bench.rows, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.supervised, other.supervised)


def test_a_process_alone_has_no_team(monkeypatch):
    monkeypatch.delenv("MLX_RANK", raising=False)
    with joined() as team:
        assert team is None


def test_a_process_that_should_not_be_alone_says_so(monkeypatch):
    monkeypatch.setenv("MLX_RANK", "1")
    with pytest.raises(InputError, match="process 1: it was started as one of several, but mlx finds no other"):
        with joined():
            pass


# --- two processes ---------------------------------------------------------------------------------------------------


def free_ports(count):
    """Return ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture
def pair(tmp_path):
    """`pair(*words)` starts `python *words` twice, as the two processes of one ring; what is left is ended."""
    started = []

    def start(*words):
        hosts = tmp_path / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
        command = [sys.executable, *map(str, words)]
        for rank in range(2):
            environment = {**os.environ, "MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank), "PYTHONPATH": str(ROOT)}
            with (tmp_path / f"out{rank}").open("w") as out, (tmp_path / f"err{rank}").open("w") as err:
                started.append(subprocess.Popen(command, stdout=out, stderr=err, cwd=tmp_path, env=environment))
        return started[-2:]

    yield start
    for process in started:
        process.kill()
        process.wait()


def said(folder, rank):
    """What a process of the ring printed; on stderr without what mlx itself says there."""
    lines = (folder / f"err{rank}").read_text().splitlines()
    return (folder / f"out{rank}").read_text(), [line for line in lines if not line.startswith("[ring]")]


@pytest.mark.slow
@pytest.mark.parametrize("by_hand", [True, False])
def test_two_processes_of_a_ring_have_the_losses_of_one(pair, tmp_path, task, write_jsonl, by_hand, tiny_llama):
    # Rotary positions in the older layout are left to mlx-lm's own forward pass.
    base = tiny_llama if by_hand else write_tiny_llama(tmp_path / "other", rope_traditional=True)
    second = write_jsonl("more/train.jsonl", rows_like(13, seed=4))
    processes = pair("-m", "tests.support.ring", tmp_path / "losses.json", tmp_path / "two", base, task, second)
    assert [process.wait(timeout=600) for process in processes] == [0, 0], said(tmp_path, 0) + said(tmp_path, 1)
    both = json.loads((tmp_path / "losses.json").read_text())
    alone = [ring.learn(tmp_path / "one", base, each) for each in (task, second)]
    assert both["size"] == 2 and [len(each) for each in alone] == [6, 4]
    for one, two in zip(alone, both["losses"], strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-5)
    assert said(tmp_path, 1) == ("", [])


@pytest.mark.slow
def test_mlx_launch_starts_mbf_learn_and_one_process_writes_and_prints(tmp_path, task, tiny_llama):
    words = [
        "learn",
        "stream",
        task,
        "--model",
        tiny_llama,
        "--rank",
        "4",
        "--iters",
        "3",
        "--batch-size",
        "4",
        "--json",
    ]
    launch = [Path(sys.executable).parent / "mlx.launch", "-n", "2", "-p", free_ports(1)[0], "--backend", "ring", "--"]
    command = [str(each) for each in (*launch, sys.executable, ROOT / "cli.py", *words)]
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        # Its stdin stays open: at its end the launcher would turn round without a pause.
        process = subprocess.Popen(
            command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=out, stderr=err, start_new_session=True
        )
    try:
        assert process.wait(timeout=600) == 0, (tmp_path / "err").read_text()
    finally:
        process.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # it and what it started, where they hang
        process.wait()
    document = json.loads((tmp_path / "out").read_text())  # one document, not two
    assert document["tasks"][0]["steps"] == 3 and document["tasks"][0]["machine"]["processes"] == 2
    assert (tmp_path / "err").read_text().count("learned words in") == 1
    verify_all(StreamFolder.open(tmp_path / "stream"))


@pytest.mark.slow
@pytest.mark.parametrize("dead", [1, 0])
def test_a_dead_process_ends_the_run_and_the_stream_is_whole(pair, tmp_path, task, tiny_llama, dead):
    words = ["learn", "stream", task, "--model", tiny_llama, "--rank", 4, "--iters", 400, "--save-every", 1]
    lose_one(pair(ROOT / "cli.py", *words), dead, tmp_path / "stream", tmp_path)
    assert f"error: process {1 - dead} of 2: another process of this run is gone" in said(tmp_path, 1 - dead)[1][-2]
    folder = StreamFolder.open(tmp_path / "stream")
    verify_all(folder)
    assert folder.history() == [] and folder.interrupted()


@pytest.mark.slow
def test_a_run_that_lost_a_process_goes_on_to_the_same_bits_when_started_again(pair, tmp_path, task, tiny_llama):
    found = {}
    for name in ("whole", "cut"):
        words = ["learn", name, task, "--model", tiny_llama, "--rank", 4, "--iters", 100, "--save-every", 5]
        if name == "cut":
            lose_one(pair(ROOT / "cli.py", *words), 1, tmp_path / name, tmp_path)
            assert StreamFolder.open(tmp_path / name).interrupted()
        processes = pair(ROOT / "cli.py", *words)
        assert [process.wait(timeout=600) for process in processes] == [0, 0], said(tmp_path, 0) + said(tmp_path, 1)
        folder = StreamFolder.open(tmp_path / name)
        verify_all(folder)
        assert [record.steps for record in folder.history()] == [100] and not folder.interrupted()
        current = tmp_path / name / "current"
        found[name] = [(current / file).read_bytes() for file in ("state.safetensors", "adapter/adapters.safetensors")]
    assert found["cut"] == found["whole"]


def lose_one(processes, dead, stream, folder):
    """Kill one of the two when the first save is there; the other has to end by itself, as a user's mistake would."""
    deadline = time.monotonic() + 200
    while not list((stream / "working").glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    processes[dead].kill()
    assert processes[1 - dead].wait(timeout=200) == 1, said(folder, 1 - dead)
