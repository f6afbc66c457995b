"""The keys of peft's `LoraConfig`, which a TRL script gives its trainer beside the GRPOConfig."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gspo_lightning.errors import UserError

if TYPE_CHECKING:
    from gspo_lightning.migrate.convert import Conversion
    from gspo_lightning.migrate.steps import Notes

PREFIX = "LoraConfig."
_RENAMED = {
    "r": "r", "lora_alpha": "alpha", "target_modules": "target_modules", "target_parameters": "target_parameters",
    "use_rslora": "use_rslora", "init_lora_weights": "init_lora_weights",
}  # fmt: skip
_DEFAULTS: dict[str, Any] = {"r": 8, "lora_alpha": 8}
"""peft's, where ours differ."""
_OFF: dict[str, tuple[Any, ...]] = {
    "bias": ("none",), "use_dora": (False,), "modules_to_save": (None, []), "lora_bias": (False,),
    "rank_pattern": (None, {}), "alpha_pattern": (None, {}), "layers_to_transform": (None,), "layers_pattern": (None,),
    "exclude_modules": (None,), "fan_in_fan_out": (False,), "loftq_config": (None, {}), "task_type": ("CAUSAL_LM",),
    "trainable_token_indices": (None,), "ensure_weight_tying": (False,),
    **dict.fromkeys(
        (
            "megatron_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "use_qalora",
            "alora_invocation_tokens", "monteclora_config", "layer_replication", "use_bdlora",
            "arrow_config", "kasa_config",
        ),
        (None, False),
    ),
}  # fmt: skip
"""Keys without a counterpart, with the values that ask for nothing."""
_NO_EFFECT = (
    "inference_mode", "base_model_name_or_path", "revision", "peft_type", "peft_version", "auto_mapping",
    "runtime_config", "megatron_core", "qalora_group_size",
)  # fmt: skip


def adapter(given: dict[str, Any], result: Conversion, notes: Notes) -> None:
    """Converts the keys of a ``LoraConfig``, written ``LoraConfig.r`` and so on in verdicts and notes.

    Raises:
        UserError: a key that peft 0.21.2 does not have, or that we do not know.
    """
    result.groups["lora"] = "language"
    for key, value in {**_DEFAULTS, **given}.items():
        name = PREFIX + key
        if key in _RENAMED:
            if value is not None:
                result.settings[f"model.lora.{_RENAMED[key]}"] = value
            notes[name] = ("same" if _RENAMED[key] == key else "renamed", f"model.lora.{_RENAMED[key]}")
        elif key == "lora_dropout":
            why = "0: dropout makes old and new log-probabilities differ by noise"
            notes[name] = ("better default" if value else "same", why)
        elif key in _NO_EFFECT or value in _OFF.get(key, ()):
            notes[name] = ("same", "what a new adapter is here")
        elif key in _OFF:
            notes[name] = ("no counterpart", "another adapter than W + scale * B A on chosen modules: docs/models.md")
        else:
            raise UserError(f"{name}: no such setting of a LoRA adapter is known; remove it or correct its name")
    if given.get("target_modules") is None and given.get("target_parameters") is None:
        result.added.append(
            "model.lora.target_modules=all-linear: LoraConfig names none, and peft then takes few that depend on the "
            "model, often [q_proj,v_proj]"
        )
