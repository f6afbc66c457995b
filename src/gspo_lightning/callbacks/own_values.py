"""What a subclass or a callback logs itself by ``self.log``: values for ``metrics.csv`` besides those of the module."""

from __future__ import annotations

from typing import Any


def own_values(trainer: Any, module: Any, but_not: str = "") -> dict[str, float]:
    """The values logged since the last call, by name, as the loggers get them; without those of the module itself.

    Rank 0 may call it alone: in training Lightning has the values of a step, already reduced over ranks where
    ``sync_dist`` asks for it, and after a validation its means. A name logged with ``on_epoch`` alone has no value
    before the end of the run.

    Args:
        trainer: its ``callback_metrics`` hold the values.
        module: what is returned is removed from its ``logged_names``.
        but_not: a hook whose values stay for the next call.
    """
    names: dict[str, str] = getattr(module, "logged_names", {})
    for ours in (*module.last_metrics, *module.last_validation, "step"):
        names.pop(ours, None)
    wanted = {name for name, hook in names.items() if hook != but_not}
    values = trainer.callback_metrics if wanted else {}
    found = {key: name for key in sorted(values) if (name := key.partition(_OF_LOADER)[0]) in wanted}
    for name in set(found.values()):
        del names[name]
    return {key: float(values[key]) for key in found}


_OF_LOADER = "/dataloader_idx_"
"""What Lightning puts behind a name that is logged in a step, and before the number of its loader, where it has
several."""
