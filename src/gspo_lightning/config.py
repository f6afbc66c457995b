"""From a composed Hydra config to objects, and every check that needs no model."""

from __future__ import annotations

import inspect
import types
import typing
import warnings
from typing import Any, Literal, Union, get_args, get_origin

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gspo_lightning.callbacks.checkpoint import StreamingCheckpointIO
from gspo_lightning.errors import UserError
from gspo_lightning.module import GSPOModule
from gspo_lightning.objective.refusals import check_objective
from gspo_lightning.policy.load import check_quantization
from gspo_lightning.targets import check_targets
from gspo_lightning.types import SamplingParams
from gspo_lightning.validation import ValidationSettings

_HYDRA_KEYS = {"_target_", "_partial_", "_args_", "_convert_", "_recursive_"}


def resolve(cfg: DictConfig) -> dict[str, Any]:
    """The config with all interpolations resolved and machine-dependent choices made, as plain containers."""
    try:
        plain: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"config: {' '.join(str(error).split())}") from error
    plain["trainer"]["precision"] = _precision(plain["trainer"]["precision"], plain["trainer"]["accelerator"])
    if plain["update"]["max_tokens_per_microbatch"] == "auto":
        plain["update"]["max_tokens_per_microbatch"] = _token_budget(plain)
    return plain


def check(plain: dict[str, Any]) -> None:
    """Refuses, in one line, what is wrong with a config before anything is loaded."""
    # First, because it is what a machine without a GPU cannot get around.
    if plain["trainer"]["accelerator"] in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(
            f"trainer.accelerator={plain['trainer']['accelerator']}: there is no GPU here; accelerator=auto takes "
            "what there is, and experiment=gspo_qwen_vl_tiny runs the vision path offline on a CPU"
        )
    check_quantization(plain["model"].get("quantization"), plain["model"].get("lora"))
    check_targets(plain)
    _check_node(plain, "")
    _check_roots(plain)
    update, rollout, data = plain["update"], plain["rollout"], plain["data"]
    longest = data["max_prompt_length"] + rollout["max_completion_length"]
    if update["max_tokens_per_microbatch"] < longest:
        raise UserError(
            f"update.max_tokens_per_microbatch={update['max_tokens_per_microbatch']} is less than one sequence "
            f"(data.max_prompt_length + rollout.max_completion_length = {longest}); raise it to at least that"
        )
    _check_precision(plain)
    if rollout["temperature"] <= 0:
        raise UserError(
            f"rollout.temperature={rollout['temperature']} must be above 0: greedy completions are all equal"
        )
    if rollout["repetition_penalty"] != 1.0:
        raise UserError(
            "rollout.repetition_penalty must be 1.0 in training: it depends on the history, so the policy's "
            "log-probabilities would not be those of the distribution that was sampled"
        )
    if plain["objective"].get("mismatch"):
        for key, everything in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
            if rollout[key] != everything:
                raise UserError(
                    f"rollout.{key}={rollout[key]} contradicts objective.mismatch: the sampler leaves tokens out, so "
                    f"the weights would compare two supports; set rollout.{key}={everything}, or mismatch=none"
                )
    _report(plain)


_LEAST = {
    "seed": 0,
    "overfit_rows": 0,
    "max_rollouts": 1,
    "checkpoint.every_n_rollouts": 1,
    "checkpoint.grace_s": 0,
    "update.num_iterations": 1,
    "update.num_minibatches": 1,
    "rollout.num_generations": 2,
    "rollout.max_completion_length": 1,
    "data.prompts_per_rollout": 1,
    "data.max_prompt_length": 1,
    "validation.num_generations": 1,
    "dynamic_sampling.max_draws": 0,
    "update.ref_sync_every_n_rollouts": 0,
}
"""Smallest value of the settings that are counts."""


def _check_precision(plain: dict[str, Any]) -> None:
    """Updates of all weights at usual rates are smaller than the spacing of bfloat16: they would be rounded away."""
    if plain["model"].get("lora"):
        return
    for key, value, fix in (
        ("trainer.precision", plain["trainer"]["precision"], "bf16-mixed"),
        ("model.dtype", plain["model"]["dtype"], "float32"),
    ):
        if value in ("bf16-true", "16-true", "transformer-engine", "bfloat16"):
            raise UserError(
                f"{key}={value} rounds the updates of full fine-tuning away; use {key}={fix}, "
                "or train an adapter (lora=language)"
            )


def _check_roots(plain: dict[str, Any]) -> None:
    for key, least in _LEAST.items():
        value: Any = plain
        for part in key.split("."):
            value = value[part]
        if isinstance(value, bool) or not isinstance(value, int):
            raise UserError(f"{key}={value!r} must be a whole number")
        if value < least:
            why = "; a group of one has no one to be compared with" if key == "rollout.num_generations" else ""
            raise UserError(f"{key}={value} must be at least {least}{why}")


def _report(plain: dict[str, Any]) -> None:
    objective = _build(plain["objective"])
    findings = check_objective(
        objective,
        num_iterations=plain["update"]["num_iterations"],
        num_minibatches=plain["update"]["num_minibatches"],
        num_generations=plain["rollout"]["num_generations"],
        prompts_per_rollout=plain["data"]["prompts_per_rollout"],
        ref_sync_every_n_rollouts=plain["update"]["ref_sync_every_n_rollouts"],
        ref_model_mixup_alpha=plain["update"]["ref_model_mixup_alpha"],
        has_adapter=bool(plain["model"].get("lora")),
    )
    for finding in findings:
        if finding.kind == "warning" or (finding.kind == "no_effect" and plain["allow_no_effect"]):
            warnings.warn(finding.message, stacklevel=2)
        else:
            hint = " (allow_no_effect=true turns this into a warning)" if finding.kind == "no_effect" else ""
            raise UserError(finding.message + hint)


# ---------------------------------------------------------------- types of `_target_` nodes


def _check_node(node: Any, key: str) -> None:
    """Compares every ``_target_`` node with the signature it will be called with."""
    if isinstance(node, list):
        for number, item in enumerate(node):
            _check_node(item, f"{key}[{number}]")
    if not isinstance(node, dict):
        return
    for name, value in node.items():
        _check_node(value, f"{key}.{name}" if key else str(name))
    if "_target_" in node and not str(node["_target_"]).startswith("hydra.utils."):
        _check_call(node, key)


def _check_call(node: dict[str, Any], key: str) -> None:
    try:
        target = get_object(node["_target_"])
    except Exception as error:  # Hydra wraps whatever importing the user's module raised
        raise UserError(f"{key}._target_: cannot import {node['_target_']} ({error.__cause__ or error})") from error
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:
        return  # a class of C code, such as datetime.timedelta, does not say
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    hints = _hints(target)
    for name, value in node.items():
        if name in _HYDRA_KEYS:
            continue
        if name not in parameters and not open_ended:
            known = ", ".join(sorted(set(parameters) - {"self", "args", "kwargs"}))
            raise UserError(f"{key}.{name}: {node['_target_']} has no such setting; it has {known}")
        hint = hints.get(name)
        if hint is not None and not isinstance(value, dict) and not _fits(value, hint):
            raise UserError(f"{key}.{name}={value!r} has the wrong type; expected {_spell(hint)}")


def _hints(target: Any) -> dict[str, Any]:
    source = target.__init__ if inspect.isclass(target) else target
    try:
        return typing.get_type_hints(source)
    except (NameError, TypeError):  # names only known to type checkers
        return {}


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    if hint is type(None):
        return value is None
    if origin in (list, tuple) or hint in (list, tuple):
        return isinstance(value, list | tuple)
    if origin is dict or hint is dict:
        return isinstance(value, dict)
    return hint is Any or value is not None


def _spell(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    return getattr(hint, "__name__", None) if inspect.isclass(hint) else str(hint).replace("typing.", "")  # type: ignore[return-value]


# ---------------------------------------------------------------- objects


def build_module(plain: dict[str, Any]) -> GSPOModule:
    """The LightningModule of a resolved config; loads nothing yet."""
    rollout = dict(plain["rollout"])
    engine = rollout.pop("engine")
    validation = {k: v for k, v in plain["validation"].items() if k != "every_n_rollouts"}
    return GSPOModule(
        policy_loader=_build(plain["model"]),
        engine=_build(engine),
        rewards=_build(plain["reward"]),
        objective=_build(plain["objective"]),
        advantages=_build(plain["advantages"]),
        sampling=SamplingParams(**{**rollout, "stop": tuple(rollout["stop"])}),
        optimizer=_build(plain["optimizer"]),
        schedule=_build(plain["scheduler"]),
        update=_build(plain["update"]),
        validation=ValidationSettings(**validation),
        max_rollouts=plain["max_rollouts"],
        seed=plain["seed"],
        max_draws=plain["dynamic_sampling"]["max_draws"],
    )


def _build(node: Any) -> Any:
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        # What the constructor said is the message; Hydra's wrapping around it is not the user's business.
        raise UserError(str(error.__cause__ or error)) from error


def build_data(plain: dict[str, Any]) -> Any:
    """The data module, with its dataset and templates checked."""
    datamodule = _build({**plain["data"], "task": _task(plain)})
    rewards = _build(plain["reward"])
    rewards.check()
    datamodule.check(rewards.required_columns())
    return datamodule


def _task(plain: dict[str, Any]) -> Any:
    """The node of the task, or of its first rows."""
    task, count = plain["data"]["task"], plain["overfit_rows"]
    if not count:
        return task
    if not isinstance(task, dict):
        raise UserError(f"overfit_rows={count} needs a data group whose task is an object; data.task is {task!r}")
    return {"_target_": "gspo_lightning.data.first_rows.FirstRows", "task": task, "count": count}


def rollouts_of_epochs(plain: dict[str, Any], rollouts_per_epoch: int | None) -> int:
    """The length of the run: ``max_rollouts``, or that of ``num_epochs`` passes over a finite task."""
    epochs = plain["num_epochs"]
    if epochs is None:
        return plain["max_rollouts"]
    if isinstance(epochs, bool) or not isinstance(epochs, int | float) or not 0 < epochs < float("inf"):
        raise UserError(f"num_epochs={epochs!r} must be a number above 0, or null")
    if plain["dynamic_sampling"]["max_draws"]:
        raise UserError(
            f"num_epochs={epochs} counts one prompt per place in a rollout, but dynamic_sampling.max_draws takes more "
            "rows than that; set max_rollouts instead"
        )
    if rollouts_per_epoch is None:
        raise UserError(
            f"num_epochs={epochs}: task {plain['data']['task'].get('name', '')} never runs out; set "
            "max_rollouts instead"
        )
    return max(1, round(epochs * rollouts_per_epoch))


def build_callbacks(plain: dict[str, Any]) -> list[Any]:
    """The callbacks of the config's ``callbacks`` group, in order."""
    return [_build(node) for node in (plain["callbacks"] or {}).values() if isinstance(node, dict)]


def build_trainer(plain: dict[str, Any], callbacks: list[Any]) -> Any:
    """The Lightning Trainer with what manual optimization and a prompt stream need."""
    every = plain["validation"]["every_n_rollouts"]
    loggers = [_build(node) for node in (plain["logger"] or {}).values() if isinstance(node, dict)]
    return instantiate(
        plain["trainer"],
        callbacks=callbacks,
        logger=loggers or False,
        plugins=[StreamingCheckpointIO()],
        max_epochs=-1,
        # A batch count no run reaches: validation inside the run is off, validation before and after is not.
        val_check_interval=every or 10**12,
        check_val_every_n_epoch=None,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        inference_mode=False,
        _convert_="all",
    )


def _token_budget(plain: dict[str, Any]) -> int:
    """Tokens that keep the device busy: on CPUs more of them only take memory. At least the longest sequence."""
    on_gpu = plain["trainer"]["accelerator"] in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return max(8192 if on_gpu else 1024, plain["data"]["max_prompt_length"] + plain["rollout"]["max_completion_length"])


def _precision(precision: str, accelerator: str) -> str:
    """``auto`` is bf16-mixed where matrix products in bfloat16 are fast in hardware, else 32-true."""
    if precision != "auto":
        return precision
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    return "bf16-mixed" if cpu_has_bf16() else "32-true"


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AVX512-BF16 or AMX)."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
