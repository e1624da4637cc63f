"""Errors of the interface itself; how clients read these and the runtime's: `serving.answers`."""

import math


class ApiError(Exception):
    """An error of the interface itself: `kind` and `code` are what OpenAI's clients know."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        kind: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.kind, self.headers = status, code, kind, headers


def busy(waiting: int, seconds: float) -> ApiError:
    """The queue is full; a place is likely after `seconds`."""
    wait = max(1, math.ceil(seconds))
    return ApiError(
        429,
        "queue_full",
        f"{waiting} pictures wait already; try again in {wait} s",
        "rate_limit_error",
        {"Retry-After": str(wait)},
    )


def too_late(seconds: float) -> ApiError:
    """The time limit of a request has passed."""
    return ApiError(
        504,
        "time_limit",
        f"not drawn within {seconds:g} s; ask for fewer pictures, steps or pixels, or try again "
        "when fewer wait",
        "server_error",
    )


def closing() -> ApiError:
    """The server finishes what runs and takes nothing new."""
    return ApiError(
        503,
        "shutting_down",
        "the server is shutting down; try again in a moment",
        "server_error",
        {"Retry-After": "5"},
    )
