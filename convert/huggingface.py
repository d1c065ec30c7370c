"""Reads repositories of a Hugging Face Hub by ranges: `hf://org/name[@revision][/folder]`.

The revision becomes a commit at the start, so all files are of one state.  Large files are redirected to another server by an
address that holds for a while; it is kept, so that only one request for each file and hour counts on the Hub.  The token, which
`huggingface_hub` finds (`HF_TOKEN`, `hf auth login`), goes to the Hub and nowhere else.  `HF_ENDPOINT` names another Hub.
"""

from __future__ import annotations

import http.client
import os
import re
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import NoReturn
from urllib.parse import quote, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from .errors import MachineError, Problem, UsageError, changed
from .limits import MAX_JSON_BYTES
from .remote import Entry, FaultError
from .strict_json import parse_json

TIMEOUT_S = 30.0  # without a byte
REDIRECTS = 5
MOVED = frozenset({301, 302, 303, 307, 308})
LATER = frozenset({408, 425, 429, 500, 502, 503, 504})
KEPT_S = 600.0  # how long the address that a file was redirected to is used; the Hub's hold for an hour
URL = re.compile(r"hf://(?:models/)?([\w.-]+/[\w.-]+)(?:@(refs/(?:pr|convert)/[\w.-]+|[^/@]+))?(?:/(.*))?", re.ASCII)
DIGEST = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")  # git's SHA-1, or SHA-256
ANSWER = "an answer of a Hugging Face Hub"


def endpoint() -> str:
    """The address of the Hub."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def _headers(url: str) -> dict[str, str]:
    """What goes to the Hub with every request: the token, if there is one, and who asks."""
    from . import __version__

    try:
        from huggingface_hub import utils
    except ImportError as error:
        raise UsageError(
            Problem(url, "", "the package huggingface_hub", str(error), "pip install 'qconvert[remote]'")
        ) from None
    headers: dict[str, str] = utils.build_hf_headers(  # type: ignore[attr-defined,unused-ignore]
        library_name="qconvert", library_version=__version__
    )
    return headers


class Repository:
    """A `Store` (see `remote`) on a repository."""

    def __init__(self, url: str) -> None:
        """Raises `UsageError` for a URL that names no repository."""
        match = URL.fullmatch(url.rstrip("/"))
        if match is None:
            forms = "hf://org/name, hf://org/name@revision or a folder in it"
            raise UsageError(Problem(url, "", forms, "another URL", "correct it"))
        self._repository, revision, self._folder = match[1], unquote(match[2] or "main"), match[3] or ""
        self._revision = revision
        self._endpoint = endpoint()
        if urlsplit(self._endpoint).scheme not in ("http", "https"):
            raise UsageError(Problem("HF_ENDPOINT", "", "an address that begins with https://", self._endpoint, "correct it"))
        self._headers = _headers(url)
        self.url = url.rstrip("/")
        self._commit = ""
        self._entries: dict[str, Entry] = {}
        self._moved: dict[str, tuple[str, float]] = {}  # file -> the address it was redirected to, since when
        self._connections = Connections()

    def close(self) -> None:
        """See `Store`."""
        self._connections.close()

    def _refused(self, status: int) -> NoReturn:
        found = {401: "no permission or no such repository", 403: "no permission"}.get(status, "no such repository or revision")
        raise UsageError(
            Problem(self.url, "", "a repository that may be read", f"{found} (status {status})",
                    "check name and revision; for a private or gated one accept its terms and set HF_TOKEN")
        )  # fmt: skip

    def listing(self) -> Mapping[str, Entry]:
        """See `Store`.  The first listing fixes the commit, which cannot change any more."""
        if self._commit:
            return self._entries
        address = f"{self._endpoint}/api/models/{self._repository}/revision/{quote(self._revision, safe='')}?blobs=true"
        with self._answer(address, {}) as (response, _):
            if response.status in (401, 403, 404):
                self._refused(response.status)
            if response.status != 200:
                raise _fault(response)
            raw = response.read(MAX_JSON_BYTES + 1)
        if len(raw) > MAX_JSON_BYTES:
            expected = f"a listing of at most {MAX_JSON_BYTES} bytes"
            raise MachineError(Problem(self.url, "", expected, "more", "check HF_ENDPOINT"))
        answer = parse_json(raw, self.url)
        commit, files = answer.get("sha"), answer.get("siblings")
        if not isinstance(commit, str) or not DIGEST.fullmatch(commit) or not isinstance(files, list):
            raise MachineError(Problem(self.url, "", ANSWER, "no commit or no files in it", "check HF_ENDPOINT"))
        prefix = f"{self._folder}/" if self._folder else ""
        for file in files:
            try:
                name, size, published = file["rfilename"], file["size"], (file.get("lfs") or {}).get("sha256")
                tag = published or file.get("blobId") or ""
                if type(size) is not int or not isinstance(name, str) or not isinstance(tag, str):
                    raise TypeError
            except (KeyError, TypeError, AttributeError):
                raise MachineError(Problem(self.url, "", ANSWER, f"{file!r:.80} as a file", "check HF_ENDPOINT")) from None
            if name.startswith(prefix):
                self._entries[name[len(prefix) :]] = Entry(size, 0, tag, published)
        self._commit = commit
        self.url = f"hf://{self._repository}@{commit}" + (f"/{self._folder}" if self._folder else "")
        return self._entries

    def read_into(self, view: memoryview, name: str, start: int) -> int:
        """See `Store`."""
        end, size = start + len(view), self._entries[name].size
        path = quote(f"{self._folder}/{name}" if self._folder else name)
        address = f"{self._endpoint}/{self._repository}/resolve/{self._commit}/{path}"
        moved, since = self._moved.get(name, ("", 0.0))
        if time.monotonic() - since > KEPT_S:
            moved = ""
        with self._answer(moved or address, {"Range": f"bytes={start}-{end - 1}"}, name) as (response, at):
            status = response.status
            if status not in (200, 206):
                self._moved.pop(name, None)
                if status in (401, 403) and at == address:
                    self._refused(status)
                if status in (404, 416) and at == address:
                    raise changed(name)
                raise _fault(response)
            if at != address:
                self._moved[name] = (at, since if moved else time.monotonic())
            _check_range(response, name, start, end, size)
            return _body_into(view, response)

    @contextmanager
    def _answer(
        self, address: str, headers: Mapping[str, str], name: str = ""
    ) -> Iterator[tuple[http.client.HTTPResponse, str]]:
        """The answer to a request, behind redirects, and the address that gave it."""
        for _ in range(REDIRECTS + 1):
            ours = urlsplit(address)[:2] == urlsplit(self._endpoint)[:2]  # the token is for the Hub alone
            with self._connections.get(address, {**(self._headers if ours else {}), **headers}) as response:
                if ours and name:
                    self._check_state(response, name)
                if response.status not in MOVED:
                    yield response, address
                    return
                address = self._following(address, response.getheader("Location") or "")
        raise FaultError(f"more than {REDIRECTS} redirects")

    def _following(self, address: str, location: str) -> str:
        """Where a redirect leads: to HTTPS, or from HTTP to HTTP."""
        with suppress(ValueError):
            following = urljoin(address, location)
            parts = urlsplit(following)
            if parts.scheme in ("https", urlsplit(address).scheme) and parts.hostname:
                return following
        raise MachineError(Problem(self.url, "", "a redirect to https://", "one to something else", "check HF_ENDPOINT"))

    def _check_state(self, response: http.client.HTTPResponse, name: str) -> None:
        """Raise `MachineError` when the Hub answers with another commit or other content than it listed."""
        linked = response.getheader("X-Linked-Etag") or (response.getheader("ETag") if response.status < 300 else "") or ""
        tag, known = linked.removeprefix("W/").strip('"'), self._entries[name].tag
        commit = response.getheader("X-Repo-Commit") or self._commit
        if commit != self._commit or (known and DIGEST.fullmatch(tag) and tag != known):
            raise changed(name)


def _fault(response: http.client.HTTPResponse) -> FaultError:
    after = response.getheader("Retry-After") or ""
    return FaultError(f"status {response.status}", float(after) if after.isdecimal() and response.status in LATER else 0.0)


def _check_range(response: http.client.HTTPResponse, name: str, start: int, end: int, size: int) -> None:
    """Raise unless an answer holds the bytes from `start` on, of a file of `size` bytes."""
    if response.status == 200:
        if start or end != size:
            raise MachineError(
                Problem(name, "", "a server that answers ranges (status 206)", "one that sends whole files",
                        "fetch the checkpoint first (hf download), then convert the copy")
            )  # fmt: skip
        return
    given = response.getheader("Content-Range") or ""
    match = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", given)
    if match is None or int(match[1]) != start or int(match[2]) >= end:
        raise FaultError(f"Content-Range {given[:60]!r} for bytes {start}-{end - 1}")
    if match[3] not in ("*", str(size)):
        raise changed(name)


def _body_into(view: memoryview, response: http.client.HTTPResponse) -> int:
    """Read the body into `view`; returns how much came."""
    done = 0
    with suppress(OSError, http.client.HTTPException):  # what came is kept; the next attempt asks for the rest
        while done < len(view):
            count = response.readinto(view[done:])
            if not count:
                break
            done += count
    return done


def _proxy(scheme: str, host: str) -> str:
    """The proxy that the environment names for a server, as [user:password@]host:port; empty for none."""
    return "" if proxy_bypass(host) else urlsplit(getproxies().get(scheme, "")).netloc


def _proxy_headers(proxy: str) -> dict[str, str]:
    user = proxy.rpartition("@")[0]
    return {"Proxy-Authorization": f"Basic {b64encode(unquote(user).encode()).decode()}"} if user else {}


class Connections:
    """Connections that are kept for the next request to the same server."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: dict[tuple[str, str], list[http.client.HTTPConnection]] = {}
        self._busy: set[http.client.HTTPConnection] = set()
        self._tls: ssl.SSLContext | None = None
        self._closed = False

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close everything, for good; requests under way fail."""
        with self._lock:
            self._closed = True
            everything = [*self._busy, *(c for kept in self._idle.values() for c in kept)]
            self._idle.clear()
        for connection in everything:
            with suppress(OSError, AttributeError):
                connection.sock.shutdown(2)  # SHUT_RDWR; `close` alone would not wake a thread that waits
            connection.close()

    def _connect(self, scheme: str, host: str) -> http.client.HTTPConnection:
        """A new connection to a server, or to the proxy that the environment names for it."""
        proxy = _proxy(scheme, host)
        where = proxy.rpartition("@")[2] or host
        if scheme != "https":
            return http.client.HTTPConnection(where, timeout=TIMEOUT_S)
        with self._lock:
            self._tls = self._tls or ssl.create_default_context()
        connection = http.client.HTTPSConnection(where, timeout=TIMEOUT_S, context=self._tls)
        if proxy:
            connection.set_tunnel(host, headers=_proxy_headers(proxy))
        return connection

    def _ask(
        self, connection: http.client.HTTPConnection, target: str, headers: Mapping[str, str], used: bool
    ) -> http.client.HTTPResponse | None:
        """The answer to a GET request; None where a connection that was used before turns out to be closed by the server."""
        connection.auto_open = 0  # one that `close` has closed stays so
        if connection.sock is None:
            connection.connect()
        with self._lock:
            self._busy.add(connection)
            if self._closed:
                raise FaultError("the work was given up")
        try:
            connection.request("GET", target, headers=dict(headers))
            return connection.getresponse()
        except ConnectionError:  # also `RemoteDisconnected`
            with self._lock:
                self._busy.discard(connection)
                given_up = self._closed
            connection.close()
            if given_up or not used:
                raise
            return None

    @contextmanager
    def get(self, address: str, headers: Mapping[str, str]) -> Iterator[http.client.HTTPResponse]:
        """The answer to a GET request.  Raises `FaultError` for what the network does, `MachineError` for a bad certificate."""
        parts = urlsplit(address)
        key = (parts.scheme, parts.netloc)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        proxy = _proxy(*key) if parts.scheme == "http" else ""
        if proxy:
            target, headers = f"http://{parts.netloc}{target}", {**headers, **_proxy_headers(proxy)}
        connection: http.client.HTTPConnection | None = None
        whole = False
        try:
            response = None
            while response is None:
                with self._lock:
                    kept = self._idle.get(key)
                    connection = kept.pop() if kept else None
                used = connection is not None
                connection = connection or self._connect(*key)
                response = self._ask(connection, target, headers, used)
            yield response
            if response.status in MOVED:
                response.read(64 << 10)
            whole = response.isclosed() and not response.length  # it is closed as well when the body was cut short
        except ssl.SSLCertVerificationError as error:
            raise MachineError(
                Problem(parts.netloc, "", "a certificate that holds", error.verify_message,
                        "check the clock and the certificates of this machine (SSL_CERT_FILE)")
            ) from None  # fmt: skip
        except (OSError, http.client.HTTPException) as error:
            raise FaultError(f"{type(error).__name__}: {error}") from None
        finally:
            if connection is not None:
                with self._lock:
                    self._busy.discard(connection)
                    if whole and connection.sock is not None:
                        self._idle.setdefault(key, []).append(connection)
                    else:
                        connection.close()
