"""What clients send and get: JSON of one form for each endpoint, checked before anything of it is used."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ser_ray.serving.limits import Refused, one_line
from ser_ray.training.inference import Answer

M = TypeVar("M", bound=BaseModel)


class Recording(BaseModel):
    """A recording in any format that `ser-ray predict` reads."""

    model_config = ConfigDict(extra="forbid")

    audio: str
    """Base64 of the file's bytes."""
    name: str = Field("", max_length=200)
    """Comes back in the answer."""


class Predict(BaseModel):
    """POST /v1/predict"""

    model_config = ConfigDict(extra="forbid")

    files: list[Recording] = Field(min_length=1)
    model: str | None = None
    """One of GET /v1/models; the first without it."""
    voice: dict[str, Any] | None = None
    """What is known of the one speaker of all files: what POST /v1/voices answered."""
    embedding: bool = False
    """Whether to answer the pooled vector of every recording too."""


class Enrol(BaseModel):
    """POST /v1/voices"""

    model_config = ConfigDict(extra="forbid")

    files: list[Recording] = Field(min_length=1)
    model: str | None = None
    name: str = Field("", max_length=200)
    """Who it is; written to the voice."""


class Parameters(BaseModel):
    """Of Hugging Face's task audio-classification; others than these are of no use here."""

    top_k: int | None = Field(None, ge=1)
    function_to_apply: Literal["softmax"] | None = None


class HuggingFace(BaseModel):
    """POST / as JSON"""

    inputs: str
    """Base64 of a recording."""
    parameters: Parameters = Parameters()


class Start(BaseModel):
    """The first message of WS /v1/stream, as text; what follows is PCM: int16, little-endian, one channel."""

    model_config = ConfigDict(extra="forbid")

    rate: int = Field(ge=4_000, le=768_000)
    """Hz."""
    model: str | None = None
    voice: dict[str, Any] | None = None
    window: float = Field(3.0, ge=1, le=10)
    """Seconds that an answer is about. After three seconds most utterances have been understood."""
    key: str = ""
    """For browsers, which send no Authorization header with a WebSocket."""


def parse(form: type[M], body: bytes | str) -> M:
    """JSON of that form. Raises Refused (422) with the first thing that is wrong, never with a value of it."""
    try:
        return form.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        if first["type"] == "json_invalid":
            raise Refused(422, "not JSON") from None
        place = ".".join(map(str, first["loc"]))[:100]
        raise Refused(422, one_line(f"{place}: {first['msg']}" if place else first["msg"])) from None


def decoded(recordings: Sequence[Recording]) -> list[bytes]:
    """The bytes of every recording. Raises Refused (422) where it is no base64."""
    try:
        return [base64.b64decode(recording.audio, validate=True) for recording in recordings]
    except (binascii.Error, ValueError):
        raise Refused(422, "files: audio is the base64 of a recording") from None


def labels_and_scores(answer: Answer, top_k: int | None) -> list[dict[str, Any]]:
    """An answer as Hugging Face's audio-classification gives it: the most probable emotion first."""
    ranked = sorted(answer.probabilities.items(), key=lambda pair: -pair[1])
    return [{"label": emotion, "score": score} for emotion, score in ranked[:top_k]]


def in_full(answer: Answer, least: float | None = None) -> dict[str, Any]:
    """An answer for a recording or a window, as `ser-ray predict --format jsonl` writes it, but for the path.
    ``least``: the probability from which an emotion is in the set, which the most probable one always is."""
    line: dict[str, Any] = {"emotion": answer.emotion or None, "probabilities": answer.probabilities}
    if least is not None:
        ranked = [one["label"] for one in labels_and_scores(answer, None)]
        line["set"] = [e for place, e in enumerate(ranked) if place == 0 or answer.probabilities[e] >= least]
    if answer.start is not None:
        line = {"start": answer.start, "end": answer.end} | line
    return line | ({"reason": answer.reason} if answer.reason else {})


def status_of(reason: str) -> int:
    """The status for a recording that cannot be used: 415 if it is no audio that can be read, 422 if it is."""
    unread = ("cannot be decoded", "holds pictures", "a Git LFS pointer", "claims a sampling rate", "claims")
    return 415 if reason.startswith(unread) or "is read by PyAV" in reason else 422


def file_schema(form: type[BaseModel] | None) -> Mapping[str, Any]:
    """For OpenAPI: a body that is JSON of that form, or a recording."""
    audio = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    json = {"application/json": {"schema": form.model_json_schema()}} if form else {}
    return {"requestBody": {"required": True, "content": {**json, **audio}}}
