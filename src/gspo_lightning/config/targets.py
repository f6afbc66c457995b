"""Checks what a config may call: a config is code, and may have been written by somebody else.

Allowed are this project, the libraries that ``conf/`` uses, and modules below the folder the command starts in or on
``PYTHONPATH``, which are the user's own. Anything else must be named in the environment variable
``GSPO_ALLOWED_TARGETS`` (prefixes, separated by commas), not in a config, because a config could allow itself.

A dotted name can lead anywhere: whatever a module imports is an attribute of it. So the name is followed as Hydra will
follow it, and the object that each step finds must be defined in an allowed place.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from gspo_lightning.errors import UserError

LIBRARIES = (
    "gspo_lightning",
    "torch.optim",
    "lightning.Trainer",
    "lightning.pytorch.loggers",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.strategies",
    "lightning.pytorch.profilers",
    "bitsandbytes.optim",
    "builtins.list",
    "builtins.dict",
    "builtins.tuple",
    "datetime.timedelta",
)
"""Prefixes of dotted names that every config may use."""
_RUN_WHAT_THEY_ARE_GIVEN = (
    "gspo_lightning.config.build",
    "gspo_lightning.callbacks.files",
    "gspo_lightning.config.types",
    "gspo_lightning.rewards.sandbox_runner",
)
"""Our modules that configs may not use: they call, import or remove what an unchecked argument names."""
LOOKUPS = ("hydra.utils.get_method", "hydra.utils.get_class", "hydra.utils.get_object")
"""Hydra functions that return what ``path`` names without calling it; that name is checked instead."""
# Read once, before any config: Hydra can set environment variables from a config (hydra.job.env_set). Programs can also
# change the folder, so the one in which the command started counts besides the current one.
_START = str(Path.cwd())
_PYTHONPATH = tuple(place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place)
_BY_THE_USER = tuple(name.strip() for name in os.environ.get("GSPO_ALLOWED_TARGETS", "").split(",") if name.strip())


def check_targets(node: Any, key: str = "") -> None:
    """Refuses a config that calls something not allowed; imports only what is allowed.

    Raises:
        UserError: names the key, the target, and how to allow it.
    """
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, child in children:
        check_targets(child, f"{key}.{name}" if key else str(name))
    if not isinstance(node, dict) or "_target_" not in node:
        return
    target, where = str(node["_target_"]), f"{key}._target_"
    if target in LOOKUPS:
        target, where = str(node.get("path") or ""), f"{key}.path"
        if not target or node.get("_args_"):
            raise UserError(f"{where}: {node['_target_']} looks up one name; give it as path, not in _args_")
    _refuse_others(target, where)


def look_up(name: str, where: str) -> Any:
    """The object that a dotted name in a config leads to, such as a function that is a tool.

    Args:
        name: such as ``my_tools.add``.
        where: key of the config, for the message.

    Raises:
        UserError: a config may not name it, or it cannot be imported.
    """
    _refuse_others(name, where)
    parts, found = name.split("."), None
    try:
        for count in range(1, len(parts) + 1):
            found = _step(found, ".".join(parts[:count]))
    except (Exception, SystemExit) as error:
        what = f"it exited with code {error.code}" if isinstance(error, SystemExit) else error
        raise UserError(f"{where}: cannot import {name} ({what})") from error
    return found


def _refuse_others(target: str, where: str) -> None:
    if (missing := _missing(target, _BY_THE_USER)) is None:
        return
    home, allowed = missing.partition(".")[0], ",".join((*_BY_THE_USER, missing))
    defined = "" if target.partition(".")[0] == home else f" (it is defined in {home})"
    raise UserError(
        f"{where}={target}{defined} is not on the list of what a config may call; if you trust it, set the "
        f"environment variable GSPO_ALLOWED_TARGETS={allowed} (docs/safety.md)"
    )


def _missing(target: str, more: tuple[str, ...]) -> str | None:
    """The name that would have to be on the list to allow a target; None if it is allowed.

    Imports what it leads to if the name itself is on the list.
    """
    package = target.partition(".")[0]
    if not package.isidentifier():
        return target
    if _is_below(target, more):
        more = (*more, package)  # an object of a trusted part of a package may be defined in another part
    elif not _is_below(target, LIBRARIES) and not _is_own(package):
        return package
    parts, found = target.split("."), None
    for count in range(1, len(parts) + 1):
        path = ".".join(parts[:count])
        try:
            found = _step(found, path)
        except (Exception, SystemExit):  # noqa: BLE001  (whoever imports it says better what is wrong)
            return None
        if (missing := _strays(found, path, more)) is not None:
            return missing
    return target if isinstance(found, ModuleType) and _is_below(target, LIBRARIES) else None


def _step(found: Any, path: str) -> Any:
    """The object that Hydra finds at the end of ``path``, given the one it found a step before."""
    before, _, name = path.rpartition(".")
    try:
        return getattr(found, name) if before else import_module(path)
    except AttributeError:
        if not isinstance(found, ModuleType):
            raise
        return import_module(path)


def _strays(found: Any, path: str, more: tuple[str, ...]) -> str | None:
    """The package or name that would have to be on the list for one step; None if nothing is missing."""
    if path in (*LIBRARIES, *more):
        return None
    if isinstance(found, ModuleType):
        return None if found.__name__ == path or _is_home(found.__name__, more) else found.__name__
    while isinstance(found, functools.partial):
        found = found.func
    if not callable(found):
        return None  # a value: the next step checks what is called on it
    module = getattr(found, "__module__", None)  # the module of its class, if it is an instance
    if not isinstance(module, str):
        return path
    home = f"{module}.{getattr(found, '__qualname__', type(found).__qualname__)}"
    if not _is_home(home, more):
        return module.partition(".")[0]
    is_private = path.rpartition(".")[2].startswith("_") and _is_below(home, LIBRARIES)
    return path if is_private or _is_below(home, _RUN_WHAT_THEY_ARE_GIVEN) else None


def _is_home(name: str, more: tuple[str, ...]) -> bool:
    return _is_below(name, (*LIBRARIES, *more)) or _is_own(name.partition(".")[0])


def _is_below(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def _is_own(package: str) -> bool:
    """Whether a top-level module is the user's own; finding it imports nothing."""
    if package in sys.stdlib_module_names:
        return False  # even if Python itself lies below the folder, as in a home folder
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return False
    if spec is None:
        return True  # no such module: importing it gives the better error
    places = [spec.origin] if spec.origin else [str(p) for p in spec.submodule_search_locations or ()]
    mine = {Path(place).resolve() for place in (_START, str(Path.cwd()), *_PYTHONPATH)}
    found = [Path(place).resolve() for place in places if place and place not in ("built-in", "frozen")]
    return bool(found) and all(mine & set(path.parents) and "site-packages" not in path.parts for path in found)
