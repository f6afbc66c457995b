"""What TRL counts in optimizer steps: the length of the run, its learning rates, and intervals."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gspo_lightning.migrate.convert import Conversion

Config = dict[str, Any]
Notes = dict[str, Any]

_SCHEDULERS = {
    "constant": "constant", "constant_with_warmup": "constant", "linear": "linear", "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
}  # fmt: skip


def length(config: Config, result: Conversion, notes: Notes, steps: int) -> None:
    """Converts the run's length to rollouts or epochs, at TRL's ``steps`` optimizer steps per rollout."""
    maximum = _max_steps(config)
    if maximum > 0:
        result.settings["max_rollouts"] = math.ceil(maximum / steps)
        notes["max_steps"] = ("renamed", f"max_rollouts: {maximum} optimizer steps of TRL, {steps} per rollout")
        notes["num_train_epochs"] = ("same", "max_steps overrides it, as in TRL")
    else:
        epochs = config["num_train_epochs"]
        result.settings["num_epochs"] = int(epochs) if float(epochs).is_integer() else epochs
        result.settings["max_rollouts"] = None  # overrides any recipe that these settings are added to
        notes["num_train_epochs"] = ("renamed", "num_epochs")
        notes["max_steps"] = ("same", "not positive: num_train_epochs decides")


def schedule(config: Config, result: Conversion, notes: Notes) -> None:
    """Converts to the config group ``scheduler``: shape, least rate and warm-up."""
    name = str(config["lr_scheduler_type"])
    if name not in _SCHEDULERS:
        notes["lr_scheduler_type"] = ("no counterpart", f"schedules are {', '.join(sorted(set(_SCHEDULERS.values())))}")
        return
    result.groups["scheduler"] = _SCHEDULERS[name]
    notes["lr_scheduler_type"] = ("renamed", f"scheduler={_SCHEDULERS[name]}")
    _least_rate(name, config, result, notes)
    _warm_up(name, config, result, notes)


def _least_rate(name: str, config: Config, result: Conversion, notes: Notes) -> None:
    extra = config.get("lr_scheduler_kwargs") or {}
    notes["lr_scheduler_kwargs"] = ("same", "empty, or without effect on a constant schedule, in TRL as here")
    if name.startswith("constant"):
        return
    if name == "cosine_with_min_lr" and list(extra) in (["min_lr"], ["min_lr_rate"]) and config["learning_rate"]:
        least = extra["min_lr_rate"] if "min_lr_rate" in extra else extra["min_lr"] / config["learning_rate"]
        result.settings["scheduler.min_ratio"] = least
        notes["lr_scheduler_kwargs"] = ("renamed", "scheduler.min_ratio, a share of the full rate")
    elif extra:
        notes["lr_scheduler_kwargs"] = ("no counterpart", "scheduler.min_ratio alone, from min_lr_rate or min_lr")
    elif name == "cosine_with_min_lr":
        notes["lr_scheduler_type"] = ("no counterpart", "TRL refuses it without min_lr_rate in lr_scheduler_kwargs")


def _warm_up(name: str, config: Config, result: Conversion, notes: Notes) -> None:
    """Converts the warm-up: in transformers, steps above 0 override the ratio, and ``constant`` reads neither."""
    warmup, ratio = config.get("warmup_steps") or 0, config.get("warmup_ratio") or 0.0
    notes["warmup_steps"] = notes["warmup_ratio"] = ("renamed", "scheduler.warmup_ratio, a share of all steps")
    if name == "constant":
        unread = ("same", "no effect: TRL's constant schedule has no warm-up (constant_with_warmup has one)")
        notes["warmup_steps"] = notes["warmup_ratio"] = unread
        return
    if warmup:
        notes["warmup_ratio"] = ("same", "warmup_steps overrides it, as in TRL")
        ratio = warmup
    if warmup >= 1:
        if _max_steps(config) <= 0:
            notes["warmup_steps"] = ("no counterpart", "a share of the run: scheduler.warmup_ratio; give max_steps")
            return
        ratio = warmup / _max_steps(config)
    if ratio:
        result.settings["scheduler.warmup_ratio"] = float(ratio)


def _max_steps(config: Config) -> int:
    """TRL's optimizer steps of the run; not positive if the epochs count instead."""
    return int(config.get("max_steps") or -1)


def intervals(config: Config, settings: Config, notes: Notes, steps: int) -> None:
    """Converts the intervals of saving, validation and a moving reference to rollouts of ``steps`` TRL steps each."""
    _every(config, notes, settings, steps, "save", "checkpoint.every_n_rollouts")
    _every(config, notes, settings, steps, "eval", "validation.every_n_rollouts")
    _moving_reference(config, notes, settings, steps)


def _moving_reference(config: Config, notes: Notes, settings: Config, steps: int) -> None:
    every, alpha = config.get("ref_model_sync_steps") or 512, config.get("ref_model_mixup_alpha") or 0.6
    notes["sync_ref_model"] = notes["ref_model_sync_steps"] = (
        "renamed",
        f"update.ref_sync_every_n_rollouts, in rollouts of {steps} steps of TRL",
    )
    notes["ref_model_mixup_alpha"] = ("same", "update.ref_model_mixup_alpha")
    if config.get("sync_ref_model"):
        settings["update.ref_sync_every_n_rollouts"] = max(1, round(every / steps))
        settings["update.ref_model_mixup_alpha"] = alpha


def _every(config: Config, notes: Notes, settings: Config, steps: int, what: str, ours: str) -> None:
    saves = what == "save"
    strategy, interval = config.get(f"{what}_strategy"), config.get(f"{what}_steps")
    if strategy is None:
        strategy = "steps" if saves else "no"
    if strategy != "steps":
        always = "the end is always saved" if saves else "there is always one before and one after the run"
        notes[f"{what}_strategy"] = ("better default", f"{ours}: rollouts, not epochs; {always}")
        notes[f"{what}_steps"] = ("same", f"no effect without {what}_strategy=steps, in TRL as here")
        return
    notes[f"{what}_strategy"] = ("renamed", ours)
    notes[f"{what}_steps"] = ("renamed", f"{ours}, in rollouts of {steps} steps of TRL")
    if not interval and not saves:
        interval = config.get("logging_steps") or 10  # as transformers and TRL do
    if interval and interval < 1:
        if _max_steps(config) <= 0:
            notes[f"{what}_steps"] = ("no counterpart", f"a share of the run: {ours}; give max_steps, or set it")
            return
        interval = math.ceil(interval * _max_steps(config))
    if interval:
        settings[ours] = max(1, round(interval / steps))
