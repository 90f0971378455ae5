"""Limits for each visitor of a public server: how many requests wait at once, and how many bytes come in an hour."""

import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterable
from ipaddress import ip_address

from starlette.requests import Request
from starlette.responses import JSONResponse

WAITING = 100  # requests; a class behind one address makes that many
BYTES = 2**30  # in an hour, also in several requests
HOUR = 3600.0
ASKING = ("/queue/join", "/call/")


def is_public(server_name: str) -> bool:
    """Whether a page that is served at this address of the machine can be reached by others."""
    return "SPACE_ID" in os.environ or not ip_address(socket.gethostbyname(server_name)).is_loopback


def visitor_of(request: Request) -> str:
    """The address of a visitor, behind a proxy as the proxy tells it."""
    told = request.headers.get("x-forwarded-for", "").split(",")[0].strip()
    return told or (request.client.host if request.client else "")


class Limits:
    """ASGI middleware that answers 429, with a sentence, beyond the limits.

    Args:
        app: what it stands before.
        waiting: gives the requests in the queue.
    """

    def __init__(self, app: Callable[..., Awaitable], waiting: Callable[[], Iterable[Request]]) -> None:
        self.app, self.waiting = app, waiting
        self.sent: list[tuple[float, str, int]] = []  # of each request when it ended, whose it was, and its bytes

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        """One request."""
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        visitor, hour_ago, size = visitor_of(Request(scope)), time.monotonic() - HOUR, 0
        self.sent = [each for each in self.sent if each[0] > hour_ago]
        asks, refusal = any(part in scope["path"] for part in ASKING), ""
        if sum(each for _, who, each in self.sent if who == visitor) >= BYTES:
            refusal = f"More than {BYTES // 2**20} MB came from your address within an hour: wait."
        elif asks and sum(visitor_of(each) == visitor for each in self.waiting()) >= WAITING:
            refusal = "Too many requests of your address wait for an answer: try again later."
        if refusal:  # under the names that Gradio's page and its clients look for
            return await JSONResponse({"error": refusal, "detail": refusal}, 429)(scope, receive, send)

        async def counted() -> dict:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            return message

        try:
            return await self.app(scope, counted, send)
        finally:
            self.sent.append((time.monotonic(), visitor, size))
