"""Builds the objects of a resolved config: module, data, callbacks, Trainer."""

from __future__ import annotations

import inspect
import os
import re
import warnings
from copy import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from gspo_lightning.advantages import check_group
from gspo_lightning.callbacks.checkpoint_files import StreamingCheckpointIO
from gspo_lightning.config.effects import check_tasks
from gspo_lightning.config.folders import is_of_another_run, make_folder
from gspo_lightning.config.hardware import choose_accelerator
from gspo_lightning.dialogue import Environments
from gspo_lightning.distributed.rendezvous import leave_at_exit, own_environment
from gspo_lightning.errors import UserError, named_reason, reason
from gspo_lightning.extras import install_line
from gspo_lightning.module import GSPOModule
from gspo_lightning.rewards import RewardSet
from gspo_lightning.rollout import RolloutEngine
from gspo_lightning.screen import counted
from gspo_lightning.training.validation import ValidationSettings
from gspo_lightning.types import Prompt, SamplingParams


def build_module(plain: dict[str, Any], rewards: RewardSet | None = None) -> GSPOModule:
    """The LightningModule of a resolved config; loads nothing yet.

    Args:
        plain: the resolved config.
        rewards: those of this config, if already built; a reward may load its own model.

    Raises:
        UserError: what a constructor raises, in one line.
    """
    rollout = dict(plain["rollout"])
    engine = build(rollout.pop("engine"))
    if plain["environment"]:
        engine = with_environments(engine, build(plain["environment"]))
    validation = {k: v for k, v in plain["validation"].items() if k != "every_n_rollouts"}
    make = build({**plain["module"], "_partial_": True})  # of a subclass: with the arguments that it adds
    arguments = {
        "policy_loader": build(plain["model"]),
        "engine": engine,
        "rewards": rewards or build(plain["reward"]),
        "objective": build(plain["objective"]),
        "advantages": build(plain["advantages"]),
        "sampling": SamplingParams(**{**rollout, "stop": tuple(rollout["stop"])}),
        "optimizer": build(plain["optimizer"]),
        "schedule": build(plain["scheduler"]),
        "update": build(plain["update"]),
        "validation": ValidationSettings(**validation),
        "max_rollouts": plain["max_rollouts"],
        "seed": plain["seed"],
        "max_draws": plain["dynamic_sampling"]["max_draws"],
    }
    try:
        module: GSPOModule = make(**arguments)
    except UserError:
        raise
    except Exception as error:  # whatever a constructor of the user's own raises
        raise UserError(f"module: {plain['module']['_target_']} could not be made ({named_reason(error)})") from error
    check_group(module.advantages, module.sampling.num_generations, module.max_draws)
    return module


def build(node: Any) -> Any:
    """The object of one ``_target_`` node.

    Raises:
        UserError: carries the constructor's message.
    """
    try:
        return instantiate(node, _convert_="all")
    except SystemExit as error:
        raise UserError(
            f"a module that the config names exited on import (exit code {error.code}); remove that exit"
        ) from error
    except InstantiationException as error:
        # The constructor's message alone; Hydra's wrapping around it does not help the user.
        cause = error.__cause__ or error
        said = reason(cause)
        if said.startswith(type(cause).__name__):  # the name of a type alone does not say whose it is
            found = re.search(r"call to target '([^']+)'", str(error))
            said = f"{found[1] if found else node['_target_']} raised {said}"
        raise UserError(said) from error


def with_environments(engine: RolloutEngine, environments: Any) -> RolloutEngine:
    """A copy of the engine whose completions are dialogues.

    Raises:
        UserError: the engine has no attribute ``environments`` and so samples no dialogues, or ``environments`` is no
            `Environments`.
    """
    if not isinstance(environments, Environments):
        raise UserError(
            f"environment._target_ creates a {type(environments).__name__}; set it to "
            "gspo_lightning.dialogue.Environments, and name the environment as environment.make._target_, with "
            "environment.make._partial_=true"
        )
    if not hasattr(engine, "environments"):
        raise UserError(f"environment: {type(engine).__name__} cannot sample dialogues; use rollout=transformers")
    # `dataclasses.replace` would call the constructor, whose arguments may be others in a subclass.
    made = copy(engine)
    object.__setattr__(made, "environments", environments)  # the in-process engine is frozen
    return made


def build_data(plain: dict[str, Any], rewards: RewardSet) -> Any:
    """The data module; its dataset, its templates, the columns that rewards need and the environment are checked.

    An environment begins a dialogue about a row of each kind: what it misses there ends the run before a model is
    loaded.
    """
    datamodule = build({**plain["data"], "task": _task(plain)})
    check_tasks(plain, rewards, getattr(datamodule, "task_names", ()))
    rewards.check()
    environments = build(plain["environment"]) if plain["environment"] else None
    if isinstance(environments, Environments):  # `with_environments` refuses any other

        def begin(prompt: Prompt) -> None:
            environments.check(datamodule.tokenizer)  # after the template's options, which may be why it fails
            environments.begin(prompt, 0, datamodule.tokenizer)

        _check_rows(datamodule, rewards.required_columns(), begin)
    else:
        _check_rows(datamodule, rewards.required_columns())
    return datamodule


def _check_rows(datamodule: Any, *arguments: Any) -> None:
    """Calls ``check`` of the data module, unless that of a subclass takes other arguments."""
    try:
        inspect.signature(datamodule.check).bind(*arguments)
    except TypeError as error:
        raise UserError(
            f"data: {type(datamodule).__name__}.check() must take (required_columns, begin) and pass both on to "
            f"super().check() ({error})"
        ) from error
    datamodule.check(*arguments)


def _task(plain: dict[str, Any]) -> Any:
    """The config node of the task, limited to its first rows under ``overfit_rows``."""
    task, count = plain["data"]["task"], plain["overfit_rows"]
    if not count:
        return task
    if not isinstance(task, dict):
        raise UserError(f"overfit_rows={count} needs a data group whose task is an object; data.task is {task!r}")
    return {"_target_": "gspo_lightning.data.first_rows.FirstRows", "task": task, "count": count}


def rollouts_of_epochs(plain: dict[str, Any], rollouts_per_epoch: int | None) -> int:
    """The length of the run: ``max_rollouts``, or ``num_epochs`` passes over a finite task, whichever is shorter.

    Warns if ``max_rollouts`` ends the run before the epochs do.
    """
    epochs, limit = plain["num_epochs"], plain["max_rollouts"]
    if epochs is None:
        return limit
    if isinstance(epochs, bool) or not isinstance(epochs, int | float) or not 0 < epochs < float("inf"):
        raise UserError(f"num_epochs={epochs!r} must be a number above 0, or null")
    if plain["dynamic_sampling"]["max_draws"]:
        raise UserError(
            f"num_epochs={epochs} counts one prompt per place in a rollout, but dynamic_sampling.max_draws takes more "
            "rows than that; set max_rollouts instead"
        )
    if rollouts_per_epoch is None:
        raise UserError(
            f"num_epochs={epochs}: task {plain['data']['task'].get('name', '')} never runs out; set "
            "max_rollouts instead"
        )
    rollouts = max(1, round(epochs * rollouts_per_epoch))
    if limit is None or rollouts <= limit:
        return rollouts
    warnings.warn(
        f"max_rollouts={limit} ends the run before num_epochs={epochs} ({counted(rollouts, 'rollout')})", stacklevel=2
    )
    return limit


def build_callbacks(plain: dict[str, Any]) -> list[Any]:
    """The callbacks of the config's ``callbacks`` group, in order.

    Raises:
        UserError: one is none, so that Lightning would end on the first hook that it lacks.
    """
    made = {name: build(node) for name, node in (plain["callbacks"] or {}).items() if node is not None}
    for name, callback in made.items():
        if not _is_a("Callback", callback):
            raise UserError(
                f"callbacks.{name} creates a {type(callback).__name__}, which is no callback of Lightning; let it be a "
                "subclass of lightning.Callback"
            )
    return list(made.values())


_INSTEAD = {
    "callbacks": "add to the group callbacks",
    "logger": "choose one with logger=",
    "plugins": "subclass it in your own script (docs/reuse.md)",
    "default_root_dir": "set hydra.run.dir",
    **dict.fromkeys(("gradient_clip_val", "gradient_clip_algorithm"), "set update.max_grad_norm"),
    **dict.fromkeys(("limit_test_batches", "limit_predict_batches"), "held-out prompts are measured by validation"),
    "use_distributed_sampler": "each rank takes its share of the stream of prompts",
    "reload_dataloaders_every_n_epochs": "the prompts are one stream, without Lightning's epochs",
    "accumulate_grad_batches": "set update.max_tokens_per_microbatch, which never changes the gradient",
    **dict.fromkeys(
        ("max_epochs", "min_epochs", "max_steps", "min_steps", "limit_train_batches"), "set max_rollouts or num_epochs"
    ),
    "overfit_batches": "set overfit_rows",
    "fast_dev_run": "debug=fast runs every part once",
    "val_check_interval": "set validation.every_n_rollouts",
    "check_val_every_n_epoch": "set validation.every_n_rollouts",
    "log_every_n_steps": "every rollout is logged",
    "num_sanity_val_steps": "there is always a validation before the run",
    "enable_checkpointing": "set checkpoint.every_n_rollouts",
    "enable_progress_bar": "the progress line is callbacks.progress",
    "enable_model_summary": "dry_run=true prints what the model needs",
    "inference_mode": "it is always off",
    "barebones": "it switches off what a run logs and saves; leave it out",
    "sync_batchnorm": "no language model has batch norms",
    "model_registry": "checkpoints stay in the run's folder; export.push_to_hub uploads the trained model",
}
"""Arguments of the Trainer that `build_trainer` sets, or that manual optimization has no use for -> what to do."""
_EXTRAS = ("wandb", "mlflow")
"""Loggers that need the package, installed by the extra, of the same name."""


def check_loggers(loggers: dict[str, Any] | None) -> None:
    """Refuses, where none is built, a logger of Lightning whose package is not installed."""
    for name, node in (loggers or {}).items():
        is_theirs = str((node or {}).get("_target_")).startswith("lightning.")
        if name in _EXTRAS and is_theirs and find_spec(name) is None:
            raise _not_installed(name)


def _not_installed(logger: str) -> UserError:
    return UserError(f"logger={logger} is not installed; run {install_line(logger)}")


def check_trainer(trainer: dict[str, Any]) -> None:
    """Refuses a Trainer argument that would be overwritten, or that the Trainer would refuse after validating."""
    for key in trainer:
        if key in _INSTEAD:
            raise UserError(f"trainer.{key} is not a setting here: {_INSTEAD[key]}")
    share = trainer.get("limit_val_batches")
    if isinstance(share, float) and 0 < share < 1:
        raise UserError(
            f"trainer.limit_val_batches={share} is a fraction, but validation batches are a stream; give their count"
        )


def time_limits(trainer: dict[str, Any]) -> list[Any]:
    """The callback that ends the run after ``max_time``; an empty list without a limit."""
    limit = {"_target_": "gspo_lightning.callbacks.time_limit.TimeLimit", "duration": trainer.get("max_time")}
    return [] if limit["duration"] is None else [build(limit)]


def _plugins(num_nodes: int) -> list[Any]:
    """The checkpoint writer, and how ranks find each other.

    On Slurm by a plugin that leaves signals to us: Lightning would save elsewhere.
    """
    on_slurm = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()
    return [StreamingCheckpointIO(), *([_slurm()] if on_slurm else own_environment(num_nodes))]


def _slurm() -> SLURMEnvironment:
    try:
        return SLURMEnvironment(auto_requeue=False)
    except RuntimeError as error:  # --ntasks in place of --ntasks-per-node
        raise UserError(f"Slurm: {' '.join(str(error).split())}") from error


def _is_a(kind: str, made: Any) -> bool:
    """Whether a class of this name is among the bases: pytorch_lightning has such classes of its own."""
    return kind in (base.__name__ for base in type(made).__mro__)


def _logger(name: str, node: dict[str, Any], run_dir: Path | None) -> Any:
    """Builds a logger, whose folder is made; ``~`` is the home folder.

    A missing package gets our install line, as Lightning's names another version or package.

    Raises:
        UserError: it cannot be made, or would write into the folder of another run, as the resolved ``config.yaml`` of
            one says it.
    """
    place = node.get("save_dir")
    try:
        logger = build({**node, "save_dir": os.path.expanduser(place)} if isinstance(place, str) else node)
    except UserError as error:
        cause = error.__cause__ and error.__cause__.__cause__
        if isinstance(cause, ModuleNotFoundError) and name in _EXTRAS:
            raise _not_installed(name) from error
        raise
    if not _is_a("Logger", logger):
        raise UserError(
            f"logger.{name} creates a {type(logger).__name__}, which is no logger of Lightning; let it be a "
            "subclass of lightning.pytorch.loggers.Logger"
        )
    if run_dir is not None and is_of_another_run(logger.save_dir, run_dir):
        raise UserError(
            f"logger.{name}.save_dir={logger.save_dir} is the folder of another run, among whose records those of this "
            f"one would be; set 'logger.{name}.save_dir=${{hydra:runtime.output_dir}}'"
        )
    make_folder(f"logger.{name}.save_dir", logger.save_dir)
    return logger


def build_trainer(plain: dict[str, Any], callbacks: list[Any], run_dir: Path | None = None) -> Any:
    """The Lightning Trainer with what manual optimization and a prompt stream need.

    Args:
        plain: the resolved config.
        callbacks: in the order in which they are called.
        run_dir: where Lightning keeps, and on Slurm looks for, its own files; None is the current folder.
    """
    every = plain["validation"]["every_n_rollouts"]
    loggers = [_logger(name, node, run_dir) for name, node in (plain["logger"] or {}).items() if node is not None]
    ours = {
        "accelerator": choose_accelerator(plain["trainer"]["accelerator"]),
        # The time limit comes before the callback that saves: it ends the run.
        "callbacks": [*time_limits(plain["trainer"]), *callbacks],
        "max_time": None,
        "logger": loggers or False,
        "plugins": _plugins(plain["trainer"].get("num_nodes", 1)),
        "default_root_dir": run_dir,
        "max_epochs": -1,
        # By default a batch count no run reaches: no validation inside the run, only before and after it.
        "val_check_interval": every or 10**12,
        "check_val_every_n_epoch": None,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "inference_mode": False,
    }
    leave_at_exit()
    try:
        trainer = instantiate(plain["trainer"], **ours, _convert_="all")
    except InstantiationException as error:
        raise UserError(f"trainer: {reason(error.__cause__ or error)}") from error
    make_folder("trainer.profiler.dirpath", getattr(getattr(trainer, "profiler", None), "dirpath", None))
    return trainer
