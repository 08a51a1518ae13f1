"""An export's job for a base and its factors, without a stream."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from mbf_mlx.export.card import About
from mbf_mlx.export.job import Job
from mbf_mlx.methods import Factors
from tests.support.factors import SCALE


def showing(seen):
    """Return a `show` that appends the numbers it is shown to a list."""
    return lambda title, total=None, unit="": nullcontext(lambda done, **values: seen.append(done))


def job_of(base: Path, factors: Factors, out: Path, **options: Any) -> Job:
    """Return a job; `options` are fields of `Job` other than these."""
    about = options.pop("about", About(base.name))
    settings = {"base_name": str(base), "scale": SCALE, "num_layers": 2, "num_blocks": 2, **options}
    return Job(base=base, factors=factors, out=out, about=about, **settings)


def mean_retention(report):
    """The mean retention of the layers with factors in a writer's report."""
    return sum(layer.retention for layer in report.layers) / len(report.layers)
