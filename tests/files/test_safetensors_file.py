import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mbf_mlx.errors import InputError
from mbf_mlx.files.dtypes import NUMPY, name_of
from mbf_mlx.files.safetensors_file import Declared, header_of, read_bytes, read_header, safetensors_bytes, write


def one(dtype="F32", shape=(2, 2), offsets=(0, 16), **more):
    return {"x": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}}


def safetensors(header, data=bytes(16), length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


DAMAGED_FILES = {
    "empty": (b"", "not a safetensors file: expected 8 bytes"),
    "short": (b"1234", "not a safetensors file: expected 8 bytes"),
    "no header": (bytes(8), "not a safetensors file: expected 8 bytes"),
    "a zip": (b"PK\x03\x04" + bytes(200), "not a safetensors file"),
    "header beyond the file": (safetensors(one(), length=10_000), "expected a header of at most .* got 10,000"),
    "absurd header": (safetensors(one(), length=1 << 63), "expected a header of at most"),
    "cut off in the header": (safetensors(one())[:40], "expected a header of at most"),
    "cut off in the data": (safetensors(one(), bytes(12)), "expected 89 bytes in all, got 85; was it cut off"),
    "bytes left over": (safetensors(one(), bytes(20)), "expected 89 bytes in all, got 93"),
    "not JSON": (safetensors(b"{'x': 1}"), "not JSON"),
    "not UTF-8": (safetensors(b'{"\xff": 1}'), "not JSON"),
    "deep": (safetensors(b"[" * 50_000), "not JSON"),
    "a list": (safetensors([1, 2]), "expected a JSON object, got list"),
    "metadata of numbers": (safetensors({"__metadata__": {"a": 1}, **one()}), "__metadata__: expected strings"),
    "an entry that is none": (safetensors({"x": 3}), "x: expected dtype, shape and data_offsets, got 3"),
    "an entry with more": (safetensors(one(more=1)), "x: expected dtype, shape and data_offsets"),
    "unknown dtype": (safetensors(one(dtype="F3")), "x: unknown dtype 'F3'"),
    "dtype no name": (safetensors(one(dtype=["F32"])), "x: unknown dtype"),
    "negative shape": (safetensors(one(shape=(-2, -2))), r"x: impossible shape \[-2, -2\]"),
    "shape of truth": (safetensors(one(shape=(True, 4))), "x: impossible shape"),
    "broken shape": (safetensors(one(shape=(2.0, 2))), "x: impossible shape"),
    "endless shape": (safetensors(one(shape=(1,) * 9)), "x: impossible shape"),
    "huge shape": (safetensors(one(shape=(1 << 31,))), "x: impossible shape"),
    "overflowing shape": (safetensors(one(shape=(1 << 30,) * 4)), "takes .* bytes, its offsets span 16"),
    "one offset": (safetensors(one(offsets=(0,))), "x: expected two data_offsets"),
    "negative offset": (safetensors(one(offsets=(-16, 0))), "x: expected two data_offsets"),
    "offsets the wrong way": (safetensors(one(offsets=(16, 0))), "its offsets span -16"),
    "offsets too near": (safetensors(one(offsets=(0, 12))), r"F32 \(2, 2\) takes 16 bytes, its offsets span 12"),
    "a gap": (safetensors(one(offsets=(16, 32)), bytes(32)), "x: expected its data at byte 0, got 16"),
    "overlap": (
        safetensors({**one(), "y": one(offsets=(8, 24))["x"]}, bytes(24)), "y: expected its data at byte 16, got 8"
    ),
    "twice": (safetensors(b'{"x": 1, "x": 2}'), "x appears twice"),
    "half a character": (safetensors(b'{"\\ud800": 1}'), "not JSON: .* surrogates not allowed"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED_FILES)
def test_damaged_safetensors_are_refused_with_the_reason(tmp_path, name):
    content, message = DAMAGED_FILES[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as refusal:
        read_header(path)
    assert str(path) in str(refusal.value)
    with pytest.raises(InputError) as of_bytes:
        header_of(content, path)
    assert str(of_bytes.value) == str(refusal.value)


def test_what_mlx_and_safetensors_write_is_read(tmp_path, mx):
    import safetensors.numpy

    arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.zeros((0, 3), np.float16), "c": np.array(7)}
    safetensors.numpy.save_file(arrays, tmp_path / "one.safetensors")
    mx.save_safetensors(str(tmp_path / "two.safetensors"), {name: mx.array(value) for name, value in arrays.items()})
    for path in (tmp_path / "one.safetensors", tmp_path / "two.safetensors"):
        entries, _ = read_header(path)
        assert {name: entry.shape for name, entry in entries.items()} == {"a": (0, 3), "b": (2, 3), "c": ()}
        assert b"".join(read_bytes(path, entries["b"])) == arrays["b"].tobytes()


def test_what_we_write_is_read_by_safetensors_and_mlx(tmp_path, mx):
    import safetensors.numpy

    arrays = [np.arange(12, dtype=np.uint32).reshape(3, 4), np.ones(5, np.float16), np.zeros((0, 2), np.float32)]
    declared = [Declared(f"tensor {i}", dtype, arrays[i].shape) for i, dtype in enumerate(("U32", "F16", "F32"))]
    write(tmp_path / "x.safetensors", declared, iter(arrays))
    theirs = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    mlx = mx.load(str(tmp_path / "x.safetensors"))
    for tensor, array in zip(declared, arrays, strict=True):
        np.testing.assert_array_equal(theirs[tensor.name], array)
        np.testing.assert_array_equal(np.array(mlx[tensor.name]), array)
    with pytest.raises(ValueError, match=r"tensor 0: declared U32 \(3, 4\), got 20 bytes"):
        write(tmp_path / "y.safetensors", declared, iter([np.zeros(5, np.float32), *arrays[1:]]))


DTYPES = [*(code for name, code in NUMPY.items() if name != "BF16"), "float32", "float64", "int64", "bool"]
tensors = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3), st.sampled_from("CFTS")),
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@given(named=tensors, form=st.sampled_from(["mlx", "pt"]))
def test_our_bytes_are_what_safetensors_saves(named, form):
    """Of any type, name, order and memory layout: row by row, column by column, transposed, every second element."""
    import safetensors.numpy

    generator, arrays = np.random.default_rng(1), {}
    for name, (dtype, shape, layout) in named.items():
        array = generator.integers(0, 100, size=[2 * length for length in shape] if layout == "S" else shape)
        array = np.array(array, dtype=dtype, order="F" if layout == "F" else "C")
        arrays[name] = array[(slice(None, None, 2),) * array.ndim] if layout == "S" else array
        arrays[name] = array.T if layout == "T" else arrays[name]
    data = safetensors_bytes(arrays, form)
    plain = {name: np.array(array, order="C") for name, array in arrays.items()}
    assert data == safetensors.numpy.save(plain, metadata={"format": form})
    entries, metadata = header_of(data, Path("here"))
    assert metadata == {"format": form}
    assert {name: (entry.dtype, entry.shape) for name, entry in entries.items()} == {
        name: (name_of(array.dtype), array.shape) for name, array in arrays.items()
    }


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_change_of_a_safetensors_file_ends_in_anything_but_tensors_or_a_refusal(tmp_path, data):
    changed = bytearray(safetensors({**one(), "y": one("F16", (4,), (16, 24))["x"]}, bytes(24)))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(changed) - 1))
        changed[place : place + 1] = data.draw(st.binary(max_size=3))
    path = tmp_path / "changed.safetensors"
    path.write_bytes(changed)
    try:
        entries, _ = read_header(path)
    except InputError as refusal:
        assert str(path) in str(refusal)
        return
    assert sum(entry.nbytes for entry in entries.values()) <= len(changed)


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors(one()))
    entry = read_header(path)[0]["x"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match="x: its bytes end early; is another program writing the file"):
        list(read_bytes(path, entry))
