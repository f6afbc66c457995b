"""The LightningDataModule of prompts: each batch is one rollout, and a run resumes from a single integer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from gspo_lightning.data.checks import check_prompt, check_settings
from gspo_lightning.data.columns import Needed, as_mapping, checked_prompt
from gspo_lightning.data.encoding import Encoder
from gspo_lightning.data.mixture import TASK_COLUMN
from gspo_lightning.data.parts import BatchWhenRead, tasks_within
from gspo_lightning.data.prompt_keys import text_key
from gspo_lightning.data.stream import Batches, PromptStream, spaced_rows, validation_rows
from gspo_lightning.data.tasks import Row, Task
from gspo_lightning.data.templating import with_schemas
from gspo_lightning.data.vision import VisionSettings
from gspo_lightning.data.written_marks import WrittenMarks
from gspo_lightning.distributed.ranks import rank, world_size
from gspo_lightning.errors import UserError
from gspo_lightning.screen import counted
from gspo_lightning.types import Prompt, PromptBatch
from gspo_lightning.users_code import keeps_state

OverlongPrompts = Literal["error", "drop"]

ROWS_CHECKED = 5_000
"""Rows of a finite task, evenly spaced, that are tokenised before a run begins, which takes a few seconds. For a
mixture, about the total over its tasks."""

_DROPS_IN_A_ROW = 1_000


class PromptDataModule(L.LightningDataModule):
    """Prompts of a task, split over ranks.

    ``cursor`` is the position of the prompt stream after the last finished rollout. It moves when the module
    says a rollout is finished, never when a batch is fetched: Lightning may fetch ahead.

    Args:
        task: where rows come from.
        model_path: the model whose tokenizer and chat template are used.
        prompts_per_rollout: over all ranks; must be divisible by their number.
        max_prompt_length: in tokens. A longer prompt is an error or left out, never truncated.
        overlong_prompts: ``error`` stops and names the row; ``drop`` takes the next row (of a `Mixture` another one of
            the same task) and counts.
        validation_batch_size: held-out prompts decoded at a time, per rank.
        seed: of the order of rows of a finite task (0 if None); refused for a task that never runs out, which draws
            its rows from its own seed.
        chat_template_kwargs: passed to the chat template, such as ``enable_thinking: false``. Among its ``tools`` may
            be functions, classes or their dotted names (`gspo_lightning.dialogue.Tools`), besides JSON schemas.
        min_pixels: images with fewer pixels are enlarged; None leaves it to the model's image processor.
        max_pixels: images with more pixels are made smaller; None leaves it to the model's image processor.
    """

    def __init__(
        self,
        task: Task,
        model_path: str,
        prompts_per_rollout: int,
        max_prompt_length: int,
        overlong_prompts: OverlongPrompts = "error",
        validation_batch_size: int = 64,
        seed: int | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> None:
        super().__init__()
        if prompts_per_rollout < 1:
            raise UserError(f"data.prompts_per_rollout={prompts_per_rollout} must be at least 1")
        self.vision_settings = VisionSettings(min_pixels, max_pixels)
        self.model_path, self.encoder = model_path, Encoder(model_path)
        self.prompts_per_rollout, self.max_prompt_length = prompts_per_rollout, max_prompt_length
        self.overlong_prompts, self.validation_batch_size = overlong_prompts, validation_batch_size
        self.chat_template_kwargs = with_schemas(chat_template_kwargs or {})
        self.seed, self.stream = seed, PromptStream(task, seed or 0)
        self.cursor = 0
        self.dropped_prompts = 0
        self._kept = 1.0
        """Share of the training rows that are not too long, as far as `check` has looked at them."""
        self._held_out: list[Row] | None = None
        self._held_out_key = ""
        self._taken: set[str] = set()
        self.has_state = bool([key for key, part in self.tasks_by_key.items() if keeps_state(part, key)])
        self._made: tuple[int, PromptBatch] | None = None

    @property
    def task(self) -> Task:
        """Where rows come from; it cannot be replaced, but may have a state that changes its training rows."""
        return self.stream.task

    @task.setter
    def task(self, task: Task) -> None:
        raise UserError(
            "data.task: a PromptDataModule keeps the task that it was made with, whose rows its position counts; make "
            "another data module, or let the task have a state (docs/reuse.md, a part with a state)"
        )

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, loaded once."""
        return self.encoder.tokenizer

    @property
    def processor(self) -> Any:
        """The model's image processor, loaded once; None for a model that reads text alone."""
        return self.encoder.processor

    @property
    def rollouts_per_epoch(self) -> int | None:
        """Rollouts in one pass over a finite task; None for an endless one.

        Of prompts that are dropped, `check` has found the share in the rows that it looked at.
        """
        size = self.task.num_train_rows
        return None if size is None else round(size * self._kept) // self.prompts_per_rollout

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks of a mixture, which are validated separately; empty for a single task."""
        return getattr(self.task, "task_names", ())

    @property
    def num_held_out(self) -> int:
        """Held-out rows of the task."""
        return len(self._validation_rows())

    @property
    def tasks_by_key(self) -> dict[str, Any]:
        """The task and those within it, by their keys; checkpoints hold the states of those that have one."""
        return tasks_within(self.task, "data.task")

    def check(self, required_columns: Needed | None = None, begin: Callable[[Prompt], Any] | None = None) -> None:
        """Makes prompts of all held-out rows and of ``ROWS_CHECKED`` training rows, without loading a model.

        Args:
            required_columns: column -> what needs it, such as ``{"answer": "reward function last_integer"}``, or a
                mapping from task of a mixture -> what needs it in the rows of that task.
            begin: called with a prompt of the training rows and one of the held-out rows, for each task of a mixture.

        Raises:
            UserError: there are too few rows, an option of the template has no effect, or a row lacks a column, is
                too long or does not fit the template; or what ``begin`` raises. Names the row or the key.

        Warns of conversations in whose text special tokens are written.
        """
        check_settings(self)
        begun: set[tuple[str, str]] = set()
        marks = WrittenMarks(self.tokenizer)
        for prompt in self._prompts_to_check():
            marks.look_at(prompt)
            check_prompt(prompt, self.chat_template_kwargs, required_columns or {})
            kind = (prompt.uid.rpartition(":")[0], str(prompt.sample.get(TASK_COLUMN)))
            if begin is not None and kind not in begun:
                begun.add(kind)
                begin(prompt)
        if (line := marks.line()) is not None:
            rank_zero_warn(line)
        self._made = None

    def _prompts_to_check(self) -> Iterator[Prompt]:
        yield from self._rollout(0).prompts
        for number in range(len(self._validation_rows())):
            yield self._validation_prompt(number)
        rows = kept = 0
        for uid, row in spaced_rows(self.task, ROWS_CHECKED):
            rows += 1
            if (prompt := self._prompt(uid, row)) is not None:
                kept += 1
                yield prompt
        self._kept = kept / rows if rows and self._substitutes is None else 1.0

    def state_dict(self) -> dict[str, Any]:
        """The state of the data in a checkpoint: cursor, dropped prompts, and which prompts are held out."""
        state = {"cursor": self.cursor, "dropped_prompts": self.dropped_prompts}
        return state if self._held_out is None else {**state, "held_out": self._held_out_key}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues at the position of the checkpoint; warns if other prompts are held out than before it."""
        self.cursor, self.dropped_prompts = state_dict["cursor"], state_dict["dropped_prompts"]
        self._made = None
        if "held_out" not in state_dict:
            return
        self._validation_rows()
        if state_dict["held_out"] != self._held_out_key:
            rank_zero_warn(
                "the held-out prompts are not those of the run that is resumed, as where its data, template or "
                "num_validation was changed: accuracies before and after are of different prompts, and some of these "
                "may have been trained on; to keep them, give them a file of their own (data.task.validation_split)"
            )

    def on_exception(self, exception: BaseException) -> None:
        """Forgets the rows of a rollout that broke off: a task with a state makes them again in the next `fit`."""
        self._made = None

    def train_dataloader(self) -> DataLoader[PromptBatch]:
        """An endless loader of rollout batches, beginning at ``cursor``.

        Raises:
            UserError: a setting has no effect, or a rollout has more prompts than the task rows; see also `check`.
        """
        if self.prompts_per_rollout % world_size():
            raise UserError(
                f"data.prompts_per_rollout={self.prompts_per_rollout} must be divisible by the number of "
                f"ranks, {world_size()}"
            )
        check_settings(self)
        return DataLoader(Batches(self._rollouts), batch_size=None)

    def _rollouts(self) -> Iterator[PromptBatch]:
        """This rank's share of each rollout from ``cursor`` on."""
        while self.has_state:
            yield BatchWhenRead(self.first)
        batch = BatchWhenRead(partial(self.batch_at, self.cursor))
        while True:
            yield batch
            batch = BatchWhenRead(partial(self._behind, batch))

    def _behind(self, batch: PromptBatch) -> PromptBatch:
        return self.batch_at(batch.cursor)

    def val_dataloader(self) -> DataLoader[PromptBatch]:
        """A loader of every held-out prompt once, spread over ranks with equally many batches; a batch may be empty."""
        count, size = len(self._validation_rows()), self.validation_batch_size
        mine = range(rank(), count, world_size())
        batches = [
            PromptBatch([self._validation_prompt(i) for i in mine[start : start + size]], cursor=0)
            for start in range(0, -(-count // world_size()), size)
        ]
        # An iterable: Lightning would divide a list among the ranks, but these batches are this rank's share already.
        return DataLoader(Batches(batches.__iter__), batch_size=None)

    def finish(self, batch: PromptBatch) -> None:
        """Marks the rollout on this batch as finished; a checkpoint taken now resumes after it."""
        self.cursor = batch.cursor
        self.dropped_prompts += batch.dropped

    def batch_at(self, cursor: int) -> PromptBatch:
        """This rank's share of the rollout that begins at ``cursor``."""
        return self._share(self._rollout(cursor))

    def first(self) -> PromptBatch:
        """This rank's share of the rollout after the last finished one; its prompts are recorded for `draw`.

        Rows passed over at the end of an epoch are not recorded.
        """
        everyone = self._rollout(self.cursor)
        self._taken = {prompt.uid for prompt in everyone.prompts}
        return self._share(everyone)

    def draw(self, batch: PromptBatch, counts: Sequence[int]) -> PromptBatch | None:
        """Fresh prompts after ``batch``: ``counts[r]`` for rank r, none of which is already in the rollout.

        None, on all ranks, if the task has too few rows left that are short enough and not in the rollout.
        """
        prompts: list[Prompt] = []
        cursor, dropped, passed = batch.cursor, batch.dropped, 0
        limit = self.task.num_train_rows or _DROPS_IN_A_ROW
        while len(prompts) < sum(counts):
            uid, row = self.stream.row_at(cursor)
            prompt, left_out = (None, False) if uid in self._taken else self._prompt_at(cursor, uid, row)
            cursor, passed = cursor + 1, passed + 1
            dropped += left_out
            if prompt is not None:
                prompts.append(prompt)
                self._taken.add(uid)
            elif passed > limit + sum(counts):
                rank_zero_warn(
                    f"dynamic_sampling.max_draws: the {limit} rows do not have {sum(counts)} more prompts that are not "
                    "yet in the rollout, so groups without signal stay; lower dynamic_sampling.max_draws or "
                    "data.prompts_per_rollout"
                )
                return None
        start = sum(counts[: rank()])
        return PromptBatch(prompts[start : start + counts[rank()]], cursor, dropped)

    def _share(self, everyone: PromptBatch) -> PromptBatch:
        size = self.prompts_per_rollout // world_size()
        return PromptBatch(everyone.prompts[rank() * size : (rank() + 1) * size], everyone.cursor, everyone.dropped)

    def _rollout(self, cursor: int) -> PromptBatch:
        """The prompts of all ranks; a task with a state is asked for them once."""
        if not self.has_state:
            return self._make_rollout(cursor)
        if self._made is None or self._made[0] != cursor:
            self._made = cursor, self._make_rollout(cursor)
        return self._made[1]

    def _make_rollout(self, cursor: int) -> PromptBatch:
        """The prompts of all ranks, since rows that are too long decide where a rank's share begins."""
        prompts: list[Prompt] = []
        dropped = drops_in_a_row = epochs_begun = 0
        while len(prompts) < self.prompts_per_rollout:
            if self.task.num_train_rows and cursor % self.task.num_train_rows == 0:
                # Rows left over at the end of an epoch are passed over: no prompt twice in one rollout.
                prompts, epochs_begun = [], epochs_begun + 1
            if epochs_begun > 1 or drops_in_a_row >= _DROPS_IN_A_ROW:
                raise UserError(
                    f"data.max_prompt_length={self.max_prompt_length}: "
                    f"{counted(dropped, 'prompt is', 'prompts are')} longer; too few remain for "
                    f"data.prompts_per_rollout={self.prompts_per_rollout}; raise one or lower the other"
                )
            uid, row = self.stream.row_at(cursor)
            prompt, left_out = self._prompt_at(cursor, uid, row)
            cursor, dropped = cursor + 1, dropped + left_out
            drops_in_a_row = 0 if prompt is not None else drops_in_a_row + 1
            if prompt is not None:
                prompts.append(prompt)
        return PromptBatch(prompts, cursor, dropped)

    def _prompt_at(self, cursor: int, uid: str, row: Row) -> tuple[Prompt | None, bool]:
        """The prompt of a place in the stream, and whether its row is left out.

        Where the task has `substitutes`, such as another row of the same task of a mixture, one takes the place.
        """
        prompt = self._prompt(uid, row)
        if prompt is not None or self._substitutes is None:
            return prompt, prompt is None
        for other in islice(self._substitutes(self.stream.index_at(cursor)), _DROPS_IN_A_ROW):
            if (prompt := self._prompt(uid, other)) is not None:
                return prompt, True
        if self.task.num_train_rows is not None:  # the rows beside it may be enough
            return None, True
        of = f" of task {row[TASK_COLUMN]}" if self.task_names else ""
        raise UserError(
            f"data.max_prompt_length={self.max_prompt_length}: row {uid}{of} is longer, and no row was found in its "
            "place that is not; raise it, or leave such rows out of data.task"
        )

    @property
    def _substitutes(self) -> Callable[[int], Iterator[Row]] | None:
        return getattr(self.task, "substitutes", None)

    def _prompt(self, uid: str, row: Row) -> Prompt | None:
        if "prompt" not in as_mapping(row, f"row {uid}"):
            raise UserError(f"row {uid}: task {self.task.name} returned a row without a prompt")
        prompt = checked_prompt(row["prompt"], f"row {uid}")
        ids, mm_inputs = self.encoder.encode(prompt, self.chat_template_kwargs, self.vision_settings, f"row {uid}")
        if not len(ids):
            raise UserError(f"row {uid}: the prompt has no tokens")
        if len(ids) > self.max_prompt_length:
            if self.overlong_prompts == "drop":
                return None
            raise UserError(
                f"row {uid}: the prompt has {counted(len(ids), 'token')}, more than data.max_prompt_length="
                f"{self.max_prompt_length}; raise it, or leave such rows out with data.overlong_prompts=drop"
            )
        return Prompt(uid=uid, prompt=prompt, input_ids=ids, sample=row, mm_inputs=mm_inputs)

    def _validation_rows(self) -> list[Row]:
        if self._held_out is None:
            self._held_out = validation_rows(self.task)
            self._held_out_key = text_key(self._held_out)
        return self._held_out

    def _validation_prompt(self, number: int) -> Prompt:
        uid = f"{self.task.name}:validation:{number}"
        prompt = self._prompt(uid, self._validation_rows()[number])
        if prompt is None:
            raise UserError(
                f"row {uid}: longer than data.max_prompt_length={self.max_prompt_length}; "
                "raise it: held-out prompts are never left out"
            )
        return prompt
