"""The console commands ``gspo-train`` and ``gspo-eval``; like `train.py` they set threads before importing torch."""

from __future__ import annotations

from types import ModuleType

from gspo_lightning.program.imports import objects_that_stay
from gspo_lightning.program.interrupt import end_at_interrupt
from gspo_lightning.program.threads import configure_threads, keep_freed_memory


def train() -> None:
    """Trains a policy: `train.py` for an installed package."""
    _program().train_main()


def evaluate() -> None:
    """Measures a policy on held-out prompts: `evaluate.py` for an installed package."""
    _program().evaluate_main()


def _program() -> ModuleType:
    end_at_interrupt()
    configure_threads()
    keep_freed_memory()
    with objects_that_stay():
        from gspo_lightning import cli  # which imports torch

    return cli
