"""The best checkpoint: a second name for the checkpoint of the rollout with the highest validation value so far."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from gspo_lightning.callbacks.files import keep_copy
from gspo_lightning.distributed.sharded_checkpoint import REST
from gspo_lightning.errors import UserError

NO_BETTER = "val/mean_tokens"
"""The validation metric for which higher is not better."""


def metrics_of(num_generations: int) -> list[str]:
    """Metrics of every validation for which higher is better, given the number of sampled completions per prompt."""
    return ["val/accuracy", "val/sampled_accuracy", f"val/pass@{num_generations}", "val/reward"]


class Best:
    """The best rollout by a validation metric, and its checkpoint.

    Every checkpoint records the best rollout, and is written before the best gets its second name. So after a kill in
    between, the checkpoint that the run resumes from is itself the best, and gets the name at the start (`take_over`).

    Args:
        metric: such as ``val/accuracy``; higher is better, the first of equals stays.
        path: path of the best checkpoint.
        key: key of the callback's state, which is `found`, in a checkpoint.
    """

    def __init__(self, metric: str, path: Path, key: str) -> None:
        self.metric, self.path, self.key = metric, path, key
        self.found: dict[str, Any] = {}
        """``metric``, ``value`` and ``rollout`` of the best so far; empty before the first."""

    def __str__(self) -> str:
        """The best rollout, its value and its path, for the screen."""
        return f"rollout {self.found['rollout']}, {self.metric}={self.found['value']:.4g}: {self.path}"

    def facts(self) -> dict[str, Any]:
        """``best_metric``, ``best_value``, ``best_rollout`` for ``summary.json``; the last two null without a best."""
        return {
            f"best_{name}": {"metric": self.metric, **self.found}.get(name) for name in ("metric", "value", "rollout")
        }

    def check(self, metrics: dict[str, float]) -> None:
        """Refuses a metric that the validation does not measure.

        Raises:
            UserError: names the metrics that it measures.
        """
        if self.metric not in metrics:
            names = ", ".join(name for name in metrics if name != NO_BETTER)
            raise UserError(f"checkpoint.keep_best={self.metric}: validation does not measure it; it measures {names}")

    def is_higher(self, metrics: dict[str, float], rollout: int) -> bool:
        """Whether a validation's value is higher than all before (NaN never is); records it if so."""
        self.check(metrics)
        value = metrics[self.metric]
        if not value > self.found.get("value", float("-inf")):
            return False
        self.found = {"metric": self.metric, "value": value, "rollout": rollout}
        return True

    def load(self, found: dict[str, Any]) -> None:
        """Restores the best of the resumed run, unless it was by another metric."""
        self.found = dict(found) if found.get("metric") == self.metric else {}

    def keep(self, checkpoint: Path) -> None:
        """Gives ``checkpoint`` its second name; see `keep_copy`."""
        keep_copy(checkpoint, self.path)

    def take_over(self, trainer: L.Trainer) -> None:
        """Brings the best so far into this run at the start of a resumed run; forgets it if its checkpoint is gone.

        It is looked for at ``path``, in the checkpoint that the run resumes from, and next to that.
        """
        if not self.found:
            return
        if not trainer.strategy.broadcast(trainer.is_global_zero and self._bring(trainer.ckpt_path)):
            rank_zero_warn(
                f"{self.path.name} of rollout {self.found['rollout']} ({self.metric}={self.found['value']:.4g}) is "
                f"neither in {self.path.parent} nor in the folder of ckpt_path: the search for the best checkpoint "
                "starts over"
            )
            self.found = {}

    def _bring(self, ckpt_path: str | Path | None) -> bool:
        if self._holds(self.path):
            return True
        sources = [] if ckpt_path is None else [Path(ckpt_path), Path(ckpt_path).with_name(self.path.name)]
        source = next(filter(self._holds, sources), None)
        if source is not None:
            self.keep(source)
        return source is not None

    def _holds(self, checkpoint: Path) -> bool:
        """Whether a checkpoint is that of the best rollout. Only the structure is loaded: tensors stay on the disk."""
        file = checkpoint / REST if checkpoint.is_dir() else checkpoint
        try:
            content = torch.load(file, map_location="meta", weights_only=True, mmap=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
            return False
        done = content["gspo_lightning"]["rollouts_done"] if "gspo_lightning" in content else None
        return done == self.found["rollout"] and content.get("callbacks", {}).get(self.key) == self.found
