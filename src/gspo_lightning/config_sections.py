"""Names and types in the parts of a config that have no ``_target_``; their files and dataclasses say what there is."""

from __future__ import annotations

import functools
from collections.abc import Collection
from difflib import get_close_matches
from importlib.resources import files
from typing import Any

from omegaconf import OmegaConf

from gspo_lightning.config_types import check_values, hints_of
from gspo_lightning.errors import UserError
from gspo_lightning.types import SamplingParams
from gspo_lightning.validation import ValidationSettings

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
    "rollout.num_generations": 2,
    "rollout.max_completion_length": 1,
    "data.prompts_per_rollout": 1,
    "data.max_prompt_length": 1,
    "validation.num_generations": 1,
    "validation.num_samples": 0,
    "validation.every_n_rollouts": 1,
    "trainer.num_nodes": 1,
    "dynamic_sampling.max_draws": 0,
    "update.ref_sync_every_n_rollouts": 0,
}
"""Smallest value of the settings that are counts."""
_MAY_BE_NULL = ("max_rollouts", "validation.every_n_rollouts")


def check_sections(plain: dict[str, Any], used: Collection[str] = ()) -> None:
    """Refuses, in one line, an unknown setting, a count that is none, or a value of the wrong type.

    Args:
        plain: the resolved config. Nodes with a ``_target_`` are left to `config_types.check_calls`.
        used: names at the root that interpolations refer to, such as a variable of the user's own.
    """
    root, elsewhere = _root()
    _check_names("", {name: value for name, value in plain.items() if name not in used}, root, elsewhere)
    sections = {name: node for name, node in root.items() if isinstance(node, dict)}
    for name, node in sections.items():
        _check_names(name, plain[name], node)
    for name, owner, more in (_SAMPLING, _VALIDATION):
        _check_names(name, plain[name], {**hints_of(owner), more: None})
    _check_counts(plain)
    if plain["max_rollouts"] is None and plain["num_epochs"] is None:
        raise UserError("max_rollouts=null and num_epochs=null: nothing ends the run; set one of them")
    for name, node in (("", root), *sections.items()):
        check_values(plain[name] if name else plain, name, {k: bool for k, v in node.items() if isinstance(v, bool)})
    for name, owner, _ in (_SAMPLING, _VALIDATION):
        check_values(plain[name], name, hints_of(owner))


@functools.cache
def _root() -> tuple[dict[str, Any], dict[str, str]]:
    """The settings of ``conf/train.yaml`` with their defaults, groups included; and where other groups put theirs."""
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
    """Each name of a node must be known; ``elsewhere`` has names that are known under another one."""
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


def _check_counts(plain: dict[str, Any]) -> None:
    for key, least in _LEAST.items():
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
            raise UserError(f"{key}={value} must be at least {least}{_WHY.get(key, '')}")


_WHY = {
    "rollout.num_generations": "; a group of one has no one to be compared with",
    "validation.every_n_rollouts": "; null: validate before and after the run only",
}
