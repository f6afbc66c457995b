"""What a config may call: a config is code, and may have been written by somebody else.

Allowed are this project, the libraries that ``conf/`` uses, and modules below the folder the command starts in or on
``PYTHONPATH``, which are the user's own. Anything else must be named in the environment variable
``GSPO_ALLOWED_TARGETS`` (prefixes, separated by commas): there, and not in a config, because a config could allow
itself.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
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
LOOKUPS = ("hydra.utils.get_method", "hydra.utils.get_class", "hydra.utils.get_object")
"""They return what ``path`` names without calling it; the same rule holds for that name."""
# Read once, before any config is: Hydra can set environment variables from a config (hydra.job.env_set). It can also
# change the folder (hydra.job.chdir), so the one in which the command started counts beside the current one.
_START = str(Path.cwd())
_PYTHONPATH = tuple(place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place)
_BY_THE_USER = tuple(name.strip() for name in os.environ.get("GSPO_ALLOWED_TARGETS", "").split(",") if name.strip())


def check_targets(node: Any, key: str = "") -> None:
    """Refuses, before anything is imported, a config that calls what is not allowed.

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
        target, where = str(node.get("path", "")), f"{key}.path"
    if not is_allowed(target):
        package = target.partition(".")[0]
        raise UserError(
            f"{where}={target} is not on the list of what a config may call; if you trust it, set the environment "
            f"variable GSPO_ALLOWED_TARGETS={package} (docs/safety.md)"
        )


def is_allowed(target: str, more: tuple[str, ...] = _BY_THE_USER) -> bool:
    """Whether a dotted name is on the list, or lies in a module of the user's own."""
    if any(target == prefix or target.startswith(f"{prefix}.") for prefix in (*LIBRARIES, *more)):
        return True
    return _is_own(target.partition(".")[0])


def _is_own(package: str) -> bool:
    """Whether a top-level module is the user's own; finding it imports nothing."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return False
    if spec is None:
        return True  # there is no such module: whoever imports it says so better
    places = [spec.origin] if spec.origin else [str(p) for p in spec.submodule_search_locations or ()]
    mine = {Path(place).resolve() for place in (_START, str(Path.cwd()), *_PYTHONPATH)}
    found = [Path(place).resolve() for place in places if place and place not in ("built-in", "frozen")]
    return bool(found) and all(mine & set(path.parents) and "site-packages" not in path.parts for path in found)
