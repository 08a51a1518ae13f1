"""What a stream of many tasks costs: `mbf status`, `mbf report`, and one commit, by the number of tasks learned.

The streams are synthetic and small (tests/support/streams.py): what is measured is the record, not training. A commit
is timed with what `mbf learn` reads of the record before it, without training and scoring.

python benchmarks/many_tasks.py [--counts 2 100 1000 10000] [--out FILE]
"""

import argparse
import os
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import common

from mbf_mlx.methods import make
from mbf_mlx.stream.folder import StreamFolder
from mbf_mlx.stream.records import spans_to_score
from tests.support.streams import new_stream, record, tune


def stream_of(folder: Path, count: int) -> StreamFolder:
    """Make a stream that has learned `count` tasks, a commit each; its factors are those of the first."""
    stream = new_stream(folder)
    method, state = make(stream.identity.method), stream.state()
    state = method.finish(state, tune(state, method.start(state)))
    with stream.writer():
        for t in range(1, count + 1):
            stream.commit(stream.current(), replace(state, t=t), record(t), "models/tiny", {})
    return stream


def measured(command: list[str]) -> dict[str, float]:
    """Run a command and return its seconds and its peak memory in MB (10^6 bytes).

    Raises:
        SystemExit: it fails.
    """
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=common.ROOT)
    waited: list[Any] = []
    seconds = common.seconds(lambda: waited.extend(os.wait4(process.pid, 0)))
    if waited[1]:
        raise SystemExit(f"{' '.join(command)}: status {waited[1]}")
    return {"seconds": seconds, "MB": waited[2].ru_maxrss * 1024 / 1e6}


def commit_seconds(stream: StreamFolder) -> float:
    """Return the seconds of one commit, with what `mbf learn` reads of the stream before it."""

    def commit() -> None:
        with stream.writer():
            start, state = stream.current(), stream.state()
            stream.task_scores().contents_of("a new task")
            stream.tasks(spans_to_score(state.t))
            stream.commit(start, replace(state, t=state.t + 1), record(state.t + 1), "models/tiny", {})

    return common.seconds(commit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 100, 1000, 10_000])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    kept = common.Kept("many_tasks", options.out)
    lines = ["| tasks | stream, MB | `mbf status` | `mbf report` | one commit |", "|---|---|---|---|---|"]
    for count in options.counts:

        def case(count: int = count) -> dict[str, Any]:
            with tempfile.TemporaryDirectory() as place:
                folder = Path(place)
                stream = stream_of(folder / "s", count)
                size = sum(file.stat().st_size for file in (folder / "s").rglob("*") if file.is_file())
                status = measured(common.mbf("status", folder / "s"))
                report = measured(common.mbf("report", folder / "s", "--out", folder / "s.html"))
                commit = commit_seconds(StreamFolder.open(stream.path))
                return {"stream_MB": size / 1e6, "status": status, "report": report, "commit": commit}

        found = kept.once(str(count), case)
        ran = [f"{found[name]['seconds']:.2f} s, {found[name]['MB']:.0f} MB" for name in ("status", "report")]
        lines.append(f"| {count:,} | {found['stream_MB']:.1f} | {ran[0]} | {ran[1]} | {found['commit']:.3f} s |")
    common.finish(common.document("many_tasks", kept.results), lines, options.out)


if __name__ == "__main__":
    main()
