"""Lightning's hooks in a subclass of `GSPOModule`: an override must not switch off, without a word, what ours does."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any

from gspo_lightning.errors import UserError
from gspo_lightning.types import PromptBatch

AT_WORK = {
    "configure_model": "loads the policy",
    "on_fit_start": "checks the settings of the Trainer",
    "on_train_start": "moves the schedule of a resumed run to its position",
    "on_train_batch_start": "samples the rollout",
    "training_step": "takes the optimizer steps",
    "on_validation_start": "chooses the forward of the model",
    "on_validation_epoch_start": "resets the counts of held-out prompts",
    "validation_step": "measures held-out prompts",
    "on_validation_epoch_end": "computes the metrics of held-out prompts",
    "on_save_checkpoint": "saves the counters of the run",
    "on_load_checkpoint": "restores the counters of the run",
}
"""Hooks that do something in `GSPOModule` -> what."""

NEVER_CALLED = {
    "optimizer_step": "give configure_optimizers an optimizer whose step() does it, or use on_before_optimizer_step",
    "optimizer_zero_grad": "gradients are cleared after every step; use on_before_zero_grad",
    "configure_gradient_clipping": "set update.max_grad_norm, or change gradients in on_before_optimizer_step",
    "lr_scheduler_step": "give configure_optimizers a scheduler whose step() does it",
}
"""Hooks that Lightning does not call under manual optimization -> what to do instead."""


class WorkingHooks:
    """A base of `GSPOModule`: an override of a hook in `AT_WORK` that does not call ``super()`` is refused when it ran.

    So is a function that is assigned to an object under the name of such a hook. Three exceptions return before they
    call it: ``configure_model`` of a module that has its policy, ``on_train_batch_start`` that returns -1 (no rollout),
    and ``validation_step`` of a batch that is no `PromptBatch`. ``on_save_checkpoint`` gets a warning, and what ours
    saves is added: an error would lose the rollouts before it.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in AT_WORK and callable(value) and not hasattr(value, "_watches_super"):
            value = MethodType(_demanding(name, _assigned(f"{type(self).__name__}.{name}", value)), self)
        super().__setattr__(name, value)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        is_ours = WorkingHooks in cls.__bases__
        for name in AT_WORK:
            hook = getattr(cls, name, None)
            if inspect.isfunction(hook) and not hasattr(hook, "_watches_super"):
                setattr(cls, name, (_noting if is_ours else _demanding)(name, hook))


def _noted(module: Any) -> set[str]:
    """Names of the hooks whose part of `GSPOModule` ran."""
    noted: set[str] = vars(module).setdefault("_hooks_that_ran", set())
    return noted


def _noting(name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook of `GSPOModule`, which notes that it ran."""

    @functools.wraps(hook)
    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        _noted(self).add(name)
        return hook(self, *args, **kwargs)

    noting._watches_super = True  # type: ignore[attr-defined]
    return noting


def _assigned(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that was assigned to an object, in the form of a hook."""

    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    hook.__qualname__ = f"{name}, assigned to the object"
    return hook


def _demanding(name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
    """An override, after which that of `GSPOModule` must have run."""

    @functools.wraps(hook)
    def demanding(self: Any, *args: Any, **kwargs: Any) -> Any:
        _noted(self).discard(name)
        result = hook(self, *args, **kwargs)
        if name == "training_step":
            _check_result(result, hook.__qualname__)
        nothing_to_do = name == "configure_model" and self.policy is not None
        nothing_to_do |= name == "validation_step" and not isinstance(args[0] if args else None, PromptBatch)
        if name in _noted(self) or nothing_to_do or (name == "on_train_batch_start" and result == -1):
            return result
        line = f"{_plain(hook.__qualname__)}: it did not call super().{name}(), which {AT_WORK[name]}"
        if name != "on_save_checkpoint":
            raise UserError(f"{line}; call it")
        warnings.warn(f"{line}; it was called after it", stacklevel=2)
        ours = next(base for base in type(self).__mro__ if WorkingHooks in base.__bases__)
        getattr(ours, name)(self, *args, **kwargs)
        return result

    demanding._watches_super = True  # type: ignore[attr-defined]
    return demanding


def _check_result(result: Any, name: str) -> None:
    """Refuses a loss that ``training_step`` returns: under manual optimization Lightning has no use for it."""
    loss = result.get("loss") if isinstance(result, dict) else result
    if getattr(loss, "requires_grad", False):
        raise UserError(
            f"{_plain(name)}: the loss that it returns is not trained on, because optimization is manual; return it "
            "from auxiliary_loss"
        )


def _plain(name: str) -> str:
    """The name of a class or function without where it is defined."""
    return name.rpartition("<locals>.")[2]


def refuse_uncalled(module: Any) -> None:
    """Refuses overrides of hooks that manual optimization never calls.

    Raises:
        UserError: names the hook and what to do instead.
    """
    for name, instead in NEVER_CALLED.items():
        owner = next(base for base in type(module).__mro__ if name in vars(base))
        if name in vars(module) or not owner.__module__.startswith("lightning."):
            raise UserError(
                f"{type(module).__name__}.{name} is never called, because optimization is manual: {instead}"
            )
