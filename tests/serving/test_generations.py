"""Which model `mbf serve` answers with: the stream's newest generation, or a fused export that is one."""

import json

import pytest

from mbf_mlx.config import LoRAConfig, ServeConfig
from mbf_mlx.errors import InputError
from tests.support.served import HI, chat, running, teach

pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")

from mbf_mlx import Stream


def test_an_undone_task_is_forgotten_with_what_was_remembered_of_it(tiny_llama, tmp_path):
    stream = Stream.open(tmp_path / "s", base=str(tiny_llama), lora=LoRAConfig(rank=4))
    teach(stream, tmp_path / "a", "music")
    with running(stream) as (server, said):
        first = chat(server, max_tokens=20)[1]["choices"][0]["message"]["content"]
        stream.undo()  # no request sees the empty stream
        teach(stream, tmp_path / "b", "weather report")
        answer = chat(server, max_tokens=20)[1]
        assert answer["choices"][0]["message"]["content"] == "".join(stream.generate(HI, max_tokens=20)) != first
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert len(said) == 2
        again = chat(server, max_tokens=20)[1]
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        stream.undo()
        chat(server)  # sees the empty stream
        teach(stream, tmp_path / "c", "fast train")
        answer = chat(server, max_tokens=20)[1]
        assert answer["choices"][0]["message"]["content"] == "".join(stream.generate(HI, max_tokens=20))
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 1_000_000_000}, "num_hidden_layers"),
        ({"hidden_size": 8}, "hidden_size"),
        ({"model_type": "nothing_known"}, "model_type"),
        ({"vocab_size": 7}, "vocab_size"),
        ({"rope_theta": "x"}, "rope_theta|cannot be loaded"),
    ],
    ids=lambda value: json.dumps(value)[:40],
)
def test_a_fused_folder_that_is_no_export_is_one_clear_error(stream, tmp_path, change, message):
    stream.export("mlx", tmp_path / "fused", bits=32)
    place = tmp_path / "fused" / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | change))
    with pytest.raises(InputError, match=message), stream.serving(ServeConfig(port=0), fused=tmp_path / "fused"):
        pass


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\0" * 100])
def test_a_fused_folder_with_a_damaged_file_is_one_clear_error(stream, tmp_path, name, content):
    stream.export("mlx", tmp_path / "fused", bits=32)
    (tmp_path / "fused" / name).write_bytes(content)
    with pytest.raises(InputError), stream.serving(ServeConfig(port=0), fused=tmp_path / "fused"):
        pass
