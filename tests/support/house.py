"""The package's modules, and which of them run without mlx."""

import functools

from tests.conftest import ROOT

PACKAGE = ROOT / "mbf_mlx"
# Run in the plain install, where there is no mlx.
WITHOUT_MLX = [
    "errors", "units", "config", "reference", "metrics", "files", "device", "methods", "adapters", "stream", "exchange",
    "data", "learning.events", "learning.new_stream", "experiment.results", "experiment.plan_file", "experiment.suites",
    "export.adapter_folder", "export.gguf.adapter", "commands",
]  # fmt: skip


@functools.cache
def modules():
    """Return every module of the package, "methods.slao" -> its file."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    found.pop("")
    return found
