"""LoRA adapters: their settings, a new one on a model, and one that an earlier run has exported."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from gspo_lightning.errors import UserError
from gspo_lightning.paths import from_home
from gspo_lightning.policy.vision import vision_parts
from gspo_lightning.screen import counted

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NO_ADAPTER = ("gate", "router", "shared_expert_gate", "modality_router", r"mamba\.dt_proj", r"mixer\.dt_proj")
"""Modules without adapters: expert routers, by their names in transformers, and a weight that Mamba's kernels read."""
_SAME = {"r": "r", "lora_alpha": "alpha", "use_rslora": "use_rslora"}
"""Name in an adapter's config -> name in `LoraSettings`, of what says how its weights are to be scaled."""
_BY_DEFAULT = {"r": 8, "lora_alpha": 8, "use_rslora": False}
"""What peft takes for those that an adapter's config lacks."""
_OTHERS = (
    "use_dora", "bias", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias", "alora_invocation_tokens",
    "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "velora_config",
    "trainable_token_indices", "layer_replication",
)  # fmt: skip
"""What else makes an adapter another function of its weights."""
KEEP_THE_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Initialisations of peft that leave the base as it is. The others, such as PiSSA, subtract B A from its weights, and
peft does so again whenever it loads the adapter."""
REPEATABLE = ("pissa", "olora")
"""Those whose change of the base is the same each time."""


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters on the language layers (peft). ``target_modules`` is a name list or a regular expression.

    The last four are settings of peft that are refused, with the reason.

    Raises:
        UserError: a value that cannot be trained with, or would not be what an engine samples from.
    """

    r: int = 16
    alpha: int = 32
    target_modules: str | list[str] = "all-linear"
    dropout: float = 0.0
    """Must be 0, as ``lora_dropout``, its name in peft."""
    use_rslora: bool = False
    """Multiply by alpha / sqrt(r) instead of alpha / r (arXiv 2312.03732), so that a larger r keeps its step size."""
    init_lora_weights: bool | str = True
    """First values of A: True (Kaiming, uniform) or ``gaussian``. B is 0, so training begins at the model."""
    target_parameters: list[str] | None = None
    """Stacked weights of experts that are no modules, such as ``mlp.experts.gate_up_proj`` of gpt-oss."""
    adapter: str | None = None
    """Folder of an exported adapter to go on from; None begins a new one."""
    lora_dropout: float = 0.0
    use_dora: bool = False
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        if self.r < 1 or self.alpha < 1:
            raise UserError(f"model.lora.r={self.r} and model.lora.alpha={self.alpha} must be at least 1")
        for name in ("dropout", "lora_dropout"):
            if getattr(self, name):
                raise UserError(
                    f"model.lora.{name} must be 0: dropout makes old and new log-probabilities differ by noise"
                )
        if self.use_dora:
            raise UserError(
                "model.lora.use_dora=true: what vLLM gets is W + scale * B A, without DoRA's magnitudes, and it takes "
                "no adapter that has them; leave it out"
            )
        if self.modules_to_save:
            raise UserError(
                f"model.lora.modules_to_save={self.modules_to_save}: whole trained modules would not be in what vLLM "
                "gets; leave it out, or train all weights (lora=none)"
            )
        if self.init_lora_weights not in (True, "gaussian"):
            raise UserError(
                f"model.lora.init_lora_weights={self.init_lora_weights}: training would not begin at the model that "
                "the reference and vLLM have; use true or gaussian, with which B is 0"
            )
        if self.adapter is not None and self.init_lora_weights is not True:
            raise UserError(
                f"model.lora.init_lora_weights={self.init_lora_weights} has no effect: the first values are those of "
                f"model.lora.adapter={self.adapter}; set it to true"
            )


def add_lora(model: PreTrainedModel, settings: LoraSettings, train_vision: bool) -> nn.Module:
    """The peft model around ``model``: adapters on its language layers, and with ``train_vision`` on its vision half.

    ``all-linear`` leaves out routers of experts, and modules whose weight a layer reads without calling them.

    Raises:
        UserError: an adapter would be on an embedding whose weight is read without it, or ``r`` is above every rank.
    """
    from peft import LoraConfig, get_peft_model

    _check_rank(model, settings.r)
    without = [] if train_vision else list(vision_parts(model))
    if settings.target_modules == "all-linear":
        without += _NO_ADAPTER
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        use_rslora=settings.use_rslora,
        init_lora_weights=settings.init_lora_weights,
        target_modules=settings.target_modules,
        target_parameters=settings.target_parameters,
        exclude_modules=rf".*\b({'|'.join(without)})\b.*" if without else None,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(model, config)
    _refuse_embeddings(model)
    if settings.target_modules == "all-linear":
        # For some families peft finds the routers in another way, together with their experts.
        for name, parameter in wrapped.named_parameters():
            if re.search(rf"\.({'|'.join(_NO_ADAPTER)})\..*lora_", name):
                parameter.requires_grad_(False)
    return wrapped


def _check_rank(model: nn.Module, r: int) -> None:
    """No change of a layer has a rank above its smaller side; models with layers of other kinds are not asked."""
    most = max((min(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)), default=r)
    if r > most:
        raise UserError(f"model.lora.r={r} is above {most}, the highest rank that a layer of this model has; lower it")


def _refuse_embeddings(model: PreTrainedModel) -> None:
    """Log-probabilities read the output embedding's matrix alone, and a tied matrix is that of both embeddings."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if hasattr(head, "base_layer"):
        raise UserError(
            "model.lora.target_modules: an adapter on the output embedding would never be trained, since "
            "log-probabilities read its matrix alone; leave it out"
        )
    if hasattr(table, "base_layer") and head is not None and head.weight is table.base_layer.weight:
        raise UserError(
            "model.lora.target_modules: the input embedding's matrix is also the output embedding's (tied), so that an "
            "adapter on one of them cannot be merged; leave it out"
        )


def adapter_config(folder: Path) -> dict[str, Any]:
    """What ``adapter_config.json`` says.

    Raises:
        UserError: there is no LoRA adapter in the folder.
    """
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        inner = " (its model/ does)" if (folder / "model" / ADAPTER_CONFIG).is_file() else ""
        raise UserError(f"{folder} holds no adapter{inner}: {ADAPTER_CONFIG} is not there; give the folder that has it")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); export the adapter again") from error
    if not isinstance(content, dict) or content.get("peft_type") != "LORA":
        raise UserError(f"{file} is of no LoRA adapter, and no other kind is known; give one that peft saved as LORA")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"{folder} has no {ADAPTER_WEIGHTS}; save the adapter there as safetensors")
    return content


def check_adapter(wrapped: nn.Module, settings: LoraSettings) -> dict[str, Any]:
    """Refuses a ``settings.adapter`` of other settings than the new one; returns what its config says.

    Args:
        wrapped: the result of `add_lora`.
        settings: of the adapter.

    Raises:
        UserError: it is not there, or another kind of adapter.
    """
    folder = from_home(str(settings.adapter))
    stored, own = {**_BY_DEFAULT, **adapter_config(folder)}, wrapped.peft_config["default"]  # type: ignore[index]
    wrong = [f"model.lora.{ours}={stored[name]}" for name, ours in _SAME.items() if stored[name] != getattr(own, name)]
    if wrong:
        raise UserError(f"model.lora.adapter={folder} was trained with other settings; set {' '.join(wrong)}")
    for name in _OTHERS:
        if (stored.get(name) or None) != (getattr(own, name) or None):
            raise UserError(f"model.lora.adapter={folder}: an adapter with {name}={stored.get(name)} is refused")
    if (first := stored.get("init_lora_weights", True)) not in KEEP_THE_BASE:
        how = f"python -m gspo_lightning.policy.merge {folder} OUT" if first in REPEATABLE else "where it was trained"
        raise UserError(
            f"model.lora.adapter={folder} began with init_lora_weights={first}, which changed the base too; merge it "
            f"into its base ({how}) and train on that"
        )
    return stored


def _which_modules(stored: dict[str, Any]) -> str:
    """What to do where the modules of an adapter are others than those of the new one."""
    layers = stored.get("layers_to_transform")
    if layers is None:
        return "set model.lora.target_modules and model.train_vision as they were in its run"
    numbers = "|".join(map(str, [layers] if isinstance(layers, int) else layers))
    names = "|".join(sorted(stored.get("target_modules") or []))
    return (
        "it is on some layers alone (layers_to_transform); set "
        f"\"model.lora.target_modules='.*[.]({numbers})[.].*({names})'\""
    )


def load_adapter(wrapped: nn.Module, settings: LoraSettings) -> str:
    """Gives a new adapter the weights of ``settings.adapter``, which must be of the same settings.

    Args:
        wrapped: the result of `add_lora`.
        settings: of the adapter.

    Returns:
        The folder or hub name of the model that it was trained on.

    Raises:
        UserError: it is another kind of adapter, or for other modules.
    """
    stored, folder = check_adapter(wrapped, settings), from_home(str(settings.adapter))
    fill(wrapped, folder, _which_modules(stored))
    return str(stored.get("base_model_name_or_path"))


def fill(wrapped: nn.Module, folder: Path, fix: str) -> None:
    """Reads the adapter's weights into a peft model that has an adapter of the same shape.

    Raises:
        UserError: its weights are not those that the model asks for.
    """
    load: Any = wrapped.load_adapter
    try:
        found = load(str(folder), "default", is_trainable=True, torch_device="cpu")
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        cause = " ".join(str(error).split())[:160]
        raise UserError(f"adapter {folder} does not fit the model ({type(error).__name__}: {cause}); {fix}") from error
    lacking = sorted(name for name in found.missing_keys if "lora_" in name)
    surplus = sorted(found.unexpected_keys)
    for names, one, several in (
        (lacking, "weight is not there", "weights are not there"),
        (surplus, "weight has no place in the model", "weights have no place in the model"),
    ):
        if names:
            found_wrong = counted(len(names), one, several)
            raise UserError(f"adapter {folder}: {found_wrong}, the first is {names[0]}; {fix}")
