"""The run's files: ``metrics.csv``, ``completions.jsonl`` and the validations before and after.

The files are on the disk before the checkpoint that counts them, so after a crash they may be ahead of it,
never behind. A resumed run takes over exactly the rows its checkpoint knows: no duplicate, none lost.
"""

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from gspo_lightning.callbacks.files import Place, copy_prefix, flush_to_disk, remove, replace_file
from gspo_lightning.callbacks.metrics_table import MetricsTable
from gspo_lightning.callbacks.own_values import own_values
from gspo_lightning.callbacks.strict_json import to_json
from gspo_lightning.distributed.ranks import gather_text
from gspo_lightning.types import ScoredRollout

BEFORE, AFTER, SUMMARY = "validation_before.json", "validation_after.json", "summary.json"


class RunRecorder(L.Callback):
    """Writes the run's files, on rank 0 only: completions and metrics are those of all ranks, which all must have it.

    ``metrics.csv`` has a row per rollout (``step`` counts finished rollouts; 0 is the validation before
    training), with the columns of a validation in the row of the rollout it follows. ``completions.jsonl``
    has a line per completion, rank after rank, which is the order of one process. ``validation_before.json`` and
    ``validation_after.json`` hold the validation before training and the newest one since. A ``summary.json`` in the
    folder, of a run that ended, is set aside.

    Args:
        run_dir: where to write; exists.
        resume_dir: the folder of the run that a checkpoint comes from; by default ``run_dir``. If given, nothing is
            recorded before that checkpoint is loaded.
        tokens: whether to record token ids and sampler log-probabilities too, which `rollout.ReplayEngine` needs.
        begins_anew: whether a run begins with the validation before training; else it begins with training, so that a
            validation alone moves no checkpoints.
    """

    def __init__(
        self,
        run_dir: str | Path,
        resume_dir: str | Path | None = None,
        tokens: bool = False,
        begins_anew: bool = False,
    ) -> None:
        self.run_dir, self.tokens = Path(run_dir), tokens
        self.resume_dir = None if resume_dir is None else Path(resume_dir)
        self.table = MetricsTable(self.run_dir / "metrics.csv")
        self.completions = self.run_dir / "completions.jsonl"
        self.completions_bytes = 0
        self._loaded: dict[str, Any] | None = None
        self._ready = self._is_alone = False
        self.begins_anew = begins_anew
        self.before_cut: Callable[[], Any] = lambda: None
        """Called before the rows of this folder that come after the checkpoint are cut off."""
        self._place: Place | None = None
        self._seconds_before, self._start = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Training time, including that of the runs that this one resumes, up to their checkpoints."""
        return self._seconds_before + time.perf_counter() - self._start

    def state_dict(self) -> dict[str, Any]:
        """How much of the files belongs to the checkpoint; that much is on the disk when this returns."""
        if not self._ready and self._loaded is not None:
            return self._loaded
        if self._ready:
            self.check_folder()
            flush_to_disk(self.table.path, self.completions, self.run_dir)
        return {"rows": self.table.rows, "completions_bytes": self.completions_bytes, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Stores the checkpoint's counts. The files are taken over in `on_train_start`, on rank 0 only."""
        self._loaded, self._ready = dict(state_dict), False
        self._seconds_before = state_dict["seconds"]
        source = (self.resume_dir or self.run_dir) / "metrics.csv"
        if state_dict["rows"] and not source.exists():
            rank_zero_warn(f"{source} is missing: the records of this run begin at the checkpoint")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes over the records of the run that wrote the checkpoint, if there is one."""
        self._start = time.perf_counter()
        if trainer.is_global_zero:
            self._begin()

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """When a run begins, sets another run's files in this folder aside: no run must resume from them by mistake."""
        if self.begins_anew and self._writes(trainer):
            self._begin()

    def _begin(self) -> None:
        self._prepare()
        if self._loaded is None:
            self._set_checkpoints_aside()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Writes a row of metrics and a line per completion."""
        entries = completion_entries(pl_module.rollouts_done, pl_module.last_scored, self.tokens)
        # Every rank takes part, before anything that rank 0 does alone can fail.
        lines = gather_text("".join(to_json(entry) + "\n" for entry in entries))
        if trainer.is_global_zero:
            self._prepare()
            self._log_completions(lines)
            own = own_values(trainer, pl_module)
            self.table.write({"step": pl_module.rollouts_done, **pl_module.last_metrics, **own})

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Adds what was logged after the row was written, such as by ``on_train_batch_end`` of the module."""
        self._complete(trainer, pl_module, but_not="on_train_batch_start")  # another callback's, of the next row

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """The same for the last rollout."""
        self._complete(trainer, pl_module)

    def _complete(self, trainer: L.Trainer, pl_module: Any, but_not: str = "") -> None:
        if trainer.is_global_zero and self.table.rows and (own := own_values(trainer, pl_module, but_not)):
            self.table.write({"step": pl_module.rollouts_done, **own})

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Writes the validation columns of this rollout's row, and the JSON file of this validation."""
        if not self._writes(trainer):
            return
        self._prepare()
        step, metrics = pl_module.rollouts_done, pl_module.last_validation
        self.table.write({"step": step, **metrics, **own_values(trainer, pl_module)})
        content = {"step": step, "metrics": metrics, "samples": pl_module.validation_samples}
        replace_file(self.run_dir / (AFTER if step else BEFORE), to_json(content, indent=1))

    def _writes(self, trainer: L.Trainer) -> bool:
        """Whether this is the rank and the time to record a validation."""
        awaits_checkpoint = self.resume_dir is not None and self._loaded is None
        return trainer.is_global_zero and not getattr(trainer, "sanity_checking", False) and not awaits_checkpoint

    def check_folder(self) -> None:
        """Refuses another folder that has taken the place of the run's since it began to write.

        Raises:
            UserError: says what became of the folder, and how to resume the run.
        """
        if self._place is not None:
            self._place.check()

    def _prepare(self) -> None:
        self.check_folder()
        if self._ready:
            return
        self._place = Place(self.run_dir)
        if self._loaded is None:
            self._set_records_aside()
        else:
            self._take_over(self._loaded, self.resume_dir or self.run_dir)
        self._ready = True

    def _set_records_aside(self) -> None:
        """A run neither mixes with the records of another in its folder nor destroys them: they become ``*.old``.

        Those of one run at a time: what ``*.old`` has of an older one gives way. A run that was stopped before it saved
        anything gives way itself, if it had set aside one that has checkpoints.
        """
        records = [self.run_dir / name for name in (self.table.path.name, self.completions.name, BEFORE, AFTER)]
        summary, folder = self.run_dir / SUMMARY, self.run_dir / "checkpoints"
        if not (_holds_any(folder) or summary.exists()) and _holds_any(_old(folder)):
            for path in records:
                remove(path)
            return
        # A kill between two renames is made good by the next run: without the table, nothing of ``*.old`` is older.
        if self.table.path.exists():
            for path in (*records, summary):
                if not path.exists():
                    remove(_old(path))
        self._set_aside(*(path.name for path in records), SUMMARY)

    def _set_aside(self, *names: str) -> None:
        for path in filter(Path.exists, (self.run_dir / name for name in names)):
            os.replace(path, _old(path))

    def _set_checkpoints_aside(self) -> None:
        """Moves another run's checkpoints: until this run has saved, ``ckpt_path=auto`` would resume from them."""
        folder = self.run_dir / "checkpoints"
        first, self._is_alone = not self._is_alone, True
        if first and _holds_any(folder):
            remove(_old(folder))
            os.replace(folder, _old(folder))

    def _take_over(self, counted: dict[str, Any], source: Path) -> None:
        problems = []
        is_elsewhere = source.resolve() != self.run_dir.resolve()
        if is_elsewhere:  # before anything is written here, and the checkpoints last, see `_set_records_aside`
            self._set_records_aside()
            self._set_checkpoints_aside()
        else:
            self.before_cut()
            self._set_aside(SUMMARY)  # it is of the run when it ended
        try:
            if (rows := self.table.take_over(source / "metrics.csv", counted["rows"])) < counted["rows"]:
                problems.append(f"metrics.csv has {rows} of {counted['rows']} rows")
        except FileNotFoundError:
            pass  # `load_state_dict` has warned of it
        try:
            size = counted["completions_bytes"]
            self.completions_bytes = copy_prefix(source / "completions.jsonl", self.completions, size)
            if self.completions_bytes < size:
                problems.append(f"completions.jsonl has {self.completions_bytes} of {size} bytes")
        except FileNotFoundError:
            if counted["completions_bytes"]:
                problems.append("completions.jsonl is missing")
        if is_elsewhere and (before := source / BEFORE).exists():
            shutil.copyfile(before, self.run_dir / BEFORE)
        if problems:
            warnings.warn(f"{source}: {'; '.join(problems)}; the records of this run are incomplete", stacklevel=2)

    def _log_completions(self, lines: str) -> None:
        with self.completions.open("ab") as file:
            file.write(lines.encode("utf-8", "backslashreplace"))
            file.flush()
            self.completions_bytes = file.tell()


def _old(path: Path) -> Path:
    return path.with_name(f"{path.name}.old")


def _holds_any(folder: Path) -> bool:
    """Whether there are checkpoints: names that begin with a dot are of one that was never finished."""
    return folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())


def completion_entries(step: int, scored: ScoredRollout, tokens: bool = False) -> list[dict[str, Any]]:
    """One flat record per completion, with its tokens if asked for; a reward that does not apply is null."""
    entries = []
    for b, (prompt, group) in enumerate(zip(scored.prompts, scored.completions, strict=True)):
        for g, completion in enumerate(group):
            values = scored.rewards_by_function[b, g].tolist()
            extra = {name: column[b * len(group) + g] for name, column in scored.extra_columns.items()}
            entries.append(
                {
                    **extra,
                    "step": step,
                    "uid": prompt.uid,
                    "prompt": prompt.prompt,
                    "completion": completion.text,
                    "rewards": dict(zip(scored.reward_names, values, strict=True)),
                    "reward": scored.rewards[b, g].item(),
                    "advantage": scored.advantages[b, g].item(),
                    "finish_reason": completion.finish_reason,
                    "tokens": completion.num_trained,
                }
            )
            if completion.thinking:
                entries[-1]["thinking"] = completion.thinking
            if completion.dialogue is not None:
                entries[-1] |= {
                    "messages": completion.dialogue.messages,
                    "turn_rewards": completion.dialogue.turn_rewards,
                }
            if (of_turns := scored.of_turns(b)) is not None:
                entries[-1]["turn_advantages"] = of_turns[g]
            if tokens:
                # A float32 is written as the double it equals, so it comes back bit-identical.
                logprobs = completion.sampler_logprobs.tolist()
                entries[-1] |= {"token_ids": completion.token_ids.tolist(), "sampler_logprobs": logprobs}
    return entries
