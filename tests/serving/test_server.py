"""`mbf serve`, asked by the real OpenAI client."""

import argparse
import contextlib
import dataclasses
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mbf_mlx.config import LoRAConfig, ServeConfig, TrainConfig
from mbf_mlx.errors import InputError
from tests.conftest import ROOT
from tests.support.rows import rows_of
from tests.support.served import running

pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")
openai = pytest.importorskip("openai", reason="openai is not installed: pip install 'mbf-mlx[dev]'")

from mbf_mlx import Stream  # noqa: E402

PROMPT = "red cold old new"
LIMIT = 20_000  # bytes of a request


def write_task(folder, seed, answer=None):
    folder.mkdir()
    for split, count in (("train", 16), ("test", 4)):
        rows = rows_of(count, seed=count + seed)
        rows = "".join(json.dumps({**row, "completion": answer or row["completion"]}) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(rows)
    return folder


def teach(stream, task, epochs=15):
    stream.learn(task, train=TrainConfig(epochs=epochs, batch_size=4, learning_rate=2e-2))


def make_stream(folder, base, **options):
    stream = Stream.open(folder / "assistant", base=str(base), lora=LoRAConfig(rank=4), **options)
    teach(stream, write_task(folder / "words", 0))
    return stream


def client_of(server):
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def taught(tiny_llama, tmp_path_factory):
    return make_stream(tmp_path_factory.mktemp("served"), tiny_llama)


@pytest.fixture(scope="module")
def served(taught):
    with running(taught, max_request_bytes=LIMIT) as (server, said):
        yield server, said


@pytest.fixture
def client(served):
    return client_of(served[0])


def ask(client, prompt=PROMPT, **options):
    return client.chat.completions.create(
        model="assistant", messages=[{"role": "user", "content": prompt}], **{"max_tokens": 20, **options}
    )


def post(server, body, path="/v1/chat/completions", length=None):
    """Send raw bytes; returns (status, the document that came back)."""
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=30)
    headers = {"Content-Length": str(len(body) if length is None else length)}
    connection.request("POST", path, body, headers)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def test_the_adapter_is_proved_before_the_first_answer(served):
    assert re.search(r"assistant: .* with the adapter of 1 task, which changes logits by up to \d", served[1][0])


def test_a_chat_completion_is_the_answer_of_mbf_generate(client, taught):
    expected = "".join(taught.generate(PROMPT, max_tokens=20))
    answer = ask(client)
    assert answer.choices[0].message.content == expected != ""
    assert answer.choices[0].finish_reason == "stop" and answer.model == "assistant"
    assert answer.usage.prompt_tokens == len(taught.speaker().prompt(PROMPT))


def test_streaming_gives_the_same_text_in_pieces_and_its_usage(client):
    whole = ask(client, "tell me of the train", max_tokens=12).choices[0].message.content
    parts = list(
        ask(client, "tell me of the train", max_tokens=12, stream=True, stream_options={"include_usage": True})
    )
    pieces = [part.choices[0].delta.content or "" for part in parts if part.choices]
    assert "".join(pieces) == whole and len(pieces) > 2
    assert parts[-1].usage.completion_tokens > 0
    # mlx-lm stumbles over options without this one
    assert list(ask(client, stream=True, stream_options={"include_usage": False}))


def test_an_answer_ends_before_a_stop_sequence(client):
    whole = ask(client, "tell me of the train", max_tokens=12).choices[0].message.content
    stop = whole[len(whole) // 2 :][:2]
    cut = ask(client, "tell me of the train", max_tokens=12, stop=[stop, "never"]).choices[0]
    assert cut.message.content == whole[: whole.index(stop)] and cut.finish_reason == "stop"


def test_text_completions_continue_a_prompt(client):
    assert client.completions.create(model="default_model", prompt="The stream", max_tokens=5).choices[0].text


def test_the_model_list_names_the_stream_alone(client):
    assert [model.id for model in client.models.list()] == ["assistant"]
    assert client.models.retrieve("assistant").id == "assistant"
    with pytest.raises(openai.NotFoundError, match="this server has only 'assistant'"):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature must be at least 0"),
        ({"n": 2}, "n must be 1"),
        ({"stop": [1]}, "stop must be a string or a list of strings"),
        ({"messages": []}, "messages must be a list of at least one object"),
        ({"messages": [{"content": "hi"}]}, "messages must be a list of at least one object"),
        ({"messages": [{"role": "user", "content": 3}]}, "content must be text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/"}}]}]},
            "content must be text, or a list of",
        ),
        ({"extra_body": {"adapters": "/somewhere"}}, "only with its stream's own adapter"),
        ({"extra_body": {"draft_model": "other"}}, "only with its stream's own adapter"),
    ],
)
def test_a_request_that_does_not_fit_is_told_why(client, options, message):
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(
            **{"model": "assistant", "messages": [{"role": "user", "content": "hi"}], **options}
        )


def test_another_model_is_refused_and_never_loaded(client):
    with pytest.raises(openai.NotFoundError, match="this server has only 'assistant', got 'org/other'"):
        client.chat.completions.create(model="org/other", messages=[{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("body", "length", "status", "message"),
    [
        (b"{", None, 400, "Invalid JSON"),
        (b"\xff", None, 400, "UTF-8"),
        (b"[]", None, 400, "dictionary"),
        (b"{}", LIMIT + 1, 413, f"at most {LIMIT} bytes"),
        (b"{}", -5, 400, "Content-Length"),
        (b'{"prompt": ""}', None, 400, "messages must be"),
    ],
)
def test_a_body_that_is_no_request_is_refused(served, client, body, length, status, message):
    got, document = post(served[0], body, length=length)
    error = document["error"]  # a string where mlx-lm itself refuses
    assert got == status and message in (error if isinstance(error, str) else error["message"])
    assert ask(client).choices[0].message.content


def test_two_clients_at_once_get_their_own_answers(client, served):
    prompts = [PROMPT, "tell me of the train"]
    alone = [ask(client, prompt, max_tokens=15).choices[0].message.content for prompt in prompts]

    def stream(prompt):
        parts = ask(client_of(served[0]), prompt, max_tokens=15, stream=True)
        return "".join(part.choices[0].delta.content or "" for part in parts)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(stream, prompts * 2)) == alone * 2


def test_a_client_that_goes_away_in_the_middle_harms_nobody(client, served):
    expected = ask(client).choices[0].message.content
    body = {"model": "assistant", "messages": [{"role": "user", "content": "tell me"}], "max_tokens": 400}
    body |= {"temperature": 3.0, "stream": True, "logit_bias": {"2": -100}}  # an answer that does not end by itself
    raw = json.dumps(body).encode()
    with ThreadPoolExecutor(1) as pool:
        with socket.create_connection(served[0].server_address[:2]) as gone:
            gone.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(raw) + raw)
            assert b"200" in gone.recv(20)
            other = pool.submit(ask, client)
        assert other.result().choices[0].message.content == expected
    assert ask(client).choices[0].message.content == expected
    for _ in range(100):
        if "127.0.0.1: went away before its answer was complete" in served[1]:
            return
        time.sleep(0.05)
    pytest.fail(f"the server said only {served[1]}")


def test_a_newly_learned_task_is_in_the_next_answer(tiny_llama, tmp_path):
    stream = make_stream(tmp_path, tiny_llama)
    with running(stream) as (server, said):
        client = client_of(server)
        before = ask(client).choices[0].message.content
        # Another process may have taught it: the server looks at the folder.
        more = write_task(tmp_path / "more", 7, answer="music")
        teach(Stream.open(stream.folder.path), more)
        after = ask(client).choices[0].message.content
        assert after == "".join(stream.generate(PROMPT, max_tokens=20)) != before
        assert "with the adapter of 2 tasks" in said[-1] and len(said) == 2
        stream.undo()
        assert ask(client).choices[0].message.content == before


def test_a_fused_export_is_served_when_it_answers_like_the_adapter(taught, tiny_llama, tmp_path):
    taught.export("mlx", tmp_path / "fused", bits=32)
    with running(taught, fused=tmp_path / "fused") as (server, said):
        assert "which answers like the adapter of 1 task, not like the base" in said[0]
        expected = "".join(taught.generate(PROMPT, max_tokens=20))
        assert ask(client_of(server)).choices[0].message.content == expected
    with (
        pytest.raises(InputError, match="answers more like the base than like the adapter"),
        running(taught, fused=tiny_llama),
    ):
        pass
    with pytest.raises(InputError, match="expected a folder that mbf export"), running(taught, fused=tmp_path):
        pass


def test_a_stream_taught_without_a_template_is_served_without_one(tiny_llama, tmp_path):
    stream = make_stream(tmp_path, tiny_llama, template="none")
    with running(stream) as (server, _):
        answer = ask(client_of(server))
        assert answer.choices[0].message.content == "".join(stream.generate(PROMPT, max_tokens=20)).strip(" ")
        assert answer.usage.prompt_tokens == len(stream.speaker().prompt(PROMPT))


def test_a_port_that_is_taken_and_settings_that_do_not_fit_are_named(served, taught):
    port = served[0].server_address[1]
    with pytest.raises(InputError, match=f"--port {port}: cannot listen there.*\nhint: --port 0"):
        with taught.serving(ServeConfig(port=port)):
            pass
    with pytest.raises(InputError, match="--host: no such address: 'no.such.host.invalid'"):
        with taught.serving(ServeConfig(host="no.such.host.invalid")):
            pass
    with pytest.raises(InputError, match="ServeConfig.decode_concurrency: expected a whole number of at least 1"):
        ServeConfig(decode_concurrency=0)


def test_our_arguments_are_those_of_mlx_lms_own_server(monkeypatch):
    from mlx_lm import server

    from mbf_mlx.serving.server import arguments

    class Parsed(Exception):
        pass

    def stop(parser, *args, **options):
        raise Parsed(vars(parse(parser, [])))

    parse = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(Parsed) as caught:
        server.main()
    theirs, ours = caught.value.args[0], vars(arguments(ServeConfig(), "model"))
    assert ours.keys() == theirs.keys()
    different = {name for name in ours if ours[name] != theirs[name]}
    assert different == {"model", "log_level", "allowed_origins"}
    # Every limit that mlx-lm offers is a setting of ours.
    settings = {field.name for field in dataclasses.fields(ServeConfig)}
    limits = {name for name in theirs if re.search("concurrency|step_size|cache|max_tokens", name)}
    assert limits <= settings


def test_the_command_listens_on_loopback_warns_otherwise_and_ends_when_told(taught):
    command = [sys.executable, str(ROOT / "cli.py"), "serve", str(taught.folder.path), "--port", "0"]
    command += ["--host", "0.0.0.0", "--no-key"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=dict(os.environ)) as process:
        try:
            lines = []
            for line in process.stderr:
                lines.append(line)
                if "listening" in line:
                    break
            text = "".join(lines)
            assert "which changes logits" in text
            assert "warning: --host 0.0.0.0: whoever reaches this machine can use the model" in text
            port = re.search(r"listening on http://0.0.0.0:(\d+)/v1, model 'assistant'", text)[1]
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", int(port), timeout=30)) as connection:
                connection.request("GET", "/health")
                assert connection.getresponse().status == 200
        finally:
            process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(30) == 143 and "Traceback" not in rest
    assert ServeConfig().host == "127.0.0.1"
