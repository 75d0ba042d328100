"""Errors in OpenAI's format."""

from __future__ import annotations

from typing import Any

RETRY_AFTER_S = 1
MAX_MESSAGE_CHARACTERS = 1000  # a message quotes what the client sent, which may be megabytes


class ProtocolError(Exception):
    """An answer that is an error: its status, and the members of OpenAI's error object."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message[:MAX_MESSAGE_CHARACTERS]
        self.code = code
        self.param = param[:MAX_MESSAGE_CHARACTERS] if param else param

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        kind = "server_error" if self.status >= 500 else "rate_limit_error" if self.status == 429 else None
        error = {"message": self.message, "type": kind or "invalid_request_error", "param": self.param}
        return {"error": error | {"code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers that belong to the status."""
        if self.status == 401:
            return {"www-authenticate": "Bearer"}
        return {"retry-after": str(RETRY_AFTER_S)} if self.status in (429, 503) else {}
