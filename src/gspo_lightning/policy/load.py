"""From a folder or hub name to a `Policy`: load, check, freeze, adapt."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gspo_lightning.errors import UserError
from gspo_lightning.packing.compiling import allow_graphs
from gspo_lightning.paths import from_home
from gspo_lightning.policy.adapter import LoraSettings as LoraSettings
from gspo_lightning.policy.adapter import add_lora, load_adapter
from gspo_lightning.policy.attention import AttentionForm, attention_implementation, register
from gspo_lightning.policy.bundled import resolve_model
from gspo_lightning.policy.check import SLOW
from gspo_lightning.policy.lean import lighten
from gspo_lightning.policy.model import Policy, without_adapter
from gspo_lightning.policy.packable import can_pack, may_pack
from gspo_lightning.policy.patches import multiply_patches
from gspo_lightning.policy.processor import load_processor
from gspo_lightning.policy.quantization import keep_packing, quantization_arguments, say_nothing_of_casts
from gspo_lightning.policy.reading import load_config, load_tokenizer, reading
from gspo_lightning.policy.vision import FAMILIES, has_vision, packs_images, vision_parts
from gspo_lightning.screen import counted

Dtype = Literal["float32", "bfloat16", "float64"]
DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class PolicyLoader:
    """Builds the policy; holds only settings, so that nothing is loaded before `Trainer` asks for it."""

    path: str
    """A folder, a hub name, or ``bundled:<name>`` (see `gspo_lightning.policy.bundled`)."""
    dtype: Dtype = "float32"
    """Dtype of the weights. Mixed precision is the Trainer's; keep float32 here for full fine-tuning."""
    lora: LoraSettings | None = None
    gradient_checkpointing: bool = False
    attention: AttentionForm = "auto"
    """Attention of packed rows: ``flex`` is one compiled kernel for GPUs, ``sdpa`` computes block by block, ``auto``
    suits device and model."""
    compile: bool = False
    """Compile the layers (torch.compile): a minute at the start, fewer and larger kernels on a GPU."""
    quantization: Literal["nf4", "int8"] | None = None
    """The base in 4 bits (GPU and CPU) or 8 bits (GPU) by bitsandbytes, for LoRA."""
    train_vision: bool = False
    """Train the vision tower too: its weights, or with ``lora`` adapters on it. Models without one refuse it."""
    train_language: bool = True
    """Train the language half; False trains the vision tower alone, and needs ``train_vision``."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Entries set on the model's config, such as ``attention_dropout: 0.0``."""

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer alone, in a second."""
        return load_tokenizer(self.path)

    def load(self) -> Policy:
        """Loads model and tokenizer, installs our attention and attaches the adapter."""
        model = self.load_model()
        _refuse_dropout(model)
        if self.gradient_checkpointing:
            if not model.supports_gradient_checkpointing:
                raise UserError(
                    f"model.gradient_checkpointing=true: {type(model).__name__} does not support it; set it to false"
                )
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        wrapped: nn.Module = model
        if self.lora is not None:
            with reading(self.path, "the adapter", "check model.lora.target_modules"):
                wrapped = add_lora(model, self.lora, self.train_vision)
            if self.lora.adapter is not None:
                self._load_adapter(wrapped, self.lora)
        return self.as_policy(wrapped, self.load_tokenizer())

    def _load_adapter(self, wrapped: nn.Module, lora: LoraSettings) -> None:
        trained_on, base = load_adapter(wrapped, lora), resolve_model(self.path)
        if from_home(trained_on).resolve() != Path(base).resolve():
            rank_zero_warn(f"model.lora.adapter={lora.adapter} was trained on {trained_on}, and is put on {base}")

    def load_reference(self, policy: Policy) -> Policy:
        """A frozen copy of the model as it was before training; shares the features of a frozen vision tower."""
        reference = self.as_policy(self.load_model(), policy.tokenizer, features_from=policy)
        reference.requires_grad_(False)
        return reference

    def as_policy(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, features_from: Policy | None = None
    ) -> Policy:
        """The policy around a loaded model."""
        config = load_config(self.path)
        return Policy(
            model,
            tokenizer,
            has_vision=packs_images(config),
            processor=load_processor(resolve_model(self.path)) if has_vision(config) else None,
            is_padded=not can_pack(without_adapter(model)),
            features_from=features_from,
        )

    def load_model(self) -> PreTrainedModel:
        """The bare model with our attention, in training mode (no layer of it may have dropout)."""
        register()
        config = load_config(self.path)
        self._check_parts(config)
        model = self._read(config)
        if getattr(model, "is_quantized", False):  # asked for, or because the folder holds such weights
            keep_packing(model)
            say_nothing_of_casts()
        if self.dtype == "float64" and model._can_set_experts_implementation():
            model.set_experts_implementation("eager")  # the grouped product of the others has no float64
        self._freeze_parts(model)
        self.change_layers(model)
        return model.train()

    def change_layers(self, model: PreTrainedModel) -> None:
        """Compiles or lightens the layers; patches of images become one matrix product (`multiply_patches`)."""
        multiply_patches(model)
        if self.compile:
            compile_layers(model)
        else:
            lighten(model, recomputed=self.gradient_checkpointing)

    def _check_parts(self, config: Any) -> None:
        """Refuses to train a half that the model lacks, or that cannot be trained."""
        if self.train_vision and not has_vision(config):
            raise UserError(f"model.train_vision=true has no effect: {self.path} has no vision tower; remove it")
        if self.train_vision and not packs_images(config):
            raise UserError(
                f"model.train_vision=true: the vision tower of {config.model_type} stays frozen; those of "
                f"{', '.join(FAMILIES)} can be trained"
            )
        if not self.train_language and (self.lora is not None or not self.train_vision):
            raise UserError(
                "model.train_language=false trains the vision tower alone: it needs model.train_vision=true and "
                "lora=none"
            )
        check_attention(self.attention, self.dtype)

    def _read(self, config: Any) -> PreTrainedModel:
        """Loads the weights, with the quantization and attention that were asked for."""
        attention = attention_implementation(self.attention, packs_images(config))
        if not may_pack(config):
            what = "reads images" if has_vision(config) else "names its layers or attends"
            rank_zero_warn(f"model type {config.model_type} {what} in a way that packing does not know; {SLOW}")
            attention = "eager"
        kind: Any = AutoModelForImageTextToText if has_vision(config) else AutoModelForCausalLM
        quantised = quantization_arguments(self.quantization, self.lora, self.path, config)
        with reading(self.path, "the model", "check the folder and model.overrides"):
            model, found = kind.from_pretrained(
                resolve_model(self.path),
                dtype=DTYPES[self.dtype],
                attn_implementation=attention,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **quantised,
                **self.overrides,
            )
        _refuse_random_weights(self.path, found)
        return model

    def _freeze_parts(self, model: PreTrainedModel) -> None:
        if not self.train_vision:
            for part in vision_parts(model).values():
                part.requires_grad_(False)
        if not self.train_language:
            model.requires_grad_(False)
            model.model.visual.requires_grad_(True)


def check_attention(form: AttentionForm, dtype: str) -> None:
    """Refuses the one-kernel form of attention where it cannot be compiled.

    Raises:
        UserError: there is no GPU, or the weights are float64.
    """
    if form == "flex" and (dtype == "float64" or not torch.cuda.is_available()):
        why = "needs a GPU, and there is none here" if dtype != "float64" else "has no kernel for model.dtype=float64"
        raise UserError(f"model.attention=flex {why}; use auto, which takes sdpa there")


def compile_layers(model: PreTrainedModel) -> None:
    """Compiles every layer of the language half at its first forward; from the second, for all lengths.

    One graph serves all layers. A cache asks each layer for its number, which would otherwise be a constant: every
    layer would need its own graph, and those beyond the limit would not be compiled at all, not even in training. The
    settings for this hold for all of torch.compile in this process, since layers are compiled when they run.

    Raises:
        UserError: the model's layers are not found where those of other models are.
    """
    layers: Any = getattr(model.get_decoder(), "layers", None)
    if layers is None:
        raise UserError(f"model.compile=true: the layers of {type(model).__name__} are not known; set it to false")
    allow_graphs()
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    for layer in layers:
        layer.compile()


def _refuse_random_weights(path: str, found: dict[str, Any]) -> None:
    """Refuses missing weights, which transformers draws at random with no more than a log line."""
    mismatched = {
        str(name): f" ({tuple(stored)}, not {tuple(wanted)})" for name, stored, wanted in found["mismatched_keys"]
    }
    wrong = {**dict.fromkeys(found["missing_keys"], ""), **mismatched}
    if wrong:
        first = min(wrong)
        raise UserError(
            f"model.path={path}: {counted(len(wrong), 'weight is', 'weights are')} missing or of another shape "
            f"and would be random, the first is {first}{wrong[first]}; check the folder and model.overrides"
        )


def _refuse_dropout(model: nn.Module) -> None:
    """Refuses what a layer draws at random in training: dropout, and the noise of routers of experts."""
    if model.config.model_type == "phimoe":  # type: ignore[union-attr]
        raise UserError(
            "models of type phimoe draw the experts of a token at random in training, with which the ratio would "
            "compare noise; use another model"
        )
    active = _dropouts(model.config.to_dict())  # type: ignore[union-attr, operator]
    if active:
        wanted = _flow(_dropouts(model.config.to_dict(), instead=0.0))  # type: ignore[union-attr, operator]
        raise UserError(
            f"the model's config has dropout or noise ({active}), with which the ratio would compare noise; add "
            f"'+model.overrides={wanted}' to the command line"
        )


def _dropouts(config: dict[str, Any], instead: float | None = None) -> dict[str, Any]:
    """The rates above 0 of a config and of the configs within it, or ``instead`` in their places."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            if inner := _dropouts(value, instead):
                found[key] = inner
        elif (
            isinstance(value, float) and value > 0 and re.search(r"(drop(out)?(_rate|_prob)?|jitter_(noise|eps))$", key)
        ):
            found[key] = value if instead is None else instead
    return found


def _flow(settings: dict[str, Any]) -> str:
    """The settings in the syntax of Hydra's command line."""
    items = (f"{key}: {_flow(value) if isinstance(value, dict) else value}" for key, value in settings.items())
    return f"{{{', '.join(items)}}}"
