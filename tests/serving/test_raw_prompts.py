"""A raw prompt has the tokens that training saw, in a terminal and over HTTP, whatever a tokenizer puts around it."""

import json
import shutil

import pytest
from tokenizers import Tokenizer, processors

pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")

from mbf_mlx import Stream
from mbf_mlx.base.load import load_tokenizer
from mbf_mlx.config import DataConfig, LoRAConfig, TrainConfig
from mbf_mlx.data.encode import Encoder
from mbf_mlx.data.task import read_task
from tests.support.rows import rows_of
from tests.support.served import CHAT, running, send

AROUND = {
    "an end token": "$A <|im_end|>",
    "a first token": "<|im_start|> $A",
    "both": "<|im_start|> $A <|im_end|>",
    "nothing": "$A",
}


@pytest.mark.parametrize("around", AROUND)
def test_a_raw_prompt_is_tokenized_as_in_training(tiny_llama, write_jsonl, tmp_path, around):
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    special = [(mark, tokenizer.token_to_id(mark)) for mark in ("<|im_start|>", "<|im_end|>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=AROUND[around], special_tokens=special)
    tokenizer.save(str(base / "tokenizer.json"))
    task = read_task(write_jsonl("words.jsonl", rows_of(12)))
    stream = Stream.open(tmp_path / "s", base=str(base), lora=LoRAConfig(rank=2), template="none")
    stream.learn(task, train=TrainConfig(iters=2, learning_rate=1e-2))

    wrapped = load_tokenizer(base)
    rows = Encoder(wrapped, DataConfig(template="none")).all(task.train, task.path)
    speaker = stream.speaker()
    end = wrapped.eos_token_id
    for row in rows:
        learned = row.tokens[: row.prompt_length].tolist()
        assert speaker.prompt(row.row.prompt) == learned
        assert learned[-1] != end
        assert (learned[0] == special[0][1]) == around.startswith(("a first", "both"))
    with running(stream) as (server, _):
        for row in rows[:2]:
            text = {"model": "s", "prompt": row.row.prompt, "max_tokens": 1}
            talk = {"model": "s", "messages": [{"role": "user", "content": row.row.prompt}], "max_tokens": 1}
            for path, body in (("/v1/completions", text), (CHAT, talk)):
                status, document = send(server, "POST", path, body)
                assert status == 200, json.dumps(document)
                assert document["usage"]["prompt_tokens"] == row.prompt_length
