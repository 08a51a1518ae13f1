"""What `import mbf_mlx` offers a user: every name is there, and a type checker knows what it is."""

import os
import subprocess
import sys

import pytest

import mbf_mlx
from tests.conftest import ROOT

SCRIPT = """from typing import assert_type
from mbf_mlx import Experiment, Stream, read_results
stream = Stream.open("assistant", base="smollm2-135m-instruct")
assert_type(stream.learn("mail.jsonl", epochs=3)[0].seconds, float)
assert_type((Experiment.open("first.toml").run() + read_results("results"))[0]["scores"], list[list[float | None]])
"""


def test_every_public_name_is_there_and_no_other():
    pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")
    from mbf_mlx.api import Stream
    from mbf_mlx.errors import InputError

    assert all(getattr(mbf_mlx, name) for name in mbf_mlx.__all__)
    assert (mbf_mlx.Stream, mbf_mlx.InputError) == (Stream, InputError)
    with pytest.raises(AttributeError, match="module 'mbf_mlx' has no attribute 'Steam'"):
        _ = mbf_mlx.Steam


def test_a_users_type_checker_sees_the_types(tmp_path):
    assert (ROOT / "mbf_mlx" / "py.typed").exists()  # without it, mypy takes an installed package for untyped
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--cache-dir", str(ROOT / ".mypy_cache")]
    command += ["--config-file", str(ROOT / "pyproject.toml"), "script.py"]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / "script.py").write_text(SCRIPT.replace("seconds, float", "seconds, str"))
    wrong = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert wrong.returncode == 1 and 'Expression is of type "float", not "str"' in wrong.stdout
