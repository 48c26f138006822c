"""Pre-trained speech encoders of four families, by hub id, local directory or embedded name.

A `Backbone` is run in two parts, so that frozen layers can be separated from trainable ones:

    hidden_BFD, mask_BF = backbone.embed(waveform_BT, lengths_B)     # convolutions, log-mel, positions
    layers = backbone.blocks(hidden_BFD, mask_BF)                    # one hidden_BFD before and after every block
    layers = backbone.blocks(hidden_BFD, mask_BF, start=k)           # the same from block k on, given its input

``padded=False`` says that all utterances of a batch are of equal length: attention then needs no mask.

In both, an utterance's frames do not depend on the other utterances of its batch. Three places need care, where
padding changes the result of transformers' own forward: Whisper's log-mel and convolutions, the group norm of
wav2vec2-base's first convolution (its statistics run over time), and attention, which is masked. On a batch without
padding the result equals that of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BitsAndBytesConfig

from ser_ray.models import attention, pretrained, wavlm
from ser_ray.models.logmel import LogMel
from ser_ray.models.lowrank import Updates
from ser_ray.models.precision import WEIGHTS, compute_dtype, in_fp32, product_dtype
from ser_ray.models.pretrained import describe
from ser_ray.models.weights import not_finite
from ser_ray.schema import UserError
from ser_ray.speech.augment import mask

transformers.utils.logging.disable_progress_bar()  # there would be one for every load

# Tensors that a checkpoint may lack; and those of the last layer of an XVector head, which is called as a part of the
# encoder is.
_OPTIONAL = ("masked_spec_embed",)
_OF_A_HEAD = ("feature_extractor.weight", "feature_extractor.bias")
# Parameters that are never trained: the former is for transformers' own SpecAugment, which is not run here; the latter
# are Whisper's fixed sinusoids, which transformers freezes too, but not when it loads them.
_FIXED = ("masked_spec_embed", "embed_positions.")
MOST_PROGRAMS = 32
"""That torch.compile makes of a block; beyond this number it runs the block as it is, without an error."""


class Backbone(nn.Module):
    """One encoder; see the module's docstring for the two parts of its forward.

    ``model`` is the transformers module, ``family`` one of `pretrained.FAMILIES`, ``width`` D, ``num_layers`` its
    blocks.
    """

    model: Any  # transformers' modules have no types
    family: str
    width: int
    num_layers: int

    def __init__(self, model: nn.Module, family: str, extractor: Any) -> None:
        super().__init__()
        self.model = model
        self.family = family
        self.extractor = extractor
        """transformers' feature extractor of the same name, to be saved beside the model's weights."""
        self.width = self.model.config.hidden_size
        self.num_layers = self.model.config.num_hidden_layers
        self.first_trained: int | None = 0
        """The first trainable block; None: nothing is trainable. What is below stays in evaluation mode."""
        self.masks = (0.0, 0.0)
        """SpecAugment in training: the largest share of channels, and of frames, that a mask covers."""
        self.recompute = False
        """Gradient checkpointing: a block's activations are recomputed in the backward pass, not stored."""
        self.compute_dtype = WEIGHTS
        """What products are computed in, and frozen weights may be held in."""
        self.updates: Updates | None = None
        """LoRA's, where there are any."""
        self._augments = False

    def layers(self) -> nn.ModuleList:
        """The transformer blocks."""
        raise NotImplementedError

    def embed(self, waveform_BT: torch.Tensor, lengths_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Waveforms, zero beyond ``lengths_B`` samples -> hidden_BFD and mask_BF, True on real frames."""
        raise NotImplementedError

    def blocks(
        self,
        hidden_BFD: torch.Tensor,
        mask_BF: torch.Tensor,
        start: int = 0,
        stop: int | None = None,
        padded: bool = True,
    ) -> list[torch.Tensor]:
        """The input of block ``start`` and the output of every block from there to before ``stop``. The last block's
        output includes the final norm."""
        hiddens = [hidden_BFD]
        # Without a mask, torch may choose a faster kernel for attention.
        run = self._block(hidden_BFD, mask_BF if padded else None)
        if self.updates is not None:
            run = self.updates.during(run)
        for index in range(start, self.num_layers if stop is None else stop):
            trainable = self.first_trained is not None and index >= self.first_trained
            with torch.set_grad_enabled(torch.is_grad_enabled() and trainable):
                if self.recompute and torch.is_grad_enabled():
                    hidden_BFD = checkpoint(run, index, hidden_BFD, use_reentrant=False)
                else:
                    hidden_BFD = run(index, hidden_BFD)
            hiddens.append(self._finish(hidden_BFD) if index + 1 == self.num_layers else hidden_BFD)
        return hiddens

    def _block(
        self, hidden_BFD: torch.Tensor, mask_BF: torch.Tensor | None
    ) -> Callable[[int, torch.Tensor], torch.Tensor]:
        """A function for a batch of this shape and mask: number of a block and its input -> its output."""
        padding = None if mask_BF is None else attention.padding(mask_BF, product_dtype(hidden_BFD))
        return lambda index, hidden: self.layers()[index](hidden, attention_mask=padding)

    def _finish(self, hidden_BFD: torch.Tensor) -> torch.Tensor:
        """The norm after the last block, where there is one."""
        raise NotImplementedError

    def forward(
        self, waveform_BT: torch.Tensor, lengths_B: torch.Tensor, stop: int | None = None, padded: bool = True
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """All hidden states (L + 1 of (B, F, D)), or with ``stop`` those up to the input of that block, and the frame
        mask (B, F)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._embedding_trainable()):
            hidden_BFD, mask_BF = self.embed(waveform_BT, lengths_B)
        return self.blocks(hidden_BFD, mask_BF, stop=stop, padded=padded), mask_BF

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile the blocks, each when it first runs: one program for batches of any size and length.

        Low-rank updates are then those of PEFT's layers, whose kernels the compiler merges by itself; it cannot look
        into an operation with a backward pass of its own.
        """
        self.updates = None
        # Programs differ by what a block is asked for: gradients or none, a mask or none, one utterance or several.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_PROGRAMS)
        for layer in self.layers():
            layer.compile(backend=backend, dynamic=True)

    def train(self, mode: bool = True) -> Backbone:
        """Training mode for the trainable part; dropout in a frozen part would only add noise."""
        super().train(False)
        self._augments = mode and max(self.masks) > 0
        if mode and self.first_trained is not None:
            if self._embedding_trainable():
                super().train(True)
            for layer in self.layers()[self.first_trained :]:
                layer.train(True)
        return self

    def _embedding_trainable(self) -> bool:
        return any(p.requires_grad for name, p in self.model.named_parameters() if "layers." not in name)


class Whisper(Backbone):
    """Whisper's encoder at the true length of the batch: positions are sliced, not padded to 30 s.

    The attention of its blocks is `attention.WhisperAttention`.
    """

    def __init__(self, model: nn.Module, family: str, extractor: Any) -> None:
        super().__init__(model, family, extractor)
        self.logmel = LogMel(self.model.config.num_mel_bins)
        for layer in self.layers():
            layer.self_attn = attention.WhisperAttention(layer.self_attn)

    def layers(self) -> nn.ModuleList:
        return self.model.layers

    def embed(self, waveform_BT: torch.Tensor, lengths_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features_BMF, mel_frames_B = self.logmel(waveform_BT, lengths_B)
        if self._augments:
            features_BMF = mask(features_BMF, mel_frames_B, *self.masks)
        hidden_BDF = nn.functional.gelu(self.model.conv1(features_BMF))
        # The first convolution leaks one frame beyond an utterance and adds its bias there: set this to zero again.
        hidden_BDF = hidden_BDF * frame_mask(mel_frames_B, hidden_BDF.shape[-1])[:, None]
        # Frames one after the other in memory, once: every block keeps the order of its input, and would copy it often.
        hidden_BFD = nn.functional.gelu(self.model.conv2(hidden_BDF)).transpose(1, 2).contiguous()
        frames = hidden_BFD.shape[1]
        hidden_BFD = hidden_BFD + self.model.embed_positions.weight[:frames]
        hidden_BFD = nn.functional.dropout(hidden_BFD, self.model.dropout, self.model.training)
        return hidden_BFD, frame_mask((mel_frames_B + 1) // 2, frames)

    def _finish(self, hidden_BFD: torch.Tensor) -> torch.Tensor:
        normed_BFD: torch.Tensor = self.model.layer_norm(hidden_BFD)
        return normed_BFD


class Wav2Vec2(Backbone):
    """wav2vec2 and HuBERT: strided convolutions over the waveform, a projection, positions, blocks."""

    def __init__(self, model: nn.Module, family: str, extractor: Any) -> None:
        super().__init__(model, family, extractor)
        self.normalize = bool(extractor.do_normalize)

    def layers(self) -> nn.ModuleList:
        return self.model.encoder.layers

    def embed(self, waveform_BT: torch.Tensor, lengths_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.normalize:
            waveform_BT = _standardise(waveform_BT, lengths_B)
        features_BCF, frames_B = self._convolve(waveform_BT, lengths_B)
        if self._augments:
            features_BCF = mask(features_BCF, frames_B, *self.masks)
        projected = self.model.feature_projection(features_BCF.transpose(1, 2))
        hidden_BFD = projected[0] if isinstance(projected, tuple) else projected  # HuBERT returns the tensor alone
        mask_BF = frame_mask(frames_B, hidden_BFD.shape[1])
        # Zero beyond the end, like the positional convolution's own padding of an utterance without a batch.
        hidden_BFD = hidden_BFD * mask_BF[..., None]
        encoder = self.model.encoder
        hidden_BFD = hidden_BFD + encoder.pos_conv_embed(hidden_BFD)
        if not self._norm_first():
            hidden_BFD = encoder.layer_norm(hidden_BFD)
        return encoder.dropout(hidden_BFD), mask_BF

    def _finish(self, hidden_BFD: torch.Tensor) -> torch.Tensor:
        return self.model.encoder.layer_norm(hidden_BFD) if self._norm_first() else hidden_BFD

    def _norm_first(self) -> bool:
        """Whether blocks normalise their input ("stable layer norm", the large models)."""
        return bool(self.model.config.do_stable_layer_norm)

    def _convolve(self, waveform_BT: torch.Tensor, lengths_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_BCF, frames_B = waveform_BT[:, None], lengths_B
        for layer in self.model.feature_extractor.conv_layers:
            (kernel,), (stride,) = layer.conv.kernel_size, layer.conv.stride
            frames_B = (frames_B - kernel) // stride + 1
            norm = getattr(layer, "layer_norm", None)
            if isinstance(norm, nn.GroupNorm):
                hidden_BCF = layer.conv(hidden_BCF)
                normed_BCF = _masked_channel_norm(hidden_BCF, frames_B, norm)
                hidden_BCF = layer.activation(normed_BCF.to(hidden_BCF.dtype))
            else:
                hidden_BCF = layer(hidden_BCF)
        return hidden_BCF, frames_B


class WavLM(Wav2Vec2):
    """The same around blocks with relative positions, whose attention is that of `wavlm`."""

    def __init__(self, model: nn.Module, family: str, extractor: Any) -> None:
        super().__init__(model, family, extractor)
        for layer in self.layers():
            layer.attention = wavlm.Attention(layer.attention)

    def _block(
        self, hidden_BFD: torch.Tensor, mask_BF: torch.Tensor | None
    ) -> Callable[[int, torch.Tensor], torch.Tensor]:
        dtype, config = product_dtype(hidden_BFD), self.model.config
        # All blocks use the first one's relative positions, which depend on the number of frames alone.
        embedding_NH = self.model.encoder.layers[0].attention.rel_attn_embed.weight
        bias_HFF = wavlm.position_bias(embedding_NH, hidden_BFD.shape[1], config.max_bucket_distance, dtype)
        padding = bias_HFF.new_zeros(()) if mask_BF is None else attention.padding(mask_BF, dtype)
        return lambda index, hidden: self.layers()[index](hidden, padding, bias_HFF)[0]


def load(
    name: str,
    quantize: bool = False,
    device: torch.device | str = "cpu",
    precision: str = "auto",
    whole: Sequence[str] = (),
) -> Backbone:
    """Load the backbone of that name: a hub id, a local directory, or ``embedded/...``.

    ``quantize``: linear layers in NF4 with double quantisation (Dettmers et al. 2023, arXiv 2305.14314), computed in
    the dtype of ``precision`` on the device. ``whole``: patterns of the names of those that are left as they are.
    Weights are read from safetensors only.

    Raises UserError, in one line, for a name that cannot be found, for an architecture that is not supported, and for
    weights that are missing, damaged or not finite; see `ser_ray.models.pretrained`.
    """
    config, extractor = describe(name)
    pretrained.check_files(name, config)
    model = _from_pretrained(name, config, quantize, device, precision, whole)
    backbone = _wrapped(model, config, extractor).to(device)
    backbone.compute_dtype = compute_dtype(precision, device)
    return backbone


def untrained(name: str, seed: int = 0) -> Backbone:
    """The architecture of that name with transformers' random initial weights; see `load` for errors."""
    config, extractor = describe(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _wrapped(pretrained.architecture(config)(config), config, extractor)


# -- below: how it is done


def _wrapped(model: nn.Module, config: Any, extractor: Any) -> Backbone:
    wrap = {"whisper": Whisper, "wavlm": WavLM}.get(config.model_type, Wav2Vec2)
    return wrap(model, config.model_type, extractor)


def _from_pretrained(
    name: str, config: Any, quantize: bool, device: torch.device | str, precision: str, whole: Sequence[str]
) -> nn.Module:
    options: dict[str, Any] = {}
    if quantize:
        # Both are small; and the 4-bit product of the projection after the convolutions would be a view that later
        # in-place steps may not change.
        small = ("feature_projection.projection", "gru_rel_pos_linear")
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype(precision, device),
            llm_int8_skip_modules=[*small, *whole],
        )
        options["device_map"] = {"": str(device)}
    if config.model_type == "whisper":
        options["key_mapping"] = {r"^model\.encoder\.": "", r"^encoder\.": ""}
    try:
        model, info = pretrained.architecture(config).from_pretrained(
            pretrained.source(name),
            config=config,
            dtype=WEIGHTS,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported, and rejected below
            **options,
        )
    except (OSError, SafetensorError, ValueError) as error:
        raise pretrained.unreachable(name, error) from None
    _check_loaded(name, model, info)
    for key, parameter in model.named_parameters():
        if key.startswith(_FIXED):
            parameter.requires_grad_(False)
    for module in model.modules() if quantize else ():
        if type(module).__name__ == "Linear4bit":  # by name: bitsandbytes takes seconds to import
            # On a CPU with AVX512-BF16 it would repack itself permanently in the first evaluation, and later training
            # would get no gradient through it.
            module.support_avx512bf16_for_cpu = False
    return model


def _check_loaded(name: str, model: Any, info: dict[str, Any]) -> None:
    """Raises UserError where weights are missing, too many, of another shape, or not finite."""
    own = [child for child, _ in model.named_children()]  # what lies beside them is a head's or a decoder's
    if model.config.model_type != "whisper":  # of which these names come without their prefix
        own.append(model.base_model_prefix)
    missing = [key for key in info["missing_keys"] if not key.startswith(_OPTIONAL)]
    unexpected = [k for k in info["unexpected_keys"] if k.partition(".")[0] in own and k not in _OF_A_HEAD]
    mismatched = [key for key, *_ in info["mismatched_keys"]]
    if problems := sorted([*missing, *unexpected, *mismatched]):
        raise UserError(f"backbone {name}: its weights do not fit its config.json; first mismatch: {problems[0]}")
    if damaged := not_finite(model.named_parameters()):
        raise UserError(f"backbone {name}: {damaged} has values that are not finite: its weights are damaged")


def frame_mask(lengths_B: torch.Tensor, longest: int) -> torch.Tensor:
    """(B, longest), True on the first ``lengths_B`` of every row."""
    return torch.arange(longest, device=lengths_B.device) < lengths_B[:, None]


@in_fp32
def _standardise(waveform_BT: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
    """Zero mean and unit variance over an utterance's own samples; zero beyond."""
    mask_BT = frame_mask(lengths_B, waveform_BT.shape[1])
    mean_B1 = waveform_BT.sum(1, keepdim=True) / lengths_B[:, None]
    centred_BT = (waveform_BT - mean_B1) * mask_BT
    variance_B1 = centred_BT.square().sum(1, keepdim=True) / lengths_B[:, None]
    return centred_BT / torch.sqrt(variance_B1 + 1e-7)


@in_fp32
def _masked_channel_norm(hidden_BCF: torch.Tensor, frames_B: torch.Tensor, norm: nn.GroupNorm) -> torch.Tensor:
    """`nn.GroupNorm` with one channel per group, its statistics over real frames only."""
    assert norm.num_groups == norm.num_channels, (norm.num_groups, norm.num_channels)
    mask_B1F = frame_mask(frames_B, hidden_BCF.shape[-1])[:, None]
    count_B11 = frames_B[:, None, None]
    mean_BC1 = (hidden_BCF * mask_B1F).sum(-1, keepdim=True) / count_B11
    variance_BC1 = ((hidden_BCF - mean_BC1) * mask_B1F).square().sum(-1, keepdim=True) / count_B11
    scaled_BCF = (hidden_BCF - mean_BC1) * torch.rsqrt(variance_BC1 + norm.eps)
    return scaled_BCF * norm.weight[:, None] + norm.bias[:, None]
