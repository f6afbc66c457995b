"""Checks the overrides of the command line before Hydra reads them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf

from gspo_lightning.config.sections import choices_of
from gspo_lightning.errors import UserError

_FOLDERS = ("hydra.run.dir", "hydra.sweep.dir")
_OF_SWEEPS = (
    "hydra/launcher", "hydra/sweeper", "hydra.launcher.", "hydra.sweeper.", "hydra.sweep.", "hparams_search",
)  # fmt: skip
"""Keys, or what they begin with, that Hydra reads for sweeps alone."""


def check_overrides(overrides: Sequence[str]) -> None:
    """Refuses, in one line, what Hydra reads otherwise than it was meant, or ends in a traceback on.

    Args:
        overrides: the command line without Hydra's flags.

    Raises:
        UserError: one cannot be parsed; names no key; names an empty folder, which Hydra takes for the current one; or
            chooses what names no file of a group, such as ``logger=null``. Names the override.
    """
    parser = OverridesParser.create()
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            raise UserError(
                f"{text!r} cannot be read as key=value: {str(error).split(' expecting ')[0]}; put a value with spaces, "
                "commas, brackets or quotes into quotes of its own: \"key='a, b'\""
            ) from error
        if not override.key_or_group:
            raise UserError(f"{text!r} names no key; settings are written key=value")
        _check(text, override)


def check_mode(overrides: Sequence[str], *, is_sweep: bool) -> None:
    """Refuses what Hydra reads for a sweep alone where there is none, and the folder of a single run in a sweep.

    Args:
        overrides: the command line without Hydra's flags; each can be parsed.
        is_sweep: whether the command makes several runs.

    Raises:
        UserError: names the key and the fix.
    """
    parser = OverridesParser.create()
    given = [o for o in map(parser.parse_override, overrides) if not o.is_delete() and o.value() is not None]
    keys = {override.key_or_group for override in given}
    if is_sweep and "hydra.run.dir" in keys and "hydra.sweep.dir" not in keys:  # which may refer to the former
        raise UserError(
            "hydra.run.dir has no effect on a sweep (-m), whose folder is hydra.sweep.dir; set that, and leave "
            "hydra.run.dir out"
        )
    # A job of a sweep that is a program of its own has its number (`sweep_job.command`).
    if is_sweep or "hydra.job.num" in keys:
        return
    for override in given:
        if override.key_or_group.startswith(_OF_SWEEPS):
            raise UserError(f"{override.input_line} has no effect on a single run; add -m for a sweep, or leave it out")


_OF_THE_COMMAND = ("command-line", "hydra.searchpath in command-line")
"""What Hydra calls the folder of ``--config-dir``, and those of an override of ``hydra.searchpath``."""


def check_own_files(sources: Iterable[Any], choices: Mapping[str, Any], config_name: str) -> None:
    """Refuses a choice of a group that names two files, one of them in a folder of the command: Hydra reads the other.

    Warns where that holds for the first config, which may be that of another program.

    Args:
        sources: where Hydra has looked for configs, in order.
        choices: group -> its choice, or several.
        config_name: of the first config.

    Raises:
        UserError: names the file that is not read.
    """
    chosen = {group.partition("@")[0]: [name] if isinstance(name, str) else name for group, name in choices.items()}
    names = [f"{group}/{name}.yaml" for group, several in chosen.items() for name in several or ()]
    for file in [*names, f"{config_name}.yaml"]:
        first: bytes | None = None
        for source in sources:
            content = _content(source, file)
            is_given = source.schema == "file" and source.provider in _OF_THE_COMMAND
            if is_given and None not in (first, content) and first != content:
                line = f"{Path(source.path, file)} is not read: {file} is a name of ours, which goes first"
                if file in names:
                    raise UserError(f"{line}; give it another name, and choose that")
                warnings.warn(f"{line}; put settings into an experiment, or choose it with --config-path", stacklevel=2)
            first = content if first is None else first


def check_rewards_add_up(sources: Sequence[Any], files_read: Iterable[Any]) -> None:
    """Refuses several choices of ``reward`` of which two name a function alike: Hydra keeps that of the later one.

    A choice has the functions of the files in its own ``defaults`` too, which it may change.

    Args:
        sources: where Hydra has looked for configs, in order.
        files_read: Hydra's ``ResultDefault`` of each config file that it has put together, in order.

    Raises:
        UserError: names the choices and the function.
    """
    of: dict[str, str] = {}
    named_by = {file.config_path: file.parent for file in files_read if file.package == "reward"}
    for file in named_by:
        content = next(filter(None, (_content(source, f"{file}.yaml") for source in sources)), b"")
        own = OmegaConf.to_container(OmegaConf.create(content.decode()))
        choice = file
        while named_by[choice] in named_by:
            choice = named_by[choice]
        for name in (own.get("functions") if isinstance(own, dict) else None) or ():
            if of.setdefault(str(name), choice) != choice:
                raise UserError(
                    f"{of[name]} and {choice} both have a function {name}, of which only that of {choice} would be "
                    "left; rename one"
                )


def _content(source: Any, file: str) -> bytes | None:
    """What a source of configs has under a name; None if nothing, or if it is no folder and no package."""
    if source.schema == "file" and Path(source.path, file).is_file():
        return Path(source.path, file).read_bytes()
    if source.schema == "pkg" and source.path:
        found = files(source.path).joinpath(file)
        return found.read_bytes() if found.is_file() else None
    return None


def _check(text: str, override: Override) -> None:
    if override.is_delete() or override.is_sweep_override():
        return
    value, choices = override.value(), choices_of(override.key_or_group)
    if override.key_or_group in _FOLDERS and value == "":
        raise UserError(f"{text} is empty, and files would go into the current folder; name a folder (. is this one)")
    if override.key_or_group in _FOLDERS and str(value).startswith("~"):
        raise UserError(
            f"{text}: ~ is a folder of that name here, not the home folder; write the whole path, such as $HOME/runs"
        )
    if choices and not isinstance(value, str | list | dict):
        raise UserError(f"{text}: not a choice of this group; leave it out, or choose one of {', '.join(choices)}")
