"""The files in .github: what they run exists in this checkout, and they do what they promise."""

import re
import tomllib

import pytest

from tests.conftest import ROOT

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed; it comes with mlx-lm")
if not (ROOT / ".github").is_dir():
    pytest.skip("this is no checkout: .github is not published", allow_module_level=True)

WORKFLOWS = {file.stem: yaml.safe_load(file.read_text()) for file in (ROOT / ".github" / "workflows").glob("*.yml")}
FORMS = [file for file in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if file.name != "config.yml"]


def steps(workflow, job):
    return WORKFLOWS[workflow]["jobs"][job]["steps"]


def commands(workflow, job):
    return "\n".join(step["run"] for step in steps(workflow, job) if "run" in step)


def every_step():
    return [step for document in WORKFLOWS.values() for job in document["jobs"].values() for step in job["steps"]]


def test_every_target_and_file_that_a_workflow_runs_is_here():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    runs = "\n".join(step.get("run", "") for step in every_step())
    called, files = set(re.findall(r"\bmake ([a-z-]+)", runs)), set(re.findall(r"\bbenchmarks/\w+\.py", runs))
    assert {"test", "test-all", "release-check"} <= called <= targets
    assert files and all((ROOT / file).is_file() for file in files)


def test_every_file_that_the_makefile_runs_is_here():
    files = set(re.findall(r"\b(?:tests|benchmarks)/[\w/]+\.py", (ROOT / "Makefile").read_text()))
    assert {"tests/fuzz/fuzz.py", "tests/whole/test_release.py"} <= files
    assert [file for file in files if not (ROOT / file).is_file()] == []


def test_linux_and_apple_silicon_run_the_same_tests():
    assert "make test PYTHON=python" in commands("test", "test").splitlines()
    (job,) = WORKFLOWS["mac"]["jobs"]
    assert "make test PYTHON=python " in commands("mac", job)


def test_nothing_may_write_but_what_publishes_and_that_holds_no_secret():
    for name, document in WORKFLOWS.items():
        assert document["permissions"] == {"contents": "read"}, name
        more = {job: each["permissions"] for job, each in document["jobs"].items() if "permissions" in each}
        assert more == ({"publish": {"id-token": "write"}} if name == "release" else {}), name
        assert all("timeout-minutes" in job for job in document["jobs"].values()), name
    assert not any("secrets." in str(step) for step in every_step())


def test_a_tag_publishes_what_was_built_and_checked():
    document = WORKFLOWS["release"]
    assert document[True] == {"push": {"tags": ["v*"]}}  # YAML reads the key `on` as a truth value
    assert document["jobs"]["publish"]["needs"] == "check"
    assert "make release-check" in commands("release", "check")
    up, down = (next(s for s in steps("release", job) if f"/{what}-artifact@" in s.get("uses", ""))
                for job, what in (("check", "upload"), ("publish", "download")))  # fmt: skip
    assert up["with"]["name"] == down["with"]["name"] and up["with"]["path"] == down["with"]["path"] == "dist/"
    (last,) = (step for step in steps("release", "publish") if "pypi-publish" in step["uses"])
    assert "with" not in last  # neither a password nor another index


def test_apple_silicon_runs_tests_quickstart_and_benchmark_and_keeps_what_they_print():
    (job,) = WORKFLOWS["mac"]["jobs"]
    assert int(re.fullmatch(r"macos-(\d+)", WORKFLOWS["mac"]["jobs"][job]["runs-on"])[1]) >= 14  # arm64 from 14 on
    for line in ("mbf doctor", "make test ", "mbf quickstart --fast", "benchmarks/step.py"):
        (step,) = (each for each in steps("mac", job) if line in each.get("run", ""))
        assert "output/" in step["run"], f"{line}: not kept"
    keep = steps("mac", job)[-1]
    assert keep["uses"].startswith("actions/upload-artifact@") and keep["if"] == "always()"
    assert keep["with"]["path"] == "output/"


def test_every_python_that_is_promised_is_tested():
    least = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    assert least in WORKFLOWS["test"]["jobs"]["test"]["strategy"]["matrix"]["python"]


@pytest.mark.parametrize("form", FORMS, ids=[form.stem for form in FORMS])
def test_every_issue_form_asks_what_mbf_doctor_prints(form):
    document = yaml.safe_load(form.read_text())
    assert document["name"] and document["description"]
    asked = [each for each in document["body"] if each["id"] == "doctor"]
    assert len(asked) == 1 and "mbf doctor" in asked[0]["attributes"]["label"]
