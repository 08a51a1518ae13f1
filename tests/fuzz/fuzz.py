"""Coverage-guided fuzzing of the readers of strangers' files: `fuzz.py {gguf,safetensors,task} [-options]`.

A reader takes a file or refuses it with an InputError. Anything else is a bug: another exception, a hang (-timeout=10),
or more than 1 GB of memory (-rss_limit_mb=1024). The options are libFuzzer's. `make fuzz` runs each reader for ten
minutes. It needs atheris, which the tests do not: pip install atheris.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

MEMORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else None


def gguf(path):
    from mbf_mlx.base.gguf.reader import read_gguf

    file = read_gguf(path)
    for tensor in file.tensors.values():
        file.rows(tensor)


def safetensors(path):
    from mbf_mlx.adapters.mlx_lm import read_tensors
    from mbf_mlx.errors import InputError
    from mbf_mlx.files.safetensors_file import read_bytes, read_header

    try:
        entries, _ = read_header(path)
    except InputError:
        entries = {}
    for entry in entries.values():
        for _ in read_bytes(path, entry):
            pass
    read_tensors(path)


def task(path):
    from mbf_mlx.data.task import read_task

    for row in read_task(path).train:
        assert row.texts


READERS = {"gguf": gguf, "safetensors": safetensors, "task": task}
SUFFIXES = {"gguf": [".gguf"], "safetensors": [".safetensors"], "task": [".jsonl", ".csv", ".tsv", ".json"]}

# Bytes that libFuzzer puts into its inputs: words of the formats, and numbers at the edges of their ranges.
WORDS = {
    "gguf": [b"GGUF", b"general.alignment", b"\x00" * 7 + b"\x80", b"\x09\x00\x00\x00", b"\x08\x00\x00\x00"],
    "safetensors": b'"dtype": "shape": "data_offsets": "__metadata__": "F16" "BF16" "I64" "F8_E4M3" [[[[ {} null true'
    b" 1e9 -1 4294967296 18446744073709551616 \\ud800 NaN".split(),
    "task": b'{"prompt":"a","completion":"b"} "messages": "role": "content": "text": "tool_calls": "tools": "assistant"'
    b' "system" "Instances": "Definition": "input": "output": "label": "sentence": \\ud800 null NaN 1e999 [[[['
    b" \xef\xbb\xbf \xe2\x80\xa8 \x00".split(),
}


def feed(name, data, folder):
    """Give one input to a reader.

    A task's first byte chooses the kind of file. If the length of a safetensors header has an odd last byte, it is
    replaced by the right length, up to the last brace, which the fuzzer would seldom find by itself.
    """
    from mbf_mlx.errors import InputError

    if name == "safetensors" and len(data) > 8 and data[7] % 2:
        end = max(8, data.rfind(b"}") + 1)
        data = (end - 8).to_bytes(8, "little") + data[8:]

    suffix = SUFFIXES[name][(data[0] if data else 0) % len(SUFFIXES[name])]
    path = Path(folder) / f"input{suffix}"
    path.write_bytes(data[1:] if name == "task" else data)
    try:
        READERS[name](path)
    except InputError:
        pass
    finally:
        path.unlink()


def seeds(name):
    """Return whole files to start from."""
    import json
    import struct

    if name == "task":
        row = json.dumps({"prompt": "a", "completion": "b"})
        chat = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
        rows = '{"Definition": ["d"], "Instances": [{"input": "a", "output": ["b"]}], "Positive Examples": []}'
        return [
            b"\0" + f"{row}\n{chat}\n".encode(),
            b"\1prompt,completion\na,b\n",
            b"\2text\na\n",
            b"\3" + rows.encode(),
        ]
    if name == "safetensors":
        one = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
        two = {"__metadata__": {"a": "b"}, **one, "b": {"dtype": "BF16", "shape": [2, 1], "data_offsets": [4, 8]}}
        none = {"a": {"dtype": "F16", "shape": [0, 3], "data_offsets": [0, 0]}}
        headers = [(json.dumps(header).encode(), data) for header, data in ((one, 4), (two, 8), (none, 0), ({}, 0))]
        return [struct.pack("<Q", len(text)) + text + bytes(data) for text, data in headers]
    name_of = struct.pack("<Q", 1) + b"a"
    settings = name_of + struct.pack("<II", 4, 7) + struct.pack("<Q", 1) + b"b" + struct.pack("<IIQ", 9, 8, 1) + name_of
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 2) + settings
    head += name_of + struct.pack("<IQIQ", 1, 32, 8, 0)
    return [head + b"\0" * (-len(head) % 32) + b"\0" * 34]


def main():
    import atheris

    name = sys.argv.pop(1)
    with atheris.instrument_imports(include=["mbf_mlx"]):
        pass

    with tempfile.TemporaryDirectory(dir=MEMORY, prefix="mbf-fuzz-") as folder:
        corpus, words = Path(folder) / "corpus", Path(folder) / "words"
        corpus.mkdir()
        words.write_text("".join('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n' for word in WORDS[name]))
        for number, seed in enumerate(seeds(name)):
            (corpus / str(number)).write_bytes(seed)
        options = [sys.argv[0], str(corpus), f"-dict={words}", *sys.argv[1:]]
        atheris.Setup(options, lambda data: feed(name, data, folder))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
