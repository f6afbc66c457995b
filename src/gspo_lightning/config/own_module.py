"""Checks which LightningModule a config names: `GSPOModule`, or a subclass of the user's own with its arguments."""

from __future__ import annotations

import inspect
from typing import Any

from gspo_lightning.config.targets import look_up
from gspo_lightning.errors import UserError
from gspo_lightning.module import GSPOModule

SET_BY = {
    "policy_loader": "model",
    "rewards": "reward",
    "objective": "objective",
    "sampling": "rollout",
    "optimizer": "optimizer",
    "max_rollouts": "max_rollouts",
    "engine": "rollout.engine",
    "advantages": "advantages",
    "schedule": "scheduler",
    "update": "update",
    "validation": "validation",
    "seed": "seed",
    "max_draws": "dynamic_sampling.max_draws",
}
"""Arguments of `GSPOModule` -> the key of the config that sets them."""


def check_module(node: dict[str, Any]) -> None:
    """Refuses, in one line, what is no subclass of `GSPOModule` or cannot be called with the keys of ``module``.

    Args:
        node: the section ``module``; its keys are the arguments that the subclass itself adds.

    Raises:
        UserError: names the key and the fix.
    """
    target = str(node["_target_"])
    found = look_up(target, "module._target_")
    if not (isinstance(found, type) and issubclass(found, GSPOModule)):
        raise UserError(f"module._target_={target} is no subclass of gspo_lightning.GSPOModule; name one")
    added = _added_arguments(found)
    for key in node.keys() - {"_target_", "_convert_", "_recursive_"}:
        if key in SET_BY:
            raise UserError(f"module.{key}: {SET_BY[key]} sets this argument of every module; change that instead")
        if key not in added:
            has = f"it has {', '.join(added)}" if added else "a subclass has those that its __init__ names"
            raise UserError(f"module.{key}: {target} has no such setting; {has}")
    for name, parameter in inspect.signature(found).parameters.items():
        is_named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if is_named and parameter.default is parameter.empty and name not in SET_BY | node:
            raise UserError(f"module.{name}: is missing; give it a value")
    try:
        inspect.signature(found).bind(**SET_BY, **{key: node[key] for key in added if key in node})
    except TypeError as error:
        raise UserError(
            f"module: {target}.__init__ {error}; let it take **kwargs and give them to super().__init__"
        ) from error


def _added_arguments(module: type[GSPOModule]) -> list[str]:
    """Names of the arguments that the constructors of a subclass and of its bases add to those of `GSPOModule`."""
    bases = module.__mro__[: module.__mro__.index(GSPOModule)]
    signatures = [inspect.signature(vars(base)["__init__"]) for base in bases if "__init__" in vars(base)]
    named = [p.name for s in signatures for p in list(s.parameters.values())[1:] if p.kind not in _OPEN]
    return sorted({name for name in named if name not in SET_BY})


_OPEN = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
