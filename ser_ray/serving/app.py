"""The endpoints, as an ASGI application of FastAPI; it knows neither Ray nor a model, but a `service.Backend`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from fastapi import FastAPI, Request, WebSocket, WebSocketDisconnect
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from ser_ray import __version__
from ser_ray.serving import messages
from ser_ray.serving.guard import Guard, body_of, error_of, refusal
from ser_ray.serving.keys import Keys, bearer, check_origin
from ser_ray.serving.limits import Rates, Refused, Room, one_line
from ser_ray.serving.listening import Listening
from ser_ray.serving.service import Backend, Service
from ser_ray.serving.settings import Settings

PAGE: Final = Path(__file__).with_name("page.html")
POLICY: Final = (
    "default-src 'none'; script-src 'unsafe-inline' blob:; worker-src blob:; style-src 'unsafe-inline'; "
    "connect-src 'self'; media-src blob:; img-src data: blob:; base-uri 'none'; frame-ancestors 'none'"
)
"""Of the page: nothing from elsewhere, and nothing to elsewhere."""
IDLE_S: Final = 30.0
"""Seconds without a message after which a stream is closed: its client has gone without a word."""
LONGEST_MESSAGE: Final = 2**20
"""Bytes of a message of a stream: 5 s at 96 kHz; a microphone sends twenty messages a second."""
CODES: Final = {413: 1009, 503: 1013}
"""Status -> code that closes a stream (RFC 6455, 7.4, and IANA's registry); 1008 for all others."""


def make_app(settings: Settings, backend: Backend, keys: Keys) -> ASGIApp:
    """The application of a server."""
    service, rates, room = Service(settings, backend), Rates(settings.limits), Room(settings.limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.decoders.close()

    app = FastAPI(title="ser-ray", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    _add_answers(app, service)
    _add_notices(app, service)
    streams = Streams(service, keys, rates, room)
    app.add_api_websocket_route("/v1/stream", streams.serve)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _refused)
    app.add_exception_handler(Exception, _failed)
    return Guard(app, keys, settings.limits, rates, room, service.measures)


class Streams:
    """WS /v1/stream: speech in, an answer a second out."""

    def __init__(self, service: Service, keys: Keys, rates: Rates, room: Room) -> None:
        self.service, self.keys, self.rates, self.room = service, keys, rates, room

    async def serve(self, socket: WebSocket) -> None:
        """One stream, from its start message to its end; a refusal is a line of JSON and a close."""
        await socket.accept()
        try:
            await self._admitted(socket)
        except Refused as refused:
            await _closed(socket, refused)
        except WebSocketDisconnect:
            return

    async def _admitted(self, socket: WebSocket) -> None:
        headers = socket.headers
        check_origin(headers.get("host", ""), headers.get("origin", ""), bool(self.keys.digests))
        start = messages.parse(messages.Start, await _received(socket, "text"))
        if owner := self.keys.owner(bearer(headers.get("authorization", "")) or start.key):
            self.rates.count(owner)
        model = self.service.named(start.model)
        minutes = self.service.limits.stream_minutes
        self.room.open_stream()
        try:
            self.service.measures.streams.set(self.room.streams)
            async with asyncio.timeout(60 * minutes):
                await self._listen(socket, start, model)
        except TimeoutError:
            raise Refused(413, f"a stream ends after {minutes:g} minutes; open another one") from None
        finally:
            self.room.close_stream()
            self.service.measures.streams.set(self.room.streams)

    async def _listen(self, socket: WebSocket, start: messages.Start, model: str) -> None:
        window = min(start.window, self.service.audio[model].max_seconds)
        listening, arrived = Listening(start.rate, window), asyncio.Event()
        tasks = [
            asyncio.create_task(_read(socket, listening, arrived)),
            asyncio.create_task(self._answer(socket, listening, arrived, model, start.voice)),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        done.pop().result()

    async def _answer(
        self,
        socket: WebSocket,
        listening: Listening,
        arrived: asyncio.Event,
        model: str,
        voice: dict[str, Any] | None,
    ) -> None:
        """One answer at a time: while it is made, what arrives moves the window on, and answers are left out."""
        while True:
            await arrived.wait()
            arrived.clear()
            if not listening.waiting:
                continue
            piece, skipped = listening.due(self.service.audio[model])
            answer = await self.service.window(model, piece, voice)
            await socket.send_json(answer | {"skipped": skipped})


# -- below: how it is done


def _add_answers(app: FastAPI, service: Service) -> None:
    @app.post("/", openapi_extra=dict(messages.file_schema(messages.HuggingFace)))
    async def classify(request: Request, model: str | None = None) -> list[dict[str, Any]]:
        """One recording; answers as Hugging Face's task audio-classification does."""
        chosen, body = service.named(model), await body_of(request, service.limits, service.measures)
        top_k = None
        if _is_json(request):
            asked = messages.parse(messages.HuggingFace, body)
            top_k = asked.parameters.top_k
            (body,) = messages.decoded([messages.Recording(audio=asked.inputs)])
        (answered,) = await service.predicted(chosen, [_audio(request, body)])
        return messages.labels_and_scores(answered.whole, top_k)

    @app.post("/v1/predict", openapi_extra=dict(messages.file_schema(messages.Predict)))
    async def predict(request: Request, model: str | None = None) -> dict[str, Any]:
        """Recordings of any length; answers in full: windows with times, probabilities, the model and its metrics."""
        service.named(model)
        body = await body_of(request, service.limits, service.measures)
        if _is_json(request):
            asked = messages.parse(messages.Predict, body)
            names, files = [one.name for one in asked.files], messages.decoded(asked.files)
        else:
            asked, names, files = messages.Predict.model_construct(files=[]), [""], [_audio(request, body)]
        chosen = service.named(asked.model or model)
        answered = await service.predicted(chosen, files, asked.voice, asked.embedding)
        told = [one.in_full(name) for one, name in zip(answered, names, strict=True)]
        return {"model": service.models[chosen], "files": told}

    @app.post("/v1/voices", openapi_extra=dict(messages.file_schema(messages.Enrol)))
    async def enrol(request: Request, model: str | None = None) -> dict[str, Any]:
        """Recordings of one speaker, without labels; answers a voice for POST /v1/predict, which is kept nowhere."""
        body = await body_of(request, service.limits, service.measures)
        if _is_json(request):
            asked = messages.parse(messages.Enrol, body)
            files = messages.decoded(asked.files)
        else:
            asked, files = messages.Enrol.model_construct(files=[]), [_audio(request, body)]
        return await service.enrolled(service.named(asked.model or model), files, asked.name)


def _add_notices(app: FastAPI, service: Service) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        if PAGE.is_file():
            return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": POLICY})
        return PlainTextResponse(f"ser-ray {__version__}: POST a recording to this address; see /openapi.json\n")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """Every model: emotions, protocol, metrics with intervals, LEAKY or not, licences, what it is not for."""
        return {"models": list(service.models.values())}

    @app.get("/health")
    async def health() -> dict[str, str]:
        """The server is up."""
        return {"status": "up"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """A model is loaded and answers."""
        if not await service.backend.is_ready():
            raise Refused(503, "no model is ready yet", 5)
        return {"status": "ready"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(service.measures.registry), media_type=CONTENT_TYPE_LATEST)


def _is_json(request: Request) -> bool:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"


def _audio(request: Request, body: bytes) -> bytes:
    """A body that is a recording. What its type says is believed only where that excludes audio: `curl` calls
    everything a form."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind.startswith(("multipart/", "text/", "image/")):
        raise Refused(415, "a body is a recording as it is, or JSON (application/json)")
    return body


async def _read(socket: WebSocket, listening: Listening, arrived: asyncio.Event) -> None:
    """Take what arrives until the client ends the stream."""
    while True:
        pcm = await _received(socket, "bytes")
        listening.add(pcm)
        if listening.waiting:
            arrived.set()


async def _received(socket: WebSocket, kind: str) -> Any:
    """The next message. Raises Refused where it is of another kind, too long, or does not come."""
    try:
        message = await asyncio.wait_for(socket.receive(), IDLE_S)
    except TimeoutError:
        raise Refused(408, f"nothing arrived for {IDLE_S:g} s") from None
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", 1000))
    content = message.get(kind)
    if content is None:
        wanted = 'a start message, such as {"rate": 16000}' if kind == "text" else "PCM as binary messages"
        raise Refused(422, f"{wanted} is expected here")
    if len(content) > LONGEST_MESSAGE:
        raise Refused(413, f"more than {LONGEST_MESSAGE} bytes in a message")
    return content


async def _closed(socket: WebSocket, refused: Refused) -> None:
    try:
        await socket.send_json(dict(error_of(refused)))
        await socket.close(CODES.get(refused.status, 1008))
    except (RuntimeError, WebSocketDisconnect):  # the client has gone
        return


async def _refused(_: Request, error: Exception) -> Response:
    if isinstance(error, Refused):
        return refusal(error)
    if isinstance(error, HTTPException):
        return refusal(Refused(error.status_code, one_line(error.detail)))
    return refusal(Refused(422, "an argument of the address is wrong; see /openapi.json"))


async def _failed(_: Request, error: Exception) -> Response:
    """What nobody foresaw: its traceback is in the server's log, not in the answer."""
    return refusal(Refused(500, "the server failed on this request; its log says why"))
