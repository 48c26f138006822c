"""How a backbone is adapted: the section ``adapter`` of an experiment."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from ser_ray.config.section import NO_UNIT, Section, Unit, Words


class Adapter(Section):
    """How the backbone is adapted."""

    method: Literal["frozen", "lora", "qlora", "full"] = "lora"
    """frozen: only the head is trained. lora: low-rank updates. qlora: LoRA on NF4 weights (double quantisation). full:
    all weights are trained."""
    rank: Annotated[int, NO_UNIT] = Field(8, ge=1, le=512)
    """Rank of the low-rank update. In LoRA's paper (arXiv 2106.09685, table 6) more than 8 brings no gain."""
    alpha: Annotated[float, NO_UNIT] = Field(16.0, gt=0)
    """The update is scaled by alpha / rank (rslora: by alpha over the root of rank). The default is twice the default
    rank, as is usual."""
    dropout: Annotated[float, Unit("share of the inputs")] = Field(0.05, ge=0, lt=1)
    """Dropout on the input of the low-rank update: of a layer's inputs for a whole batch, not of single frames. The
    default is the QLoRA paper's value for small models. pissa has none: it would drop a part of what the backbone
    knows."""
    variant: Literal["plain", "rslora", "dora", "pissa", "loftq", "loraplus"] = "plain"
    """plain: LoRA as in its paper, the most tried one; tests/benchmarks/variants.py compares the others with it.
    rslora: scaled by alpha over the root of rank, so that large ranks learn as fast (arXiv 2312.03732).
    dora: the length of every row of the weights is trained apart from its direction (arXiv 2402.09353).
    pissa: starts from the largest singular directions of the weights, which are then trained themselves
    (arXiv 2404.02948); for lora only.
    loftq: starts from what brings the 4-bit weights closest to the original ones (arXiv 2310.08659); for qlora only.
    loraplus: B is trained at a higher rate than A (arXiv 2402.12354); see `loraplus_ratio`."""
    loraplus_ratio: Annotated[float, NO_UNIT] = Field(16.0, ge=1, le=1000)
    """For loraplus: the learning rate of B is this many times `Optimizer.lr`, that of A. The paper uses 16."""
    first_layer: Annotated[int, Unit("layers")] = Field(0, ge=0)
    """Layers below this one stay frozen: they get no LoRA update, and ``full`` does not train them."""
    targets: Words | None = None
    """Names of the linear layers that get a LoRA update. null: all of attention and feed-forward (QLoRA paper,
    section 4: all layers are needed to match full fine-tuning)."""

    @field_validator("variant")
    @classmethod
    def _variant_fits_the_method(cls, variant: str, info: ValidationInfo) -> str:
        method = info.data.get("method")  # frozen and full make no use of it, as of rank
        if (variant, method) == ("loftq", "lora"):
            raise ValueError("loftq makes up for the error of 4-bit weights: set adapter.method to qlora")
        if (variant, method) == ("pissa", "qlora"):
            raise ValueError(
                "with qlora, pissa would quantise weights that are not the backbone's, and its adapter would fit no "
                "other copy: set adapter.method to lora, or adapter.variant to loftq"
            )
        return variant
