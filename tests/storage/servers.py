"""Servers on loopback for tests of stores: an S3 (moto) and a web server, made to fail at will.

Every request passes through a :class:`Faulty` server, which notes it and, when told to, answers
with an error, drops the connection in the middle of a body, or cuts a body short. What is behind it
does not know.
"""

import email.utils
import http.client
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

EXPIRED = (
    b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
)
_PASSED_ON = ("content-", "last-modified", "etag", "accept-ranges", "x-amz-", "location")


@dataclass
class Request:
    """One request as it came in; ``num_bytes`` of body were sent back."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    num_bytes: int = 0
    status: int = 0


@dataclass
class Fault:
    """What is to go wrong with the next requests that fit.

    Attributes:
        kind: ``status``, ``drop`` (half of the body, then silence), ``short`` (half of the body,
            announced as whole), ``flip`` (one bit), or ``lost`` (carried out, never answered).
        times: Requests it happens to; all when ``None``.
        path: Text that stands in the path.
        method: Of the request; any when empty.
        status, body: Of the answer, for ``status``.
    """

    kind: str
    times: int | None = 1
    path: str = ""
    method: str = ""
    status: int = 500
    body: bytes = b""

    def fits(self, request: Request) -> bool:
        return (
            self.times != 0
            and self.path in unquote(request.path)
            and self.method in ("", request.method)
        )


Answer = tuple[int, dict[str, str], bytes]
Backend = Callable[[Request, bytes], Answer]


@dataclass
class Faulty:
    """A server on loopback in front of ``backend``.

    Attributes:
        requests: All requests so far, in order.
        faults: What is to go wrong; the first that fits counts.
        latency: Seconds every answer waits.
    """

    backend: Backend
    requests: list[Request] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    latency: float = 0.0
    url: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def fail(self, kind: str, **settings: Any) -> Fault:
        """Let the next requests fail; see :class:`Fault`."""
        fault = Fault(kind, **settings)
        self.faults.append(fault)
        return fault

    def reset(self) -> None:
        """Forget requests and faults."""
        self.requests.clear()
        self.faults.clear()
        self.latency = 0.0

    def count(self, method: str = "", path: str = "") -> int:
        """Requests so far with such a method and such a text in the path."""
        return sum(
            method in ("", request.method) and path in request.path for request in self.requests
        )

    @contextmanager
    def serving(self) -> Iterator["Faulty"]:
        """Serve on a free port while the block runs."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        server.daemon_threads = True
        server.handle_error = lambda *about: None  # type: ignore[method-assign]  # killed clients
        self.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    def answer(self, request: Request, body: bytes) -> tuple[Answer, str | None]:
        """Return the response of the server, and the kind of its fault."""
        with self._lock:
            self.requests.append(request)
            fault = next((fault for fault in self.faults if fault.fits(request)), None)
            if fault is not None and fault.times is not None:
                fault.times -= 1
        if self.latency:
            time.sleep(self.latency)
        if fault is not None and fault.kind == "status":
            return (fault.status, {"Content-Type": "application/xml"}, fault.body), None
        return self.backend(request, body), fault.kind if fault else None


def _handler(faulty: Faulty) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: Any) -> None:
            del format, arguments

        def _serve(self) -> None:
            parts = urlsplit(self.path)
            request = Request(self.command, parts.path, parts.query, dict(self.headers))
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            (status, headers, content), fault = faulty.answer(request, body)
            whole = len(content)
            if fault == "lost":
                self.close_connection = True
                return
            if fault == "short":
                content = content[: whole // 2]
                whole = len(content)
            elif fault == "drop":
                content = content[: whole // 2]
                self.close_connection = True
            elif fault == "flip" and content:
                content = bytes([content[0] ^ 1]) + content[1:]
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() != "content-length":
                    self.send_header(name, value)
            if self.command == "HEAD":
                self.send_header("Content-Length", headers.get("Content-Length", str(whole)))
                content = b""
            elif status not in (204, 304):
                self.send_header("Content-Length", str(whole))
            self.end_headers()
            self.wfile.write(content)
            request.num_bytes, request.status = len(content), status

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    return Handler


def folder(root: Path) -> Backend:
    """A static web server of files below ``root``, with range requests, as nginx answers them."""

    def answer(request: Request, body: bytes) -> Answer:
        del body
        path = root / unquote(request.path).lstrip("/")
        if request.method not in ("GET", "HEAD"):
            return 405, {}, b""
        if ".." in path.parts or not path.is_file():
            return 404, {}, b"not found"
        content, status = path.read_bytes(), path.stat()
        headers = {
            "Last-Modified": email.utils.formatdate(status.st_mtime, usegmt=True),
            "ETag": f'"{status.st_mtime_ns:x}-{status.st_size:x}"',
            "Accept-Ranges": "bytes",
            "Content-Length": str(len(content)),
        }
        asked = request.headers.get("Range") or request.headers.get("range")
        if asked is None or request.method == "HEAD":
            return 200, headers, content
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start = int(first) if first else max(0, len(content) - int(last))
        end = min(int(last) + 1 if first and last else len(content), len(content))
        if start >= len(content):
            return 416, {"Content-Range": f"bytes */{len(content)}"}, b""
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        return 206, headers, content[start:end]

    return answer


def forward(host: str, port: int) -> Backend:
    """Passes requests on to another server."""

    def answer(request: Request, body: bytes) -> Answer:
        connection = http.client.HTTPConnection(host, port, timeout=30)
        target = request.path + (f"?{request.query}" if request.query else "")
        headers = {k: v for k, v in request.headers.items() if k.lower() != "connection"}
        try:
            connection.request(request.method, target, body=body, headers=headers)
            found = connection.getresponse()
            content = found.read()
        finally:
            connection.close()
        kept = {
            name: value for name, value in found.getheaders() if name.lower().startswith(_PASSED_ON)
        }
        return found.status, kept, content

    return answer
