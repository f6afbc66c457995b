"""What each argument of callbacks, loggers, the Trainer and the optimizer does."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import lightning
import torch
from hydra.utils import instantiate

from gspo_lightning.callbacks import completions as completions_module
from gspo_lightning.callbacks.health import Facts
from gspo_lightning.config import hardware
from gspo_lightning.config.build import build_trainer
from tests.callbacks.fakes import TRAINER, FakeModule
from tests.conf.probes.base import Probe, built


def correction(node: dict[str, Any], folder: Path) -> Any:
    old = torch.tensor([0.0, 0.9, -2.0, 0.02, 2.0, -0.004])
    weights, metrics = built(node)(old, torch.zeros(6), torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([3, 1, 2]))
    return weights.tolist(), {name: value[0].item() for name, value in metrics.items()}


def table(node: dict[str, Any], folder: Path) -> Any:
    written: list[Any] = []
    trainer = SimpleNamespace(is_global_zero=True, loggers=[object()])
    callback, module = built(node), FakeModule(total=40)
    with mock.patch.object(
        completions_module, "write_table", lambda logger, columns, rows, step: written.append((step, len(rows)))
    ):
        for step in range(1, 41):
            callback.on_train_batch_end(trainer, module.at(step), None, None, step)
    return written


def progress(node: dict[str, Any], folder: Path) -> Any:
    callback, module, screen = built(node), FakeModule(), io.StringIO()
    perf = {"perf/rollout_tokens_per_s": 1.0, "perf/train_tokens_per_s": 1.0}
    with contextlib.redirect_stdout(screen):
        callback.on_train_start(TRAINER, module)
        for step in range(1, 7):
            module.at(step)
            module.last_metrics |= perf
            callback.on_train_batch_end(TRAINER, module, None, None, step)
    return screen.getvalue().count("\n")


def health(node: dict[str, Any], folder: Path) -> Any:
    """When a run without signal is warned about, and whether it ends."""
    callback = built(node)
    objective = SimpleNamespace(ratio_bounds=None, importance_sampling_level="token")
    trainer = SimpleNamespace(is_global_zero=True, should_stop=False)
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen):
        for step in range(1, 9):
            module = SimpleNamespace(objective=objective, last_metrics={"silent_frac": 1.0, "reward/mean": 0.0})
            callback.on_train_batch_end(trainer, module)
            if screen.getvalue():
                return step, trainer.should_stop
    return None, Facts


def watchdog(node: dict[str, Any], folder: Path) -> Any:
    """The limits after each of a few rollouts."""
    dog, seen = built(node), []
    for seconds in (2.0, 3.0, 4.0, 0.001):
        dog._seconds.append(seconds)
        seen.append(dog.limit_s)
    dog._seconds = [0.001] * 3
    with mock.patch("gspo_lightning.callbacks.watchdog.threading.Timer") as timer:
        dog._expect_progress()
    return seen, dog.limit_s, timer.call_args.args[0] if timer.called else None


def captured(target: str) -> Callable[[dict[str, Any], Path], Any]:
    """The arguments with which a library's class is called."""

    def observe(node: dict[str, Any], folder: Path) -> Any:
        calls: list[Any] = []
        with mock.patch(target, lambda **kwargs: calls.append(kwargs)):
            instantiate(node)
        return calls

    return observe


def trainer(node: dict[str, Any], folder: Path) -> Any:
    """The arguments of the Trainer as the program makes it."""
    calls: list[Any] = []
    plain = {"trainer": node, "validation": {"every_n_rollouts": None}, "logger": {}}
    plain["trainer"]["precision"] = hardware.choose_precision(node["precision"], node["accelerator"])
    made = mock.patch.object(lightning, "Trainer", lambda **kwargs: calls.append(kwargs))
    meet = mock.patch.dict(os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # which several nodes need
    with made, meet, mock.patch.object(torch.cuda, "is_available", lambda: True):
        build_trainer(plain, [])
    kept = [{k: v for k, v in call.items() if k != "plugins"} for call in calls]
    return [
        {k: type(v).__name__ if k == "strategy" and not isinstance(v, str) else v for k, v in c.items()} for c in kept
    ]


def strategy(node: dict[str, Any], folder: Path) -> Any:
    """How long a rank waits for the others, whether weights are whole while it samples, and what DDP is told."""
    made = instantiate(node)
    return made._timeout, getattr(made, "gather_for_rollouts", None), getattr(made, "_ddp_kwargs", None)


def minutes(node: dict[str, Any], folder: Path) -> Any:
    return instantiate(node)


def tensorboard(node: dict[str, Any], folder: Path) -> Any:
    logger = instantiate(node)
    return logger.log_dir, logger._default_hp_metric


def optimizer(node: dict[str, Any], folder: Path) -> Any:
    made = built(node)([{"params": [torch.nn.Parameter(torch.zeros(1))]}])
    return made.defaults


PROBES = [
    Probe(["mismatch=token_mask"], "objective.mismatch", correction, {"level": "sequence", "how": "truncate", "high": 1.5}, {"low": 0.0}),
    Probe(["mismatch=token_mask"], "objective.mismatch", correction, {"low": 0.0}),
    Probe([], "callbacks.completions", table, {"every_n_rollouts": 7, "num_completions": 1}),
    Probe([], "callbacks.progress", progress, {"every_n_rollouts": 3}),
    Probe([], "callbacks.health", health, {"patience": 2, "stop_on": ["no_signal"]}),
    Probe([], "callbacks.watchdog", watchdog, {"factor": 5.0, "min_rollouts": 1, "min_s": 1.0, "end_s": None}),
    Probe(["trainer=ddp"], "trainer", trainer, {
        "accelerator": "cpu", "devices": 3, "max_time": "00:01:00:00", "num_nodes": 2, "precision": "bf16-true", "strategy": "auto",
    }),
    Probe(["trainer=ddp"], "trainer.strategy", strategy, {
        "timeout": {"_target_": "datetime.timedelta", "minutes": 3}, "gradient_as_bucket_view": False,
    }),
    Probe(["trainer=ddp"], "trainer.strategy.timeout", minutes, {"minutes": 3}),
    Probe(["trainer=fsdp"], "trainer.strategy", strategy, {
        "timeout": {"_target_": "datetime.timedelta", "minutes": 3}, "gather_for_rollouts": False,
    }),
    Probe(["trainer=fsdp"], "trainer.strategy.timeout", minutes, {"minutes": 3}),
    Probe(["logger=csv"], "logger.csv", captured("lightning.pytorch.loggers.CSVLogger"), {"save_dir": "x", "name": "x", "version": "x"}),
    Probe(["logger=tensorboard"], "logger.tensorboard", tensorboard, {"save_dir": "x", "name": "x", "version": "x", "default_hp_metric": True}),
    Probe(["logger=wandb"], "logger.wandb", captured("lightning.pytorch.loggers.WandbLogger"), {"save_dir": "x", "project": "x", "offline": True}),
    Probe(["logger=mlflow"], "logger.mlflow", captured("lightning.pytorch.loggers.MLFlowLogger"), {
        "experiment_name": "x", "tracking_uri": "x", "artifact_location": "x",
    }),
    Probe(["optimizer=adamw"], "optimizer", optimizer, {"fused": False}),
]  # fmt: skip
