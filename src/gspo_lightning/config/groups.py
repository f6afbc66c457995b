"""Checks the choices of config groups on the command line before Hydra reads them."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from gspo_lightning.config.sections import choices_of
from gspo_lightning.errors import UserError


def check_choices(arguments: Sequence[str]) -> None:
    """Refuses, in one line, a choice that names no file, such as ``logger=null``, on which Hydra ends in a traceback.

    Args:
        arguments: the command line; arguments that do not parse are left to Hydra.
    """
    parser = OverridesParser.create()
    for argument in arguments:
        try:
            override = parser.parse_override(argument)
        except HydraException:
            continue
        if override.is_delete() or override.is_sweep_override() or not (choices := choices_of(override.key_or_group)):
            continue
        if not isinstance(override.value(), str | list | dict):
            raise UserError(
                f"{argument}: not a choice of this group; leave it out, or choose one of {', '.join(choices)}"
            )
