"""From the keys of a GRPOConfig to our overrides, with a verdict on each key."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from gspo_lightning.errors import UserError
from gspo_lightning.migrate import computed, lora, losses, vllm
from gspo_lightning.migrate.trl_table import (
    BETTER,
    COMPUTED,
    COUNTS,
    DEFAULTS,
    HARMLESS,
    KINDS,
    MAPPINGS,
    NONE,
    RENAMED,
    SWITCHED_OFF_BY_NONE,
)

Kind = Literal["same", "renamed", "better default", "no counterpart"]


@dataclass(frozen=True)
class Verdict:
    """What becomes of one key."""

    key: str
    value: Any
    kind: Kind
    note: str
    """Our key, or why there is none."""


@dataclass
class Conversion:
    """The result: verdicts on the given keys, our settings, and what was added to them."""

    verdicts: list[Verdict] = field(default_factory=list)
    groups: dict[str, str] = field(default_factory=dict)
    """Config group -> choice."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Dotted key -> value."""
    added: list[str] = field(default_factory=list)
    """Settings and notes that come from no key of the source, and why."""
    unread: list[str] = field(default_factory=list)
    """Lines of the source that may change settings, and were not read."""
    blocking: list[str] = field(default_factory=list)
    """Keys that change what is trained and cannot be expressed."""

    @property
    def remainder(self) -> list[str]:
        """Keys without counterpart."""
        return [verdict.key for verdict in self.verdicts if verdict.kind == "no counterpart"]


_MOST_BITS = 63
"""Of a whole number; one of hundreds of digits is no float, and no setting either."""


def convert(given: dict[str, Any], *, ranks: int = 1, adapter: dict[str, Any] | None = None) -> Conversion:
    """Translates a GRPOConfig of TRL 1.16.0 (and ``max_prompt_length``, ``warmup_ratio`` of older releases).

    Keys that affect the result and are not given take TRL's default, not ours, so that the two runs are the same.

    Args:
        given: the keys as written.
        ranks: processes of the TRL run; its batch sizes are per process.
        adapter: the keys of the ``LoraConfig`` next to it; None trains all weights.

    Raises:
        UserError: an unknown key, a value of the wrong type, or batch sizes that do not hold whole groups.
    """
    if ranks < 1:
        raise UserError(f"--ranks {ranks} must be at least 1")
    result = Conversion()
    for key in given:
        if key not in RENAMED and key not in COMPUTED and key not in BETTER and key not in NONE:
            raise UserError(f"{key}: TRL 1.16.0's GRPOConfig has no such field; remove it or correct its name")
    for key, value in (*given.items(), *(adapter or {}).items()):
        if isinstance(value, int) and value.bit_length() > _MOST_BITS:
            raise UserError(f"{key}: a whole number of {value.bit_length()} bits is too large; correct it")
    config = {**DEFAULTS, **{key: _read(key, value) for key, value in given.items()}}
    notes: dict[str, tuple[Kind, str]] = {}
    for key in (key for key in config if key in RENAMED):
        if config[key] is not None:
            result.settings[RENAMED[key]] = config[key]
        notes[key] = ("same" if RENAMED[key].split(".")[-1] == key else "renamed", RENAMED[key])
    steps = computed.optimization(config, result, notes, ranks)
    losses.objective(config, given, result, notes)
    computed.running(config, result, notes, steps)
    vllm.rollout(config, result, notes)
    losses.single_tokens(config, result, notes)
    losses.smooth_weights(config, result, notes, steps)
    if adapter is not None:
        lora.adapter(adapter, result, notes)
        given = given | {lora.PREFIX + key: value for key, value in adapter.items()}
    for key, value in given.items():
        result.verdicts.append(_verdict(key, value, notes, result))
    return result


def _read(key: str, value: Any) -> Any:
    """The checked value: a number if TRL has one, and a mapping if TRL also takes JSON for it."""
    default = DEFAULTS.get(key)
    if value is None and key in SWITCHED_OFF_BY_NONE:
        return None
    if isinstance(default, int | float) and not isinstance(value, int | float):
        raise UserError(f"{key}={value!r} is not a number; TRL's default is {default}")
    if value is None and default is not None:
        raise UserError(f"{key}=None: give a value; TRL's default is {default}")
    if key in COUNTS and not 1 <= value < math.inf:
        raise UserError(f"{key}={value} must be at least 1")
    _check_kind(key, value)
    if key in MAPPINGS and isinstance(value, str):
        value = _json(value)
    if key in MAPPINGS and value is not None and not isinstance(value, dict):
        raise UserError(f"{key}={value}: neither a mapping nor JSON of one; write it as a mapping")
    return value


def _check_kind(key: str, value: Any) -> None:
    if key not in KINDS or value is None:
        return
    if not isinstance(value, KINDS[key]) or (isinstance(value, float) and not math.isfinite(value)):
        raise UserError(f"{key}={value!r} must be {' or '.join(kind.__name__ for kind in KINDS[key])}")


def _json(text: str) -> Any:
    """The text parsed as JSON, or the text itself if it is not JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _verdict(key: str, value: Any, notes: dict[str, tuple[Kind, str]], result: Conversion) -> Verdict:
    if key in notes:
        kind, note = notes[key]
        if kind == "no counterpart" and not key.startswith(HARMLESS):
            result.blocking.append(key)
        return Verdict(key, value, kind, note)
    if key in BETTER:
        return Verdict(key, value, "better default", BETTER[key])
    if key in COMPUTED:  # the key that it depends on blocks already
        return Verdict(key, value, "no counterpart", "it belongs to a TRL option that does not exist here")
    default, why = NONE[key]
    if value is None or value == default or not (value or default):
        return Verdict(key, value, "same", "TRL's default, which needs no counterpart")
    if key == "reward_weights" and all(weight == 1 for weight in value):
        return Verdict(key, value, "same", "1 is our default: reward.functions.<name>.weight")
    if not key.startswith(HARMLESS):
        result.blocking.append(key)
    return Verdict(key, value, "no counterpart", why)
