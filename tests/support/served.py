"""A stream that is served in this process, and requests to it over real sockets."""

import contextlib
import http.client
import json
import socket
import threading

from mbf_mlx.config import ServeConfig, TrainConfig
from tests.support.rows import rows_of

LIMIT = 50_000  # bytes of a request
CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "red cold old new"}]


@contextlib.contextmanager
def running(stream, **options):
    """Serve a stream in this process; gives (server, what it said)."""
    said = []
    fused = options.pop("fused", None)
    with stream.serving(ServeConfig(port=0, **options), fused=fused, say=said.append) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server, said
        finally:
            server.shutdown()
            thread.join()


def teach(stream, folder, answer=None):
    folder.mkdir()
    for split, count in (("train", 16), ("test", 4)):
        rows = [{**row, "completion": answer or row["completion"]} for row in rows_of(count, seed=count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream.learn(folder, train=TrainConfig(epochs=15, batch_size=4, learning_rate=2e-2))


def raw(server, data, wait=30):
    """Send bytes and return all that comes back."""
    with socket.create_connection(server.server_address[:2], timeout=wait) as connection:
        connection.sendall(data)
        found = b""
        while part := connection.recv(1 << 16):
            found += part
        return found


def lines(*headers, body=b"", path=CHAT, method="POST"):
    return "\r\n".join([f"{method} {path} HTTP/1.1", *headers, "", ""]).encode("latin-1") + body


def send(server, method, path, body=None, **headers):
    """Return (status, document) of a request."""
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=60)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body if body is None or isinstance(body, bytes) else json.dumps(body), names)
    answer = connection.getresponse()
    text = answer.read()
    return answer.status, json.loads(text) if text else None


def chat(server, **fields):
    return send(server, "POST", CHAT, {"messages": HI, "max_tokens": 4, **fields})


def error_of(document):
    assert set(document["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in document["error"]["message"] and "\n" not in document["error"]["message"]
    return document["error"]["message"]


def is_well(server):
    assert send(server, "GET", "/health") == (200, {"status": "ok"})
    status, document = chat(server)
    assert status == 200 and document["choices"][0]["message"]["content"]
