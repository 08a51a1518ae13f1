import os
import subprocess
import sys

import pytest

from mbf_mlx.errors import InputError
from mbf_mlx.stream.folder import StreamFolder
from tests.support.streams import new_stream


def test_a_second_writer_is_told_who_holds_the_lock(quick_path):
    stream = new_stream(quick_path / "s")
    with stream.writer():
        with pytest.raises(InputError, match=rf"in use by process {os.getpid()} on .* since \d{{4}}-"):
            with StreamFolder.open(quick_path / "s").writer():
                pass
    with StreamFolder.open(quick_path / "s").writer():
        pass


def test_the_lock_of_a_killed_process_is_free(quick_path):
    new_stream(quick_path / "s")
    code = (
        "import os, signal, sys; from pathlib import Path; from mbf_mlx.stream.folder import StreamFolder\n"
        "with StreamFolder.open(Path(sys.argv[1])).writer(): os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(quick_path / "s")], check=False)
    assert done.returncode == -9
    with StreamFolder.open(quick_path / "s").writer():
        pass
