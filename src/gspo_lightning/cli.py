"""The programs of `train.py` and `evaluate.py`; for how they end see `gspo_lightning.program.ending`."""

from __future__ import annotations

import contextlib
import logging
import warnings
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import transformers
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from rich.console import Console

from gspo_lightning.advantages import check_combination
from gspo_lightning.config import checks, hardware
from gspo_lightning.config.build import (
    build,
    build_callbacks,
    build_data,
    build_module,
    build_trainer,
    check_loggers,
    rollouts_of_epochs,
)
from gspo_lightning.config.devices import is_sharded
from gspo_lightning.config.effects import check_environment_reward, check_held_out
from gspo_lightning.config.resolve import resolve
from gspo_lightning.distributed import first_error, rank_watch
from gspo_lightning.errors import UserError
from gspo_lightning.module import GSPOModule
from gspo_lightning.program.ending import no_run_dir, one_job, run
from gspo_lightning.program.estimate import estimate_run
from gspo_lightning.program.evaluation import HeldOutLog, write_evaluation
from gspo_lightning.program.redact import redacted
from gspo_lightning.program.resume import find_checkpoint
from gspo_lightning.program.run_lock import lock_run
from gspo_lightning.program.sweep_job import SweepStopped, begins_ranks, run_apart
from gspo_lightning.program.threads import share_threads
from gspo_lightning.program.training_run import TrainingRun
from gspo_lightning.report import print_evaluation
from gspo_lightning.report.config_tree import config_tree
from gspo_lightning.rewards import RewardSet
from gspo_lightning.rollout import closing_engine


def train_main() -> None:
    """Runs `train` with the configs of the package (`gspo_lightning.program.commands`)."""
    run(hydra.main(version_base="1.3", config_path="pkg://gspo_lightning.conf", config_name="train")(train))


def evaluate_main() -> None:
    """Runs `evaluate` with the configs of the package."""
    run(hydra.main(version_base="1.3", config_path="pkg://gspo_lightning.conf", config_name="train")(evaluate))


def train(cfg: DictConfig) -> float | None:
    """One training run; returns the held-out sampled accuracy after it, for sweeps."""
    return one_job(_train, cfg)


def evaluate(cfg: DictConfig) -> None:
    """Measures a policy on the held-out prompts of a data config, with the same settings as training."""
    one_job(_evaluate, cfg)


def _train(cfg: DictConfig) -> float | None:
    _quieten()
    plain = resolve(cfg)
    checks.check(plain)
    folder = Path(HydraConfig.get().runtime.output_dir)
    if plain["dry_run"]:
        find_checkpoint(plain["ckpt_path"], folder, sharded=is_sharded(plain))
        _dry_run(plain)
        first_error.leave_nothing(folder)
        return None
    if begins_ranks(plain["trainer"], hardware.ranks(plain)):
        return run_apart()
    _share_threads(plain)
    ckpt_path = find_checkpoint(plain["ckpt_path"], folder, sharded=is_sharded(plain))
    run_dir = _make_run_dir(folder)
    L.seed_everything(plain["seed"], workers=True, verbose=False)
    rewards = _rewards(plain)
    datamodule = _data(plain, rewards)
    if plain["print_config"]:
        rank_zero_only(Console().print)(config_tree(redacted(plain)))
    # Seeded again, so that an adapter's initial weights do not depend on random numbers drawn by data and rewards.
    L.seed_everything(plain["seed"], workers=True, verbose=False)
    module = _module(plain, rewards)
    with contextlib.closing(module.rewards), closing_engine(module.engine):
        training = TrainingRun(plain, run_dir, ckpt_path, module, datamodule)
        accuracy = training.execute()
    if training.stopped:
        training.stop.hand_over()
    if training.stopped and HydraConfig.get().mode != RunMode.RUN:
        raise SweepStopped(f"{training.stopped}; the jobs after it were not run")
    return accuracy


def _dry_run(plain: dict[str, Any]) -> None:
    """Prints the table of `gspo_lightning.program.estimate` for the first prompts of the run."""
    check_loggers(plain["logger"])
    build_callbacks(plain)  # which may refuse their settings
    rewards = _rewards(plain)
    datamodule = _data(plain, rewards)
    module = _module(plain, rewards)
    Console().print(estimate_run(plain, datamodule, module).table())


def _data(plain: dict[str, Any], rewards: RewardSet) -> Any:
    """The data of a training run, which may decide its length."""
    datamodule = build_data(plain, rewards)
    plain["max_rollouts"] = rollouts_of_epochs(plain, datamodule.rollouts_per_epoch)
    check_held_out(plain, datamodule.num_held_out, training=True)
    return datamodule


def _module(plain: dict[str, Any], rewards: RewardSet) -> GSPOModule:
    """The module of a training run; an estimator of the user's own was not made before."""
    module = build_module(plain, rewards)
    check_combination(rewards.how, module.advantages.scale_rewards)
    return module


def _rewards(plain: dict[str, Any]) -> RewardSet:
    rewards: RewardSet = build(plain["reward"])
    check_environment_reward(plain, rewards)
    return rewards


def _share_threads(plain: dict[str, Any]) -> None:
    share_threads(hardware.ranks(plain) // plain["trainer"]["num_nodes"])


def _evaluate(cfg: DictConfig) -> None:
    _quieten()
    plain = resolve(cfg)
    checks.check(plain, training=False)
    if begins_ranks(plain["trainer"], hardware.ranks(plain)):
        run_apart()
        return
    _share_threads(plain)
    rewards = _rewards(plain)
    datamodule, module = build_data(plain, rewards), build_module(plain, rewards)
    check_held_out(plain, datamodule.num_held_out, training=False)
    folder = _make_run_dir(Path(HydraConfig.get().runtime.output_dir))
    trainer = build_trainer(plain, [], folder)
    lock = lock_run(folder, trainer)

    def leave() -> None:
        if lock is not None:
            lock.release()
        first_error.leave_nothing(folder)

    first_error.join(folder, trainer.global_rank, trainer.world_size)
    rank_watch.begin(folder, leave)
    try:
        _measure(plain, trainer, module, datamodule, folder)
    finally:
        if lock is not None:
            lock.release()


def _measure(plain: dict[str, Any], trainer: L.Trainer, module: GSPOModule, datamodule: Any, folder: Path) -> None:
    """Validates, and writes and shows what was measured."""
    module.validator.log = log = HeldOutLog(folder, trainer.global_rank, trainer.world_size)
    with contextlib.closing(module.rewards), closing_engine(module.engine):
        trainer.validate(module, datamodule=datamodule, verbose=False)
        rank_watch.stop()
    try:
        log.write()
        written = write_evaluation(folder, plain, module.last_validation) if trainer.is_global_zero else None
    except OSError as error:
        where = error.filename or folder
        raise UserError(
            f"cannot write {where} ({error.strerror}); free some space, or choose another folder (hydra.run.dir)"
        ) from error
    if written is not None:
        print_evaluation(Console(), plain["model"]["path"], module.last_validation, module.validation_samples)
        print(f"written: {written} and {log.path.name} next to it", flush=True)


def _make_run_dir(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write_test"
        probe.touch()
        probe.unlink(missing_ok=True)  # another rank may have been quicker
    except OSError as error:
        raise no_run_dir(folder, error) from error
    return folder


def _quieten() -> None:
    """Silences tips of libraries and progress bars of file loading."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for chosen in ("callbacks", "profilers"):  # what a user has added says what it was added for
        logging.getLogger(f"lightning.pytorch.{chosen}").setLevel(logging.INFO)
    transformers.utils.logging.disable_progress_bar()
    # About its kernel for a base in 4 bits, which it names whenever peft imports it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # About names of routers, which the pattern of `add_lora` has for every model.
    warnings.filterwarnings("ignore", message="You have passed exclude_modules")
    # Without held-out rows, where the line of the screen says nan.
    warnings.filterwarnings("ignore", message="The ..compute.. method of metric MeanMetric was called before")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # What is logged is already a mean over all ranks.
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
