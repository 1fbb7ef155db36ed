"""HTTP/1.1 (RFC 9112): framing, limits, keep-alive, connections, bytes in and out. Nothing here knows what is said over it.

The main thread only accepts; each connection has a thread to itself, which outlives it. A subclass of Connection answers one request at
a time in `answer`, with `read_body`, `head`, `reply_bytes` and the stream's three verbs; whatever it raises comes back to it in `fail`.

The law of reading: bytes are judged as they came, before anything is made of them, and whatever two readers could understand
in two ways is refused with 400 and the end of the connection. Every wait for a client has a deadline in all, not per byte.
"""

from __future__ import annotations

import _thread
import contextlib
import errno
import functools
import logging
import os
import queue
import random
import re
import select
import socket
import socketserver
import ssl
import stat
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from ipaddress import ip_address, ip_network
from typing import Any

log = logging.getLogger("openai_api_endpoint")
PEER_CHECK_S = 0.05  # how often somebody looks whether a client that waits is still there
LINGER_S = 2.0  # how long a refused body is read on, so that the client gets to read the refusal
LINGER_RATE, ONE_LINGERS = 64 << 20, threading.Lock()  # bytes per second of all refused bodies: whoever sends them has time
NOWHERE = bytearray(1 << 20)  # where they are read to; nobody looks at it
LARGE, ONE_READS = 1 << 16, threading.Lock()  # bytes that are still to come of a large body; see Reader.piece
SKIPPED = 1 << 20  # bytes of an unwanted body that are read over to keep the connection; a longer one ends it
WRITE_S = 60.0  # for a client that reads nothing, or less than SLICE bytes; it costs its own connection only
SLICE = 1 << 16
PREFIX = b"HTTP/1.1 "  # how every reply begins, whatever its status

LINE_MAX, FIELDS_MAX = 1 << 16, 100  # bytes of the request line, and of all header lines together; header lines
TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = re.compile(rb"(%s) ([!-~\x80-\xff]+) (HTTP/([0-9])\.[0-9])\r\n" % TOKEN)
FIELD_LINE = re.compile(rb"(%s):([\t -~\x80-\xff]*)\r\n" % TOKEN)  # no obs-fold, no CR, LF or NUL inside
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,12})(?:[ \t]*;[\t -~\x80-\xff]*)?\r\n")
HOST = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=%-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?")
CHUNKS_FREE, CHUNK_LEAST = 10_000, 64  # more chunks than these must have so many bytes each, on average


class HttpError(Exception):
    """A request that HTTP itself refuses. `close`: the connection's framing is lost, so it ends with this reply."""

    def __init__(self, status: int, message: str, headers: Iterable[tuple[str, str]] = (), close: bool = False):
        super().__init__(message)
        self.status, self.message, self.headers, self.close = status, message, tuple(headers), close


class PeerGone(Exception):
    """The client has left: nobody is there to tell."""


# ───────────────────────────────────────────────────── limits ────────────────────────────────────────────────────


def file_numbers() -> int:
    """How many files and connections this process may have open (`ulimit -n`)."""
    if sys.platform == "win32":
        return 2048
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft


def most_connections() -> int:
    """A quarter of the file numbers is kept for engines, models and upstream servers."""
    return max(8, min(8192, file_numbers() * 3 // 4))


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """What clients may take. Sizes in bytes, times in seconds."""

    connections: int = field(default_factory=most_connections)
    per_address: int = 0  # connections of one address, of IPv6 one /64; 0: three quarters of all
    header_s: float = 10.0  # for a whole header, from its first byte
    idle_s: float = 60.0  # for a first byte, and between two requests
    body_rate: float = 4096.0  # bytes per second that a body must bring, once it has had `header_s`
    max_body: int = 16 << 20
    all_bodies: int = 128 << 20  # that are being read or answered; one address may have half of it


@functools.lru_cache(4096)
def address_of(host: str) -> str:
    """What counts as one client address: an IPv4 address, or an IPv6 /64, which is what one subscriber has."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if address.version == 4:
        return str(address)
    return str(address.ipv4_mapped or ip_network((address, 64), strict=False))


def lower(counts: Counter[str], name: str, by: int) -> None:
    """Counts of nothing are not kept."""
    counts[name] -= by
    if counts[name] <= 0:
        del counts[name]


class Seat:
    """One connection's place in the server."""

    def __init__(self, sock: Any, address: str):
        self.socket, self.address = sock, address


class Seats:
    """Who is connected. A quiet connection, of which no request is being answered, makes room for a new one, the oldest first."""

    LEAVING = 64  # so many may be on their way out before the next one is let in

    def __init__(self, limits: HttpLimits):
        self.most = limits.connections
        self.each = limits.per_address or max(1, limits.connections * 3 // 4)
        self.lock = threading.Lock()
        self.taken: dict[Any, Seat] = {}  # by the socket that was accepted
        self.quiet: dict[Seat, None] = {}  # the one that has been so for longest comes first
        self.leaving: set[Seat] = set()  # told to go, and not gone yet
        self.of: Counter[str] = Counter()  # connections by address

    def enter(self, sock: Any, address: str) -> bool:
        """False: there is no room. An empty address has no limit of its own."""
        until = time.monotonic() + 1.0
        while len(self.leaving) > self.LEAVING and time.monotonic() < until:
            time.sleep(0.002)
        with self.lock:
            crowded = bool(address) and self.of[address] >= self.each
            if crowded or len(self.taken) - len(self.leaving) >= self.most:
                victim = next((seat for seat in self.quiet if not crowded or seat.address == address), None)
                if victim is None:
                    return False
                self.send_away(victim)
            self.taken[sock] = Seat(sock, address)
            self.quiet[self.taken[sock]] = None
            self.of[address] += 1
            return True

    def send_away(self, seat: Seat) -> None:
        del self.quiet[seat]
        self.leaving.add(seat)
        lower(self.of, seat.address, 1)
        with contextlib.suppress(OSError):
            socket.socket.shutdown(seat.socket, socket.SHUT_RDWR)  # wakes the thread that reads it

    def hush(self, seat: Seat) -> None:
        """It waits for its client: the last to make room."""
        with self.lock:
            if seat not in self.leaving:
                self.quiet.pop(seat, None)
                self.quiet[seat] = None

    def busy(self, seat: Seat) -> None:
        """A request of it is being answered."""
        with self.lock:
            self.quiet.pop(seat, None)

    def leave(self, sock: Any) -> None:
        with self.lock:
            seat = self.taken.pop(sock, None)
            if seat is None:
                return
            self.quiet.pop(seat, None)
            if seat in self.leaving:
                self.leaving.discard(seat)
            else:
                lower(self.of, seat.address, 1)


class Bodies:
    """The bytes of all request bodies in memory. A body's first FREE bytes cost nothing: a small request always gets in."""

    FREE = 1 << 16

    def __init__(self, most: int):
        self.most, self.lock = most, threading.Lock()
        self.held, self.of = 0, Counter[str]()

    def take(self, address: str, size: int) -> bool:
        with self.lock:
            if self.held + size > self.most or (address and self.of[address] + size > self.most // 2):
                return False
            self.held += size
            self.of[address] += size
            return True

    def give_back(self, address: str, size: int) -> None:
        if size:
            with self.lock:
                self.held -= size
                lower(self.of, address, size)


# ───────────────────────────────────────────────────── reading ───────────────────────────────────────────────────


class Headers:
    """Header fields by name, whatever its case; values without the white space around them."""

    def __init__(self) -> None:
        self.fields: dict[str, list[str]] = {}

    def add(self, name: str, value: str) -> None:
        self.fields.setdefault(name.lower(), []).append(value)

    def get(self, name: str, default: str = "") -> str:
        """The first of that name."""
        return self.fields.get(name.lower(), [default])[0]

    def get_all(self, name: str) -> list[str]:
        return self.fields.get(name.lower(), [])

    def words(self, name: str) -> set[str]:
        """Of a field that is a list with commas, in lower case."""
        return {word.strip().lower() for value in self.get_all(name) for word in value.split(",")}

    def __contains__(self, name: str) -> bool:
        return name.lower() in self.fields


def at_once(sock: Any) -> bool:
    """Is it plain, and its file number one that never waits? (Python makes it so for a timeout.)"""
    return os.name == "posix" and type(sock) is socket.socket and bool(sock.gettimeout())


class Reader:
    """A socket's bytes by lines, by counts, by heads. `until`: the deadline of what is being read. Raises TimeoutError, PeerGone."""

    def __init__(self, sock: Any):
        self.socket, self.held, self.until = sock, bytearray(), 0.0

    def receive(self, most: int) -> bytes:
        """What is there, or comes until the deadline; nothing: the client has shut its side."""
        if time.monotonic() >= self.until:
            raise TimeoutError
        if not at_once(self.socket):
            self.socket.settimeout(max(self.until - time.monotonic(), 1e-3))
            try:
                return bytes(self.socket.recv(most))
            finally:
                self.socket.settimeout(WRITE_S)
        number = self.socket.fileno()
        with contextlib.suppress(BlockingIOError):  # as a rule it is there: to wait first would be one more turn
            return os.read(number, most)
        if not self.ready(self.until):
            raise TimeoutError
        return os.read(number, most)

    def more(self) -> bool:
        data = self.receive(1 << 13)
        self.held += data
        return bool(data)

    def line(self, most: int) -> bytes | None:
        """Up to and with the next LF; None: it is longer than `most`."""
        start = 0
        while (end := self.held.find(b"\n", start)) < 0:
            start = len(self.held)
            if start > most:
                return None
            if not self.more():
                raise PeerGone
        return self.take(end + 1) if end < most else None

    def take(self, most: int) -> bytes:
        data = bytes(self.held[:most])
        del self.held[:most]
        return data

    def some(self, most: int) -> bytes:
        """At least one byte, at most `most`."""
        data = self.take(most) if self.held else self.receive(min(most, 1 << 18))
        if not data:
            raise PeerGone
        return data

    def piece(self, most: int) -> bytes:
        """The same of a large body, one connection at a time: many that all want the interpreter keep the others from it."""
        if self.held or most < LARGE or isinstance(self.socket, ssl.SSLSocket):
            return self.some(most)
        if not self.ready(self.until):
            raise TimeoutError
        with ONE_READS:
            return self.some(most)

    def ready(self, until: float) -> bool:
        """Wait for something to read, or for the end. False: nothing came until then."""
        left = max(0.0, until - time.monotonic())
        if not hasattr(select, "poll"):
            return bool(select.select([self.socket], [], [], left)[0])
        poller = select.poll()
        poller.register(self.socket, select.POLLIN)
        return bool(poller.poll(min(left * 1000, 1 << 30)))  # of milliseconds it takes no more than 31 bits

    def wait(self, patience: float) -> bool:
        """For the first byte of a request. False: none came, or the client has left."""
        if self.held:
            return True
        self.until = time.monotonic() + patience
        try:
            return self.more()
        except TimeoutError:
            return False

    def head(self) -> tuple[str, str, str, Headers]:
        """(method, target, HTTP/1.0 or HTTP/1.1, headers). Raises HttpError."""
        left = LINE_MAX
        while (line := self.line(left)) == b"\r\n":  # RFC 9112, section 2.2: before a request it means nothing
            left -= 2
        if line is None:
            raise HttpError(414, "The request line is too long.", close=True)
        if not (found := REQUEST_LINE.fullmatch(line)):
            raise HttpError(
                400, "The request line is malformed: METHOD, target and HTTP/1.1, with CR LF at its end.", close=True
            )
        if found[4] != b"1":
            raise HttpError(505, "This server speaks HTTP/1.1 and HTTP/1.0.", close=True)
        version = "HTTP/1.0" if found[3] == b"HTTP/1.0" else "HTTP/1.1"  # of 1.2 we know what 1.1 has
        return found[1].decode(), found[2].decode("latin-1"), version, self.fields()

    def fields(self) -> Headers:
        """Header lines up to the empty one. Raises HttpError."""
        headers, left = Headers(), LINE_MAX
        for _ in range(FIELDS_MAX + 1):
            line = self.line(left)
            if line is None:
                break
            if line == b"\r\n":
                return headers
            if not (found := FIELD_LINE.fullmatch(line)):
                raise HttpError(
                    400,
                    "A header line is malformed: Name: value, without control characters, with CR LF at its end.",
                    close=True,
                )
            headers.add(found[1].decode(), found[2].strip(b" \t").decode("latin-1"))
            left -= len(line)
        raise HttpError(431, f"The header is larger than {LINE_MAX} bytes or {FIELDS_MAX} lines.", close=True)


class Connection(socketserver.BaseRequestHandler):
    """One connection: reads requests, and writes replies and streams."""

    server: HttpServer
    left = False  # PeerWatch has seen the client go

    def setup(self) -> None:
        self.connection = self.request
        self.seat = self.server.seats.taken[self.request]
        if self.connection.family != getattr(socket, "AF_UNIX", None):
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        self.ended = False  # the client has shut its sending side
        self.voice = threading.Lock()  # held where a reply begins: whoever looks for the client may have to say its first bytes
        self.clear()

    def clear(self) -> None:
        """Nothing is known of the next request yet."""
        self.close_connection = True
        self.command = self.path = self.request_id = self.log_note = ""
        self.request_version, self.headers = "HTTP/1.1", Headers()
        self.status, self.started, self.streaming, self.chunked = 0, time.monotonic(), False, False
        self.extra: list[tuple[str, str]] = []
        self.unread: int | None = None  # bytes of the body that are still to come; None: nobody knows
        self.begun = b""  # what of the reply has been sent to see whether the client is still there
        self.body = b""
        self.charged = 0  # bytes taken from server.bodies

    def handle(self) -> None:
        if self.server.tls and not self.shake_hands(self.server.tls):
            return
        self.connection.settimeout(WRITE_S)
        self.reader = Reader(self.connection)
        self.close_connection = False
        while not self.close_connection:
            self.handle_one_request()

    def shake_hands(self, tls: ssl.SSLContext) -> bool:
        self.connection.settimeout(self.server.limits.header_s)
        try:
            self.connection = tls.wrap_socket(self.request, server_side=True, do_handshake_on_connect=False)
            self.seat.socket = self.connection
            self.connection.do_handshake()
            return True
        except (OSError, ValueError) as error:
            log.debug("TLS with %s: %s", self.seat.address, error)
            return False

    def finish(self) -> None:
        if self.connection is not self.request:  # wrapped in TLS
            with contextlib.suppress(OSError):
                self.connection.close()

    # ── one request ──

    def handle_one_request(self) -> None:
        self.clear()
        try:
            try:
                if not self.read_head():
                    return
            except TimeoutError:
                return self.refuse(
                    HttpError(408, f"The header was not there after {self.server.limits.header_s:g} s.", close=True)
                )
            except HttpError as error:
                return self.refuse(error)
            with self.server.busy:
                self.respond()
        except (OSError, PeerGone):  # reset, timed out, or left
            self.close_connection = True

    def refuse(self, error: HttpError) -> None:
        """What could not even be read as a request."""
        try:
            self.fail(error)
        finally:
            self.note()

    def respond(self) -> None:
        self.request_id = re.sub(r"[^!-~]", "", self.headers.get("X-Request-Id"))[:128] or f"req-{random.getrandbits(128):032x}"
        try:
            self.unread = self.framing()
            self.answer()
        except (PeerGone, OSError):
            self.status = 499  # nginx's number for it; nobody reads it but the log
            raise
        except Exception as error:
            self.fail(error)
        finally:
            self.server.bodies.give_back(self.seat.address, self.charged)
            self.server.seats.hush(self.seat)
            self.note()
        if self.unread and not self.close_connection:
            self.skip_body()

    def answer(self) -> None:
        """Answer the request whose head has been read; whatever is raised goes to `fail`."""
        raise NotImplementedError

    def fail(self, error: Exception) -> None:
        """Render any error, before or inside a stream; then `linger` where the connection ends with it."""
        raise NotImplementedError

    def note(self) -> None:
        """The request has been answered: `status`, `command` and `path` say how."""

    # ── reading ──

    def read_head(self) -> bool:
        """Wait for a request, and read its line and headers. False: none comes. Raises HttpError, and TimeoutError inside of one."""
        limits = self.server.limits
        if not self.reader.wait(limits.idle_s):
            return False
        self.started = time.monotonic()
        self.reader.until = self.started + limits.header_s
        self.command, self.path, self.request_version, self.headers = self.reader.head()
        wish = self.headers.words("Connection")
        self.close_connection = "close" in wish or (self.request_version == "HTTP/1.0" and "keep-alive" not in wish)
        return True

    def framing(self) -> int | None:
        """How long the request's body is, None: chunked. Whatever makes that unclear ends the connection."""
        hosts = self.headers.get_all("Host")
        if len(hosts) > 1 or (not hosts and self.request_version == "HTTP/1.1") or not all(map(HOST.fullmatch, hosts)):
            raise HttpError(
                400, "An HTTP/1.1 request must have one Host header: a name or an address, and maybe a port.", close=True
            )
        lengths, codings = self.headers.get_all("Content-Length"), self.headers.get_all("Transfer-Encoding")
        if codings and (lengths or self.request_version == "HTTP/1.0"):
            raise HttpError(400, "Transfer-Encoding excludes Content-Length, and HTTP/1.0 does not have it.", close=True)
        if codings and (len(codings) > 1 or codings[0].lower() != "chunked"):
            raise HttpError(400, "The only Transfer-Encoding that this server knows is chunked.", close=True)
        if len(set(lengths)) > 1 or not all(re.fullmatch("[0-9]{1,18}", length) for length in lengths):
            raise HttpError(400, "Content-Length must be one decimal number.", close=True)
        return None if codings else int(lengths[0]) if lengths else 0

    def expects(self) -> bool:
        """Does the client wait for our word before it sends the body?"""
        return self.headers.get("Expect").lower() == "100-continue" and self.request_version == "HTTP/1.1"

    def read_body(self) -> bytes:
        """The request's body, whole; until then nobody is answering this request."""
        if self.unread == 0 and "Content-Length" not in self.headers and self.command in ("POST", "PUT", "PATCH"):
            raise HttpError(411, "Send a Content-Length or a chunked body.")
        if self.unread and self.unread > self.server.limits.max_body:
            raise self.too_large()
        self.server.seats.hush(self.seat)
        if self.unread != 0 and self.expects():
            self.write(PREFIX + b"100 Continue\r\n\r\n")
        self.begin_body()
        body = bytearray()
        try:
            if self.unread is None:
                self.read_chunks(body)
            else:
                self.read_into(body, self.unread)
        except TimeoutError:
            rate = self.server.limits.body_rate
            raise HttpError(408, f"The body came more slowly than {rate:g} bytes per second.", close=True) from None
        self.unread = 0
        self.server.seats.busy(self.seat)
        return bytes(body)

    def begin_body(self) -> None:
        self.body_began = time.monotonic()
        self.reader.until = self.body_began + self.server.limits.header_s

    def body_grew(self, size: int) -> None:
        """What has come so far moves the deadline."""
        limits = self.server.limits
        self.reader.until = self.body_began + limits.header_s + (size / limits.body_rate if limits.body_rate else 1e9)

    def read_into(self, body: bytearray, size: int) -> None:
        end = len(body) + size
        while len(body) < end:
            body += self.reader.piece(end - len(body))
            self.body_grew(len(body))
            if (due := len(body) - Bodies.FREE - self.charged) > 0:
                if not self.server.bodies.take(self.seat.address, due):
                    raise HttpError(
                        503, "Too many large requests at once. Try again in a moment.", [("Retry-After", "1")], close=True
                    )
                self.charged += due

    def read_chunks(self, body: bytearray) -> None:
        """RFC 9112, section 7.1. Extensions and trailers are read over."""
        malformed, count = HttpError(400, "The chunked body is malformed.", close=True), 0
        while True:
            line = self.reader.line(1024)
            if line is None or not (found := CHUNK_LINE.fullmatch(line)):
                raise malformed
            if not (size := int(found[1], 16)):
                break
            if len(body) + size > self.server.limits.max_body:
                raise self.too_large()
            self.read_into(body, size)
            if self.reader.line(2) != b"\r\n":
                raise malformed
            count += 1
            if count > CHUNKS_FREE + len(body) // CHUNK_LEAST:
                raise HttpError(400, "The chunks of the body are too small.", close=True)
        self.reader.fields()  # trailers

    def skip_body(self) -> None:
        """Read over a body that the reply did not need. Raises TimeoutError: too slow to wait for."""
        self.begin_body()
        left = self.unread or 0
        while left:
            left -= len(self.reader.piece(left))
        self.unread = 0

    def too_large(self) -> HttpError:
        return HttpError(413, f"The body is larger than {self.server.limits.max_body} bytes.", close=True)

    def linger(self) -> None:
        """Closing while the client still writes would reset the connection, and the reply with it (RFC 9112, 9.6)."""
        until = time.monotonic() + LINGER_S
        try:
            self.connection.shutdown(socket.SHUT_WR)
            while time.monotonic() < until and self.reader.ready(until):
                with ONE_LINGERS:  # all of them together no faster than LINGER_RATE
                    self.connection.settimeout(LINGER_S)
                    if not (size := self.connection.recv_into(NOWHERE)):
                        break
                    time.sleep(size / LINGER_RATE)
        except (OSError, ValueError):
            pass

    def peer_gone(self) -> bool:
        """Has the client left? Pipelined requests are data, not an end.

        One that has shut its sending side (`nc -N`) looks like one that has left, until something is sent: the latter answers
        with a reset. So the first bytes of the reply, which are always the same, are sent at once.
        """
        try:
            gone, ended = self.look()
            if ended and not gone and not self.ended:
                self.ended = self.begin()
                gone, _ = self.look()
            return gone
        except BlockingIOError:  # it has not read earlier replies
            return False
        except OSError:
            return True

    def begin(self) -> bool:
        """Send the first bytes of the reply, unless it has begun."""
        with self.voice:
            if not self.status and not self.begun:  # without waiting, which socket.send would
                sent = os.write(self.connection.fileno(), PREFIX) if os.name == "posix" else self.connection.send(PREFIX)
                self.begun = PREFIX[:sent]
        return True

    def look(self) -> tuple[bool, bool]:
        """(the connection is broken, the client has shut its sending side)"""
        secure = self.connection is not self.request  # TLS: nobody closes but half of it, and there is no peeking
        if not hasattr(select, "poll"):  # Windows; elsewhere select() cannot take file numbers over 1,023
            ready = not secure and select.select([self.connection], [], [], 0)[0]
            return False, bool(ready) and not self.connection.recv(1, socket.MSG_PEEK)
        poller = select.poll()
        hung_up = getattr(select, "POLLRDHUP", 0)
        poller.register(self.connection, select.POLLIN | hung_up)
        happened = poller.poll(0)
        if not happened:
            return False, False
        if happened[0][1] & ~(select.POLLIN | hung_up):
            return True, True
        if happened[0][1] & hung_up:
            return secure, True
        return False, not secure and not self.connection.recv(1, socket.MSG_PEEK)

    # ── writing ──

    def write(self, data: bytes) -> None:
        sent = self.write_now(data) if self.can_write_now() else 0
        if sent < len(data):
            self.server.seats.hush(self.seat)  # one that does not read may have to make room, too
            for at in range(sent, len(data), SLICE):  # its timeout is for all that it is given
                self.connection.sendall(data[at : at + SLICE])
            self.server.seats.busy(self.seat)

    def can_write_now(self) -> bool:
        return at_once(self.connection)

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
        with self.voice:
            self.status = status
        if self.unread != 0 and (self.unread is None or self.unread > SKIPPED or self.expects()):
            self.close_connection = True  # nobody will read the body, and what comes after it
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", f"Date: {http_date(int(time.time()))}"]
        for name, value in (*self.common_headers(), *self.extra, *headers):
            lines.append(f"{name}: {value if value.isprintable() else re.sub('[^ -~]', ' ', value)}")
        if self.close_connection:
            lines.append("Connection: close")
        elif self.request_version == "HTTP/1.0":
            lines.append("Connection: keep-alive")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")[len(self.begun) :]

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


@functools.lru_cache(maxsize=1)
def http_date(second: int) -> str:
    """RFC 9110, section 5.6.7. To format it takes a thirtieth of a request."""
    return formatdate(second, usegmt=True)


# ───────────────────────────────────────────────────── serving ───────────────────────────────────────────────────


class Busy:
    """Counts the requests being answered, so that a shutdown can wait for them."""

    def __init__(self) -> None:
        self.count, self.total, self.lock = 0, 0, threading.Lock()

    def __enter__(self) -> None:
        with self.lock:
            self.count += 1
            self.total += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.count -= 1


class Threads:
    """Threads that outlive what they run: to start one and end it takes as long as to read a request and to write a reply."""

    KEPT_S = 10.0  # how long one that is not kept waits for something to do

    def __init__(self) -> None:
        self.lock = threading.Lock()  # guards what follows
        self.all = self.kept = 0
        self.idle = 0  # those that wait, and are not meant for anything that is given
        self.given: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()  # None: leave

    def keep(self, count: int) -> None:
        """So many are to be there, before anything is given to them. Raises RuntimeError: no more threads."""
        if count < self.kept:
            self.dismiss(count)
        self.kept = count
        while self.all < count:
            self.start(None)

    def dismiss(self, left: int = 0) -> None:
        """Of those that wait so many leave at once that `left` are there, and those that work once they have waited."""
        with self.lock:
            leaving = min(self.idle, max(0, self.all - left))
            self.kept, self.idle = left, self.idle - leaving
        for _ in range(leaving):
            self.given.put(None)

    def run(self, work: Callable[[], None]) -> None:
        """At once: by one that waits, else by a new one. Raises RuntimeError: no more threads."""
        with self.lock:
            waits = self.idle > 0
            self.idle -= waits
        if waits:
            self.given.put(work)
        else:
            self.start(work)

    def start(self, work: Callable[[], None] | None) -> None:
        with self.lock:  # threading.Thread would have us wait until it runs: under load a turn of the interpreter for each
            _thread.start_new_thread(self.live, (work,))
            self.all += 1
            self.idle += work is None

    def live(self, work: Callable[[], None] | None) -> None:
        try:
            while work or (work := self.next()):
                work()
                work = None
                with self.lock:
                    self.idle += 1
        finally:
            with self.lock:
                self.all -= 1

    def next(self) -> Callable[[], None] | None:
        """What is given to it; None: it may leave."""
        while True:
            with contextlib.suppress(queue.Empty):
                return self.given.get(timeout=self.KEPT_S if self.all > self.kept else None)
            with self.lock:
                if self.idle and self.all > self.kept:  # none idle: who waits is meant for what has just been given
                    self.idle -= 1
                    return None


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


def tls_context(certfile: str, keyfile: str = "") -> ssl.SSLContext:
    """TLS 1.2 and up, with a certificate chain in PEM; without `keyfile` its key is in there too. Raises OSError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    context.load_cert_chain(certfile, keyfile or None, password=lambda: b"")  # nobody is asked for one
    return context


class HttpServer(ThreadingHTTPServer):
    """Accepts connections, a daemon thread each. `uds`: the path of a Unix socket to listen on, instead of the address."""

    request_queue_size = 4096  # connections that wait to be accepted; the system has a limit of its own
    full = PREFIX + b"503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"

    def __init__(
        self,
        address: tuple[str, int],
        handler: type[Connection],
        limits: HttpLimits | None = None,
        tls: ssl.SSLContext | None = None,
        uds: str = "",
    ):
        given = limits or HttpLimits()
        self.limits = replace(given, connections=min(given.connections, most_connections()))
        self.seats, self.bodies = Seats(self.limits), Bodies(self.limits.all_bodies)
        self.uncounted: Callable[[str], bool] = lambda host: False  # addresses that speak for many, as a proxy's does
        self.tls, self.uds, self.bound = tls, uds, False
        self.draining = False
        self.busy = Busy()
        self.peers, self.workers = PeerWatch(), Threads()
        if uds:
            if not hasattr(socket, "AF_UNIX"):
                raise OSError("this system has no Unix sockets for Python")
            self.address_family = socket.AF_UNIX
        elif ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(uds or address, handler)  # type: ignore[arg-type]

    def server_bind(self) -> None:
        if self.uds:
            free_path(self.uds)
            mask = os.umask(0o177)  # there is no moment at which others could connect
            try:
                self.socket.bind(self.uds)
            finally:
                os.umask(mask)
            self.bound = True
            self.server_name, self.server_port = self.uds, 0
            return
        if os.name == "posix":
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def server_activate(self) -> None:
        super().server_activate()
        self.socket.setblocking(False)  # a client may have left the backlog before it is accepted

    def get_request(self) -> tuple[Any, Any]:
        try:
            request, address = self.socket.accept()
            return request, address or ("", 0)  # a Unix socket's other end has no name
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(0.05)  # no file numbers left: the connection stays in the backlog, and we do not spin
            raise

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Is there room for another connection?"""
        host = str(client_address[0])
        if self.seats.enter(request, "" if self.uds or self.uncounted(host) else address_of(host)):
            return True
        log.warning("no room for a connection of %s: %d are there", host or "the Unix socket", len(self.seats.taken))
        if not self.tls:
            with contextlib.suppress(OSError):
                request.setblocking(False)
                request.send(self.full)
        return False

    def process_request(self, request: Any, client_address: Any) -> None:
        self.workers.run(lambda: self.process_request_thread(request, client_address))

    def shutdown_request(self, request: Any) -> None:
        """Not a mere close: that says RST where something is unread, and the client may lose what it was sent."""
        super().shutdown_request(request)
        self.seats.leave(request)

    def server_close(self) -> None:
        super().server_close()
        self.peers.close()
        self.workers.dismiss()
        if self.bound:
            self.bound = False
            with contextlib.suppress(OSError):
                os.unlink(self.uds)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.error("connection of %s", client_address, exc_info=True)

    def drain(self, grace: float) -> None:
        """Stop accepting, and let running answers finish for `grace` seconds."""
        self.draining = True
        self.server_close()
        until = time.monotonic() + grace
        while self.busy.count and time.monotonic() < until:
            time.sleep(0.02)


def free_path(path: str) -> None:
    """Take away the socket of a server that has died. Raises OSError where somebody listens, or something else is there."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise OSError(errno.EEXIST, "there is a file of that name")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            os.unlink(path)
            return
    raise OSError(errno.EADDRINUSE, "another server listens there")
