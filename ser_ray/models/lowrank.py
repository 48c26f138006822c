"""The adapted linear layers as one operation: x W + b + (x A) B, and its backward pass, in the dtype of W.

PEFT inserts LoRA's weights, names, saves, loads and merges them. What its layers compute is replaced here, since a step
through them dispatches five times as many kernels as the products need, and keeps the input of every layer in fp32,
several times:

- The input is converted once, and kept once. q, k and v of one attention, whose input is the same, are one product.
- W is held in the dtype that it is computed in (`precision.hold_frozen`), or in NF4, and dequantised in forward and
  again in backward. Its scales are held in fp32 beside the quantised ones, half a bit a weight: one kernel in place of
  three.
- A and B, in fp32, are converted for all layers at once at the start of a forward pass, with B times alpha / rank.
- Dropout zeroes inputs of A for a whole batch, that is columns of A (Lin et al. 2024, arXiv 2404.09610): it costs no
  kernel in a layer, and no mask is kept. PEFT's draws every frame anew, which a mean over the frames averages away.

Outside of `Updates.during`, and with merged or disabled adapters, the layers compute what PEFT's do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import torch
from torch import nn

from ser_ray.models.precision import no_autocast

ADAPTER: Final = "default"
"""PEFT's name of the only adapter."""
SAME_INPUT: Final = ("q_proj", "k_proj", "v_proj")
"""Linear layers of an attention that are called with the same tensor."""

Run = Callable[[int, torch.Tensor], torch.Tensor]
"""Number of a block and its input -> its output."""


class Updates:
    """All low-rank updates of a backbone whose blocks PEFT has adapted."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        self.blocks = [_groups(block) for block in blocks]
        # Weights of one shape and dtype are converted together.
        self.down: dict[Any, list[_Group]] = defaultdict(list)
        self.up: dict[Any, list[_Group]] = defaultdict(list)
        for group in (group for groups in self.blocks for group in groups):
            self.down[group.dtype, group.rank, group.inputs].append(group)
            self.up[group.dtype, group.rank, group.outputs].append(group)

    def during(self, run: Run) -> Run:
        """The same function of a block, in which the adapted layers are one operation.

        Called once for a forward pass: it converts A and B and draws dropout, so blocks that are run a second time, in
        gradient checkpointing, compute the same.
        """
        down = _gathered(self.down.values(), _Group.down_weights)
        up = _gathered(self.up.values(), _Group.up_weights)

        def run_with(index: int, hidden_BFD: torch.Tensor) -> torch.Tensor:
            for group in self.blocks[index]:
                group.update = (down[group], up[group])
            try:
                return run(index, hidden_BFD)
            finally:
                for group in self.blocks[index]:
                    group.update, group.waiting = None, None

        return run_with


class _Group:
    """Layers of PEFT that are computed together, as they have the same input: k of them, or one."""

    update: tuple[torch.Tensor, torch.Tensor] | None = None
    """A (k, rank, inputs) and B (k, outputs, rank) of the forward pass."""
    waiting: tuple[torch.Tensor, dict[int, torch.Tensor]] | None = None
    """The input, and by number of the layer what has been computed of it and not been asked for."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = layers
        base = layers[0].get_base_layer()
        self.frozen = _Quantized(layers) if hasattr(base.weight, "quant_state") else _Frozen(layers)
        self.dtype = self.frozen.dtype
        self.rank: int = layers[0].r[ADAPTER]
        self.inputs, self.outputs = layers[0].in_features, layers[0].out_features
        for number, layer in enumerate(layers):
            layer.forward = _Forward(self, number)

    def __call__(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """What layer ``number`` makes of its input."""
        assert self.update is not None
        if self.waiting is None or self.waiting[0] is not x or number not in self.waiting[1]:
            with no_autocast(x.device):
                outputs = _Linear.apply(x, *self.update, self.frozen)
            self.waiting = (x, dict(enumerate(outputs)))
        output = self.waiting[1].pop(number)
        if not self.waiting[1]:
            self.waiting = None
        return output

    @staticmethod
    def down_weights(groups: list[_Group]) -> tuple[list[nn.Parameter], torch.Tensor | float]:
        """A of every layer, and dropout as a factor (layers, 1, inputs)."""
        layers = [layer for group in groups for layer in group.layers]
        weights = [layer.lora_A[ADAPTER].weight for layer in layers]
        dropout = layers[0].lora_dropout[ADAPTER]
        share = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        if not share:
            return weights, 1.0
        kept = torch.empty(len(layers), 1, groups[0].inputs, device=weights[0].device).bernoulli_(1 - share)
        return weights, kept.div_(1 - share)

    @staticmethod
    def up_weights(groups: list[_Group]) -> tuple[list[nn.Parameter], torch.Tensor | float]:
        """B of every layer, and alpha / rank."""
        layers = [layer for group in groups for layer in group.layers]
        return [layer.lora_B[ADAPTER].weight for layer in layers], layers[0].scaling[ADAPTER]


class _Forward:
    """In place of the method of a layer; an object, so that a copy of the model has its own."""

    def __init__(self, group: _Group, number: int) -> None:
        self.group, self.number = group, number

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        layer = self.group.layers[self.number]
        if self.group.update is None or layer.merged or layer.disable_adapters:
            own: torch.Tensor = type(layer).forward(layer, x, *args, **kwargs)
            return own
        return self.group(self.number, x)


class _Frozen:
    """The frozen weights and biases of layers with the same input, one below the other: (k outputs, inputs).

    The layers' own are views of them, so that they are held once. Where one has been moved or replaced since, they are
    put together again.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.bases = [layer.get_base_layer() for layer in layers]
        self.dtype = self._compute_dtype()
        self._join()

    def weight(self) -> torch.Tensor:
        """In the dtype that is computed in."""
        return self.joined

    def refresh(self) -> None:
        """Notice that a weight has been moved or replaced."""
        if self.places != [base.weight.data_ptr() for base in self.bases]:
            self._join()

    def _compute_dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.bases[0].weight.dtype
        return dtype

    def _join(self) -> None:
        weights = [base.weight for base in self.bases]
        if len(weights) == 1:
            self.joined = weights[0].data
        else:
            self.joined = torch.cat([weight.data for weight in weights])
            for weight, own in zip(weights, self.joined.split([len(w) for w in weights]), strict=True):
                weight.data = own
        self.bias = self._join_biases()
        self.places = [weight.data_ptr() for weight in weights]

    def _join_biases(self) -> torch.Tensor | None:
        """Zero where a layer has none, as Whisper's k."""
        biases = [base.bias for base in self.bases]
        if all(bias is None for bias in biases):
            return None
        if len(biases) == 1:
            return biases[0].data.to(self.dtype)
        none = torch.zeros(self.bases[0].out_features, device=self.joined.device)
        return torch.cat([none if bias is None else bias.data for bias in biases]).to(self.dtype)


class _Quantized(_Frozen):
    """The same in NF4."""

    def weight(self) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_4bit

        weight: torch.Tensor = dequantize_4bit(self.joined, self.state)
        return weight

    def _compute_dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.bases[0].compute_dtype
        return dtype

    def _join(self) -> None:
        from bitsandbytes.functional import QuantState, dequantize_blockwise

        super()._join()
        states = [base.weight.quant_state for base in self.bases]
        scales = [dequantize_blockwise(state.absmax, state.state2) + state.offset for state in states]
        self.state = QuantState(
            torch.cat(scales),
            shape=torch.Size([sum(state.shape[0] for state in states), states[0].shape[1]]),
            dtype=self.dtype,
            blocksize=states[0].blocksize,
            quant_type=states[0].quant_type,
        )


class _Linear(torch.autograd.Function):
    """x W^T + b + (x A^T) B^T of k layers, in the dtype of W: k tensors (..., outputs)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, frozen: _Frozen
    ) -> tuple[torch.Tensor, ...]:
        """x (..., inputs), A (k, rank, inputs), B (k, outputs, rank)."""
        layers, outputs, _ = b.shape
        frozen.refresh()
        x_ND = x.reshape(-1, x.shape[-1]).to(frozen.dtype)
        weight = frozen.weight()
        y = x_ND @ weight.t() if frozen.bias is None else torch.addmm(frozen.bias, x_ND, weight.t())
        low = x_ND @ a.flatten(0, 1).t()
        if layers == 1:
            y.addmm_(low, b[0].t())
        else:
            _by_layer(y, layers).baddbmm_(_by_layer(low, layers), b.transpose(1, 2))
        # In fewer bits it is computed again: with it, LoRA may keep more than full training does. In fp32, that is on a
        # CPU, the product costs more.
        ctx.save_for_backward(x_ND, a, b, low if frozen.dtype is torch.float32 else None)
        ctx.frozen, ctx.shape, ctx.dtype = frozen, x.shape, x.dtype
        return y.view(*x.shape[:-1], -1).split(outputs, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, A and B."""
        x_ND, a, b, low = ctx.saved_tensors  # once: gradient checkpointing gives them no second time
        with no_autocast(x_ND.device):
            low = x_ND @ a.flatten(0, 1).t() if low is None else low
            return _Linear._gradients(ctx, x_ND, a, b, low, gradients)

    @staticmethod
    def _gradients(
        ctx: Any,
        x_ND: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        low: torch.Tensor,
        gradients: tuple[torch.Tensor, ...],
    ) -> tuple[torch.Tensor | None, ...]:
        layers, outputs, _ = b.shape
        y = gradients[0] if layers == 1 else torch.cat(gradients, -1)
        y = y.reshape(len(x_ND), layers * outputs)
        # A CPU takes up to five times as long for the same product with few columns as with few rows.
        if layers == 1:
            of_low = (b[0].t() @ y.t()).t()
            of_b = (low.t() @ y).t()[None]
        else:
            of_low = torch.empty_like(low)
            torch.bmm(_by_layer(y, layers), b, out=_by_layer(of_low, layers))
            of_b = torch.bmm(_by_layer(low, layers).transpose(1, 2), _by_layer(y, layers)).transpose(1, 2)
        of_a = (of_low.t() @ x_ND).view_as(a)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (y @ ctx.frozen.weight()).addmm_(of_low, a.flatten(0, 1)).view(ctx.shape).to(ctx.dtype)
        return of_x, of_a, of_b, None


class _Gather(torch.autograd.Function):
    """n weights of one shape times a factor, in another dtype, as one tensor for each group of them.

    A group that is not used has no gradient, and so its weights have none, which `adapters.check_gradients` reports.
    """

    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, factor: torch.Tensor | float, sizes: list[int], *weights: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.factor, ctx.sizes = factor, sizes
        ctx.set_materialize_grads(False)
        return torch.stack(weights).mul_(factor).to(dtype).split(sizes)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        factor, used = ctx.factor, [gradient for gradient in gradients if gradient is not None]
        if isinstance(factor, torch.Tensor) and len(used) < len(gradients):
            parts = zip(factor.split(ctx.sizes), gradients, strict=True)
            factor = torch.cat([part for part, gradient in parts if gradient is not None]) if used else factor
        scaled = iter(torch.cat(used).float().mul_(factor) if used else ())
        of_weights: list[torch.Tensor | None] = []
        for size, gradient in zip(ctx.sizes, gradients, strict=True):
            of_weights += [None if gradient is None else next(scaled) for _ in range(size)]
        return None, None, None, *of_weights


# -- below: how it is done


def _gathered(
    kinds: Iterable[list[_Group]], weights_of: Callable[[list[_Group]], tuple[list[nn.Parameter], Any]]
) -> dict[_Group, torch.Tensor]:
    """For every group its weights (k, ...) in the dtype that it computes in."""
    found: dict[_Group, torch.Tensor] = {}
    for groups in kinds:
        weights, factor = weights_of(groups)
        parts = _Gather.apply(groups[0].dtype, factor, [len(group.layers) for group in groups], *weights)
        found |= dict(zip(groups, parts, strict=True))
    return found


def _groups(block: nn.Module) -> list[_Group]:
    """The adapted layers of a block: those with the same input together, the others by themselves."""
    groups: list[_Group] = []
    for parent in block.modules():
        adapted = {name: child for name, child in parent.named_children() if _is_adapted(child)}
        together = [adapted.pop(name) for name in SAME_INPUT if name in adapted]
        if not _can_be_joined(together):
            groups += [_Group([layer]) for layer in together]
        elif together:
            groups.append(_Group(together))
        groups += [_Group([layer]) for layer in adapted.values()]
    return groups


def _is_adapted(module: Any) -> bool:
    """Variants of LoRA with arithmetic of their own, such as DoRA, are left to PEFT."""
    return hasattr(module, "lora_A") and not module.lora_variant


def _can_be_joined(layers: Sequence[Any]) -> bool:
    """Of one shape, and in NF4 with rows of whole blocks: others bitsandbytes reads otherwise on a CPU."""
    bases = [layer.get_base_layer() for layer in layers]
    states = [base.weight.quant_state for base in bases if hasattr(base.weight, "quant_state")]
    whole = all(base.in_features % state.blocksize == 0 for base, state in zip(bases, states, strict=False))
    return whole and len({(base.in_features, base.out_features, base.weight.dtype) for base in bases}) == 1


def _by_layer(tensor: torch.Tensor, layers: int) -> torch.Tensor:
    """(N, k width) -> (k, N, width), a view."""
    return tensor.view(len(tensor), layers, -1).transpose(0, 1)
