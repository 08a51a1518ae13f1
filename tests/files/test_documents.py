import time

import pytest

from mbf_mlx.errors import InputError
from mbf_mlx.files.documents import first_repeated, read_object, toml


def test_a_json_object_is_read(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "llama", "sizes": [1, 2]}')
    assert read_object(path) == {"model_type": "llama", "sizes": [1, 2]}


BAD_JSON = {
    "nothing": (b"", "not JSON: Expecting value"),
    "cut off": (b'{"a": 1', "not JSON: "),
    "bytes": (b"\xff\xff\x00", "not JSON: "),
    "brackets without end": (b"[" * 100_000, "not JSON: "),
    "a list": (b"[1]", "expected a JSON object, got list"),
    "null": (b"null", "expected a JSON object, got NoneType"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_what_is_no_json_object_is_refused_with_the_file_and_the_reason(tmp_path, case):
    content, message = BAD_JSON[case]
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_object(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_missing_json_file_is_for_the_caller_to_explain(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_object(tmp_path / "config.json")


def test_a_folder_in_the_place_of_a_document_is_refused(tmp_path):
    for read in (read_object, lambda path: toml(path, "a recipe")):
        with pytest.raises(InputError, match="cannot read: a folder is there"):
            read(tmp_path)


def test_a_toml_document_is_read(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('seeds = [0, 1]\n[train]\nepochs = 2\nname = "Zürich"\n', encoding="utf-8")
    assert toml(path, "") == {"seeds": [0, 1], "train": {"epochs": 2, "name": "Zürich"}}


@pytest.mark.parametrize(
    "content", [b"a = ", b"a = 1\na = 2", b"a = \xff", b"a = " + b"[" * 100_000], ids=lambda text: text[:9].hex()
)
def test_what_is_no_toml_is_refused_with_the_file_and_the_reason(tmp_path, content):
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not readable as TOML: ") as caught:
        toml(path, "")
    assert str(caught.value).startswith(f"{path}: ")


def test_a_missing_toml_file_comes_with_the_callers_hint(tmp_path):
    with pytest.raises(InputError) as caught:
        toml(tmp_path / "run.toml", "an experiment file names its methods")
    assert str(caught.value) == f"{tmp_path}/run.toml: no such file\nhint: an experiment file names its methods"


def test_the_first_repeated_name_is_found_in_linear_time():
    names = [str(place) for place in range(1_000_000)]
    begin = time.process_time()
    assert first_repeated(names) is None
    assert first_repeated([*names, "999999", "3"]) == "999999"
    assert first_repeated(["x" * 7_000_000] * 2) == "x" * 80
    assert time.process_time() - begin < 10  # quadratic: hours
