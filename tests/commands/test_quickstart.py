import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_the_quickstart_learns_compares_exports_and_answers_and_can_be_repeated(smollm2, tmp_path):
    command = [sys.executable, str(ROOT / "cli.py"), "quickstart", "--json"]
    environment = {**os.environ, "MBF_MODELS": str(smollm2.parent)}
    first = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    result = json.loads(first.stdout)
    assert [task["name"] for task in result["assistant"]["tasks"]] == ["home", "inbox", "bins"]
    assert [task["name"] for task in result["sequential"]["tasks"]] == ["home", "inbox", "bins"]
    assert max(result["base_scores"].values()) < 0.2  # the base has not solved them
    assert result["assistant"]["average_accuracy"] > 0.5
    assert result["answer"].strip()
    assert (tmp_path / "quickstart/fused/config.json").is_file()
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    repeated = json.loads(again.stdout)
    assert repeated["assistant"]["scores"] == result["assistant"]["scores"]
    assert repeated["base_scores"] == result["base_scores"]


@pytest.mark.slow
def test_the_fast_quickstart_does_all_of_it_on_fewer_rows(smollm2, tmp_path):
    command = [sys.executable, str(ROOT / "cli.py"), "quickstart", "--fast", "--json"]
    environment = {**os.environ, "MBF_MODELS": str(smollm2.parent)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [task["train_rows"] for task in result["assistant"]["tasks"]] == [24, 24, 24]
    assert (tmp_path / "quickstart/fused-fast/config.json").is_file()
