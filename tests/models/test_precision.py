"""Precision: fp32 where it says so, the same answer in fewer bits with every head, adapter and cache, and no more of a
GPU than its share."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from backbone_fixtures import LAYERS, VARIANTS, WIDTH, cached, experiment, noise, noise_batch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ser_ray
from ser_ray.models import backbones, precision, prefix
from ser_ray.models.classifier import EmotionClassifier, build
from ser_ray.models.heads.pooled import PooledHead
from ser_ray.models.logmel import LogMel
from ser_ray.models.moments import mixed_mean, mixed_statistics, moments
from ser_ray.models.pooling import normalise
from ser_ray.models.pooling.mean import masked_mean
from ser_ray.models.pooling.statistics import masked_statistics, weighted_statistics
from ser_ray.schema import UserError
from ser_ray.speech.stream import Batch

PRECISIONS = ("fp32", "bf16", "fp16")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {"fp32": 2e-3, "bf16": 4e-2, "fp16": 6e-3}
"""Of logits, in parts of the largest or of 1; in fp32 too, since a cache holds frames in fp16."""
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
CUDA = torch.device("cuda")


# -- what a setting means


def test_auto_is_the_best_that_a_device_has(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, dtype in DTYPES.items():
        for device in ("cpu", "cuda"):
            assert precision.compute_dtype(name, device) is dtype
    assert precision.compute_dtype("auto", "cpu") is torch.float32
    for major, dtype in ((9, torch.bfloat16), (7, torch.float16)):  # a V100 can only pretend to have bf16
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True, new=major >= 8: new or including_emulation
        )
        assert precision.compute_dtype("auto", CUDA) is dtype


def test_no_other_file_decides_on_precision() -> None:
    package = Path(ser_ray.__file__).parent
    names = {"autocast", "allow_tf32", "is_bf16_supported", "set_per_process_memory_fraction"}
    for path in package.rglob("*.py"):
        if path == Path(precision.__file__):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & names
        assert not used, f"{path.relative_to(package)}: {used}"


def test_products_in_fp32_are_not_rounded_to_tf32() -> None:
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32


# -- what is computed in fp32 whatever surrounds it

HIDDENS = [100 + 3 * torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
LENGTHS = torch.tensor([50, 31])
MASK = torch.arange(50) < LENGTHS[:, None]
SPEECH, SAMPLES = noise((0.5, 0.31))
MIX = torch.tensor([0.7, -0.4, 1.3])


def _head(hiddens: list[torch.Tensor], mask_BF: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    settings = experiment("none", head={"hidden": 16, "pooling": "attentive"})
    head = PooledHead(settings, num_layers=2, width=8).to(mask_BF.device).eval()
    nn.init.normal_(head.pooling.score[2].get_parameter("weight"))
    return head(hiddens, mask_BF)


EXACT: dict[str, tuple[Callable[..., object], tuple[object, ...]]] = {
    "normalise": (normalise, (HIDDENS[0],)),
    "mean": (masked_mean, (HIDDENS[0], MASK)),
    "statistics": (masked_statistics, (HIDDENS[0], MASK)),
    "weighted statistics": (weighted_statistics, (HIDDENS[0], MASK / LENGTHS[:, None])),
    "moments": (lambda hiddens, mask: moments(hiddens, mask, covariances=True), (HIDDENS, MASK)),
    "mixed mean": (mixed_mean, (moments(HIDDENS, MASK, covariances=True), MIX)),
    "mixed statistics": (mixed_statistics, (moments(HIDDENS, MASK, covariances=True), MIX)),
    "log-mel": (lambda waveform, lengths: LogMel(80).to(waveform.device)(waveform, lengths)[0], (SPEECH, SAMPLES)),
    "standardised speech": (backbones._standardise, (SPEECH, SAMPLES)),
    "norm over time": (
        lambda hidden, lengths: backbones._masked_channel_norm(
            hidden, lengths, nn.GroupNorm(50, 50).to(hidden.device).requires_grad_(False)
        ),
        (HIDDENS[0].repeat(1, 1, 7)[..., :50], LENGTHS),
    ),
    "head": (_head, (HIDDENS, MASK)),
}


def _moved(value: object, device: str, dtype: torch.dtype | None = None) -> object:
    if isinstance(value, list):
        return [_moved(one, device, dtype) for one in value]
    assert isinstance(value, torch.Tensor)
    value = value.to(device)
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("low", ["bf16", "fp16"])
@pytest.mark.parametrize("name", EXACT)
@torch.no_grad()
def test_it_is_computed_in_fp32_under_autocast_too(name: str, low: str, device: str) -> None:
    function, arguments = EXACT[name]
    given_ = [_moved(value, device) for value in arguments]
    expected = function(*given_)
    with precision.autocast(low, device):
        found = function(*given_)
        of_low = function(*(_moved(value, device, DTYPES[low]) for value in arguments))
    assert isinstance(expected, torch.Tensor)
    assert isinstance(found, torch.Tensor)
    assert isinstance(of_low, torch.Tensor)
    assert found.dtype == of_low.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# -- the same answer in fewer bits


def _logits(model: EmotionClassifier, batch: Batch, setting: str) -> torch.Tensor:
    with torch.inference_mode(), precision.autocast(setting, "cpu"):
        logits_BK: torch.Tensor = model(batch.inputs, batch.lengths_B)
    assert logits_BK.dtype == torch.float32
    return logits_BK


def _excite(module: nn.Module, scale: float) -> None:
    """Weights that begin at zero or even would hide a difference."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))


METHODS = ("frozen", "lora", "qlora", "full")
CASES = [(method, mix) for method in METHODS for mix in ("weighted", "concat", "last")]


@pytest.mark.parametrize("setting", PRECISIONS)
@pytest.mark.parametrize(("method", "mix"), CASES)
def test_every_head_adapter_and_cache_gives_the_logits_of_fp32(
    backbones_dir: Path, method: str, mix: str, setting: str
) -> None:
    """Of ragged batches, and of an utterance alone; the backbone is another one from case to case."""
    variant = VARIANTS[CASES.index((method, mix)) % len(VARIANTS)]
    batch = noise_batch((0.5, 0.83, 0.61))
    own = int(batch.lengths_B[0])
    alone = Batch(batch.utterance_ids[:1], batch.inputs[:1, :own], batch.lengths_B[:1], batch.labels_B[:1])
    described = {"adapter": {"method": method, "first_layer": 1, "rank": 2}, "head": {"layer_mix": mix}}
    exact, model = (build(experiment(backbones_dir / variant, **described, precision=p)) for p in ("fp32", setting))
    for one in (exact.eval(), model.eval()):
        torch.manual_seed(0)
        _excite(one.backbone, 0.1)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    held = {torch.float32} if method == "full" else {torch.float32, DTYPES[setting], torch.uint8}  # uint8: NF4
    assert {parameter.dtype for parameter in model.parameters()} <= held
    for pooling in ("mean", "statistics", "attentive"):
        for hidden in (0, 8):
            torch.manual_seed(1)
            head = {"layer_mix": mix, "pooling": pooling, "hidden": hidden}
            model.experiment = experiment(
                backbones_dir / variant, adapter=dict(model.experiment.adapter), head=head, precision=setting
            )
            model.head, model.prefix = PooledHead(model.experiment, LAYERS, WIDTH).eval(), None
            _excite(model.head, 0.1)
            exact.head = model.head
            expected_BK = _logits(exact, batch, "fp32")
            found_BK = _logits(model, batch, setting)
            largest = float(expected_BK.abs().max())
            assert largest > 0.1
            atol = TOLERANCE[setting] * max(1.0, largest)
            torch.testing.assert_close(found_BK, expected_BK, rtol=0, atol=atol)
            torch.testing.assert_close(_logits(model, alone, setting), found_BK[:1], rtol=0, atol=atol / 2)
            of_cache_BK = _logits(model, cached(model, batch, setting), setting)
            torch.testing.assert_close(of_cache_BK, found_BK, rtol=0, atol=atol / 2)


@pytest.mark.parametrize("setting", ["bf16", "fp16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_frozen_weights_in_the_compute_dtype_change_no_bit(backbones_dir: Path, variant: str, setting: str) -> None:
    """So a cache that was made before, or by a backbone that holds them in fp32, is the same."""
    batch = noise_batch((0.5, 0.83))
    plain = backbones.load(str(backbones_dir / variant)).eval()
    held = build(experiment(backbones_dir / variant, adapter={"method": "frozen"}, precision=setting)).eval()
    dtypes = {type(m): m.weight.dtype for m in held.backbone.modules() if isinstance(m, nn.Linear | nn.LayerNorm)}
    assert dtypes == {nn.Linear: DTYPES[setting], nn.LayerNorm: torch.float32}
    with torch.inference_mode(), precision.autocast(setting, "cpu"):
        found, expected = (one(batch.inputs, batch.lengths_B)[0] for one in (held.backbone, plain))
    for own, other in zip(found, expected, strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("pooling", ["mean", "statistics", "attentive"])
@pytest.mark.parametrize("setting", PRECISIONS)
def test_a_cache_has_the_dtype_and_shape_that_it_says(backbones_dir: Path, setting: str, pooling: str) -> None:
    settings = experiment(backbones_dir / "whisper", adapter={"method": "frozen"}, head={"pooling": pooling})
    form, backbone = prefix.of(settings, setting), backbones.load(settings.backbone).eval()
    with precision.autocast(setting, "cpu"):
        arrays = prefix.compute(form, backbone, noise_batch((0.5, 0.83)))
    for array in arrays:
        assert array.dtype == form.dtype
        np.testing.assert_array_equal(form.read(pa.py_buffer(array.tobytes())), array)


@pytest.mark.parametrize("pooling", ["statistics", "attentive"])
def test_hidden_states_that_overflow_are_not_cached(backbones_dir: Path, pooling: str) -> None:
    settings = experiment(backbones_dir / "whisper", adapter={"method": "frozen"}, head={"pooling": pooling})
    backbone = backbones.load(settings.backbone).eval()
    with torch.no_grad():
        backbone.model.conv1.weight.mul_(1e6)
    with pytest.raises(UserError, match=r"precision|prefix_gb"), precision.autocast("fp16", "cpu"):
        prefix.compute(prefix.of(settings, "fp16"), backbone, noise_batch((0.5, 0.83)))


# -- the device, and the share of a GPU


@pytest.mark.parametrize(("gpus", "there", "gone"), [(None, "cuda", "cpu"), (0, "cpu", "cpu"), (0.25, "cuda", "cpu")])
def test_a_process_computes_on_a_gpu_that_it_asked_for_and_that_is_there(
    monkeypatch: pytest.MonkeyPatch, gpus: float | None, there: str, gone: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert precision.choose_device(gpus) == torch.device(there)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert precision.choose_device(gpus) == torch.device(gone)


@given(share=st.floats(0.05, 0.99), gigabytes=st.floats(16, 200))
def test_all_that_share_a_gpu_fit_with_their_contexts(share: float, gigabytes: float) -> None:
    total = int(gigabytes * 2**30)
    fraction = precision.memory_fraction(share, total)
    assert 0 < fraction < share
    assert int(1 / share) * (fraction * total + precision.CONTEXT_BYTES) <= total * (1 + 1e-6)


def test_the_share_is_asked_for_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", asked.append)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    precision.bound_memory(0.25)  # declared to Ray, but not there
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for share in (0.0, 1.0, 2.0):
        precision.bound_memory(share)
    assert asked == []
    precision.bound_memory(0.25)
    assert asked == [precision.memory_fraction(0.25, 80 * 2**30)]
