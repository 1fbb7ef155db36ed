"""Errors as a client sees them: ApiError has its wire face, and what the layers below raise is translated here, in one place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from catalog import UsageError
from engine import EngineFailed, QueueFull, Refused, Unloading, log
from http11 import HttpError
from model_init import RETRY_S, Conflict, NotReady, StillLoading, UnknownModel
from upstream import UpstreamFailed

ERROR_TYPES = {  # what is not here is the client's fault
    401: "authentication_error",
    409: "conflict_error",
    429: "rate_limit_error",
    500: "server_error",
    502: "upstream_error",
    503: "unavailable_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An error with its wire face. `close`: the connection's framing is lost, so it ends with this reply."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Iterable[tuple[str, str]] = (),
        close: bool = False,
        **more: Any,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers, self.close, self.more = tuple(headers), close, more

    def body(self) -> dict[str, Any]:
        kind = ERROR_TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code, **self.more}}


class SpinningUp(ApiError):
    """No error, but no answer either: 202, with the body that llm-serve's clients know."""

    def body(self) -> dict[str, Any]:
        return {"object": "model.load", "status": "spinning_up"} | self.more


def rename(error: ApiError, names: Iterable[tuple[str, str]]) -> None:
    """A dialect's own word for the field to blame: `names` has (a field of the chat request, the dialect's), longer ones first."""
    param = error.param or ""
    for old, new in names:
        if param == old or param.startswith((old + ".", old + "[")):
            error.param = new + param[len(old) :]
            error.message = error.message.replace(f"'{old}", f"'{new}")
            return


def as_api_error(error: Exception) -> ApiError:
    """What the layers below raise, as a client sees it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HttpError):
        return ApiError(error.status, error.message, headers=error.headers, close=error.close)
    if isinstance(error, Refused):
        return ApiError(400, error.message, error.param, error.code)
    if isinstance(error, QueueFull):
        return ApiError(
            429,
            "All slots are busy and the queue is full. Try again in a moment.",
            code="queue_full",
            headers=[("Retry-After", "1")],
        )
    later = [("Retry-After", str(RETRY_S))]
    if isinstance(error, NotReady):
        return ApiError(503, f"Not ready: {error}.", code="not_ready", headers=later)
    if isinstance(error, UnknownModel):
        return ApiError(404, f"{error}.", "model", "model_not_found")
    if isinstance(error, StillLoading):
        return SpinningUp(
            202, f"{error}", headers=later,
            model=error.model, current_model=error.current, retry_after_seconds=RETRY_S, eta_seconds=None,
        )  # fmt: skip
    if isinstance(error, Conflict):
        return ApiError(409, f"Try again: {error}.", "model", "model_conflict", later, current_model=error.current)
    if isinstance(error, UpstreamFailed):
        wait = error.retry_after or ("1" if error.status == 429 else str(RETRY_S))
        headers = [("Retry-After", wait)] if error.status in (429, 503) else []
        return ApiError(error.status, f"The upstream server failed: {error}.", code="upstream_failed", headers=headers)
    if isinstance(error, Unloading):
        return ApiError(409, f"Try again: {error}.", "model", "model_swapped", later, current_model=error.current)
    if isinstance(error, UsageError):
        return ApiError(400, f"This model cannot be loaded here: {error}.", "model", "unsupported_model")
    if isinstance(error, EngineFailed):
        return ApiError(500, f"The engine failed: {error}. Try again.", code="engine_failed")
    log.error("bug: %s", error, exc_info=error)
    return ApiError(500, "Internal error; the server's log has the details.", code="internal_error")
