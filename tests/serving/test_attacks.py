"""`mbf serve` against bytes that are no request, clients that go away, and pages and machines that may not ask."""

import contextlib
import json
import socket
import time

import pytest

from mbf_mlx.config import ServeConfig
from mbf_mlx.errors import InputError
from tests.support.served import CHAT, HI, LIMIT, chat, error_of, is_well, lines, raw, running, send

pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (lines(f"Content-Length: {'9' * 5000}"), 413),
        (lines("Content-Length: -5"), 400),
        (lines("Content-Length: 5, 5", body=b"{}"), 400),
        (lines("Content-Length: 2", "Content-Length: 20", body=b"{}"), 400),
        (lines("Content-Length: \u00b2", body=b"{}"), 400),
        (lines("Transfer-Encoding: chunked", body=b"2\r\n{}\r\n0\r\n\r\n"), 411),
        (lines(), 411),
        (lines(f"Content-Length: {LIMIT}", body=b"[" * LIMIT), 400),
        (lines("Content-Length: 5001", body=b"9" * 5001), 400),
        (lines("Content-Length: 3", body=b"NaN"), 400),
        (lines("Content-Length: 22", body=b'{"temperature": 1e999}'), 400),
        (lines("Content-Length: 4", body=b"\xff\xfe\0\0"), 400),
        (lines("Content-Length: 0"), 400),
        (lines("Content-Length: 2", body=b"{}", path="/v1/embeddings"), 404),
        (lines("Content-Length: 2", body=b"{}", path="/%00/../x"), 404),
        (lines("Content-Length: 2", body=b"{}", path="http://[/"), 400),
        (lines("Content-Length: 2", body=b"{}", path="/health"), 405),
        (lines(method="DELETE"), 405),
        (lines(method="GET"), 405),
        (b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET /health HTTP/9.9\r\n\r\n", 505),
        (lines("X: " + "x" * 70_000, method="GET", path="/health"), 431),
        (lines(*(f"X{number}: x" for number in range(200)), method="GET", path="/health"), 431),
        (lines(method="GET", path="/" + "x" * 70_000), 414),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_a_request_that_is_none_gets_an_openai_error(served, data, status):
    answer = raw(served[0], data)
    head, _, body = answer.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/"):  # to HTTP/0.9 there are no headers
        head, body = b"HTTP/1.0 %d" % status, head
    assert head.split()[1] == b"%d" % status, answer
    error_of(json.loads(body))
    is_well(served[0])


def test_a_body_that_ends_early_is_told_so(served):
    with socket.create_connection(served[0].server_address[:2], timeout=30) as connection:
        connection.sendall(lines("Content-Length: 50", body=b"{}"))
        connection.shutdown(socket.SHUT_WR)
        assert b" 400 " in connection.recv(1 << 16)


def test_an_error_in_the_thread_that_generates_ends_only_the_answers_at_work(served, monkeypatch):
    from mlx_lm import server as theirs

    def broken(*args):
        raise SystemError("a defect of another library")

    with monkeypatch.context() as patch:
        patch.setattr(theirs, "_make_sampler", broken)
        status, document = chat(served[0])
        assert status == 500 and "a defect of another library" in error_of(document)
    assert any("a defect of another library" in line for line in served[1])
    is_well(served[0])


def test_health_says_when_nobody_answers(served, monkeypatch):
    from mbf_mlx.serving import generator

    is_well(served[0])
    monkeypatch.setattr(generator, "STALLED", -1.0)
    assert send(served[0], "GET", "/health") == (503, {"status": "unavailable"})


ENDLESS = {"temperature": 1.0, "logit_bias": {"2": -100}, "max_tokens": 10**9}


def test_an_answer_ends_where_its_time_does(stream):
    with running(stream, max_seconds=1) as (server, _):
        begin = time.monotonic()
        status, document = chat(server, **ENDLESS)
        assert time.monotonic() - begin < 20
        if status == 200:
            assert document["choices"][0]["finish_reason"] in ("length", "stop")
        else:
            assert status == 503 and "--max-seconds" in error_of(document)


def test_clients_that_go_away_leave_the_generator_free(served):
    body = json.dumps({"messages": HI, **ENDLESS}).encode()
    for _ in range(8):
        with socket.create_connection(served[0].server_address[:2], timeout=30) as connection:
            connection.sendall(lines(f"Content-Length: {len(body)}", body=body))
    begin = time.monotonic()
    is_well(served[0])
    assert time.monotonic() - begin < 20


def test_connections_have_a_bound_and_late_ones_are_cut_off(stream, monkeypatch):
    from mbf_mlx.serving import server as ours

    monkeypatch.setattr(ours, "RECEIVE", 2.0)
    with running(stream, max_connections=3) as (server, _), contextlib.ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(server.server_address[:2], timeout=30)) for _ in range(3)]
        time.sleep(0.3)
        assert b" 503 " in raw(server, b"")
        idle[0].sendall(b"GET /health")  # byte after byte does not help
        time.sleep(3.5)
        assert [connection.recv(10) for connection in idle] == [b""] * 3
        is_well(server)


@pytest.fixture(scope="module")
def friendly(stream):
    """A server that knows one other name and one page."""
    options = {"allow_host": ("friend.example",), "allowed_origins": ("https://page.example/",)}
    with running(stream, **options) as (server, _):
        yield server


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:80"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "10.0.0.1"}, 403),
        ({"Host": "localhost@evil.example"}, 400),
        ({"Host": "[::1"}, 400),
        ({"Host": ""}, 400),
        ({"Host": "LOCALHOST.:8080"}, 200),
        ({"Host": "[::1]:8080"}, 200),
        ({"Host": "friend.example:8080"}, 200),
        ({"Origin": "http://evil.example", "Content-Type": "text/plain"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 403),
        ({"Origin": "http://localhost:1234"}, 403),
        ({"Origin": "https://page.example"}, 200),
        ({"Origin": "https://page.example.evil"}, 403),
        ({"Origin": "http://localhost:8080", "Host": "localhost:8080"}, 200),
    ],
    ids=lambda value: json.dumps(value),
)
def test_only_its_own_names_and_allowed_pages_reach_the_server(friendly, headers, status):
    for method, path, body in (("POST", CHAT, {"messages": HI, "max_tokens": 2}), ("GET", "/v1/models", None)):
        got, document = send(friendly, method, path, body, **headers)
        assert got == status, document
        assert status == 200 or error_of(document)


def test_a_browser_learns_what_an_allowed_page_may_send(friendly):
    ask = "Access-Control-Request-Method: POST", "Access-Control-Request-Headers: authorization"
    allowed = raw(friendly, lines("Origin: https://page.example", *ask, method="OPTIONS"))
    assert b" 204 " in allowed and b"Access-Control-Allow-Origin: https://page.example\r\n" in allowed
    assert b"Authorization" in allowed
    foreign = raw(friendly, lines("Origin: https://evil.example", *ask, method="OPTIONS"))
    assert b" 403 " in foreign and b"Access-Control-Allow" not in foreign
    assert b"Access-Control-Allow" not in raw(friendly, lines(method="OPTIONS"))


def test_a_key_is_asked_for(stream):
    with running(stream, api_key="sesame") as (server, _):
        for given in (
            {},
            {"Authorization": "sesame"},
            {"Authorization": "Bearer other"},
            {"Authorization": "Bearer é"},
        ):
            status, document = send(server, "GET", "/v1/models", **given)
            assert status == 401 and document["error"]["type"] == "authentication_error"
            assert send(server, "POST", CHAT, {"messages": HI}, **given)[0] == 401
        assert send(server, "GET", "/v1/models", Authorization="Bearer sesame")[0] == 200
        assert send(server, "GET", "/health")[0] == 200


def test_other_machines_need_a_key_or_no_key_is_said(stream):
    with pytest.raises(InputError, match="--host 0.0.0.0: other machines .* --api-key KEY, or --no-key"):
        with stream.serving(ServeConfig(host="0.0.0.0", port=0)):
            pass
    for bad in ({"api_key": ""}, {"api_key": "a b"}, {"api_key": "\u00e9"}, {"api_key": "a", "no_key": True}):
        with pytest.raises(InputError, match="key"):
            ServeConfig(**bad)
    for bad in ({"allow_host": ("http://x",)}, {"allow_host": ("",)}, {"allowed_origins": ("page.example",)}):
        with pytest.raises(InputError, match="expected"):
            ServeConfig(**bad)


def test_paths_are_read_as_urls(served):
    for path in ("/v1/models?limit=20", "/v1/models/", "/v1/%6dodels"):
        assert send(served[0], "GET", path)[1]["data"][0]["id"] == "s1"
    for path in ("/v1/models/s%31", "/v1/models/s1?x=y"):
        assert send(served[0], "GET", path)[1]["id"] == "s1"
    assert send(served[0], "GET", "/health?x")[0] == 200
    assert send(served[0], "POST", CHAT + "?api-version=1", {"messages": HI, "max_tokens": 2})[0] == 200
    assert send(served[0], "HEAD", "/health") == (200, None)
    for path in ("/v1/models/other", "/v1/modelsx", "/"):
        assert error_of(send(served[0], "GET", path)[1])
