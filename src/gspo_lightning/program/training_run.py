"""One training run from the first validation to the report, whoever has built its parts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf
from rich.console import Console
from safetensors import SafetensorError

from gspo_lightning.callbacks import RunRecorder
from gspo_lightning.callbacks.checkpoint import RolloutCheckpoint
from gspo_lightning.callbacks.disk_errors import disk_error
from gspo_lightning.callbacks.files import remove
from gspo_lightning.callbacks.graceful_stop import GracefulStop
from gspo_lightning.config.build import build_callbacks, build_trainer
from gspo_lightning.data.vision import VisionSettings
from gspo_lightning.distributed import first_error, rank_watch
from gspo_lightning.distributed.sharding import whole_policy
from gspo_lightning.errors import UserError
from gspo_lightning.how_to_resume import resume_line
from gspo_lightning.module import GSPOModule
from gspo_lightning.paths import from_home
from gspo_lightning.policy.export import export_policy
from gspo_lightning.policy.hub import push
from gspo_lightning.policy.model import Policy
from gspo_lightning.program.interrupt import Interrupted, is_interrupt
from gspo_lightning.program.redact import redacted
from gspo_lightning.program.resume import goes_on, run_folder
from gspo_lightning.program.run_lock import lock_run
from gspo_lightning.report import print_result_table, render_report, write_summary
from gspo_lightning.report.model_card import model_card
from gspo_lightning.rollout import RolloutError
from gspo_lightning.screen import has_no_reader
from gspo_lightning.training.out_of_memory import OutOfMemoryError, memory_for
from gspo_lightning.training.timing import peak_rss_gb

_WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
"""Exceptions that a full disk may cause, see `disk_error`."""

_WHOLE_MODEL = (
    "outside of rollouts and updates: weights, gradients and optimizer states do not fit",
    "lora=language trains an adapter, optimizer=adamw_8bit keeps a quarter of the state, trainer=fsdp splits all of it "
    "over GPUs",
)
"""What ran out of memory where nothing more is known, and what takes less."""


class TrainingRun:
    """Validate, train, validate, export, report.

    Args:
        plain: the config, resolved and checked.
        run_dir: where everything is written; it exists.
        ckpt_path: checkpoint to resume from; None starts afresh.
        module: not yet set up.
        datamodule: its prompts.

    Raises:
        UserError: another run is writing into ``run_dir``.
    """

    def __init__(
        self, plain: dict[str, Any], run_dir: Path, ckpt_path: Path | None, module: GSPOModule, datamodule: Any
    ) -> None:
        self.plain, self.run_dir, self.module, self.datamodule = plain, run_dir, module, datamodule
        begins_at = from_home(plain["model"]["path"]).resolve()
        if plain["export"]["enabled"] and begins_at == (run_dir / "model").resolve():
            raise UserError(
                f"model.path={plain['model']['path']}: this run would overwrite the model it starts from; choose "
                "another hydra.run.dir, or export.enabled=false"
            )
        self.ckpt_path = ckpt_path
        self.stopped = ""
        """How far the run came if a signal ended it; else empty."""
        self.checkpoint = RolloutCheckpoint(
            run_dir / "checkpoints",
            plain["checkpoint"]["every_n_rollouts"],
            plain["validation"]["every_n_rollouts"],
            plain["checkpoint"]["keep_last"],
            plain["checkpoint"]["keep_best"],
        )
        resume_dir = run_folder(self.ckpt_path) if self.ckpt_path else None
        # The recorder comes after the user's callbacks, so that what they log is in its row, and before the checkpoint,
        # which counts its rows: files may be ahead, never behind.
        self.recorder = RunRecorder(
            run_dir, resume_dir=resume_dir, tokens=plain["record_tokens"], begins_anew=ckpt_path is None
        )
        self.stop = GracefulStop(
            self.checkpoint, plain["checkpoint"]["grace_s"], goes_on(plain["ckpt_path"], self.checkpoint.last)
        )
        callbacks = [*build_callbacks(plain), self.recorder, self.checkpoint, self.stop]
        self.trainer = build_trainer(plain, callbacks, run_dir)
        self.lock = lock_run(run_dir, self.trainer)
        first_error.join(run_dir, self.trainer.global_rank, self.trainer.world_size, self.checkpoint.last)
        rank_watch.begin(run_dir, self._leave)

    def execute(self) -> float | None:
        """Runs all of it; returns the held-out sampled accuracy at the end, None if the run ended early.

        Raises:
            UserError: for a mistake of the user, or a disk that cannot be written to.
            Interrupted: by Ctrl-C before or after training; while it trains, the rollout is finished and saved.
        """
        try:
            if self.trainer.is_global_zero:
                self._write_config()
            with memory_for(*_WHOLE_MODEL):  # rollouts and updates have their own lines
                accuracy = self._execute()
            rank_watch.stop()
            return accuracy
        except (KeyboardInterrupt, SystemExit) as end:
            if not is_interrupt(end):
                raise
            raise Interrupted(f"SIGINT: stopped; {resume_line(self.checkpoint.last)}") from end
        except OutOfMemoryError as error:
            raise OutOfMemoryError(f"{error}; {resume_line(self.checkpoint.last)}") from error
        except MisconfigurationException as error:  # by callbacks and loggers of Lightning, once they are asked
            raise UserError(f"callbacks, logger or trainer: {' '.join(str(error).split())}") from error
        except BrokenPipeError as error:
            if not has_no_reader():
                raise
            raise UserError(f"standard output has no reader any more; {resume_line(self.checkpoint.last)}") from error
        except _WRITE_ERRORS as error:
            if (line := disk_error(self.run_dir, error)) is None:
                raise
            raise line from error
        finally:
            if self.lock is not None:
                self.lock.release()

    def _write_config(self) -> None:
        """Into the run folder, and to every logger, as the hyperparameters of the run.

        Not to a run of MLflow that goes on: its hyperparameters are final, and others end in an error.
        """
        plain = redacted(self.plain)
        (self.run_dir / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(plain)), encoding="utf-8")
        nodes = [node for node in (plain["logger"] or {}).values() if node is not None]
        for node, logger in zip(nodes, self.trainer.loggers, strict=True):
            if not node.get("run_id"):
                logger.log_hyperparams(plain)

    def _leave(self) -> None:
        """Cleans up when another rank's failure ends this one: releases the lock, removes an empty run folder."""
        if self.lock is not None:
            self.lock.release()
        first_error.leave_nothing(self.run_dir)

    def _execute(self) -> float | None:
        self._train()
        best = self.checkpoint.best
        if self.module.rollouts_done < self.module.max_rollouts:
            done = f"{self.module.rollouts_done} of {self.module.max_rollouts} rollouts done"
            if self.trainer.is_global_zero:
                print(f"{done}; {resume_line(self.checkpoint.last)}", flush=True)
                if best is not None and best.found:
                    print(f"best checkpoint: {best}", flush=True)
            if self.stop.stopping:
                self.stopped = f"{done} in {self.run_dir}"
            return None
        wall_s = self.recorder.seconds
        with self.stop.finishing():
            # Lightning validates when it stops, but not if a run was resumed after its last rollout.
            if not self.module.last_validation:
                self.trainer.validate(self.module, datamodule=self.datamodule, verbose=False)
                self.checkpoint.save_if_best(self.trainer, self.module)
            self._finish(wall_s)
        return self.module.last_validation.get("val/sampled_accuracy")

    def _train(self) -> None:
        ckpt_path = str(self.ckpt_path) if self.ckpt_path else None
        self.stop.listen(self.trainer)
        try:
            if ckpt_path is None:
                self.trainer.validate(self.module, datamodule=self.datamodule, verbose=False)
            self.trainer.fit(self.module, datamodule=self.datamodule, ckpt_path=ckpt_path, weights_only=True)
        except (RolloutError, UserError) as error:
            if not self._goes_on_after(error):
                raise
            saved = "saved" if self.checkpoint.saved_at == self.module.rollouts_done else "an earlier rollout is saved"
            raise type(error)(f"{error}; {saved}, resume with ckpt_path={self.checkpoint.last}") from error
        finally:
            self.stop.give_back()

    def _goes_on_after(self, error: Exception) -> bool:
        """Whether a checkpoint has to do with an error that ended training, and its line does not say so yet."""
        # Without one of this run, a mistake is one of its settings.
        is_told = isinstance(error, OutOfMemoryError) or (isinstance(error, UserError) and not self.checkpoint.saved_at)
        return self.checkpoint.last.exists() and not is_told

    def _finish(self, wall_s: float) -> None:
        assert self.module.policy is not None
        export_dir = None
        self.recorder.check_folder()
        if self.plain["export"]["enabled"]:
            policy = whole_policy(self.module.policy, self.module.policy_loader)
            if policy is not None:
                export_dir = self._export(policy)
        self.recorder.check_folder()  # a large model is written for minutes
        if self.trainer.is_global_zero:
            summary = write_summary(self.run_dir, self._facts(wall_s, export_dir))
            report = render_report(self.run_dir)
            print_result_table(Console(), self.run_dir, report)
            if export_dir is not None:
                self._publish(export_dir, summary)

    def _export(self, policy: Policy) -> Path:
        """Exports to a temporary folder and renames it: a full disk leaves no partial model and no leftovers."""
        folder, temporary = self.run_dir / "model", self.run_dir / ".model.tmp"
        remove(temporary)
        try:
            merge = self.plain["export"]["merge_lora"]
            export_policy(policy, temporary, merge_lora=merge, image_size=self._image_size(policy))
        except BaseException:
            remove(temporary)
            raise
        remove(folder)
        os.replace(temporary, folder)
        return folder

    def _image_size(self, policy: Policy) -> dict[str, int] | None:
        """Limits of images in training, by which the exported model sees them too; None leaves the processor's."""
        data = self.plain["data"]
        limits = VisionSettings(data.get("min_pixels"), data.get("max_pixels"))
        return limits.size(policy.processor.image_processor) if policy.processor is not None and limits.is_set else None

    def _publish(self, folder: Path, summary: dict[str, Any]) -> None:
        """Writes the model card next to the weights, and pushes both to the hub if ``push_to_hub`` is set."""
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
            **({} if self.checkpoint.best is None else self.checkpoint.best.facts()),
        }
