"""The programs of `train.py` and `evaluate.py`, from the command line to the exit code."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import hydra
import lightning as L
import transformers
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from gspo_lightning.config import checks, hardware
from gspo_lightning.config.build import build, build_data, build_module, build_trainer, rollouts_of_epochs
from gspo_lightning.config.devices import is_sharded
from gspo_lightning.config.effects import check_environment_reward, check_held_out
from gspo_lightning.config.groups import check_choices
from gspo_lightning.config.resolve import resolve
from gspo_lightning.distributed import first_error, rank_watch
from gspo_lightning.errors import UserError
from gspo_lightning.extras import install_line
from gspo_lightning.program.estimate import Ranks, Work, estimate, own_parts
from gspo_lightning.program.evaluation import HeldOutLog, write_evaluation
from gspo_lightning.program.interrupt import Interrupted, is_interrupt
from gspo_lightning.program.redact import masked, masked_stderr, redacted
from gspo_lightning.program.resume import find_checkpoint
from gspo_lightning.program.sweep_job import SweepStopped, begins_ranks, run_apart
from gspo_lightning.program.threads import share_threads
from gspo_lightning.program.training_run import TrainingRun
from gspo_lightning.report import print_evaluation
from gspo_lightning.report.config_tree import config_tree
from gspo_lightning.rewards import RewardSet
from gspo_lightning.rollout import RolloutError, closing_engine
from gspo_lightning.rollout.engine import traits
from gspo_lightning.training.guarded_step import NonFiniteGradientError

USER_ERRORS = (UserError, HydraException, OmegaConfBaseException)
_OF_SWEEPS = re.compile(r"Could not (?:find|load) '(hydra/(?:launcher/(?:joblib|submitit_\w+)|sweeper/optuna))'")
RUN_ERRORS = (NonFiniteGradientError, RolloutError)
"""Errors that end a run whose config was right."""
_STOPPED = "SIGINT: stopped"


def run(main: Callable[[], Any]) -> None:
    """Runs a Hydra main: a mistake of the user prints one line and exits with code 2, without a traceback."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises instead of printing its own lines
    logging.getLogger("hydra").setLevel(logging.CRITICAL)
    if os.getcwd() not in sys.path:  # the user's own modules; after the libraries, which they must not shadow
        sys.path.append(os.getcwd())
    try:
        check_choices(sys.argv[1:])
        with masked_stderr():  # Hydra repeats the command line of a job that failed
            main()
    except (*USER_ERRORS, *RUN_ERRORS) as error:
        _exit_with_line(error, _wants_traceback())
    except KeyboardInterrupt as stopped:
        if _wants_traceback():  # Ctrl-C shows what a program waits for
            traceback.print_exc()
        if first_error.is_first_rank():
            print(f"error: {stopped if isinstance(stopped, Interrupted) else _STOPPED}", file=sys.stderr, flush=True)
        sys.exit(130)
    except OSError as error:
        key = _key_of_folder(error)
        if key is None:
            raise
        _exit_with_line(_no_run_dir(error.filename, error, key), _wants_traceback())


def train_main() -> None:
    """Runs `train` with the configs of the package (`gspo_lightning.program.commands`)."""
    run(hydra.main(version_base="1.3", config_path="pkg://gspo_lightning.conf", config_name="train")(train))


def evaluate_main() -> None:
    """Runs `evaluate` with the configs of the package."""
    run(hydra.main(version_base="1.3", config_path="pkg://gspo_lightning.conf", config_name="train")(evaluate))


def train(cfg: DictConfig) -> float | None:
    """One training run; returns the held-out sampled accuracy after it, for sweeps."""
    return _job(_train, cfg)


def evaluate(cfg: DictConfig) -> None:
    """Measures a policy on the held-out prompts of a data config, with the same settings as training."""
    _job(_evaluate, cfg)


def _job(work: Callable[[DictConfig], Any], cfg: DictConfig) -> Any:
    """Runs ``work``. A user's mistake ends a single run here; in a sweep it must not end the other jobs.

    A sweep runs all of its jobs and then ends with the first failure and its exit code; each failure prints a line.
    """
    try:
        return work(cfg)
    except (*USER_ERRORS, *RUN_ERRORS) as error:
        rank_watch.stop()
        if HydraConfig.get().mode != RunMode.RUN:
            job = HydraConfig.get().job
            line = masked(f"job {job.num} ({job.override_dirname}): {' '.join(str(error).split())}")
            print(f"failed: {line}", file=sys.stderr, flush=True)
            raise next((kind for kind in RUN_ERRORS if isinstance(error, kind)), UserError)(line) from error
        folder = Path(HydraConfig.get().runtime.output_dir)
        # An error raised on every rank is printed by one of them.
        line = masked(" ".join(str(error).split()))
        is_news = not first_error.several_ranks() or first_error.record(folder, line, _code(error))
        first_error.leave_nothing(folder)
        _exit_with_line(error, bool(cfg.traceback), is_news=is_news)
    except Exception as error:
        rank_watch.stop()
        if first_error.several_ranks():
            _end_with_the_others(error, Path(HydraConfig.get().runtime.output_dir))
        raise
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SweepStopped) or not is_interrupt(end):
            raise
        rank_watch.stop()
        first_error.leave_nothing(Path(HydraConfig.get().runtime.output_dir))
        line = str(end) if isinstance(end, Interrupted) else _STOPPED
        others = "" if HydraConfig.get().mode == RunMode.RUN else "; the jobs after it were not run"
        raise Interrupted(f"{line}{others}") from end


def _key_of_folder(error: OSError) -> str | None:
    """The key of the folder that Hydra could not make before any of our code ran; None for any other error."""
    frames = traceback.extract_tb(error.__traceback__)
    if not any(frame.name in ("run_job", "sweep", "launch") and "mkdir" in str(frame.line) for frame in frames):
        return None
    return "hydra.sweep.dir" if any(frame.name == "multirun" for frame in frames) else "hydra.run.dir"


def _wants_traceback() -> bool:
    """Whether the command line asks for a traceback, for errors that leave no config to ask."""
    return not {"debug=traceback", "traceback=true"}.isdisjoint(sys.argv)


def _exit_with_line(error: Exception, with_traceback: bool, *, is_news: bool = True) -> NoReturn:
    if with_traceback:
        traceback.print_exc()
    # Hydra appends its search path, OmegaConf its types.
    line = " ".join(str(error).split()).split(" Config search path:")[0].removesuffix(" object_type=dict")
    if (extra := _OF_SWEEPS.search(line)) is not None:
        line = f"{extra[1]} is not installed; run {install_line('sweep')}"
    if is_news:
        print(f"error: {masked(line)}", file=sys.stderr, flush=True)
    sys.exit(_code(error))


def _code(error: Exception) -> int:
    return 3 if isinstance(error, NonFiniteGradientError) else 4 if isinstance(error, RolloutError) else 2


def _end_with_the_others(error: Exception, folder: Path) -> None:
    """On one of several ranks: notes this rank's own error; if it only lost another, ends with that one's error."""
    if not first_error.lost_a_rank(error):
        first_error.record(folder, masked(f"{type(error).__name__}: {' '.join(str(error).split())}"), 1)
        return
    line, code = first_error.first(folder)
    print(f"error: {line}", file=sys.stderr, flush=True)
    first_error.leave_nothing(folder)
    # Threads of the process group may wait for the rank that is gone.
    os._exit(code)


def _train(cfg: DictConfig) -> float | None:
    _quieten()
    plain = resolve(cfg)
    checks.check(plain)
    folder = Path(HydraConfig.get().runtime.output_dir)
    if plain["dry_run"]:
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
    datamodule = build_data(plain, rewards)
    plain["max_rollouts"] = rollouts_of_epochs(plain, datamodule.rollouts_per_epoch)
    check_held_out(plain, datamodule.num_held_out, training=True)
    if plain["print_config"]:
        rank_zero_only(Console().print)(config_tree(redacted(plain)))
    # Seeded again, so that an adapter's initial weights do not depend on random numbers drawn by data and rewards.
    L.seed_everything(plain["seed"], workers=True, verbose=False)
    module = build_module(plain, rewards)
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
    rewards = _rewards(plain)
    datamodule, module = build_data(plain, rewards), build_module(plain, rewards)
    prompts, ranks = datamodule.batch_at(0).prompts, _ranks(plain)
    size = len(prompts) // ranks.count
    shares = [prompts[start : start + size] for start in range(0, size * ranks.count, size)]
    work = Work(
        num_generations=module.sampling.num_generations,
        max_completion_length=module.sampling.max_completion_length,
        validation_rows=datamodule.validation_batch_size * module.validator.sampled.num_generations,
        max_concurrent=traits(module.engine).max_concurrent,
        update=module.update_settings,
        optimizer=plain["optimizer"]["_target_"].rpartition(".")[2],
        needs_reference=module.objective.needs_ref,
        precision=plain["trainer"]["precision"],
        on_gpu=hardware.on_gpu(plain["trainer"]["accelerator"]),
        validation_generations=module.validator.sampled.num_generations,
        samples_ahead=module.ahead is not None,
        ranks=ranks,
        own=tuple(module.parameters()),  # the policy is not loaded
        not_counted=own_parts(module),
    )
    longest = max(shares, key=lambda share: sum(len(prompt.input_ids) for prompt in share))
    Console().print(estimate(module.policy_loader, longest, work).table())


def _rewards(plain: dict[str, Any]) -> RewardSet:
    rewards: RewardSet = build(plain["reward"])
    check_environment_reward(plain, rewards)
    return rewards


def _ranks(plain: dict[str, Any]) -> Ranks:
    sharded = is_sharded(plain)
    gather = sharded and plain["trainer"]["strategy"].get("gather_for_rollouts", True)
    return Ranks(hardware.ranks(plain), sharded, gather_for_rollouts=gather)


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
    module.validator.log = log = HeldOutLog(folder, trainer.global_rank, trainer.world_size)
    first_error.join(folder, trainer.global_rank, trainer.world_size)
    rank_watch.begin(folder, lambda: first_error.leave_nothing(folder))
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
        raise _no_run_dir(folder, error) from error
    return folder


def _no_run_dir(folder: str | Path, error: OSError, key: str = "hydra.run.dir") -> UserError:
    return UserError(f"{key}={folder}: cannot write there ({error.strerror}); choose another folder")


def _quieten() -> None:
    """Silences tips of libraries and progress bars of file loading."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
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
