"""The page for browsers at `/`: page.html as it stands, and the headers that keep it to itself. Nothing here knows HTTP's framing.

The policy names the page's one style and one script by their hashes: whatever a model makes the page show, no other script runs,
nothing is loaded from elsewhere, and no text becomes HTML (Trusted Types, where the browser has them).
"""

from __future__ import annotations

import base64
import hashlib
import logging
import re
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger("openai_api_endpoint")
PAGE = Path(__file__).with_name("page.html")


class Page(NamedTuple):
    body: bytes
    kind: str  # its Content-Type
    headers: tuple[tuple[str, str], ...]


def read_page(path: Path = PAGE) -> Page | None:
    """None where there is no such file."""
    try:
        body = path.read_bytes()
    except OSError as error:
        log.warning("no page for browsers: %s", error)
        return None
    return Page(body, "text/html; charset=utf-8", guards(body.decode()))


def guards(html: str) -> tuple[tuple[str, str], ...]:
    """Headers under which only what stands in the page itself may run, be shown, or be asked."""
    policy = {
        "default-src": "'none'",
        "script-src": hashes(html, "script"),
        "style-src": hashes(html, "style"),
        "img-src": "data:",  # its icon
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return (
        ("Content-Security-Policy", "; ".join(f"{name} {value}" for name, value in policy.items())),
        ("X-Content-Type-Options", "nosniff"),
        ("Referrer-Policy", "no-referrer"),
        ("Cross-Origin-Opener-Policy", "same-origin"),
        ("Cache-Control", "no-cache"),
        ("Vary", "Accept"),
    )


def hashes(html: str, tag: str) -> str:
    """CSP's source expressions (level 3, section 2.3.1) for the text of every <tag>."""
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in found)


def wants_page(accept: str) -> bool:
    """Does an Accept header come from a browser that is shown a page? What takes anything (curl, most clients) gets JSON."""
    return "text/html" in accept.lower()
