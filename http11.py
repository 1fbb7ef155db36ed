"""HTTP/1.1 (RFC 9112): framing, limits, keep-alive, connections, bytes in and out. Nothing here knows what is said over it.

The main thread only accepts; each connection has a thread of its own. A subclass of Connection answers one request at a time in
`answer`, with `head`, `reply_bytes` and the stream's three verbs; whatever it raises comes back to it in `fail`.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

log = logging.getLogger("openai_api_endpoint")
PEER_CHECK_S = 0.05  # how often somebody looks whether a client that waits is still there
LINGER_S = 2.0  # how long a refused body is read on, so that the client gets to read the refusal


class HttpError(Exception):
    """A request that HTTP itself refuses. `close`: the connection's framing is lost, so it ends with this reply."""

    def __init__(self, status: int, message: str, headers: Iterable[tuple[str, str]] = (), close: bool = False):
        super().__init__(message)
        self.status, self.message, self.headers, self.close = status, message, tuple(headers), close


class PeerGone(Exception):
    """The client has left: nobody is there to tell."""


class Connection(BaseHTTPRequestHandler):
    """One connection: reads requests, and writes replies and streams."""

    server: HttpServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 60  # seconds for a silent client, reading or writing; it costs its own connection only
    left = False  # PeerWatch has seen the client go

    # ── one request ──

    def handle_one_request(self) -> None:
        self.close_connection = True
        try:
            self.raw_requestline = self.rfile.readline(65537)
            if not self.raw_requestline:
                return
            if len(self.raw_requestline) > 65536:
                self.requestline = self.request_version = self.command = ""
                return self.send_error(414)
            if self.parse_request():
                with self.server.busy:
                    self.respond()
        except (OSError, PeerGone):  # reset, timed out, or left
            self.close_connection = True

    def respond(self) -> None:
        self.status, self.started, self.streaming = 0, time.monotonic(), False
        self.log_note = ""
        self.extra: list[tuple[str, str]] = []
        self.request_id = (
            re.sub(r"[^!-~]", "", self.headers.get("X-Request-Id", ""))[:128] or f"req-{random.getrandbits(128):032x}"
        )
        try:
            self.answer()
        except (PeerGone, OSError):
            self.status = 499  # nginx's number for it; nobody reads it but the log
            raise
        except Exception as error:
            self.fail(error)
        finally:
            self.note()

    def answer(self) -> None:
        """Answer the request whose head has been read; whatever is raised goes to `fail`."""
        raise NotImplementedError

    def fail(self, error: Exception) -> None:
        """Render any error, before or inside a stream."""
        raise NotImplementedError

    def note(self) -> None:
        """The request has been answered: `status`, `command` and `path` say how."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """http.server's own errors (a bad request line, too many headers), told like all others."""
        self.status, self.streaming, self.log_note, self.extra, self.request_id = 0, False, "", [], ""
        self.fail(HttpError(int(code), f"{message or HTTPStatus(code).phrase}.", close=True))

    def check_host(self) -> None:
        if self.request_version == "HTTP/1.1" and len(self.headers.get_all("Host") or ()) != 1:
            raise HttpError(400, "An HTTP/1.1 request must have one Host header.", close=True)

    # ── reading ──

    def handle_expect_100(self) -> bool:
        return True  # answered in read_body, once it is clear that the body is wanted

    def read_body(self) -> bytes:
        """The request's body, whole. Whatever makes its end unclear closes the connection after the reply."""
        if self.headers.defects or self.headers.get_payload():  # Python's parser drops all headers after a malformed one
            raise HttpError(400, "A header line is malformed.", close=True)
        lengths, codings = self.headers.get_all("Content-Length") or [], self.headers.get_all("Transfer-Encoding") or []
        if codings and lengths:
            raise HttpError(400, "Content-Length and Transfer-Encoding exclude each other.", close=True)
        if codings and (len(codings) > 1 or codings[0].strip().lower() != "chunked"):
            raise HttpError(400, "The only Transfer-Encoding that this server knows is chunked.", close=True)
        if len({length.strip() for length in lengths}) > 1 or not all(re.fullmatch(r"\s*[0-9]{1,18}\s*", n) for n in lengths):
            raise HttpError(400, "Content-Length must be one decimal number.", close=True)
        if not codings and not lengths:
            if self.command in ("POST", "PUT", "PATCH"):
                raise HttpError(411, "Send a Content-Length or a chunked body.")
            return b""
        if lengths and int(lengths[0]) > self.server.max_body:
            raise self.too_large()
        if self.headers.get("Expect", "").lower() == "100-continue" and self.request_version == "HTTP/1.1":
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return self.read_exactly(int(lengths[0])) if lengths else self.read_chunked()

    def read_exactly(self, size: int) -> bytes:
        data = self.rfile.read(size)
        if len(data) < size:
            raise PeerGone
        return data

    def read_chunked(self) -> bytes:
        """RFC 9112, section 7.1. Extensions and trailers are read over."""
        body = bytearray()
        while True:
            line = self.rfile.readline(1026)
            digits = line.split(b";")[0].strip()
            if not line.endswith(b"\n") or not re.fullmatch(rb"[0-9A-Fa-f]{1,12}", digits):
                raise HttpError(400, "The chunked body is malformed.", close=True)
            size = int(digits, 16)
            if len(body) + size > self.server.max_body:
                raise self.too_large()
            if size == 0:
                break
            body += self.read_exactly(size)
            if self.read_exactly(2) != b"\r\n":
                raise HttpError(400, "The chunked body is malformed.", close=True)
        for _ in range(100):
            if self.rfile.readline(65537) in (b"\r\n", b"\n", b""):
                return bytes(body)
        raise HttpError(431, "Too many trailers.", close=True)

    def too_large(self) -> HttpError:
        return HttpError(413, f"The body is larger than {self.server.max_body} bytes.", close=True)

    def linger(self) -> None:
        """Closing while the client still writes would reset the connection, and the reply with it (RFC 9112, 9.6)."""
        try:
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(LINGER_S)
            until, left = time.monotonic() + LINGER_S, 64 << 20
            while left > 0 and time.monotonic() < until and (data := self.connection.recv(1 << 16)):
                left -= len(data)
        except OSError:
            pass

    def peer_gone(self) -> bool:
        """Has the client closed its side? Pipelined requests are data, not an end."""
        try:
            if hasattr(select, "poll"):  # select() cannot take file numbers over 1,023
                poller = select.poll()
                poller.register(self.connection, select.POLLIN | getattr(select, "POLLRDHUP", 0))
                happened = poller.poll(0)
                if not happened:
                    return False
                if happened[0][1] & ~select.POLLIN:
                    return True
            elif not select.select([self.connection], [], [], 0)[0]:
                return False
            return not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    # ── writing ──

    def write(self, data: bytes) -> None:
        self.connection.sendall(data)

    def can_write_now(self) -> bool:
        """Is the socket plain, and its file number one that never waits? (Python makes it so for a timeout.)"""
        return os.name == "posix" and type(self.connection) is socket.socket and bool(self.connection.gettimeout())

    def write_now(self, data: bytes) -> int:
        """Write what the socket takes without waiting: how many bytes. For whatever thread has the stream's turn."""
        try:
            return os.write(self.connection.fileno(), data)  # socket.send would wait for as long as the timeout
        except OSError:  # full; or reset, which the next write() tells
            return 0

    def common_headers(self) -> list[tuple[str, str]]:
        """Headers that every reply has beside those that HTTP asks for."""
        return [("X-Request-Id", self.request_id)] if self.request_id else []

    def head(self, status: int, headers: Iterable[tuple[str, str]]) -> bytes:
        self.status = status
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", f"Date: {self.date_time_string()}"]
        lines += [f"{name}: {value}" for name, value in (*self.common_headers(), *self.extra, *headers)]
        if self.close_connection:
            lines.append("Connection: close")
        elif self.request_version == "HTTP/1.0":
            lines.append("Connection: keep-alive")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")

    def reply_bytes(self, status: int, body: bytes, kind: str, headers: Iterable[tuple[str, str]] = ()) -> None:
        """A whole reply; `kind` is its Content-Type."""
        head = self.head(status, [("Content-Type", kind), ("Content-Length", str(len(body))), *headers])
        self.write(head if self.command == "HEAD" else head + body)

    def begin_stream(self, first: bytes) -> None:
        self.write(self.stream_head(first))

    def stream_head(self, first: bytes) -> bytes:
        """Status line, headers and the first events, to be written in one packet."""
        self.streaming, self.chunked = True, self.request_version == "HTTP/1.1"
        sse = [("Content-Type", "text/event-stream"), ("Cache-Control", "no-cache"), ("X-Accel-Buffering", "no")]
        if self.chunked:
            sse.append(("Transfer-Encoding", "chunked"))
        else:
            self.close_connection = True
        return self.head(200, sse) + self.framed(first)

    def framed(self, data: bytes) -> bytes:
        return b"%x\r\n%s\r\n" % (len(data), data) if self.chunked and data else data  # an empty chunk would be the end

    def end_stream(self, last: bytes) -> None:
        """The last events, and the end."""
        self.write(self.framed(last) + (b"0\r\n\r\n" if self.chunked else b""))

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("http: " + format, *args)


class Busy:
    """Counts the requests being answered, so that a shutdown can wait for them."""

    def __init__(self) -> None:
        self.count, self.lock = 0, threading.Lock()

    def __enter__(self) -> None:
        with self.lock:
            self.count += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.count -= 1


class PeerWatch:
    """Tells those who wait for an answer that their client has left. One thread looks for all, while there are any."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # guards all that follows; a connection that is watched stays open
        self.watched: dict[int, tuple[Connection, Callable[[], None]]] = {}  # by file number
        self.poller = select.poll() if hasattr(select, "poll") else None
        self.some = threading.Event()
        self.running = self.closed = False

    def add(self, connection: Connection, tell: Callable[[], None]) -> None:
        """Once `connection`'s client has gone, its `left` is set and `tell` called, which must not wait for anybody."""
        number = connection.connection.fileno()
        with self.lock:
            self.watched[number] = (connection, tell)
            if self.poller:
                self.poller.register(number, getattr(select, "POLLRDHUP", select.POLLIN))
            if not self.running:
                threading.Thread(target=self.run, name="peer-watch", daemon=True).start()
                self.running = True
            self.some.set()

    def discard(self, connection: Connection) -> None:
        with self.lock:
            self.remove(connection.connection.fileno())

    def remove(self, number: int) -> None:
        if self.watched.pop(number, None) and self.poller:
            self.poller.unregister(number)

    def close(self) -> None:
        """End the thread when nobody waits any more."""
        self.closed = True
        self.some.set()

    def run(self) -> None:
        while True:
            self.some.wait()
            time.sleep(PEER_CHECK_S)
            with self.lock:
                self.look()
                if not self.watched and self.closed:
                    self.running = False
                    return
                if not self.watched:
                    self.some.clear()

    def look(self) -> None:
        for number in [number for number, _ in self.poller.poll(0)] if self.poller else list(self.watched):
            connection, tell = self.watched[number]
            if connection.peer_gone():
                self.remove(number)
                connection.left = True
                tell()


class HttpServer(ThreadingHTTPServer):
    """Accepts connections, a daemon thread each."""

    daemon_threads = True
    request_queue_size = 4096  # connections that wait to be accepted; the system has a limit of its own

    def __init__(self, address: tuple[str, int], handler: type[Connection], max_body: int = 16 << 20):
        self.max_body = max_body  # bytes
        self.draining = False
        self.busy = Busy()
        self.peers = PeerWatch()
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, handler)

    def server_bind(self) -> None:
        # HTTPServer's own looks its host name up in the DNS, which can take seconds.
        if os.name == "posix":
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def get_request(self) -> tuple[Any, Any]:
        try:
            request: tuple[Any, Any] = super().get_request()
            return request
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(0.05)  # no file numbers left: the connection stays in the backlog, and we do not spin
            raise

    def server_close(self) -> None:
        super().server_close()
        self.peers.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.error("connection of %s", client_address, exc_info=True)

    def drain(self, grace: float) -> None:
        """Stop accepting, and let running answers finish for `grace` seconds."""
        self.draining = True
        self.server_close()
        until = time.monotonic() + grace
        while self.busy.count and time.monotonic() < until:
            time.sleep(0.02)
