"""What a user would run otherwise: transformers' Trainer with PEFT, on the same utterances with the same settings.

A library for the scripts beside it. It does what transformers' own example for audio classification does, with LoRA:
the model that AutoModelForAudioClassification gives, its feature extractor as batches are put together (Whisper's pads
to 30 s, wav2vec2's to the longest of the batch), a fixed number of utterances a batch. Settings are read from the same
`Experiment` that our side trains from: LoRA on the same linear layers, AdamW in the same groups at the same rates,
warm-up and linear decay, precision, a learned sum of the layers. Left as transformers has it: its projection, mean
pooling and linear classifier, no class weights. Turned off, since our side has neither and both change the work of a
step: layers skipped at random (layerdrop) and masks on wav2vec2's features. Decoding is no part of it: waveforms are in
memory.
"""

from __future__ import annotations

import gc
import math
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    BitsAndBytesConfig,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ser_ray.config import Experiment
from ser_ray.evaluation import metrics
from ser_ray.models.adapters import ATTENTION, FEED_FORWARD
from ser_ray.models.precision import compute_dtype
from ser_ray.schema import SAMPLING_RATE
from ser_ray.training import loop

Utterance = tuple[np.ndarray, int]
"""A float32 waveform (T,) at 16 kHz, and its label."""


@dataclass(frozen=True)
class Outcome:
    """One run. Time is of training alone, after the warm-up steps: no import, evaluation or checkpoint is in it."""

    utterances_per_s: float
    seconds_per_epoch: float
    """What an epoch takes at that rate."""
    train_loss: float
    """Mean over all steps."""
    dev_uar: float
    dev_predicted: np.ndarray
    peak_memory_mb: float
    """On a GPU what torch allocated; on a CPU the process's largest resident size so far, whatever ran in it before."""
    flops_per_utterance: float | None
    """Counted over the warm-up steps, where asked for."""


def run(
    experiment: Experiment,
    train: Sequence[Utterance],
    dev: Sequence[Utterance],
    *,
    batch_size: int = 8,
    group_by_length: bool = False,
    max_steps: int | None = None,
    warm_up: int = 2,
    count_flops: bool = False,
    workers: int = 0,
    device: torch.device | str = "cpu",
) -> Outcome:
    """Train ``experiment.epochs`` epochs (or ``max_steps`` steps) on ``train``, then predict ``dev``.

    ``experiment.backbone`` is a directory or hub id, its adapter lora, qlora or full. ``warm_up``: steps that are not
    timed, at least one. ``workers`` put batches together; 0: the training process does.
    """
    device = torch.device(device)
    fresh_memory(device)
    torch.manual_seed(experiment.seed)
    steps_per_epoch = -(-len(train) // batch_size)
    steps = max_steps or steps_per_epoch * experiment.epochs
    assert 0 < warm_up < steps, f"{warm_up} steps of warm-up, {steps} in all: at least one of each is needed"
    model = classifier(experiment, device)
    extractor = AutoFeatureExtractor.from_pretrained(experiment.backbone)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as counting:
        clock = Clock(device, len(train), batch_size, warm_up, counting if count_flops else None)
        trainer = Trainer(
            model=model,
            args=arguments(experiment, scratch, batch_size, group_by_length, steps, workers, device),
            data_collator=partial(collate, extractor),
            train_dataset=dataset(extractor, train),
            eval_dataset=dataset(extractor, dev),
            processing_class=extractor,
            optimizers=(optimizer(model, experiment, device), None),
            callbacks=[clock],
        )
        assert trainer.args.n_gpu <= 1, "Trainer would share each batch among all GPUs; set CUDA_VISIBLE_DEVICES"
        trainer.remove_callback(PrinterCallback)
        trained = trainer.train()
        memory = loop._memory(device)["peak_memory_mb"]
        # Without the states of every layer, which it would keep of all of dev.
        logits = trainer.predict(trainer.eval_dataset, ignore_keys=["hidden_states", "attentions"]).predictions
    predicted = np.asarray(logits).argmax(-1)
    confusion = metrics.confusion(np.array([label for _, label in dev]), predicted, len(experiment.emotions))
    rate = clock.utterances / clock.seconds
    uar = float(metrics.uar(confusion))
    return Outcome(rate, len(train) / rate, trained.training_loss, uar, predicted, memory, clock.flops_per_utterance)


def classifier(experiment: Experiment, device: torch.device) -> nn.Module:
    """The model before training, on the device, with its adapters; projection, classifier and layer weights learn."""
    config = AutoConfig.from_pretrained(
        experiment.backbone, num_labels=len(experiment.emotions), use_weighted_layer_sum=True
    )
    config.update({"layerdrop": 0.0, "encoder_layerdrop": 0.0, "apply_spec_augment": False})
    method = experiment.adapter.method
    options: dict[str, Any] = {}
    if method == "qlora":
        options = {
            "quantization_config": nf4(compute_dtype(experiment.precision, device)),
            "device_map": {"": str(device)},
        }
    if config.model_type == "whisper":  # an encoder by itself has other names for the same weights
        encoder = r"^(?:model\.)?(?:encoder\.)?(?=conv1\.|conv2\.|embed_positions\.|layers\.|layer_norm\.)"
        options["key_mapping"] = {encoder: "encoder."}
    model, info = AutoModelForAudioClassification.from_pretrained(
        experiment.backbone, config=config, dtype=torch.float32, output_loading_info=True, **options
    )
    new = ("projector.", "classifier.", "layer_weights", "masked_spec_embed")  # the last serves masks alone
    missing = [key for key in info["missing_keys"] if not any(part in key for part in new)]
    assert not missing, missing
    if method == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        for module in model.modules():
            if isinstance(module, Linear4bit):  # repacked on CPUs with AVX512-BF16, in a way that needs 64 columns
                module.support_avx512bf16_for_cpu = False
    if method == "full":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("embed_positions" not in name)  # Whisper's given sinusoids
        return model.to(device)
    assert method in ("lora", "qlora"), method
    if hasattr(model, "freeze_feature_encoder"):
        model.freeze_feature_encoder()
    lora = LoraConfig(
        r=experiment.adapter.rank,
        lora_alpha=experiment.adapter.alpha,
        lora_dropout=experiment.adapter.dropout,
        target_modules=list(ATTENTION[config.model_type] + FEED_FORWARD[config.model_type]),
        modules_to_save=["projector", "classifier"],
    )
    adapted = get_peft_model(model, lora)
    model.layer_weights.requires_grad_(True)  # a parameter, no module: PEFT cannot be told of it
    return adapted.to(device)


def nf4(compute: torch.dtype) -> BitsAndBytesConfig:
    """4-bit weights with double quantisation, as our side has them; what learns by itself stays as it is."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=["projector", "classifier", "feature_projection.projection"],
    )


def optimizer(model: nn.Module, experiment: Experiment, device: torch.device) -> torch.optim.AdamW:
    """AdamW in the groups of `loop.make_optimizer`: the head at its own rate, no decay on vectors."""
    settings = experiment.optimizer
    head = ("projector", "classifier", "layer_weights")
    groups = []
    for in_head, rate in ((False, settings.lr), (True, settings.head_lr)):
        named = model.named_parameters()
        part = [p for name, p in named if p.requires_grad and any(h in name for h in head) is in_head]
        groups += [
            {"params": [p for p in part if p.ndim > 1], "lr": rate, "weight_decay": settings.weight_decay},
            {"params": [p for p in part if p.ndim <= 1], "lr": rate, "weight_decay": 0.0},
        ]
    return torch.optim.AdamW([group for group in groups if group["params"]], fused=device.type == "cuda")


def arguments(
    experiment: Experiment,
    scratch: str,
    batch_size: int,
    group_by_length: bool,
    steps: int,
    workers: int,
    device: torch.device,
) -> TrainingArguments:
    """What Trainer is told: the experiment's settings, and to do nothing but train."""
    dtype = compute_dtype(experiment.precision, device)
    return TrainingArguments(
        output_dir=scratch,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        train_sampling_strategy="group_by_length" if group_by_length else "random",
        lr_scheduler_type="linear",
        warmup_steps=round(experiment.optimizer.warmup * steps),
        max_grad_norm=experiment.optimizer.clip,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        use_cpu=device.type == "cpu",
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        label_names=["labels"],
        seed=experiment.seed,
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def dataset(extractor: Any, utterances: Iterable[Utterance]) -> list[dict[str, Any]]:
    """Under the names that the length-grouped sampler looks for."""
    return [{extractor.model_input_names[0]: waveform, "labels": label} for waveform, label in utterances]


def collate(extractor: Any, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Features of a batch, as the example's transform makes them of one; an attention mask where the extractor wants
    it (wav2vec2 with layer norms; Whisper's encoder takes none)."""
    name = extractor.model_input_names[0]
    whisper = name == "input_features"
    features = extractor(
        [row[name] for row in rows],
        sampling_rate=SAMPLING_RATE,
        padding="max_length" if whisper else "longest",
        return_tensors="pt",
    )
    return dict(features) | {"labels": torch.tensor([row["labels"] for row in rows])}


class Clock(TrainerCallback):
    """Time and utterances of the steps after the first ``warm_up``; with ``counting``, which is left before the others,
    the operations of those first ones."""

    def __init__(
        self, device: torch.device, utterances: int, batch_size: int, warm_up: int, counting: ExitStack | None
    ) -> None:
        self.device, self.total, self.batch_size = device, utterances, batch_size
        self.warm_up, self.counting, self.counter = warm_up, counting, operations()
        self.started = self.seconds = 0.0
        self.utterances = self.warming = 0
        self.flops_per_utterance: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if self.counting is not None:
            self.counting.enter_context(self.counter)

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        steps_per_epoch = -(-self.total // self.batch_size)
        seen = (state.global_step - 1) % steps_per_epoch * self.batch_size
        size = min(self.batch_size, self.total - seen)
        if state.global_step > self.warm_up:
            self.utterances += size
            return
        self.warming += size
        if state.global_step == self.warm_up:
            if self.counting is not None:
                self.counting.close()
                self.flops_per_utterance = self.counter.get_total_flops() / self.warming
            self.started = now(self.device)

    def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.seconds = now(self.device) - self.started


def operations() -> FlopCounterMode:
    """Counts floating-point operations; torch itself knows neither NF4's product nor attention on a CPU."""

    def four_bit(states: Sequence[int], packed: Any, weight: Sequence[int], *rest: Any, **named: Any) -> int:
        return 2 * math.prod(states) * weight[0]

    def attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *rest: Any, **named: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def attention_backward(gradient: Any, query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> int:
        return sdpa_backward_flop_count(gradient, query, key, value)

    known = {
        torch.ops.bitsandbytes.gemm_4bit: four_bit,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    return FlopCounterMode(display=False, custom_mapping=known)


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def fresh_memory(device: torch.device) -> None:
    """Give back what is left of a run before; on a GPU a new peak is looked for from here on."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
