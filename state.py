"""Responses that outlive their request: one sqlite3 file. It keeps JSON that it does not read; nothing here knows HTTP.

A row is one response: what was given to it (`input`), what came of it (`output`), and the rest of its resource (`head`), apart
because a continued conversation reads the first two of every turn. A chain is followed by `previous`. Every write is one
transaction, so a killed process leaves the whole of a response or nothing of it. One connection, one lock, any thread.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import sys
import threading
import time
from pathlib import Path
from typing import Any

VERSION = 1  # of the tables; `PRAGMA user_version`
# `gone`: deleted, but a later response is built on it. `open`: its making has not ended. `items`: which response an item came with.
TABLES = """
CREATE TABLE responses (id TEXT PRIMARY KEY, owner TEXT, previous TEXT, created REAL, bytes INTEGER, gone INTEGER, open INTEGER, head TEXT, input TEXT, output TEXT)
CREATE INDEX responses_previous ON responses (previous)
CREATE INDEX responses_created ON responses (created, bytes)
CREATE INDEX responses_gone ON responses (id) WHERE gone
CREATE INDEX responses_open ON responses (id) WHERE open
CREATE TABLE items (id TEXT, owner TEXT, response TEXT NOT NULL, PRIMARY KEY (id, owner))
CREATE INDEX items_response ON items (response)
CREATE TRIGGER forget AFTER DELETE ON responses BEGIN DELETE FROM items WHERE response = old.id; END
CREATE TABLE secrets (key BLOB NOT NULL);
"""
CHAIN = """
WITH RECURSIVE chain (previous, input, output, depth) AS (
    SELECT previous, input, output, 0 FROM responses WHERE id = ? AND owner = ? AND NOT gone AND created >= ?
    UNION ALL
    SELECT r.previous, r.input, r.output, depth + 1 FROM chain JOIN responses r ON r.id = chain.previous)
SELECT previous, input, output FROM chain ORDER BY depth DESC
"""
OPEN = ("queued", "in_progress")  # the status of a response whose making has not ended
PRUNE_EVERY = 64  # writes

Json = dict[str, Any]


class StateError(Exception):
    """The file cannot be used, and why."""


class State:
    """Stored responses. `owner` is whose they are: nobody else finds them. Raises StateError on opening, sqlite3.Error later."""

    def __init__(self, path: str = ":memory:", ttl: float = 30 * 86400, size: int = 1 << 30):
        self.ttl, self.size = ttl, size  # seconds, bytes of JSON
        self.lock = threading.Lock()
        self.writes = 0
        try:
            if path != ":memory:":
                create_private(Path(path))
            self.db = sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)
            self.prepare()
            self.end_open()
            self.prune()
        except (OSError, sqlite3.Error) as error:
            raise StateError(f"{path}: {error}") from None
        self.key: bytes = self.db.execute("SELECT key FROM secrets").fetchone()[0]  # of this server's signatures

    def prepare(self) -> None:
        db = self.db
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")  # a killed process loses nothing; a power cut may lose the last seconds
        db.execute("BEGIN IMMEDIATE")
        try:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, VERSION):
                raise sqlite3.DatabaseError(f"it was written by another version of this server ({version}, not {VERSION})")
            if version == 0:
                for statement in TABLES.strip().splitlines():
                    db.execute(statement)
                db.execute("INSERT INTO secrets VALUES (?)", (secrets.token_bytes(32),))
                db.execute(f"PRAGMA user_version = {VERSION}")
            db.execute("COMMIT")
        except BaseException:
            db.execute("ROLLBACK")
            raise

    def end_open(self) -> None:
        """What was being made when its server ended has failed. (Another that is still at it will write what it becomes.)"""
        error = {"code": "server_error", "message": "The server ended while this response was being made."}
        for id, head in self.db.execute("SELECT id, head FROM responses WHERE open").fetchall():
            told = json.dumps(json.loads(head) | {"status": "failed", "error": error}, ensure_ascii=False)
            self.db.execute("UPDATE responses SET open = 0, head = ? WHERE id = ?", (told, id))

    def put(self, owner: str, response: Json, given: list[Json]) -> None:
        """Keep a response and the items that were given to it; a later state of the same response takes its place."""
        head = {name: value for name, value in response.items() if name != "output"}
        data = [json.dumps(part, ensure_ascii=False) for part in (head, given, response["output"])]
        row = (
            response["id"],
            owner,
            response["previous_response_id"],
            time.time(),
            sum(map(len, data)),
            response["status"] in OPEN,
            *data,
        )
        items = [(item["id"], owner, response["id"]) for item in [*given, *response["output"]]]
        with self.lock:
            self.db.execute("BEGIN IMMEDIATE")
            try:
                self.db.execute("DELETE FROM items WHERE response = ?", (response["id"],))
                self.db.execute("INSERT OR REPLACE INTO responses VALUES (?, ?, ?, ?, ?, 0, ?, ?, ?, ?)", row)
                self.db.executemany("INSERT OR REPLACE INTO items VALUES (?, ?, ?)", items)
                self.db.execute("COMMIT")
            except BaseException:
                self.db.execute("ROLLBACK")
                raise
            self.writes += 1
            if self.writes % PRUNE_EVERY == 0:
                self.prune()

    def get(self, owner: str, id: str) -> Json | None:
        row = self.row(owner, id, "head, output")
        return {**json.loads(row[0]), "output": json.loads(row[1])} if row else None

    def is_open(self, owner: str, id: str) -> bool:
        """Is it still being made?"""
        row = self.row(owner, id, "open")
        return bool(row and row[0])

    def given(self, owner: str, id: str) -> list[Json] | None:
        """The items that were given to a response."""
        row = self.row(owner, id, "input")
        return json.loads(row[0]) if row else None

    def chain(self, owner: str, id: str) -> list[Json] | None:
        """All items of a conversation up to and with this response, in their order. None where any of it is missing."""
        with self.lock:
            rows = self.db.execute(CHAIN, (id, owner, time.time() - self.ttl)).fetchall()
        if not rows or rows[0][0] is not None:  # its first turn continues one that is no longer kept
            return None
        return [item for _, given, output in rows for part in (given, output) for item in json.loads(part)]

    def item(self, owner: str, id: str) -> Json | None:
        """One item, given or made, of any response that is kept."""
        with self.lock:
            row = self.db.execute(
                "SELECT r.input, r.output FROM items i JOIN responses r ON r.id = i.response "
                "WHERE i.id = ? AND i.owner = ? AND NOT gone AND created >= ?",
                (id, owner, time.time() - self.ttl),
            ).fetchone()
        found = [item for part in row or () for item in json.loads(part) if item["id"] == id]
        return found[0] if found else None

    def delete(self, owner: str, id: str) -> bool:
        """Forget a response. What others are built on is kept for them, unseen, until they are gone, too."""
        with self.lock:
            done = self.db.execute(
                "UPDATE responses SET gone = 1 WHERE id = ? AND owner = ? AND NOT gone AND created >= ?",
                (id, owner, time.time() - self.ttl),
            ).rowcount
            if done:
                self.prune()
        return bool(done)

    def row(self, owner: str, id: str, columns: str) -> Any:
        with self.lock:
            return self.db.execute(
                f"SELECT {columns} FROM responses WHERE id = ? AND owner = ? AND NOT gone AND created >= ?",
                (id, owner, time.time() - self.ttl),
            ).fetchone()

    def prune(self) -> None:
        """Drop what is too old or deleted and has nothing built on it, then the oldest until the rest fits into `size`."""
        db = self.db
        db.execute("BEGIN IMMEDIATE")
        try:
            unused = "NOT EXISTS (SELECT 1 FROM responses later WHERE later.previous = responses.id)"
            old = time.time() - self.ttl
            while db.execute(f"DELETE FROM responses WHERE (gone OR created < ?) AND {unused}", (old,)).rowcount:
                pass  # its parent may have nothing built on it now
            excess = (db.execute("SELECT SUM(bytes) FROM responses").fetchone()[0] or 0) - self.size
            if excess > 0:
                for id, size in db.execute("SELECT id, bytes FROM responses ORDER BY created").fetchall():
                    db.execute("DELETE FROM responses WHERE id = ?", (id,))
                    excess -= size
                    if excess <= 0:
                        break
            db.execute("COMMIT")
        except BaseException:
            db.execute("ROLLBACK")
            raise

    def close(self) -> None:
        with self.lock:
            self.db.close()


def create_private(path: Path) -> None:
    """The file, for its owner's eyes alone; sqlite gives its companions the same mode."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))


def default_path() -> Path:
    """In the user's state folder (XDG Base Directory Specification; Windows: local application data)."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return base / "openai_api_endpoint" / "responses.sqlite3"
