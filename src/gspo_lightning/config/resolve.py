"""From a composed Hydra config to a plain one, with all interpolations and machine-dependent choices resolved."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gspo_lightning.config.hardware import choose_precision, choose_token_budget
from gspo_lightning.config.sections import check_data, check_sections
from gspo_lightning.config.targets import check_targets
from gspo_lightning.config.types import check_calls
from gspo_lightning.errors import UserError

DEFAULT_ROLLOUTS = 30
"""What max_rollouts=auto is without num_epochs."""


def resolve(cfg: DictConfig) -> dict[str, Any]:
    """The config with all interpolations resolved and machine-dependent choices made, as plain containers.

    Raises:
        UserError: what cannot be resolved, or names and types of `sections.check_sections`.
    """
    for key in _missing(OmegaConf.to_container(cfg, resolve=False)):
        raise UserError(f"{key}: is missing; give it a value")
    try:
        plain: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"config: {' '.join(str(error).split())}") from error
    if plain.get("max_rollouts") == "auto":
        plain["max_rollouts"] = DEFAULT_ROLLOUTS if plain.get("num_epochs") is None else None
    check_sections(plain, re.findall(r"\$\{([A-Za-z_]\w*)", OmegaConf.to_yaml(cfg)))  # before anything computes with it
    plain["trainer"]["precision"] = choose_precision(plain["trainer"]["precision"], plain["trainer"]["accelerator"])
    if plain["update"]["max_tokens_per_microbatch"] == "auto":
        plain["update"]["max_tokens_per_microbatch"] = choose_token_budget(plain)
    return plain


def resolve_data(cfg: DictConfig) -> dict[str, Any]:
    """The section ``data`` alone, for a program that reads no other: resolved, and checked as it is for a run.

    Raises:
        UserError: what cannot be resolved, a ``_target_`` that a config may not call, or names, types and counts.
    """
    for key in _missing(OmegaConf.to_container(cfg.data, resolve=False), "data"):
        raise UserError(f"{key}: is missing; give it a value")
    data: Any = OmegaConf.to_container(cfg.data, resolve=True, throw_on_missing=True)
    check_data(data)
    check_targets(data, "data")
    check_calls(data, "data")
    return data


def _missing(node: Any, key: str = "") -> Iterator[str]:
    """Keys of the mandatory values that nobody has set; OmegaConf's error may name one that refers to them."""
    if node == "???":
        yield key
    elif isinstance(node, dict):
        for name, value in node.items():
            yield from _missing(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _missing(value, f"{key}[{number}]")
