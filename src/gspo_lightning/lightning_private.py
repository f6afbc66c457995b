"""All that is used of Lightning without being public, with the reason; checked with Lightning 2.6.6.

Another release may rename it without a word: look here first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Set
from itertools import chain
from typing import Any

import torch


def trainer_of(module: Any) -> Any:
    """The Trainer of a LightningModule; None before it has one, where the public ``module.trainer`` raises."""
    return module._trainer


def current_hook(module: Any) -> str:
    """Name of the hook that Lightning is calling, for what is logged in it; ``None`` as text outside of hooks."""
    return str(module._current_fx_name)


def is_compiled(module: Any) -> bool:
    """Whether a Trainer was given the module within `torch.compile`, which then compiles its steps."""
    return module._compiler_ctx is not None


def batch_in_hand(module: Any) -> Any:
    """The batch of the loop that is running; None outside of loops."""
    results = getattr(module._trainer, "_results", None)
    return getattr(results, "batch", None)


def start_method(trainer: Any) -> str | None:
    """How the launcher starts the other ranks by multiprocessing; None for torchrun and scripts, which start none."""
    return getattr(trainer.strategy.launcher, "_start_method", None)


def looks_at_epoch_end(early_stopping: Any) -> bool:
    """Whether `EarlyStopping` looks at its metric at the end of an epoch, and not after a validation."""
    return bool(early_stopping._check_on_train_epoch_end)


def saves_at_epoch_end(checkpoint: Any, trainer: Any) -> bool:
    """Whether `ModelCheckpoint` with ``every_n_epochs`` saves at the end of an epoch, and not after a validation."""
    return bool(checkpoint._should_save_on_train_epoch_end(trainer))


def is_by_time(checkpoint: Any) -> bool:
    """Whether `ModelCheckpoint` was asked to save by the clock, which it does under automatic optimization alone."""
    return checkpoint._train_time_interval is not None


def begin_averages(trainer: Any) -> None:
    """Prepares `WeightAveraging` for this run.

    It counts the steps of this Trainer, else it would wait for as many as an earlier one had taken; and it averages
    what checkpoints hold, see `_average_what_is_saved`.
    """
    for callback in _averaging(trainer):
        callback._latest_update_step = min(callback._latest_update_step, trainer.global_step)
        callback._latest_update_epoch = min(callback._latest_update_epoch, trainer.current_epoch - 1)
        _average_what_is_saved(callback._average_model)


def _average_what_is_saved(average: Any) -> None:
    """Keeps frozen weights, and buffers that no state dict holds, out of an average: there they are the module's.

    By rounding the average of equal numbers is another number, and that of packed 4-bit weights another weight. These
    would take the place of the module's when training ends, and a resumed run would begin without them.
    """
    update = average.update_parameters

    @torch.no_grad()
    def update_what_is_saved(module: Any) -> None:
        update(module)
        saved = {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}
        for mine, theirs in zip(_tensors(average.module), _tensors(module), strict=True):
            if id(theirs) not in saved:
                mine.copy_(theirs)

    average.update_parameters = update_what_is_saved


def _tensors(module: Any) -> Iterator[torch.Tensor]:
    return chain(module.parameters(), module.buffers())


@torch.no_grad()
def let_averages_follow(trainer: Any, module: Any) -> None:
    """Lets the weights of a `WeightAveraging` that has not begun be the trained ones.

    It validates with them, and puts them in place when training ends. They are those that it was made with, and the
    first ones that it averages take their place in any case.
    """
    for callback in _averaging(trainer):
        if callback._average_model.n_averaged:
            continue
        for average, trained in zip(_tensors(callback._average_model.module), _tensors(module), strict=True):
            average.copy_(trained)


def averages_weights(trainer: Any) -> bool:
    """Whether a callback of this fit averages weights, and puts the average in their place when training ends."""
    return bool(_averaging(trainer))


def take_trained(module: Any, checkpoint: dict[str, Any]) -> None:
    """Puts the trained weights where `WeightAveraging` has saved their average, for a run that goes on without it."""
    trainer = module._trainer
    goes_on = trainer is not None and trainer.training
    if goes_on and not averages_weights(trainer) and "current_model_state" in checkpoint:
        checkpoint["state_dict"] = checkpoint.pop("current_model_state")


def put_trained_back(trainer: Any, module: Any) -> None:
    """Ends the exchange of trained and averaged weights that `WeightAveraging` makes for a validation.

    It does so by itself only where the validation is not broken off.
    """
    for callback in _averaging(trainer):
        callback._swap_models(module)


def _averaging(trainer: Any) -> list[Any]:
    return [callback for callback in trainer.callbacks if getattr(callback, "_average_model", None) is not None]


def forget(trainer: Any, names: Set[str]) -> None:
    """Makes the Trainer forget metrics of ``training_step``: it logs the last value of every name that it has seen.

    Callbacks can still monitor the last value.
    """
    logged = trainer._results or {}  # None outside of a loop
    for key in [key for key, value in logged.items() if value.meta.fx == "training_step" and value.meta.name in names]:
        del logged[key]


def uncount_batch(trainer: Any) -> None:
    """Takes the batch in hand out of Lightning's count, by which validations are due: it becomes no rollout.

    A run that is resumed after its last rollout reads one such batch; its checkpoint would move all later validations.
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress
    progress.total.ready -= 1
    progress.current.ready -= 1


def uncount_batch_in(checkpoint: dict[str, Any]) -> None:
    """`uncount_batch` in a checkpoint that is saved while a batch is in hand: a resumed run reads that one again."""
    if "loops" in checkpoint:  # not where weights alone are saved
        counted = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
        counted["ready"] = counted["started"] = counted["processed"]


def change_kill(change: Callable[[Callable[[], None]], Callable[[], None]]) -> None:
    """Replaces, once, how Lightning's observer kills this process when a rank that it started has failed.

    The observer is a thread known by its name alone, and there is no hook before the kill.

    Args:
        change: what kills -> what is called instead.
    """
    for thread in threading.enumerate():
        if thread.name == "child-process-observer" and "_terminate_all" not in vars(thread):
            observer: Any = thread
            observer._terminate_all = change(observer._terminate_all)
