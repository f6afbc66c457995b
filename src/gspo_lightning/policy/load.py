"""From a folder or hub name to a `Policy`: load, check, freeze, adapt."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from gspo_lightning.errors import UserError
from gspo_lightning.policy.attention import ATTENTION_NAME, register
from gspo_lightning.policy.bundled import resolve_model
from gspo_lightning.policy.model import Policy

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters on the language layers (peft). ``target_modules`` is a name list or a regular expression."""

    r: int = 16
    alpha: int = 32
    target_modules: str | list[str] = "all-linear"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.dropout:
            raise UserError("model.lora.dropout must be 0: dropout makes old and new log-probabilities differ by noise")


@dataclass(frozen=True)
class PolicyLoader:
    """Builds the policy; holds only settings, so that nothing is loaded before `Trainer` asks for it."""

    path: str
    """A folder, a hub name, or ``bundled:<name>`` (see `gspo_lightning.policy.bundled`)."""
    dtype: str = "float32"
    """Dtype of the weights. Mixed precision is the Trainer's; keep float32 here for full fine-tuning."""
    lora: LoraSettings | None = None
    gradient_checkpointing: bool = False
    overrides: dict[str, Any] = field(default_factory=dict)
    """Entries set on the model's config, such as ``attention_dropout: 0.0``."""

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer alone, in a second."""
        return AutoTokenizer.from_pretrained(resolve_model(self.path))

    def load(self) -> Policy:
        """Loads model and tokenizer, puts our attention in place and attaches the adapter."""
        register()
        model = self.load_model()
        _refuse_dropout(model)
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        wrapped: nn.Module = model if self.lora is None else _add_lora(model, self.lora)
        return Policy(wrapped, self.load_tokenizer(), has_adapter=self.lora is not None)

    def load_model(self) -> PreTrainedModel:
        """The bare model with our attention, in training mode (no layer of it may have dropout)."""
        register()
        model = AutoModelForCausalLM.from_pretrained(
            resolve_model(self.path), dtype=_DTYPES[self.dtype], attn_implementation=ATTENTION_NAME, **self.overrides
        )
        return model.train()


def _refuse_dropout(model: nn.Module) -> None:
    config = model.config
    active = {
        key: value
        for key, value in config.to_dict().items()  # type: ignore[union-attr, operator]
        if re.search(r"drop(out)?(_rate|_prob)?$", key) and isinstance(value, float) and value > 0
    }
    if active:
        wanted = ", ".join(f"{key}: 0.0" for key in active)
        raise UserError(
            f"the model's config has dropout ({active}); it breaks the ratio. Set model.overrides to {{{wanted}}}"
        )


def _add_lora(model: PreTrainedModel, settings: LoraSettings) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        target_modules=settings.target_modules,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)
