"""A Hub on this machine: the listing of a repository, ranges of its files behind a redirect, and faults on demand.

The Hub is `http://127.0.0.1:PORT`; large files are redirected to `http://localhost:PORT`, which to a client is another server.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Request(NamedTuple):
    """A request as it came: host, path, range or None, and its Authorization header."""

    number: int
    host: str
    path: str
    span: tuple[int, int] | None
    token: str | None


@dataclass
class Hub:
    """What the server has and does.

    fault     what to do with a request: "" for nothing wrong, a status such as "503", or one of `Handler.do_GET`
    sent      bytes of bodies by path
    waiting   called before an answer, for tests of what happens meanwhile
    """

    directory: Path
    endpoint: str = ""
    token: str | None = None
    commit: str = COMMIT
    listing: Callable[[dict[str, Any]], Any] = lambda listing: listing
    fault: Callable[[Request], str] = lambda request: ""
    waiting: Callable[[Request], object] = lambda request: None
    requests: list[Request] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    over: threading.Event = field(default_factory=threading.Event)

    def answer(self) -> dict[str, Any]:
        """The listing as the Hub gives it with `blobs=true`."""
        siblings = []
        for path in sorted(p for p in self.directory.rglob("*") if p.is_file()):
            data = path.read_bytes()
            entry: dict[str, Any] = {"rfilename": path.relative_to(self.directory).as_posix(), "size": len(data)}
            entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            if path.suffix == ".safetensors":
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        return {"id": "org/name", "sha": self.commit, "siblings": siblings, "lastModified": "2026-01-01T00:00:00.000Z"}


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body[:cut])
        with self.hub.lock:
            path = urlsplit(self.path).path
            self.hub.sent[path] = self.hub.sent.get(path, 0) + len(body[:cut])

    def do_GET(self) -> None:
        """Answer, or do what `Hub.fault` says."""
        hub = self.hub
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        whole = (int(span[1]), int(span[2]) + 1) if span else None
        host, path = self.headers["Host"].partition(":")[0], unquote(urlsplit(self.path).path)
        with hub.lock:
            request = Request(len(hub.requests), host, path, whole, self.headers.get("Authorization"))
            hub.requests.append(request)
        hub.waiting(request)
        fault = hub.fault(request)
        if fault == "closed later":  # and the client, which keeps the connection, is not told
            self.close_connection = True
        if fault.isdecimal():
            self._send(int(fault), b"sorry", {"Retry-After": "0"})
            return
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return
        if fault.startswith("redirect "):
            self._send(302, b"", {"Location": fault.partition(" ")[2]})
            return
        if hub.token is not None and host != "localhost" and request.token != f"Bearer {hub.token}":
            self._send(401, b"who are you?")
        elif path.startswith("/api/models/org/name/revision/"):
            self._send(200, json.dumps(hub.listing(hub.answer())).encode())
        elif path.startswith(f"/org/name/resolve/{hub.commit}/"):
            self._file(path.removeprefix(f"/org/name/resolve/{hub.commit}/"), whole, fault, redirects=host != "localhost")
        elif path.startswith("/large/"):
            self._file(path.removeprefix("/large/"), whole, fault, redirects=False)
        else:
            self._send(404, b"no such thing")

    def _file(self, name: str, span: tuple[int, int] | None, fault: str, redirects: bool) -> None:
        path = self.hub.directory / name
        if not path.is_file():
            self._send(404, b"no such file")
            return
        data = path.read_bytes()
        blob = hashlib.sha256(data) if name.endswith(".safetensors") else hashlib.sha1(b"blob %d\0" % len(data) + data)
        tag = "f" * 64 if fault == "other-content" else blob.hexdigest()
        headers = {"X-Repo-Commit": "f" * 40 if fault == "other-commit" else self.hub.commit}
        if redirects and name.endswith(".safetensors"):
            port = urlsplit(self.hub.endpoint).port
            location = f"http://localhost:{port}/large/{name}?signature=abc"
            self._send(302, b"moved", {**headers, "Location": location, "X-Linked-Etag": f'"{tag}"'})
            return
        if redirects:
            headers["ETag"] = f'W/"{tag}"'
        if fault == "no-ranges" or span is None:
            self._send(200, data, headers)
            return
        start, end = span[0], min(span[1], len(data))
        shown = (start + 1, end) if fault == "wrong-range" else (start, end)
        total = len(data) + 1 if fault == "grown" else len(data)
        headers["Content-Range"] = f"bytes {shown[0]}-{shown[1] - 1}/{total}"
        body = data[slice(*shown)]
        if fault == "truncated":
            self.close_connection = True
            self._send(206, body, headers, cut=len(body) // 2)
        elif fault == "short":
            self._send(206, body[: max(1, len(body) // 2)], headers | {"Content-Range": f"bytes {start}-{end - 1}/{total}"})
        elif fault == "stalled":
            self.close_connection = True
            self._send(206, body, headers, cut=len(body) // 2)
            self.hub.over.wait(5)
        else:
            self._send(206, body, headers)


class Server(ThreadingHTTPServer):
    """A server that says nothing of clients that go away."""

    daemon_threads = True
    request_queue_size = 128  # a client that opens many connections at once waits for none

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing."""


@contextmanager
def hub_server(directory: Path) -> Iterator[Hub]:
    """A running Hub whose repository `org/name` is a directory."""
    hub = Hub(directory)
    server = Server(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.over.set()
        server.shutdown()
        thread.join()
        server.server_close()
