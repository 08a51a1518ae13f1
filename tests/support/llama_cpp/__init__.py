"""The real llama.cpp for slow tests: `install()` once, then `run(job)`; run.mjs says what a job is."""

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from filelock import FileLock

FOLDER = Path(__file__).parent
PACKAGE = FOLDER / "node_modules" / "node-llama-cpp" / "package.json"


def install():
    """Install npm's node-llama-cpp beside this file where it is missing; skip where that cannot be done."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed, which brings llama.cpp for this test")
    with FileLock(Path(tempfile.gettempdir()) / "mbf-llama-cpp.lock"):
        if not PACKAGE.exists():
            # The install script would look for a GPU and may build; the binaries are in the packages.
            flags = ["--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock"]
            done = subprocess.run(["npm", "install", *flags], cwd=FOLDER, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"npm could not install node-llama-cpp: {done.stderr.strip().splitlines()[-1:]}")


def run(tmp_path, **job):
    """Return llama.cpp's answer to a job."""
    question, answer = tmp_path / "job.json", tmp_path / "answer.json"
    question.write_text(
        json.dumps({key: str(value) if isinstance(value, Path) else value for key, value in job.items()})
    )
    command = ["node", str(FOLDER / "run.mjs"), str(question), str(answer)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    return json.loads(answer.read_text())
