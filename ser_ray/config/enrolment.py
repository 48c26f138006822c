"""How an evaluation measures what recordings of a speaker without labels are worth."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from ser_ray.config.section import NO_UNIT, Section, Unit, as_tuple
from ser_ray.config.validation import refuse

OTHERS: Final = "others"
"""In place of a number of recordings: all others of the speaker."""
Count = Annotated[int, Field(ge=0)] | Literal["others"]


class Enrolment(Section):
    """Beside the headline, dev and test are answered with recordings of the same speaker, without labels; only where
    the chosen model's `Head.speaker` is not none. It chooses nothing, and no trial differs by it."""

    recordings: Annotated[tuple[Count, ...], BeforeValidator(as_tuple), Unit("recordings")] = (
        0,
        1,
        2,
        4,
        8,
        16,
        OTHERS,
    )
    """How many are known of a speaker: a point of the curve each. An utterance is never answered with itself. others:
    with all others of its speaker. Doublings, because what a further recording brings falls with their number."""
    which: Annotated[Literal["any"] | tuple[str, ...], BeforeValidator(as_tuple)] = "any"
    """any: recordings are drawn from all of a speaker's, as they come in a call or a session. A list of emotions: from
    these alone, as where a speaker is asked to speak neutrally first; the labels are used for this choice only."""
    draws: Annotated[int, Unit("draws")] = Field(5, ge=1, le=1000)
    """The curve is the mean over so many draws: with one recording, which one it is matters. Five halve the spread."""
    seed: Annotated[int, NO_UNIT] = Field(0, ge=0)
    """Seed of the draws; separate from the training seed, so that all models are answered with the same recordings."""

    @field_validator("recordings", "which")
    @classmethod
    def _named_once(cls, values: Any, info: ValidationInfo) -> Any:
        if values == "any":
            return values
        if not values:
            raise ValueError("it is empty; name at least one")
        refuse(((n,), f"{one!r} is named twice") for n, one in enumerate(values) if one in values[:n])
        return values
