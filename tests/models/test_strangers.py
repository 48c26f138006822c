"""A checkpoint from a stranger: nothing of it is run, all of it has to be there and finite, and one line says what is
not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from backbone_fixtures import experiment, logits, noise_batch
from safetensors.torch import load_file, save_file

from ser_ray.models import backbones, checkpoint
from ser_ray.models.classifier import build
from ser_ray.schema import UserError

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "tdnn_dim": [16] * 5,
}
ADAPTER, CONFIG = "adapter/adapter_model.safetensors", "adapter/adapter_config.json"


@pytest.fixture
def saved(backbones_dir: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A function: method of adaptation -> a whole checkpoint of it."""

    def save(method: str) -> Path:
        model = build(experiment(backbones_dir / "whisper", adapter={"method": method}))
        checkpoint.save(model, tmp_path / "best", {})
        return tmp_path / "best"

    return save


def refused(directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        checkpoint.load(directory)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# -- weights


@pytest.mark.parametrize("file", ["head.safetensors", ADAPTER, "backbone/model.safetensors"])
@pytest.mark.parametrize("damage", ["half is missing", "one is foreign", "NaN", "infinity", "shape", "cut", "empty"])
def test_weights_that_are_not_all_there_are_refused(saved: Callable[[str], Path], file: str, damage: str) -> None:
    directory = saved("full" if file.startswith("backbone") else "lora")
    path = directory / file
    weights = load_file(path)
    first = sorted(name for name in weights if "weight" in name and "positions" not in name)[0]
    if damage == "half is missing":
        weights = {name: weights[name] for name in sorted(weights)[: len(weights) // 2]}
    elif damage == "one is foreign":
        weights["layers.7.fc1.weight"] = torch.zeros(1)
    elif damage in ("NaN", "infinity"):
        weights[first].view(-1)[-1] = float("nan" if damage == "NaN" else "-inf")
    elif damage == "shape":
        weights[first] = torch.zeros(3, 3, 3)
    save_file(weights, path, {"format": "pt"})
    if damage in ("cut", "empty"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if damage == "cut" else b"")
    assert str(directory / file.partition("/")[0]) in refused(directory)


def test_weights_in_another_dtype_are_the_same_weights(saved: Callable[[str], Path]) -> None:
    directory = saved("lora")
    before = logits(checkpoint.load(directory), noise_batch())
    for file in ("head.safetensors", ADAPTER):
        save_file({name: tensor.double() for name, tensor in load_file(directory / file).items()}, directory / file)
    assert torch.equal(logits(checkpoint.load(directory), noise_batch()), before)


# -- the adapter's configuration


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "XLORA"),
        ("peft_type", None),
        ("r", 4),
        ("lora_alpha", 1.0),
        ("target_modules", ["q_proj"]),
        ("target_modules", ".*proj"),
        ("modules_to_save", ["conv1"]),
        ("rank_pattern", {"fc1": 2}),
        ("use_dora", True),
        ("init_lora_weights", "pissa"),
        ("base_model_name_or_path", "/etc"),
        ("auto_mapping", {"base_model_class": "system", "parent_library": "os"}),
        ("megatron_core", "evil.core"),
        ("corda_config", {"cache_file": "/etc/passwd"}),
        ("adapters", {"a": "/elsewhere"}),
    ],
)
def test_an_adapter_that_experiment_yaml_does_not_describe(
    saved: Callable[[str], Path], key: str, value: object
) -> None:
    directory = saved("lora")
    edit(directory / CONFIG, **{key: value})
    message = refused(directory)
    assert key in message
    assert "adapter_config.json" in message


def test_an_adapter_of_another_version_of_peft(saved: Callable[[str], Path]) -> None:
    """It may know keys that ours does not, and lack some; nothing of them is used."""
    directory = saved("lora")
    content = json.loads((directory / CONFIG).read_text()) | {"new_scale": 16, "new_list": []}
    del content["use_dora"]
    (directory / CONFIG).write_text(json.dumps(content))
    checkpoint.load(directory)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"r": ' + "1" * 10_000 + "}", "\ud800"])
@pytest.mark.parametrize("file", [CONFIG, "backbone/config.json", "backbone/preprocessor_config.json"])
def test_json_that_is_none(saved: Callable[[str], Path], file: str, text: str) -> None:
    directory = saved("full" if file.startswith("backbone") else "lora")
    (directory / file).write_bytes(text.encode("utf-8", "surrogatepass"))
    assert str(directory / file.partition("/")[0]) in refused(directory)


# -- the backbone


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_code_of_a_backbone_is_refused(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    directory = saved("full")
    (directory / "backbone" / "evil.py").write_text(f"open({str(directory / 'ran')!r}, 'w')\n")
    classes = dict.fromkeys(("AutoConfig", "AutoFeatureExtractor", "AutoModel"), "evil.E")
    edit(directory / "backbone" / file, auto_map=classes)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    assert f"auto_map in its {file}" in refused(directory)
    assert not (directory / "ran").exists()
    assert "custom code" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quantization_config", {"quant_method": "gptq"}),
        ("transformers_weights", "../../other.safetensors"),
        ("encoder_layers", 10**9),
        ("num_hidden_layers", 10**6),
        ("d_model", 10**6),
        ("encoder_ffn_dim", 10**12),
        ("encoder_attention_heads", 0),
        ("encoder_attention_heads", 5),
        ("d_model", "32"),
        ("activation_function", "evil"),
        ("dropout", 7.0),
        ("max_source_positions", 3),
        ("model_type", ["whisper"]),
    ],
)
def test_a_configuration_that_does_not_fit_costs_nothing(saved: Callable[[str], Path], key: str, value: object) -> None:
    directory = saved("full")
    edit(directory / "backbone" / "config.json", **{key: value})
    refused(directory)


def test_a_large_number_of_labels_is_no_concern(saved: Callable[[str], Path]) -> None:
    directory = saved("full")
    edit(directory / "backbone" / "config.json", num_labels=10**12, attn_implementation="evil/kernels")
    checkpoint.load(directory)


@pytest.mark.parametrize("strides", [[0] * 7, [1] * 7, [5, 2, 2, 2, 2, 2, 10**6], [5, 2]])
def test_convolutions_that_make_no_frames(backbones_dir: Path, tmp_path: Path, strides: list[int]) -> None:
    copied = shutil.copytree(backbones_dir / "wav2vec2-layer", tmp_path / "backbone")
    checkpoint.save(build(experiment(copied, adapter={"method": "frozen"})), tmp_path / "best", {})
    edit(copied / "config.json", conv_stride=strides)
    refused(tmp_path / "best")


def test_other_input_than_there_is_is_refused(backbones_dir: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(backbones_dir / "whisper", tmp_path / "backbone")
    edit(copied / "preprocessor_config.json", sampling_rate=8000)
    with pytest.raises(UserError, match=r"sampling_rate in its preprocessor_config\.json is 8000; supported is 16000"):
        backbones.load(str(copied))


def test_an_adapter_inside_a_backbone_is_not_loaded(backbones_dir: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(backbones_dir / "whisper", tmp_path / "backbone")
    (copied / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/elsewhere"}))
    with pytest.raises(UserError, match=r"it holds adapter_config\.json; merge the adapter"):
        backbones.load(str(copied))


@pytest.mark.parametrize("foreign", ["pytorch_model.bin", "../backbone/model.safetensors", "/etc/x.safetensors"])
def test_an_index_names_its_own_files(backbones_dir: Path, tmp_path: Path, foreign: str) -> None:
    copied = shutil.copytree(backbones_dir / "whisper", tmp_path / "backbone")
    (copied / "model.safetensors").rename(copied / "other.safetensors")
    index = {"metadata": {}, "weight_map": {"conv1.weight": foreign}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="is no safetensors file of its own"):
        backbones.load(str(copied))


@pytest.mark.parametrize(
    "whole",
    [
        transformers.Wav2Vec2ForSequenceClassification,
        transformers.WavLMForXVector,
        transformers.HubertForCTC,
        transformers.Wav2Vec2ForPreTraining,
        transformers.WhisperForAudioClassification,
    ],
)
def test_backbones_under_a_head_of_transformers(tmp_path: Path, whole: type[transformers.PreTrainedModel]) -> None:
    """As SUPERB's checkpoints are: a weighted sum of layers, and heads with names of their own."""
    options = dict(SMALL) | {"use_weighted_layer_sum": True, "num_labels": 4}
    if whole.config_class is transformers.WhisperConfig:
        options = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
        options |= {"decoder_layers": 1, "use_weighted_layer_sum": True}
        transformers.WhisperFeatureExtractor().save_pretrained(tmp_path)
    else:
        transformers.Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    model = whole(whole.config_class(**options))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {"emotion_head.0.weight": torch.zeros(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = backbones.load(str(tmp_path)).model.state_dict()
    encoder = model.encoder if hasattr(model, "encoder") else model.base_model
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def test_how_to_convert_a_pickle_is_said_and_works(backbones_dir: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(backbones_dir / "wavlm-layer", tmp_path / "copied")
    weights = load_file(copied / "model.safetensors")
    torch.save(weights, copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"pytorch_model\.bin only, a pickle, which is never loaded") as caught:
        backbones.load(str(copied))
    assert "\n" not in str(caught.value)
    exec(str(caught.value).partition('python -c "')[2].removesuffix('"'), {})
    loaded = backbones.load(str(copied)).model.state_dict()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


# -- where it has moved


def test_a_backbone_that_has_moved_is_given(backbones_dir: Path, tmp_path: Path) -> None:
    before = shutil.copytree(backbones_dir / "whisper", tmp_path / "before")
    model = build(experiment(before))
    checkpoint.save(model, tmp_path / "best", {})
    before.rename(tmp_path / "after")
    assert f"{before}: no such directory; if it has moved, say where it is now: --backbone DIR" in refused(
        tmp_path / "best"
    )
    moved = checkpoint.load(tmp_path / "best", backbone=tmp_path / "after")
    assert torch.equal(logits(moved, noise_batch()), logits(model, noise_batch()))
    assert moved.experiment.backbone == str(before), "the name that it has for others"
    checkpoint.save(moved, tmp_path / "again", {})
    assert json.loads((tmp_path / "again" / CONFIG).read_text())["base_model_name_or_path"] == str(before)


def test_a_whole_model_holds_its_backbone(saved: Callable[[str], Path], backbones_dir: Path, tmp_path: Path) -> None:
    directory = saved("full")
    loaded = checkpoint.load(directory)
    assert loaded.experiment.backbone == str(backbones_dir / "whisper"), "not where it happens to lie now"
    with pytest.raises(UserError, match="it holds its backbone itself"):
        checkpoint.load(directory, backbone=backbones_dir / "whisper")
    checkpoint.save(loaded, tmp_path / "again", {})
    shutil.rmtree(directory / "backbone")
    assert "backbone: no such directory" in refused(directory)
    assert "--backbone" not in refused(directory)
    assert torch.equal(logits(checkpoint.load(tmp_path / "again"), noise_batch()), logits(loaded, noise_batch()))


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_are_as_readable_as_the_umask_says(backbones_dir: Path, tmp_path: Path, umask: int) -> None:
    from ser_ray.training.loop import make_optimizer

    model = build(experiment(backbones_dir / "whisper", adapter={"method": "lora"}))
    before = os.umask(umask)
    try:
        checkpoint.save(model, tmp_path / "best", {})
        checkpoint.save_training_state(tmp_path / "best", make_optimizer(model), {})
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "best").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "model.safetensors"])
@pytest.mark.parametrize("other", ["a pipe", "a device", "a circle"])
def test_what_is_no_file_is_not_opened(saved: Callable[[str], Path], file: str, other: str) -> None:
    """A pipe that nobody writes into, or /dev/zero, would be read without end."""
    path = saved("full") / "backbone" / file
    path.unlink()
    if other == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if other == "a device" else path.name)
    assert f"{file} is no file" in refused(path.parents[1])


@pytest.mark.parametrize("file", [CONFIG, "backbone/config.json", "backbone/preprocessor_config.json"])
def test_a_huge_json_file_costs_no_memory(saved: Callable[[str], Path], file: str) -> None:
    directory = saved("full" if file.startswith("backbone") else "lora")
    os.truncate(directory / file, 2**40)
    assert "bytes are too many" in refused(directory)
