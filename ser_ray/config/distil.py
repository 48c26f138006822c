"""How a student is trained on the probabilities of another model, its teacher."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from ser_ray.config.section import NO_UNIT, Section, Unit, Words
from ser_ray.config.validation import refuse


class Distil(Section):
    """Training on the probabilities that a larger model, the teacher, gives to the same utterances (Hinton et al. 2015,
    arXiv 1503.02531). ``ser-ray distil`` sets `teacher`, `answers` and `unlabelled`; without `answers` the other keys
    have no effect."""

    teacher: str | None = None
    """What the model card and the report call the teacher: the name of its search and a digest of its weights."""
    answers: str | None = None
    """A Parquet file with the teacher's probabilities for every utterance of train. null: there is no teacher, and
    training is on the labels alone."""
    unlabelled: Words = ()
    """Corpora whose recordings have no label, as ``ser-ray distil --speech`` prepares them. All are train, whatever the
    protocol, with the teacher's most probable emotion in place of the label, which only class weights use."""
    temperature: Annotated[float, NO_UNIT] = Field(2.0, ge=1, le=100)
    """Logits of both models are divided by this before they are compared: so the student sees how the teacher orders
    the less probable emotions too. 2 was the best of 1, 2, 5 and 10 for speech recognition in the paper (section 4)."""
    label_weight: Annotated[float, Unit("times the loss on the teacher")] = Field(0.5, ge=0, le=100)
    """Weight of `Experiment.loss` on the labels, beside the loss on the teacher's probabilities, which has 1. 0.5 is
    that of the paper for speech recognition; 0: the teacher alone. Utterances of `unlabelled` have only the latter."""

    @model_validator(mode="after")
    def _complete(self) -> Distil:
        refuse(
            ((name,), "it needs distil.answers, the file that ser-ray distil writes")
            for name in ("teacher", "unlabelled")
            if getattr(self, name) and not self.answers
        )
        return self
