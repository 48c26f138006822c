"""WavLM's attention is that of transformers in outputs, gradients and dropout, and all of its projections adapt."""

from __future__ import annotations

import copy
import shutil
import warnings
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
import yaml
from backbone_fixtures import LAYERS, cached, experiment, logits, noise, noise_batch
from peft import PeftModel
from torch import nn
from transformers import AutoModel, BitsAndBytesConfig, Wav2Vec2FeatureExtractor, WavLMConfig, WavLMModel
from transformers.models.wavlm.modeling_wavlm import WavLMAttention

from ser_ray.models import backbones, checkpoint, precision, wavlm
from ser_ray.models.adapters import FEED_FORWARD, check_gradients
from ser_ray.models.backbones import Backbone, frame_mask
from ser_ray.models.classifier import EmotionClassifier, build
from ser_ray.schema import UserError

VARIANTS = ("wavlm-group", "wavlm-layer")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
TARGETS = (*PROJECTIONS, "intermediate_dense", "output_dense")
TINY, LARGE = (32, 4), (1024, 16)
"""Width and heads; the latter those of wavlm-large."""


def pair(width: int, heads: int, stable: bool, blocks: int = 2) -> tuple[Backbone, WavLMModel]:
    """Ours and transformers' own, of the same random weights."""
    config = WavLMConfig(
        hidden_size=width,
        num_attention_heads=heads,
        num_hidden_layers=blocks,
        intermediate_size=2 * width,
        conv_dim=[16] * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        do_stable_layer_norm=stable,
        attention_dropout=0.2,
        hidden_dropout=0.0,  # its draws follow the order in memory, which is another one there
        activation_dropout=0.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        theirs = WavLMModel(config)
        for name, parameter in theirs.named_parameters():  # far from where they begin, so that every one matters
            scale = 0.5 if "rel_pos" in name or "rel_attn" in name else 0.5 / width**0.5
            parameter.data.add_(scale * torch.randn_like(parameter))
    return backbones._wrapped(copy.deepcopy(theirs), config, Wav2Vec2FeatureExtractor()), theirs


def their_blocks(model: WavLMModel, hidden_BFD: torch.Tensor, mask_BF: torch.Tensor) -> list[torch.Tensor]:
    """Every state of transformers' encoder from the input of its blocks, whose attention handles the padding."""
    hiddens, bias = [hidden_BFD], None
    for layer in model.encoder.layers:
        hidden_BFD, bias = layer(hidden_BFD, attention_mask=mask_BF, position_bias=bias)
        hiddens.append(hidden_BFD)
    if model.config.do_stable_layer_norm:
        hiddens[-1] = model.encoder.layer_norm(hidden_BFD)
    return hiddens


def ragged(width: int, frames: tuple[int, ...] = (90, 41, 7)) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden_BFD and mask_BF."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(len(frames), max(frames), width, generator=generator), frame_mask(
        torch.tensor(frames), max(frames)
    )


# -- the same as transformers


@pytest.mark.parametrize("frames", [1, 2, 49, 160, 161, 700, 1500])
@pytest.mark.parametrize(("buckets", "furthest"), [(320, 800), (32, 128), (30, 101)])
def test_the_bias_is_that_of_transformers(frames: int, buckets: int, furthest: int) -> None:
    theirs = WavLMAttention(8, 2, num_buckets=buckets, max_distance=furthest)
    own = theirs.rel_attn_embed.weight.detach().clone().requires_grad_()
    expected_HFF, found_HFF = theirs.compute_bias(frames, frames), wavlm.position_bias(own, frames, furthest, own.dtype)
    assert torch.equal(found_HFF, expected_HFF)
    if frames < 200:
        weights_HFF = torch.randn_like(expected_HFF)
        (expected_HFF * weights_HFF).sum().backward()
        (found_HFF * weights_HFF).sum().backward()
        torch.testing.assert_close(own.grad, theirs.rel_attn_embed.weight.grad, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("size", [TINY, LARGE])
@torch.inference_mode()
def test_every_block_of_a_ragged_batch_is_that_of_transformers(size: tuple[int, int], stable: bool) -> None:
    ours, theirs = pair(*size, stable)
    hidden_BFD, mask_BF = ragged(size[0])
    found, expected = ours.eval().blocks(hidden_BFD, mask_BF), their_blocks(theirs.eval(), hidden_BFD, mask_BF)
    assert len(found) == len(expected) == LAYERS + 1
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own[mask_BF], other[mask_BF], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_an_utterance_of_a_ragged_batch_is_that_of_transformers_alone(backbones_dir: Path, variant: str) -> None:
    """From the waveform: the padding of the others changes nothing."""
    directory = backbones_dir / variant
    ours, theirs = backbones.load(str(directory)).eval(), AutoModel.from_pretrained(directory).eval()
    extractor = Wav2Vec2FeatureExtractor.from_pretrained(directory)
    waveform_BT, lengths_B = noise([0.4, 2.1, 1.17])
    hiddens, mask_BF = ours(waveform_BT, lengths_B)
    for row, length in enumerate(lengths_B.tolist()):
        waveform = waveform_BT[row, :length].numpy()
        values = extractor(waveform, sampling_rate=16_000, return_tensors="pt").input_values
        alone = theirs(values, output_hidden_states=True)
        for own, other in zip(hiddens, [*alone.hidden_states[:-1], alone.last_hidden_state], strict=True):
            torch.testing.assert_close(own[row][mask_BF[row]], other[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_training_step_is_that_of_transformers(stable: bool, recompute: bool) -> None:
    """Dropout of attention included: both draw the same numbers from one seed."""
    ours, theirs = pair(*TINY, stable, blocks=3)
    assert [n for n, _ in ours.model.named_parameters()] == [n for n, _ in theirs.named_parameters()], (
        "by this order a saved optimiser's moments are numbered"
    )
    ours.recompute = recompute
    hidden_BFD, mask_BF = ragged(TINY[0])
    weights_BFD = torch.randn_like(hidden_BFD) * mask_BF[..., None]
    gradients = []
    for states in (lambda h: ours.train().blocks(h, mask_BF), lambda h: their_blocks(theirs.train(), h, mask_BF)):
        given_BFD = hidden_BFD.clone().requires_grad_()
        torch.manual_seed(11)
        sum((state * weights_BFD).sum() for state in states(given_BFD)).backward()
        gradients.append(given_BFD.grad)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)
    reference = {name: parameter.grad for name, parameter in theirs.encoder.layers.named_parameters()}
    for name, parameter in ours.layers().named_parameters():
        assert parameter.grad is not None
        if "k_proj.bias" in name:  # the same for all keys of a query: softmax takes it away, and leaves rounding errors
            continue
        error, size = (parameter.grad - reference[name]).norm(), reference[name].norm()
        assert error < 1e-4 * size, (name, float(error), float(size))


def test_attention_drops_in_training_only() -> None:
    ours, _ = pair(*TINY, stable=True)
    hidden_BFD, mask_BF = ragged(TINY[0])
    first, second = (ours.train().blocks(hidden_BFD, mask_BF)[-1] for _ in range(2))
    assert not torch.equal(first, second)
    first, second = (ours.eval().blocks(hidden_BFD, mask_BF)[-1] for _ in range(2))
    assert torch.equal(first, second)


# -- adapters


def excited(model: EmotionClassifier) -> EmotionClassifier:
    """With updates that are not zero."""
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(len(name)))
    return model


def step(model: EmotionClassifier, seconds: tuple[float, ...] = (0.5, 0.8, 0.6)) -> dict[str, torch.Tensor]:
    """The gradients of one."""
    batch = noise_batch(seconds)
    torch.manual_seed(0)
    nn.functional.cross_entropy(model.train()(batch.inputs, batch.lengths_B), batch.labels_B).backward()
    check_gradients(model)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("setting", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_projection_learns(backbones_dir: Path, variant: str, method: str, setting: str, recompute: bool) -> None:
    adapter = {"method": method, "rank": 2}
    model = build(experiment(backbones_dir / variant, adapter=adapter, precision=setting, recompute=recompute))
    with precision.autocast(setting, "cpu"):
        gradients = step(excited(model))
    for target in TARGETS:
        for side in ("lora_A", "lora_B"):
            of_target = [g for name, g in gradients.items() if f".{target}.{side}." in name]
            assert len(of_target) == LAYERS
            assert all(g.isfinite().all() and g.abs().max() > 0 for g in of_target), (target, side)
    held = bnb.nn.Linear4bit if method == "qlora" else nn.Linear
    for layer in model.backbone.layers():
        for name in PROJECTIONS:
            assert type(getattr(layer.attention, name).base_layer) is held, name
        assert type(layer.attention.gru_rel_pos_linear) is nn.Linear


def test_gradients_of_updates_are_those_of_their_product_in_transformers(backbones_dir: Path) -> None:
    """dW of the merged weight W + s B A in transformers' own model gives dB = s dW A^T and dA = s B^T dW."""
    directory = backbones_dir / "wavlm-layer"
    adapter = {"method": "lora", "rank": 2, "alpha": 6.0, "dropout": 0.0}
    model = excited(build(experiment(directory, adapter=adapter)))
    hidden_BFD, mask_BF = ragged(TINY[0])
    model.backbone.eval().blocks(hidden_BFD, mask_BF)[-1][mask_BF].square().sum().backward()
    theirs = AutoModel.from_pretrained(directory).eval()
    updates = {n: p for n, p in model.backbone.model.named_parameters() if ".lora_" in n}
    names = sorted({name.split(".lora_")[0] for name in updates})
    assert len(names) == LAYERS * len(TARGETS)
    pairs = {n: (updates[f"{n}.lora_A.default.weight"], updates[f"{n}.lora_B.default.weight"]) for n in names}
    with torch.no_grad():
        for name, (a, b) in pairs.items():
            theirs.get_submodule(name).weight.add_(3.0 * b @ a)
    their_blocks(theirs, hidden_BFD, mask_BF)[-1][mask_BF].square().sum().backward()
    for name, (a, b) in pairs.items():
        of_weight = theirs.get_submodule(name).weight.grad
        for found, expected in ((a.grad, 3.0 * b.T @ of_weight), (b.grad, 3.0 * of_weight @ a.T)):
            assert found is not None
            scale = float(expected.detach().abs().max())
            assert scale > 1e-3
            torch.testing.assert_close(found, expected, atol=1e-4 * scale, rtol=1e-3)


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_frozen_lower_half_may_be_cached(backbones_dir: Path, variant: str, method: str) -> None:
    model = excited(build(experiment(backbones_dir / variant, adapter={"method": method, "first_layer": 1})))
    batch = noise_batch((0.5, 0.83, 0.61))
    expected_BK = logits(model, batch)
    of_cache_BK = logits(model, cached(model, batch))
    torch.testing.assert_close(of_cache_BK, expected_BK, rtol=5e-3, atol=5e-3)
    below, above = model.backbone.layers()
    assert not any(parameter.requires_grad for parameter in below.parameters())
    assert any("attention.q_proj" in n for n, parameter in above.named_parameters() if parameter.requires_grad)


@pytest.mark.parametrize("method", ["frozen", "lora", "qlora", "full"])
@pytest.mark.parametrize(("setting", "tolerance"), [("bf16", 4e-2), ("fp16", 6e-3)])
def test_fewer_bits_are_near_fp32(backbones_dir: Path, method: str, setting: str, tolerance: float) -> None:
    model = excited(build(experiment(backbones_dir / "wavlm-layer", adapter={"method": method})))
    batch = noise_batch((0.5, 2.3, 0.61))
    expected_BK = logits(model, batch)
    with precision.autocast(setting, "cpu"):
        found_BK = logits(model, batch)
    torch.testing.assert_close(found_BK, expected_BK, rtol=0, atol=tolerance * max(1.0, float(expected_BK.abs().max())))


# -- in and out


def test_a_fully_trained_backbone_is_one_of_transformers(backbones_dir: Path, tmp_path: Path) -> None:
    model = build(experiment(backbones_dir / "wavlm-layer", adapter={"method": "full"}))
    with torch.no_grad():
        for parameter in model.backbone.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    checkpoint.save(model, tmp_path, {})
    theirs = AutoModel.from_pretrained(tmp_path / "backbone").eval()
    assert type(theirs) is WavLMModel
    hidden_BFD, mask_BF = ragged(TINY[0])
    with torch.inference_mode():
        own, other = (
            model.backbone.eval().blocks(hidden_BFD, mask_BF)[-1],
            their_blocks(theirs, hidden_BFD, mask_BF)[-1],
        )
    torch.testing.assert_close(own[mask_BF], other[mask_BF], atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(checkpoint.load(tmp_path), noise_batch()), logits(model, noise_batch()))


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_an_adapter_comes_back(backbones_dir: Path, tmp_path: Path, method: str) -> None:
    model = excited(build(experiment(backbones_dir / "wavlm-group", adapter={"method": method})))
    checkpoint.save(model, tmp_path, {})
    assert torch.equal(logits(checkpoint.load(tmp_path), noise_batch()), logits(model, noise_batch()))


def test_others_merge_the_adapter_before_they_run_it(backbones_dir: Path, tmp_path: Path) -> None:
    """transformers' WavLM bypasses what is not merged; if this fails, docs/predict.md and the model card can say so."""
    directory = backbones_dir / "wavlm-layer"
    model = excited(build(experiment(directory, adapter={"method": "lora"}))).eval()
    assert model.peft is not None
    model.peft.save_pretrained(str(tmp_path))
    hidden_BFD, mask_BF = ragged(TINY[0])
    with torch.inference_mode():
        own = model.backbone.blocks(hidden_BFD, mask_BF)[-1][mask_BF]
        theirs = PeftModel.from_pretrained(AutoModel.from_pretrained(directory), str(tmp_path)).eval()
        bypassed = their_blocks(theirs.base_model.model, hidden_BFD, mask_BF)[-1][mask_BF]
        merged = their_blocks(theirs.merge_and_unload(), hidden_BFD, mask_BF)[-1][mask_BF]
    torch.testing.assert_close(merged, own, atol=1e-5, rtol=1e-5)
    assert (bypassed - own).abs().max() > 0.1


# -- version 0.1, where only feed-forward was adapted and attention was transformers' own


def as_of_0_1(backbones_dir: Path, directory: Path, method: str) -> EmotionClassifier:
    """Writes a checkpoint as it was then: feed-forward adapted, ``targets: null``. Returns a model of its head."""
    adapter = {"method": method, "targets": FEED_FORWARD["wavlm"]}
    model = excited(build(experiment(backbones_dir / "wavlm-layer", adapter=adapter)))
    checkpoint.save(model, directory, {})
    described = yaml.safe_load((directory / "experiment.yaml").read_text())
    described["adapter"]["targets"] = None
    (directory / "experiment.yaml").write_text(yaml.safe_dump(described))
    return model


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_checkpoint_of_0_1_is_as_it_was(backbones_dir: Path, tmp_path: Path, method: str) -> None:
    as_of_0_1(backbones_dir, tmp_path / "old", method)
    options = {}
    if method == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=["feature_projection.projection", r".*\.attention"],
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on a mask of another type, which transformers' attention gives to torch
        encoder = AutoModel.from_pretrained(backbones_dir / "wavlm-layer", **options)
        for module in encoder.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                module.support_avx512bf16_for_cpu = False
        theirs = PeftModel.from_pretrained(encoder, str(tmp_path / "old" / "adapter")).eval()
        hidden_BFD, mask_BF = ragged(TINY[0])
        with torch.inference_mode():
            expected = their_blocks(theirs.base_model.model, hidden_BFD, mask_BF)[-1][mask_BF]
    loaded = checkpoint.load(tmp_path / "old")
    checkpoint.save(loaded, tmp_path / "again", {})
    for model in (loaded, checkpoint.load(tmp_path / "again")):
        with torch.inference_mode():
            found = model.backbone.blocks(hidden_BFD, mask_BF)[-1][mask_BF]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_only_wavlm_had_other_defaults(backbones_dir: Path, tmp_path: Path) -> None:
    as_of_0_1(backbones_dir, tmp_path, "lora")
    shutil.copytree(backbones_dir / "wav2vec2-layer", tmp_path / "wav2vec2")
    with pytest.raises(UserError, match=r"target_modules is .* but experiment\.yaml describes other modules"):
        checkpoint.load(tmp_path, backbone=tmp_path / "wav2vec2")
