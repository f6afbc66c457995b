"""Hydra's flags anywhere on the command line: argparse refuses overrides before and after a flag."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from hydra._internal.utils import get_args_parser

from gspo_lightning.errors import UserError

_MODES = {"run": "--run", "multirun": "--multirun", "cfg": "--cfg", "info": "--info", "shell_completion": "-sc"}
"""Flags of which Hydra takes one at a time."""


@dataclass(frozen=True)
class CommandLine:
    """The arguments of a program, each kind in its order."""

    overrides: list[str]
    flags: list[str]
    """Flags of Hydra and their values."""
    info: bool
    """Whether they ask for ``--info``."""
    multirun: bool
    """Whether they ask for a sweep."""

    @property
    def arguments(self) -> list[str]:
        """Flags last: the value of ``--info`` may be left out, and an override after it would be taken for it."""
        return [*self.overrides, *self.flags]


def read(arguments: Sequence[str]) -> CommandLine:
    """Tells overrides from flags of Hydra and their values.

    Args:
        arguments: without the name of the program.

    Raises:
        UserError: a flag is unknown, does not go with another one, or lacks a value or has a wrong one.
        SystemExit: after ``--version``, which is printed.
    """
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    flags = [argument for argument in arguments if argument != "--"]
    known, unknown = parser.parse_known_intermixed_args(flags)
    if unknown:  # the first, as overrides after it are among them
        _refuse(f"there is no flag {unknown[0]}")
    rerun = known.experimental_rerun
    if rerun is not None and not Path(rerun).is_file():  # flags may be cut short: --experiment=micro is read as it
        given = next(flag for flag in flags if flag.startswith("--e"))
        named = given.partition("=")[0] == "--experimental-rerun"
        _refuse(f"--experimental-rerun: there is no file {rerun}" if named else f"there is no flag {given}")
    if len(several := [flag for name, flag in _MODES.items() if getattr(known, name)]) > 1:
        _refuse(f"{' and '.join(several)} do not go together")
    if known.resolve and not (known.cfg or known.help):
        _refuse("--resolve goes only with --cfg or --help")
    overrides = known.overrides
    for override in overrides:
        flags.remove(override)
    # The help about Hydra is made of another config, which has none of our keys.
    return CommandLine([] if known.hydra_help else overrides, flags, known.info is not None, known.multirun)


def _refuse(message: str) -> NoReturn:
    raise UserError(f"command line: {message}; settings are written key=value, and --hydra-help shows the flags")
