"""What lies at a backbone's name, a hub id or a folder: found, read, and checked before a model is built from it.

A backbone may come from a stranger. Only JSON and safetensors are read; what would run code of the backbone, or lead to
other files than its own, is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from safetensors import safe_open
from transformers import CONFIG_MAPPING, FeatureExtractionMixin, PreTrainedConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils import cached_file, find_adapter_config_file

from ser_ray.disk import expanded
from ser_ray.models.logmel import HOP, N_FFT
from ser_ray.models.weights import REASON, check_small
from ser_ray.schema import SAMPLING_RATE, UserError, reason_of

FAMILIES: Final = ("wav2vec2", "hubert", "wavlm", "whisper")
ASSETS: Final = Path(__file__).parent.parent / "assets"
EMBEDDED: Final = "embedded/"

_REFUSED = ("auto_map", "quantization_config", "transformers_weights")
"""Keys that name code, a way to unpack weights, or other files."""
_IGNORED = (
    *("num_labels", "id2label", "label2id", "dtype", "torch_dtype", "attn_implementation", "_attn_implementation"),
    *("initializer_range", "init_std"),
)
"""Keys of config.json that an encoder does not need: of a head (a large number of labels alone would fill the memory),
of the dtype, which `precision.WEIGHTS` sets, of attention, which may name code on the hub, and of random weights, as
all are read."""
_STRIDES: Final = range(160, 1601)
"""Samples from frame to frame, 10 to 100 ms. All known backbones have 320; attention over more frames needs memory that
grows with their square, and fewer describe no speech."""


class MissingBackboneError(UserError):
    """There is no backbone at that name: it may lie elsewhere."""


def describe(name: str) -> tuple[Any, Any]:
    """A backbone's transformers config and feature extractor, without its weights.

    Raises UserError, in one line, for a name that cannot be found, for an architecture that is not in `FAMILIES`, and
    for files that do not describe one.
    """
    content, audio = _read(name)
    for file, found in (("config.json", content), ("preprocessor_config.json", audio)):
        if refused := [key for key in _REFUSED if key in found]:
            raise UserError(
                f"backbone {name}: {refused[0]} in its {file} would run other code, or read other files, than its own; "
                "not supported"
            )
    family = content.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"backbone {name}: its type is {family}; supported are {', '.join(FAMILIES)}")
    if content.get("add_adapter"):
        raise UserError(f"backbone {name}: add_adapter in its config.json reduces the number of frames; not supported")
    _check_audio(name, family, content, audio)
    extractor = transformers.WhisperFeatureExtractor if family == "whisper" else transformers.Wav2Vec2FeatureExtractor
    known = {key: value for key, value in content.items() if key not in _IGNORED}
    try:
        config = CONFIG_MAPPING[family].from_dict(known)
        if family != "whisper" and math.prod(config.conv_stride) not in _STRIDES:
            raise ValueError(f"conv_stride makes a frame of every {math.prod(config.conv_stride)} samples")
        return config, extractor.from_dict(dict(audio))
    except Exception as error:  # transformers raises errors of many kinds for values that it does not expect
        raise UserError(f"backbone {name}: its configuration is not usable: {reason_of(error, REASON)}") from None


def identity(name: str) -> str:
    """A digest of a backbone's configuration and of which weights it has: distinguishes those of the same name."""
    config, _ = describe(name)
    directory = _directory(name)
    files = sorted(directory.glob("*.safetensors")) if directory is not None else []
    weights = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    parts = [
        config.to_json_string(use_diff=False),
        weights or getattr(config, "_commit_hash", None) or transformers.__version__,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def embedded_directory(name: str) -> Path | None:
    """The directory of an embedded backbone; None for others. Raises UserError for an unknown embedded name."""
    return _directory(name) if name.startswith(EMBEDDED) else None


def source(name: str) -> str:
    """The hub id or directory that transformers reads for that name."""
    return str(_directory(name) or name)


def architecture(config: Any) -> Any:
    """The class of transformers that has the encoder alone."""
    return WhisperEncoder if config.model_type == "whisper" else transformers.MODEL_MAPPING[type(config)]


def check_files(name: str, config: Any) -> None:
    """Check from the heads of a backbone's files, in milliseconds, that its weights can be those of ``config``.

    So a config.json with a number that is far too large costs no memory. Raises UserError if it has an adapter of PEFT,
    which transformers would load unasked, or weights that are cut short or fewer than the config needs.
    """
    if find_adapter_config_file(source(name)):
        raise UserError(f"backbone {name}: it holds adapter_config.json; merge the adapter into the weights first")
    try:
        sizes = [size for path in _weight_files(name) for size in _sizes(path)]
    except Exception as error:
        raise UserError(f"backbone {name}: its weights are not readable: {reason_of(error, REASON)}") from None
    if not sizes:
        return  # there are no safetensors: transformers says so, or finds those that the hub has converted
    try:
        layers = config.num_hidden_layers
        if layers > len(sizes):
            raise ValueError(f"{layers} layers of {len(sizes)} tensors")
        with torch.device("meta"):
            needed = sum(p.numel() for p in architecture(config)(config).parameters()) - config.hidden_size
    except Exception as error:
        raise UserError(f"backbone {name}: its config.json is not usable: {reason_of(error, REASON)}") from None
    if needed > sum(sizes):  # all but masked_spec_embed, which may be missing
        raise UserError(
            f"backbone {name}: its weights do not fit its config.json, which describes {needed} numbers; its files "
            f"hold {sum(sizes)}"
        )


def unreachable(name: str, error: Exception) -> UserError:
    """What to tell a user for an error of transformers that says that files are missing."""
    if any(_cached(name, file) for file in ("pytorch_model.bin", "pytorch_model.bin.index.json")):
        return UserError(_how_to_convert(name))
    if _directory(name) is not None:
        return UserError(f"backbone {name}: {reason_of(error, REASON)}")
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
    return MissingBackboneError(
        f"backbone {name}: no such directory, and not available from the hub{offline}; "
        f"give a local directory, or download it where there is a network ({reason_of(error, REASON)})"
    )


def shown(backbone: str) -> str:
    """A backbone's name for others: of one in a folder, the folder's own name, as the path is that of one machine."""
    return backbone if on_hub(backbone) or backbone.startswith(EMBEDDED) else Path(backbone).name


def on_hub(backbone: str) -> bool:
    """Whether a backbone's name is an id on the hub, and not a folder."""
    elsewhere = backbone.startswith((EMBEDDED, ".", "/", "~"))
    return not elsewhere and backbone.count("/") <= 1 and not Path(backbone).is_dir()


# -- below: how it is done


def _read(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of config.json, and of preprocessor_config.json."""
    where = source(name)
    _check_directory(name)
    try:
        content, _ = PreTrainedConfig.get_config_dict(where)
        audio, _ = FeatureExtractionMixin.get_feature_extractor_dict(where)
    except (OSError, ValueError) as error:
        raise unreachable(name, error) from None
    except Exception as error:
        raise UserError(f"backbone {name}: its configuration is not readable: {reason_of(error, REASON)}") from None
    if not isinstance(content, dict) or not isinstance(audio, dict):
        raise UserError(f"backbone {name}: config.json and preprocessor_config.json are no JSON objects")
    return content, audio


def _check_directory(name: str) -> None:
    """Raises UserError where a file of a local backbone is a pipe or a device, which transformers would read without
    end, or a JSON file that is too large to be one."""
    directory = _directory(name)
    for path in sorted(directory.iterdir()) if directory else ():
        if path.suffix in (".json", ".safetensors") and not path.is_file():
            raise UserError(f"backbone {name}: {path.name} is no file, but a folder, a pipe, or a link to none")
        if path.suffix == ".json":
            check_small(path)


def _check_audio(name: str, family: str, content: dict[str, Any], audio: dict[str, Any]) -> None:
    """Raises UserError for a backbone of other input than there is: its answers would be wrong."""
    expected: dict[str, Any] = {"sampling_rate": SAMPLING_RATE}
    if family == "whisper":
        expected |= {"feature_size": content.get("num_mel_bins", 80), "n_fft": N_FFT, "hop_length": HOP}
    for key, value in expected.items():
        if audio.get(key, value) != value:
            given = f"{key} in its preprocessor_config.json is {str(audio[key])[:40]}"
            raise UserError(f"backbone {name}: {given}; supported is {value}")


def _directory(name: str) -> Path | None:
    """The directory of a local or embedded backbone; None for a hub id."""
    if name.startswith(EMBEDDED):
        directory = ASSETS / name.removeprefix(EMBEDDED)
        if ".." in directory.parts or not (directory / "config.json").is_file():
            known = ", ".join(sorted(EMBEDDED + path.parent.name for path in ASSETS.glob("*/config.json")))
            raise UserError(f"backbone {name}: not embedded; known: {known}")
        return directory
    path = expanded(name)
    if path.is_dir():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise MissingBackboneError(f"backbone {name}: no such directory")
    return None


def _cached(name: str, file: str) -> str | None:
    """The path of one of its files, downloaded if need be; None where it has none of that name, or cannot be asked."""
    try:
        found: str | None = cached_file(
            source(name),
            file,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:  # the hub knows no such repository
        return None
    return found


def _weight_files(name: str) -> list[str]:
    """The paths of its safetensors, one or several that an index lists; none where it has no such file."""
    if single := _cached(name, "model.safetensors"):
        return [single]
    index = _cached(name, "model.safetensors.index.json")
    if index is None:
        return []
    files = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    if foreign := [file for file in files if Path(file).name != file or not file.endswith(".safetensors")]:
        raise ValueError(f"{foreign[0]!r} in model.safetensors.index.json is no safetensors file of its own")
    return [path for file in files if (path := _cached(name, file))]


def _sizes(path: str) -> list[int]:
    """How many numbers each tensor of a file has, from its head alone."""
    with safe_open(path, framework="pt") as file:
        return [math.prod(file.get_slice(key).get_shape()) for key in file.keys()]  # noqa: SIM118 (not a dict)


def _how_to_convert(name: str) -> str:
    directory = _directory(name)
    code = (
        "from transformers import AutoModel, AutoFeatureExtractor as E; "
        f"a, b = {source(name)!r}, {str(directory) if directory else 'NEW_DIRECTORY'!r}; "
        "AutoModel.from_pretrained(a).save_pretrained(b); E.from_pretrained(a).save_pretrained(b)"
    )
    return (
        f"backbone {name}: its weights are in pytorch_model.bin only, a pickle, which is never loaded here; if you "
        f"trust it, convert it to safetensors: python -c {json.dumps(code)}"
    )
