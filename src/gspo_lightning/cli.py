"""What `train.py` and `evaluate.py` do; with `config.py` the only place that knows Hydra."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import hydra
import lightning as L
import torch
import transformers
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from gspo_lightning import config, first_error
from gspo_lightning.build import build_callbacks, build_data, build_module, build_trainer, rollouts_of_epochs
from gspo_lightning.callbacks import RunRecorder
from gspo_lightning.callbacks.checkpoint import GracefulStop, RolloutCheckpoint, disk_error
from gspo_lightning.errors import UserError
from gspo_lightning.estimate import estimate
from gspo_lightning.guarded_step import NonFiniteGradientError
from gspo_lightning.module import GSPOModule
from gspo_lightning.policy.export import export_policy
from gspo_lightning.policy.hub import push
from gspo_lightning.redact import masked, redacted
from gspo_lightning.report import print_evaluation, print_result_table, render_report, write_summary
from gspo_lightning.report.config_tree import config_tree
from gspo_lightning.report.model_card import model_card
from gspo_lightning.resume import find_checkpoint
from gspo_lightning.rollout import RolloutError
from gspo_lightning.sharding import whole_policy
from gspo_lightning.timing import peak_rss_gb

USER_ERRORS = (UserError, HydraException, OmegaConfBaseException)


class SweepStopped(KeyboardInterrupt):
    """A signal ended a job of a sweep; not an Exception, because Hydra would go on with the next job."""


def run(main: Callable[[], Any]) -> None:
    """Runs a Hydra main: a mistake of the user prints one line and exits with code 2, without a traceback."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises instead of printing lines of its own
    logging.getLogger("hydra").setLevel(logging.CRITICAL)
    if os.getcwd() not in sys.path:  # the user's own modules; behind the libraries, which they must not shadow
        sys.path.append(os.getcwd())
    try:
        main()
    except (*USER_ERRORS, NonFiniteGradientError) as error:
        _exit_with_line(error, _wants_traceback())
    except SweepStopped as stopped:
        print(f"error: {stopped}", file=sys.stderr, flush=True)
        sys.exit(130)
    except OSError as error:
        # Hydra makes the run's folder before any of our code runs; any other OSError is not ours to explain.
        if not any(
            frame.name == "run_job" and "mkdir" in str(frame.line)
            for frame in traceback.extract_tb(error.__traceback__)
        ):
            raise
        _exit_with_line(_no_run_dir(error.filename, error), _wants_traceback())


def train_main() -> None:
    """The console command ``gspo-train``: `train.py` for an installed package."""
    run(hydra.main(version_base="1.3", config_path="pkg://gspo_lightning.conf", config_name="train")(train))


def evaluate_main() -> None:
    """The console command ``gspo-eval``: `evaluate.py` for an installed package."""
    run(hydra.main(version_base="1.3", config_path="pkg://gspo_lightning.conf", config_name="train")(evaluate))


def train(cfg: DictConfig) -> float | None:
    """One training run; returns the held-out sampled accuracy after it, for sweeps."""
    return _job(_train, cfg)


def evaluate(cfg: DictConfig) -> None:
    """Measures a policy on the held-out prompts of a data config, with the same settings as training."""
    _job(_evaluate, cfg)


def _job(work: Callable[[DictConfig], Any], cfg: DictConfig) -> Any:
    """In a single run a user's mistake ends the program here; in a sweep it must not take the other jobs along.

    A sweep runs all of its jobs, and then ends with the first failure and its exit code; each failure has its line.
    """
    try:
        return work(cfg)
    except (*USER_ERRORS, NonFiniteGradientError, RolloutError) as error:
        if HydraConfig.get().mode != RunMode.RUN:
            job = HydraConfig.get().job
            line = masked(f"job {job.num} ({job.override_dirname}): {' '.join(str(error).split())}")
            print(f"failed: {line}", file=sys.stderr, flush=True)
            raise (NonFiniteGradientError if isinstance(error, NonFiniteGradientError) else UserError)(line) from error
        if first_error.several_ranks():
            line = masked(" ".join(str(error).split()))
            first_error.record(Path(HydraConfig.get().runtime.output_dir), line, _code(error))
        _leave_nothing(Path(HydraConfig.get().runtime.output_dir))
        _exit_with_line(error, bool(cfg.traceback))
    except Exception as error:
        if first_error.several_ranks():
            _end_with_the_others(error, Path(HydraConfig.get().runtime.output_dir))
        raise


def _leave_nothing(folder: Path) -> None:
    """A run that was refused before it did anything leaves no folder; Hydra had made it."""
    if {path.name for path in folder.rglob("*")} <= {"config.yaml", ".hydra"}:
        with contextlib.suppress(OSError):
            (folder / "config.yaml").unlink(missing_ok=True)
            folder.rmdir()


def _wants_traceback() -> bool:
    """Where there is no config, because it is what is wrong."""
    return not {"debug=traceback", "traceback=true"}.isdisjoint(sys.argv)


def _exit_with_line(error: Exception, with_traceback: bool) -> NoReturn:
    if with_traceback:
        traceback.print_exc()
    # Hydra goes on about where it has looked, OmegaConf about its types.
    line = " ".join(str(error).split()).split(" Config search path:")[0].removesuffix(" object_type=dict")
    # What ends a rollout is raised on every rank (`rollout.over_ranks`): one of them says it.
    if not isinstance(error, RolloutError) or first_error.is_first_rank():
        print(f"error: {masked(line)}", file=sys.stderr, flush=True)
    sys.exit(_code(error))


def _code(error: Exception) -> int:
    return 3 if isinstance(error, NonFiniteGradientError) else 4 if isinstance(error, RolloutError) else 2


def _end_with_the_others(error: Exception, folder: Path) -> None:
    """One of several ranks: notes an error of its own; where it has only lost another, ends with that one's error."""
    if not first_error.lost_a_rank(error):
        first_error.record(folder, masked(f"{type(error).__name__}: {' '.join(str(error).split())}"), 1)
        return
    line, code = first_error.first(folder)
    print(f"error: {line}", file=sys.stderr, flush=True)
    # Threads of the process group may wait for the rank that has gone.
    os._exit(code)


def _train(cfg: DictConfig) -> float | None:
    _quieten()
    plain = config.resolve(cfg)
    config.check(plain)
    folder = Path(HydraConfig.get().runtime.output_dir)
    if plain["dry_run"]:
        _dry_run(plain)
        _leave_nothing(folder)
        return None
    ckpt_path = find_checkpoint(plain["ckpt_path"], folder, sharded=config.is_sharded(plain))
    run_dir = _make_run_dir(folder)
    datamodule = build_data(plain)
    plain["max_rollouts"] = rollouts_of_epochs(plain, datamodule.rollouts_per_epoch)
    shown = redacted(plain)
    (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(shown)))
    if plain["print_config"]:
        rank_zero_only(Console().print)(config_tree(shown))
    L.seed_everything(plain["seed"], workers=True, verbose=False)
    module = build_module(plain)
    with contextlib.closing(module.rewards):
        return TrainingRun(plain, run_dir, ckpt_path, module, datamodule).execute()


def _dry_run(plain: dict[str, Any]) -> None:
    """The table of `gspo_lightning.estimate` for the first prompts of the run."""
    datamodule = build_data(plain)
    module = build_module(plain)
    found = estimate(
        module.policy_loader,
        datamodule.batch_at(0).prompts,
        num_generations=module.sampling.num_generations,
        max_completion_length=module.sampling.max_completion_length,
        validation_rows=datamodule.validation_batch_size * module.validator.sampled.num_generations,
        max_concurrent=getattr(module.engine, "max_concurrent", 0),
        update=module.update_settings,
        optimizer=plain["optimizer"]["_target_"].rpartition(".")[2],
        needs_reference=module.objective.needs_ref,
        precision=plain["trainer"]["precision"],
        on_gpu=torch.cuda.is_available() and plain["trainer"]["accelerator"] != "cpu",
    )
    Console().print(found.table())


def _evaluate(cfg: DictConfig) -> None:
    _quieten()
    plain = config.resolve(cfg)
    config.check(plain, training=False)
    datamodule = build_data(plain)
    module = build_module(plain)
    trainer = build_trainer(plain, [])
    with contextlib.closing(module.rewards):
        trainer.validate(module, datamodule=datamodule, verbose=False)
    if trainer.is_global_zero:
        print_evaluation(Console(), plain["model"]["path"], module.last_validation, module.validation_samples)


class TrainingRun:
    """Validate, train, validate, export, report."""

    def __init__(
        self, plain: dict[str, Any], run_dir: Path, ckpt_path: Path | None, module: GSPOModule, datamodule: Any
    ) -> None:
        self.plain, self.run_dir, self.module, self.datamodule = plain, run_dir, module, datamodule
        self.ckpt_path = ckpt_path
        self.checkpoint = RolloutCheckpoint(
            run_dir / "checkpoints",
            plain["checkpoint"]["every_n_rollouts"],
            plain["validation"]["every_n_rollouts"],
            plain["checkpoint"]["keep_last"],
        )
        resume_dir = self.ckpt_path.parent.parent if self.ckpt_path else None
        # The recorder writes its rows before the checkpoint that counts them: files may be ahead, never behind.
        self.recorder = RunRecorder(run_dir, resume_dir=resume_dir, tokens=plain["record_tokens"])
        self.stop = GracefulStop(self.checkpoint, plain["checkpoint"]["grace_s"])
        callbacks = [self.recorder, *build_callbacks(plain), self.checkpoint, self.stop]
        self.trainer = build_trainer(plain, callbacks)
        first_error.join(run_dir, self.trainer.global_rank, self.trainer.world_size)

    def execute(self) -> float | None:
        """Runs all of it; returns the held-out sampled accuracy at the end."""
        if self.ckpt_path is None:
            self.trainer.validate(self.module, datamodule=self.datamodule, verbose=False)
        start = time.perf_counter()
        ckpt_path = str(self.ckpt_path) if self.ckpt_path else None
        try:
            self.trainer.fit(self.module, datamodule=self.datamodule, ckpt_path=ckpt_path, weights_only=True)
        except OSError as error:
            raise disk_error(self.run_dir, error) or error from error
        except RolloutError as error:
            if not self.checkpoint.last.exists():
                raise
            raise type(error)(f"{error}; saved, go on with ckpt_path={self.checkpoint.last}") from error
        wall_s = time.perf_counter() - start
        if self.module.rollouts_done < self.module.max_rollouts:
            done = f"{self.module.rollouts_done} of {self.module.max_rollouts} rollouts done"
            print(f"{done}; go on with ckpt_path={self.checkpoint.last}", flush=True)
            if self.stop.received is not None and HydraConfig.get().mode != RunMode.RUN:
                raise SweepStopped(f"{done} in {self.run_dir}; the jobs behind it were not run")
            return None
        # Lightning validates when it stops, but not where a run was resumed behind its last rollout.
        if not self.module.last_validation:
            self.trainer.validate(self.module, datamodule=self.datamodule, verbose=False)
        self._finish(wall_s)
        return self.module.last_validation.get("val/sampled_accuracy")

    def _finish(self, wall_s: float) -> None:
        assert self.module.policy is not None
        export_dir = None
        if self.plain["export"]["enabled"]:
            policy = whole_policy(self.module.policy, self.module.policy_loader)
            if policy is not None:
                merge = self.plain["export"]["merge_lora"]
                export_dir = export_policy(policy, self.run_dir / "model", merge_lora=merge)
        if self.trainer.is_global_zero:
            summary = write_summary(self.run_dir, self._facts(wall_s, export_dir))
            report = render_report(self.run_dir)
            print_result_table(Console(), self.run_dir, report)
            if export_dir is not None:
                self._publish(export_dir, summary)

    def _publish(self, folder: Path, summary: dict[str, Any]) -> None:
        """The model card beside the weights, and both on the hub if that is asked for."""
        settings = self.plain["export"]
        is_adapter = (folder / "adapter_config.json").exists()
        card = model_card(redacted(self.plain), summary, is_adapter=is_adapter)
        (folder / "README.md").write_text(card, encoding="utf-8")
        if settings["push_to_hub"]:
            print(f"uploaded to {push(folder, settings['push_to_hub'], private=settings['private'])}", flush=True)

    def _facts(self, wall_s: float, export_dir: Path | None) -> dict[str, Any]:
        counts = self.module.counts
        return {
            "seed": self.plain["seed"],
            "steps": self.module.rollouts_done,
            "optimizer_steps": counts["optimizer_steps"],
            "wall_s": wall_s,
            "train_tokens": counts["train_tokens"],
            "rollout_tokens": counts["rollout_tokens"],
            "tokens_per_s": (counts["train_tokens"] + counts["rollout_tokens"]) / wall_s,
            "peak_rss_gb": peak_rss_gb(),
            "model": self.plain["model"]["path"],
            "precision": self.plain["trainer"]["precision"],
            "threads": torch.get_num_threads(),
            "export_dir": None if export_dir is None else str(export_dir),
        }


def _make_run_dir(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write_test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _no_run_dir(folder, error) from error
    return folder


def _no_run_dir(folder: str | Path, error: OSError) -> UserError:
    return UserError(f"hydra.run.dir={folder}: cannot write there ({error.strerror}); choose another folder")


def _quieten() -> None:
    """Keeps the screen for what matters: no tips of libraries, no progress bars of file loading."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # What is logged is already a mean over all ranks.
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
