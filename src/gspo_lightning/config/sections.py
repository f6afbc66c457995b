"""Checks names and types in the config sections without ``_target_``, against their files and dataclasses."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from importlib.resources import files
from typing import Any

from omegaconf import OmegaConf

from gspo_lightning.config.types import check_values, hints_of
from gspo_lightning.errors import UserError
from gspo_lightning.training.validation import ValidationSettings
from gspo_lightning.types import SamplingParams

_OF_THE_ROOT = ("experiment", "debug", "hparams_search")
"""Groups whose files hold settings of other sections; without that line, they would be a section of their own."""
_NEEDED = {
    "module": ("_target_",),
    "model": ("_target_", "path", "dtype"),
    "data": ("_target_", "task", "prompts_per_rollout", "max_prompt_length"),
    "reward": ("_target_",),
    "objective": ("_target_",),
    "advantages": ("_target_",),
    "rollout": ("num_generations", "max_completion_length", "temperature", "repetition_penalty", "stop", "engine"),
    "update": (
        "_target_", "num_iterations", "num_minibatches", "max_tokens_per_microbatch", "keep_zero_advantage",
        "ref_sync_every_n_rollouts", "ref_model_mixup_alpha",
    ),
    "optimizer": ("_target_",),
    "scheduler": ("_target_",),
    "validation": ("every_n_rollouts",),
    "trainer": ("_target_", "accelerator", "devices", "num_nodes", "strategy", "precision"),
}  # fmt: skip
"""Names that each group must have, whichever choice or custom file it comes from."""
_TYPES = {
    "": {"ckpt_path": str | None},
    "checkpoint": {"keep_best": str | None},
    "export": {"push_to_hub": str | None},
}
"""Types of settings whose default values do not show them."""
_SAMPLING = ("rollout", SamplingParams, "engine")
_VALIDATION = ("validation", ValidationSettings, "every_n_rollouts")

_LEAST = {
    "seed": 0,
    "overfit_rows": 0,
    "max_rollouts": 1,
    "checkpoint.every_n_rollouts": 1,
    "checkpoint.grace_s": 0,
    "checkpoint.keep_last": 0,
    "update.num_iterations": 1,
    "update.num_minibatches": 1,
    "rollout.num_generations": 1,
    "rollout.max_completion_length": 1,
    "data.prompts_per_rollout": 1,
    "data.max_prompt_length": 1,
    "data.validation_batch_size": 1,
    "validation.num_generations": 1,
    "validation.num_samples": 0,
    "validation.every_n_rollouts": 1,
    "trainer.num_nodes": 1,
    "dynamic_sampling.max_draws": 0,
    "update.ref_sync_every_n_rollouts": 0,
}
"""Smallest value of the settings that are counts."""
MOST_HELD_OUT = 1_000_000
"""Most held-out rows: they are kept in memory."""
_MAY_BE_NULL = ("max_rollouts", "validation.every_n_rollouts")

_NUMBERS = ("objective", "advantages", "rollout", "update", "scheduler", "validation")
"""Sections whose numbers must be finite."""
_MAY_BE_INFINITE = (
    "update.max_grad_norm", "objective.epsilon", "objective.epsilon_high", "objective.delta",
    "objective.off_policy_mask_threshold",
)  # fmt: skip
"""Limits that may be infinite, which switches them off."""


def check_sections(plain: dict[str, Any], used: Collection[str] = ()) -> None:
    """Refuses, in one line, an unknown or missing setting, a number that is not finite, or a value of the wrong type.

    Args:
        plain: the resolved config. Nodes with a ``_target_`` are left to `types.check_calls`.
        used: names at the root that interpolations refer to, such as a user's own variable.
    """
    root, elsewhere = _root()
    for name in _OF_THE_ROOT:
        if isinstance(plain.get(name), dict):
            raise UserError(f"{name}: the file that is chosen must begin with the line `# @package _global_`")
    _check_names("", {name: value for name, value in plain.items() if name not in used}, root, elsewhere)
    _check_there("", plain, root)
    sections = {name: node for name, node in root.items() if isinstance(node, dict) and "_target_" not in node}
    for name, node in sections.items():
        _check_names(name, plain[name], node)
        _check_there(name, plain[name], node)
    for name, owner, more in (_SAMPLING, _VALIDATION):
        _check_names(name, plain[name], {**hints_of(owner), more: None})
    for name, needed in _NEEDED.items():
        _check_there(name, plain[name], needed)
    _check_engine(plain["rollout"]["engine"])
    _check_objects(plain)
    _check_counts(plain, _LEAST)
    _check_held_out(plain["data"])
    _check_finite(plain)
    if plain["max_rollouts"] is None and plain["num_epochs"] is None:
        raise UserError("max_rollouts=null and num_epochs=null: nothing ends the run; set one of them")
    for name, node in (("", root), *sections.items()):
        hints = {key: bool for key, value in node.items() if isinstance(value, bool)}
        check_values(plain[name] if name else plain, name, hints | _TYPES.get(name, {}))
    for name, owner, _ in (_SAMPLING, _VALIDATION):
        check_values(plain[name], name, hints_of(owner))


def check_data(data: Any) -> None:
    """The same for the section ``data`` alone."""
    _check_there("data", data, _NEEDED["data"])
    _check_counts({"data": data}, {key: least for key, least in _LEAST.items() if key.startswith("data.")})
    _check_held_out(data)


def choices_of(group: str) -> list[str]:
    """Names of the files of a config group; empty if there is no such group."""
    folder = files("gspo_lightning.conf").joinpath(group)
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


@functools.cache
def _root() -> tuple[dict[str, Any], dict[str, str]]:
    """The settings of ``conf/train.yaml`` and its groups with their defaults; and the path of each relocated group."""
    conf = files("gspo_lightning.conf")
    root: dict[str, Any] = _read(conf.joinpath("train.yaml").read_text(encoding="utf-8"))
    elsewhere: dict[str, str] = {}
    choices = [entry for entry in root.pop("defaults") if isinstance(entry, dict)]
    del root["hydra"]
    for group, choice in (item for entry in choices for item in entry.items()):
        if choice is None or group.startswith("override "):
            continue
        text = conf.joinpath(group, f"{choice}.yaml").read_text(encoding="utf-8")
        package = text.partition("@package ")[2].split()[0] if "@package " in text else group
        if package == "_global_":
            root |= _read(text)
        elif package == group:
            root[group] = None  # what is in it depends on the choice
        else:
            elsewhere[group] = f"{package}.{group}"
    return root, elsewhere


def _read(text: str) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.create(text))  # type: ignore[return-value]


def _check_names(section: str, node: Any, known: dict[str, Any], elsewhere: dict[str, str] | None = None) -> None:
    """Refuses an unknown name in a node; ``elsewhere`` maps names to the path under which they are known."""
    if not isinstance(node, dict):
        raise UserError(f"{section}={node!r} must be a section with {', '.join(known)}")
    for name in node:
        if name in known:
            continue
        spelled = {**{key: key for key in known}, **(elsewhere or {})}
        prefix = f"{section}." if section else ""
        others = f"; {section} has {', '.join(known)}" if section else ", and nothing refers to it"
        near = [spelled[match] for match in get_close_matches(str(name), spelled, n=1, cutoff=0.4)]
        hint = "".join(f", the nearest name is {n if '.' in n else prefix + n}" for n in near)
        raise UserError(f"{prefix}{name}: there is no such setting{hint}{others}")


def _check_there(section: str, node: Any, needed: Collection[str]) -> None:
    """Refuses a section from which a needed name (``~``) or everything (``logger=[]``) was removed."""
    if not isinstance(node, dict):
        raise UserError(f"{section}={node!r} must be a section{' with ' if needed else ''}{', '.join(needed)}")
    for name in needed:
        if name not in node:
            choices = choices_of(section if name == "_target_" else name)
            hint = f"choose one of {', '.join(choices)}" if choices else "give it a value"
            raise UserError(f"{section}{'.' if section else ''}{name}: is missing; {hint}")


def _check_engine(node: Any) -> None:
    if not (isinstance(node, dict) and "_target_" in node):
        raise UserError(
            f"rollout.engine={node!r} must be a section with a _target_; choose one with rollout=: "
            f"{', '.join(choices_of('rollout'))}"
        )


def _check_objects(plain: dict[str, Any]) -> None:
    """Refuses what should name an object and does not: a word in its place would be ignored, or fail much later."""
    functions = plain["reward"].get("functions")
    for section, node in (("callbacks", plain["callbacks"]), ("logger", plain["logger"])):
        if node is not None and not isinstance(node, dict):
            raise UserError(f"{section}={node!r} must be a section with a section for each, or null")
        for name, value in (node or {}).items():
            _refuse_word(f"{section}.{name}", value)
    for name, spec in (functions if isinstance(functions, dict) else {}).items():
        if not isinstance(spec, dict) or "_target_" not in spec:
            raise UserError(
                f"reward.functions.{name}={spec!r} must be a section with a _target_, such as those in conf/reward; to "
                f"leave a function out, write ~reward.functions.{name}"
            )
        if "function" in spec and not isinstance(spec["function"], dict):
            raise UserError(
                f"reward.functions.{name}.function={spec['function']!r} must be a section; for a function of your own: "
                f"reward.functions.{name}.function={{_target_:hydra.utils.get_method,path:my_rewards.f}}"
            )
    places = {
        "environment": plain["environment"],
        "objective.mismatch": plain["objective"].get("mismatch"),
        "model.lora": plain["model"].get("lora"),
    }
    for key, value in places.items():
        _refuse_word(key, value)


def _refuse_word(key: str, value: Any) -> None:
    if value is not None and not (isinstance(value, dict) and "_target_" in value):
        raise UserError(f"{key}={value!r} must be null, or a section with a _target_ (the name of its class)")


def _check_held_out(data: dict[str, Any]) -> None:
    """Refuses a negative ``num_validation``: the task would give no rows, and nothing would be measured."""
    task = data["task"] if isinstance(data["task"], dict) else {}
    places = {"data": data, "data.task": task}
    places |= {f"data.task.tasks.{name}": node for name, node in (task.get("tasks") or {}).items()}
    for place, node in places.items():
        count = node.get("num_validation") if isinstance(node, dict) else None
        if isinstance(count, int | float) and count < 0:
            raise UserError(f"{place}.num_validation={count} must be at least 0")
        if isinstance(count, int | float) and count > MOST_HELD_OUT:
            raise UserError(f"{place}.num_validation={count} must be at most {MOST_HELD_OUT}")


def _check_finite(plain: dict[str, Any]) -> None:
    """Refuses NaN and infinity: comparisons with NaN are all false, so most range checks let it pass."""
    for key, value in ((f"{section}.{name}", v) for section in _NUMBERS for name, v in plain[section].items()):
        lifted = key in _MAY_BE_INFINITE and value == math.inf
        if isinstance(value, float) and not math.isfinite(value) and not lifted:
            raise UserError(f"{key}={value} must be a finite number")
    for name, value in plain["rollout"]["engine"].items():
        if isinstance(value, float) and math.isnan(value):  # a wait may be endless, but this one would be by mistake
            raise UserError(f"rollout.engine.{name}={value} must be a number")


def _check_counts(plain: dict[str, Any], counts: Mapping[str, int]) -> None:
    for key, least in counts.items():
        value: Any = plain
        *sections, name = key.split(".")
        for section in sections:
            value = value[section]
        if name not in value:  # the dataclass has a default, or says that it is missing
            continue
        value = value[name]
        if value is None and key in _MAY_BE_NULL:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise UserError(f"{key}={value!r} must be a whole number{' or null' if key in _MAY_BE_NULL else ''}")
        if key == "seed" and value >= 2**32:
            raise UserError(f"seed={value} must be below 2^32")
        if value < least:
            why = "; null: validate before and after the run only" if key == "validation.every_n_rollouts" else ""
            raise UserError(f"{key}={value} must be at least {least}{why}")
