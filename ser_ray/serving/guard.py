"""What every request passes before it is looked at: origin, key, rate, length, room. What is known of it afterwards is
its path, status, size and time, as sums for Prometheus."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ser_ray.serving.keys import Keys, bearer, check_origin
from ser_ray.serving.limits import Limits, Rates, Refused, Room

OPEN: Final = frozenset({("GET", "/"), ("GET", "/health"), ("GET", "/ready")})
"""What needs no key: the page, which has nothing of anybody in it, and what a load balancer asks."""
PATHS: Final = frozenset(
    {"/", "/v1/predict", "/v1/voices", "/v1/models", "/v1/stream", "/health", "/ready", "/metrics", "/openapi.json"}
)


class Measures:
    """Counts for Prometheus."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        known: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("ser_ray_requests", "Requests by path and status", ["path", "status"], **known)
        self.seconds = Histogram("ser_ray_request_seconds", "From the first byte to the answer", ["path"], **known)
        self.bytes = Counter("ser_ray_request_bytes", "Bytes of requests", **known)
        self.audio = Counter("ser_ray_audio_seconds", "Seconds of audio answered", **known)
        self.under_way = Gauge("ser_ray_requests_under_way", "Requests being served", **known)
        self.streams = Gauge("ser_ray_streams", "Open streams", **known)


class Guard:
    """ASGI middleware. It refuses in one line of JSON; streams are let through, as they can be refused only once they
    are open (`ser_ray.serving.app`)."""

    def __init__(self, app: ASGIApp, keys: Keys, limits: Limits, rates: Rates, room: Room, measures: Measures) -> None:
        self.app, self.keys, self.limits = app, keys, limits
        self.rates, self.room, self.measures = rates, room, measures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status = time.monotonic(), 499  # what servers note for a client that has gone

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._served(scope, receive, noted)
        except Refused as refused:
            await refusal(refused)(scope, receive, noted)
        finally:
            path = scope["path"] if scope["path"] in PATHS else "other"
            self.measures.requests.labels(path, str(status)).inc()
            self.measures.seconds.labels(path).observe(time.monotonic() - begun)
            self.measures.under_way.set(self.room.requests)

    async def _served(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        check_origin(headers.get("host", ""), headers.get("origin", ""), bool(self.keys.digests))
        if (scope["method"], scope["path"]) not in OPEN and (owner := self._owner(headers)):
            self.rates.count(owner)
        if scope["method"] in ("GET", "HEAD"):
            await self.app(scope, receive, send)
            return
        size = _length(headers, self.limits)
        self.room.enter(size)
        try:
            await self.app(scope, receive, send)
        finally:
            self.room.leave(size)

    def _owner(self, headers: Headers) -> str:
        return self.keys.owner(bearer(headers.get("authorization", "")))


async def body_of(request: Request, limits: Limits, measures: Measures) -> bytes:
    """The body of a request. Raises Refused where it is too long (413), empty (422), or too slow (408)."""
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.receive_seconds):
            async for part in request.stream():
                size += len(part)
                if size > limits.megabytes * 1e6:
                    raise too_large(limits)
                parts.append(part)
    except TimeoutError:
        raise Refused(408, f"the request did not arrive within {limits.receive_seconds:g} s") from None
    except ClientDisconnect:
        raise Refused(400, "the request was cut off") from None
    measures.bytes.inc(size)
    if not size:
        raise Refused(422, "the request is empty: a recording is needed")
    return b"".join(parts)


def refusal(refused: Refused) -> JSONResponse:
    """As an answer: one line of JSON."""
    headers = {"Retry-After": str(refused.wait_s)} if refused.wait_s else {}
    if refused.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_of(refused), refused.status, headers)


def error_of(refused: Refused) -> Mapping[str, Any]:
    """Its content, for an answer and for a stream."""
    return {"error": refused.reason, "status": refused.status}


def too_large(limits: Limits) -> Refused:
    """For a request with too many bytes."""
    return Refused(413, f"more than {limits.megabytes:g} MB in a request")


# -- below: how it is done


def _length(headers: Headers, limits: Limits) -> int:
    """Bytes that a request says it has; as many as it may have, where it says nothing."""
    given = headers.get("content-length")
    if given is None:
        return int(limits.megabytes * 1e6)
    if not (given.isascii() and given.isdecimal()):
        raise Refused(400, "Content-Length is no number")
    if len(given) > 15 or int(given) > limits.megabytes * 1e6:
        raise too_large(limits)
    return int(given)
