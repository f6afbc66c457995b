"""Learning-rate schedules as one function of the optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from gspo_lightning.errors import UserError, check_choice


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up over ``warmup_ratio`` of all steps, then cosine or linear decay to ``min_ratio``, or constant."""

    name: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = 0.0
    min_ratio: float = 0.0

    def __post_init__(self) -> None:
        check_choice("scheduler.name", self.name, ("cosine", "linear", "constant"))
        for key in ("warmup_ratio", "min_ratio"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"scheduler.{key}={getattr(self, key)} must be between 0 and 1")

    def factor(self, step: int, total: int) -> float:
        """Multiplier of the base learning rate in step ``step`` (counted from 0) of ``total``."""
        warmup = math.ceil(self.warmup_ratio * total)
        if step < warmup:
            return (step + 1) / warmup
        if self.name == "constant":
            return 1.0
        done = min(1.0, (step - warmup) / max(1, total - warmup))
        shape = 0.5 * (1.0 + math.cos(math.pi * done)) if self.name == "cosine" else 1.0 - done
        return self.min_ratio + (1.0 - self.min_ratio) * shape

    def build(self, optimizer: Optimizer, total: int, done: int = 0) -> LambdaLR:
        """The torch scheduler over ``total`` optimizer steps, of which ``done`` were taken by another optimizer."""
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])  # torch requires it if a schedule does not begin at step 0
        return _OwnRates(optimizer, partial(self.factor, total=total), last_epoch=done - 1)


class _OwnRates(LambdaLR):
    """A `LambdaLR` that resumes a checkpoint's position with the base learning rates of this run.

    Groups that are added to the optimizer during the run, as `BaseFinetuning` does, follow the same schedule. So does a
    rate that a program writes into a group: it is that of the current position, from which the schedule goes on.
    """

    def get_lr(self) -> list[Any]:
        """The rates at the current position."""
        self._take_over()
        self._follow_groups()
        return super().get_lr()

    def _take_over(self) -> None:
        """Makes rates that were written since the last step, which has moved the position already, the groups' own."""
        written = zip(self.optimizer.param_groups, getattr(self, "_last_lr", ()), strict=False)
        for number, (group, last) in enumerate(written):
            if group["lr"] != last:
                factor = self.lr_lambdas[number](self.last_epoch - 1)
                self.base_lrs[number] = group["lr"] / factor if factor else group["lr"]

    def _follow_groups(self) -> None:
        for group in self.optimizer.param_groups[len(self.base_lrs) :]:
            self.base_lrs.append(group.setdefault("initial_lr", group["lr"]))
            self.lr_lambdas.append(self.lr_lambdas[0])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads everything but the base learning rates."""
        own = self.base_lrs
        # Nor factors: those of groups that had been added belong to no group of this run yet.
        super().load_state_dict({**state_dict, "lr_lambdas": []})
        self.base_lrs = own
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]  # not yet those of this position

    def move_to(self, step: int) -> None:
        """Sets the position and the rates that belong to it; where both are right already, no bit changes."""
        self._follow_groups()
        self.last_epoch = step
        self._last_lr = []
        for group, base, factor in zip(self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, strict=True):
            group["lr"] = base * factor(step)
            self._last_lr.append(group["lr"])


def move_to(schedule: Any, step: int) -> None:
    """Moves a schedule that was loaded from a checkpoint to the optimizer step at which this run resumes.

    The loaded position counts the steps of the run that saved it, which may have taken more or fewer per rollout, and
    the loaded rate belongs to that run's total.

    Args:
        schedule: of `Schedule.build`; any other is left alone.
        step: optimizer steps of the finished rollouts, as this run takes them.
    """
    if isinstance(schedule, _OwnRates):
        schedule.move_to(step)
