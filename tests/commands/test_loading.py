"""`mbf chat` and `mbf serve` say what they load before they import anything heavy."""

import subprocess
import sys

import pytest

from tests.support.command_line import mbf
from tests.support.house import ROOT
from tests.support.streams import new_stream

HEAVY = ("mlx", "mlx_lm", "transformers", "numpy", "torch", "mbf_mlx.api")
SAID_FIRST = """
import sys
from mbf_mlx.commands import console, main
say, said = console.say_loading, []
def watched(*given):
    say(*given)
    print("heavy:", *({HEAVY} & sys.modules.keys()), file=sys.stderr)
    raise SystemExit(0)
console.say_loading = watched
main()
"""


@pytest.mark.parametrize("command", ["chat", "serve"])
def test_what_is_loaded_is_said_before_anything_heavy_is_imported(command, tmp_path):
    new_stream(tmp_path / "[s]")
    code = SAID_FIRST.replace("{HEAVY}", str(set(HEAVY)))
    done = subprocess.run(
        [sys.executable, "-c", code, command, tmp_path / "[s]"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stderr == f"{tmp_path}/[s]: loading tiny ...\nheavy:\n" and not done.stdout


def test_an_export_is_named_in_place_of_the_base(tmp_path):
    new_stream(tmp_path / "s")
    done = mbf("serve", tmp_path / "s", "--fused", tmp_path / "export")
    assert done.stderr.startswith(f"{tmp_path}/s: loading {tmp_path}/export ...\n") and done.returncode == 1


@pytest.mark.parametrize("content", [None, "{", "[]", '{"base": 3}'])
def test_of_a_stream_that_cannot_be_read_only_the_error_is_said(content, tmp_path):
    if content is not None:
        (tmp_path / "s").mkdir()
        (tmp_path / "s" / "stream.json").write_text(content)
    for command in ("chat", "serve"):
        done = mbf(command, tmp_path / "s")
        assert "loading" not in done.stderr and done.stderr.startswith("error: ") and done.returncode == 1
