"""Who may ask, and as whom: keys, web pages, proxies. No socket: what a request says goes in, a name or an ApiError comes out.

Without a key a server on a loopback address is for this machine's programs alone. A web browser is such a program, and speaks
for whatever page it shows: so Host must name this machine (a page whose name was made to point here gives its own), and Origin,
which a browser sends and a page cannot forge, must be of this machine too.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import stat
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from urllib.parse import urlsplit

from api_errors import ApiError
from catalog import UsageError
from engine import log
from http11 import Headers, address_of

KEY = re.compile(r"[!-~]{1,4096}")
SIMPLE = (
    "text/plain",
    "application/x-www-form-urlencoded",
    "multipart/form-data",
    "",
)  # what a page may send without asking first


# ────────────────────────────────────────────────────── keys ─────────────────────────────────────────────────────


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()


def checked(key: str, where: str) -> str:
    if not key:
        raise UsageError(f"{where}: an empty key would let everyone in; leave it out if that is meant")
    if not KEY.fullmatch(key):
        raise UsageError(f"{where}: a key is made of visible ASCII characters, without spaces")
    return key


class Keys:
    """Named keys: those given, and those of a file, which is read again when it changes. Raises UsageError.

    The file has one key a line, with a name before a `:` where one is wanted; `#` begins a comment. No line is ever logged.
    """

    def __init__(self, given: Sequence[str] = (), file: str = "", flag: str = "--api-key"):
        self.file, self.flag, self.lock = file, flag, threading.Lock()
        self.seen: object = None  # what of the file has been read
        self.given = [(f"key{i}", digest(checked(key, flag))) for i, key in enumerate(given, 1)]
        self.read: list[tuple[str, bytes]] = []
        if file:
            try:
                self.seen = self.mark()
                self.read = self.from_file()
            except (OSError, UnicodeDecodeError) as error:
                raise UsageError(f"{flag}-file {file}: {getattr(error, 'strerror', None) or error}") from None
            if not self.read:
                raise UsageError(f"{flag}-file {file}: there is no key in it")

    def __bool__(self) -> bool:
        """Is a key asked for? A file that has become empty lets nobody in."""
        return bool(self.given or self.file)

    def mark(self) -> object:
        found = os.stat(self.file)
        return found.st_mtime_ns, found.st_size, found.st_ino

    def from_file(self) -> list[tuple[str, bytes]]:
        if os.name == "posix" and stat.S_IMODE(os.stat(self.file).st_mode) & 0o077:
            log.warning("%s-file %s can be read by others: chmod 600", self.flag, self.file)
        found = []
        with open(self.file, encoding="utf-8-sig") as f:
            for number, line in enumerate(f.read(1 << 24).splitlines(), 1):
                text = line.strip()
                if text and not text.startswith("#"):
                    name, colon, key = text.partition(":")
                    name, key = (name.strip(), key.strip()) if colon else (f"line{number}", text)
                    found.append((name or f"line{number}", digest(checked(key, f"{self.flag}-file, line {number}"))))
        return found

    def refresh(self) -> None:
        """A file that cannot be read leaves the keys as they were."""
        if not self.file:
            return
        with self.lock:
            try:
                if (now := self.mark()) == self.seen:
                    return
                self.seen = now
                self.read = self.from_file()
                log.info("%s-file: %d keys", self.flag, len(self.read))
            except (OSError, UnicodeDecodeError, UsageError) as error:
                log.error("%s-file stays as it was: %s", self.flag, error)

    def name_of(self, key: str) -> str | None:
        """The name of a key, None: it is no key. All are compared, whichever fits."""
        self.refresh()
        asked, found = digest(key), None
        for name, known in [*self.given, *self.read]:
            if hmac.compare_digest(asked, known):
                found = name
        return found if key else None


def key_in(headers: Headers) -> str:
    scheme, _, bearer = headers.get("Authorization").partition(" ")
    return bearer.strip() if scheme.lower() == "bearer" else headers.get("X-Api-Key")


# ──────────────────────────────────────────────── browsers and proxies ───────────────────────────────────────────

Network = IPv4Network | IPv6Network


def network(text: str) -> Network:
    """Of --trusted-proxy. Raises ValueError."""
    return ip_network(text, strict=False)


def host_of(authority: str) -> str:
    """The name in `name:port`, in lower case."""
    name = authority[: authority.find("]") + 1] if authority.startswith("[") else authority.partition(":")[0]
    return name.strip("[]").lower().removesuffix(".")


def is_loopback(host: str) -> bool:
    """Does the name or address mean this machine, whoever resolves it?"""
    try:
        return ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def origin_of(text: str) -> str:
    """An origin as browsers write it: lower case, no slash at the end."""
    return text.strip().lower().rstrip("/")


@dataclass
class Access:
    """The rules of one server. `guard`: web pages are kept off; the server sets it where it is on loopback without a key."""

    keys: Keys = field(default_factory=Keys)
    admin: Keys | None = None  # None: no operator's routes; without keys: for whoever may use the others
    guard: bool = False
    hosts: frozenset[str] = frozenset()  # names that Host may have besides this machine's
    origins: frozenset[str] = frozenset()  # "*": any
    proxies: tuple[Network, ...] = ()  # whose X-Forwarded-For is believed
    json_only: bool = False  # with an Origin, a body must say that it is JSON

    @property
    def guarded(self) -> bool:
        return self.guard and not self.keys and "*" not in self.origins

    def check_page(self, headers: Headers, authority: str, sends: bool) -> None:
        """Refuse what a web page may not do. `authority`: of an absolute target; `sends`: the request has a body to be read."""
        if self.guarded:
            for host in [*headers.get_all("Host"), *([authority] if authority else [])]:
                if not self.host_allowed(host_of(host)):
                    message = (
                        f"Host {host[:100]!r} does not name this machine. Start the server with --allow-host, or with a key."
                    )
                    raise ApiError(403, message, code="host_not_allowed")
            for origin in headers.get_all("Origin"):
                if not self.origin_allowed(origin):
                    message = f"Pages of {origin[:100]!r} may not use this server. Start it with --allow-origin, or with a key."
                    raise ApiError(403, message, code="origin_not_allowed")
        if self.json_only and sends and "Origin" in headers:
            kind = headers.get("Content-Type").partition(";")[0].strip().lower()
            if kind in SIMPLE:
                raise ApiError(415, "A web page must send its body as Content-Type: application/json.", code="json_only")

    def host_allowed(self, host: str) -> bool:
        return is_loopback(host) or host in self.hosts

    def origin_allowed(self, origin: str) -> bool:
        if origin_of(origin) in self.origins:
            return True
        with contextlib.suppress(ValueError):
            return self.host_allowed(host_of(urlsplit(origin.strip()).netloc))
        return False

    def cors(self, headers: Headers) -> list[tuple[str, str]]:
        """What lets a page's script read the reply."""
        if not self.guarded:
            return [("Access-Control-Allow-Origin", "*")]
        origin = headers.get("Origin")
        allowed = origin and self.origin_allowed(origin)
        return [*([("Access-Control-Allow-Origin", origin)] if allowed else []), ("Vary", "Origin")]

    def trusts(self, host: str) -> bool:
        """Is this the address of a proxy that speaks for others?"""
        if not self.proxies:
            return False
        try:
            address = ip_address(host.partition("%")[0])
        except ValueError:
            return False
        return any(address in proxies for proxies in self.proxies)

    def address(self, peer: str, headers: Headers) -> str:
        """Where a request comes from: behind trusted proxies the last address that is none of theirs."""
        if not self.trusts(peer):
            return address_of(peer)
        for hop in reversed([hop.strip() for value in headers.get_all("X-Forwarded-For") for hop in value.split(",")]):
            try:
                ip_address(hop)
            except ValueError:
                break
            peer = hop
            if not self.trusts(hop):
                break
        return address_of(peer)

    def client(self, peer: str, headers: Headers, operator: bool, open_to_all: bool) -> str:
        """The name under which a request counts: of the key that let it in, else its address. Raises ApiError 401, 403."""
        if operator and self.admin is None:
            raise ApiError(403, "Loading and unloading by request is off: start the server with --admin.", code="admin_off")
        wanted = self.admin if operator and self.admin else self.keys
        given = key_in(headers) if wanted else ""
        name = wanted.name_of(given) if wanted else None
        if name is None and wanted is self.keys and self.admin and given:
            name = self.admin.name_of(given)  # who may load models may ask them
        if wanted and name is None and not open_to_all:
            raise ApiError(
                401,
                "Wrong or missing API key: send it as Authorization: Bearer KEY.",
                code="invalid_api_key",
                headers=[("WWW-Authenticate", "Bearer")],
            )
        return f"key {name}" if name is not None else self.address(peer, headers) or "local"
