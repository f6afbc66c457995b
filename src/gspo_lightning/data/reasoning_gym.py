"""Tasks of the package reasoning-gym (an optional extra) by name: endless rows, each task with its verifier."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from gspo_lightning.data.datamodule import OverlongPrompts, PromptDataModule
from gspo_lightning.data.tasks import Endless, Row
from gspo_lightning.errors import UserError
from gspo_lightning.rewards.functions import text_of

_CHUNK = 500
_HELD_OUT_SEED = 2_000_000_000
_SEEDS = 1_900_000_000
_ATTEMPTS = 200
_TAGGED = re.compile(r"(?s).*<answer>(.*?)</answer>")


@dataclass(frozen=True)
class ReasoningGym(Endless):
    """Rows of one reasoning-gym dataset (https://github.com/open-thought/reasoning-gym, Apache-2.0).

    Row i is a function of (seed, i). The held-out rows do not depend on ``seed``; a training row with the question of a
    held-out one is drawn again. Rows have ``answer`` (None if a task has no single one) and ``entry``, which the
    verifier reads.

    Raises:
        UserError: the package is missing, has no such dataset, or refuses the options; raised when rows are first read.
    """

    dataset: str
    """Name of the dataset, such as ``gcd`` or ``products``."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the dataset, such as ``max_digits: 2``."""
    instruction: str = "\nAnswer with just the answer."
    """Text appended to every question."""
    seed: int = 0
    num_validation: int = 128

    @property
    def name(self) -> str:
        """Name of the task, part of every uid."""
        return f"reasoning_gym.{self.dataset}"

    def train_row(self, index: int) -> Row:
        """An entry that is not held out."""
        for attempt in range(_ATTEMPTS):
            chunk, place = divmod(index + attempt * 1_000_003, _CHUNK)
            entry = self._chunk((self.seed * 20_000_003 + chunk * _CHUNK) % _SEEDS, _CHUNK)[place]
            if entry["question"] not in self._held_out_questions:
                return self._row(entry)
        raise UserError(
            f"data.num_validation={self.num_validation} holds out nearly every question of {self.dataset}; lower it"
        )

    def validation_rows(self) -> list[Row]:
        """The held-out entries, each question once."""
        return [self._row(entry) for entry in self._held_out]

    @cached_property
    def _held_out(self) -> list[dict[str, Any]]:
        source = self._chunk(_HELD_OUT_SEED, max(1, self.num_validation))
        entries = [source[number] for number in range(self.num_validation)]
        return list({entry["question"]: entry for entry in entries}.values())

    @cached_property
    def _held_out_questions(self) -> frozenset[str]:
        return frozenset(entry["question"] for entry in self._held_out)

    def _chunk(self, seed: int, size: int) -> Any:
        return _dataset(self.dataset, json.dumps(self.options, sort_keys=True), seed, size)

    def _row(self, entry: dict[str, Any]) -> Row:
        question = {"role": "user", "content": entry["question"] + self.instruction}
        answer = None if entry["answer"] is None else str(entry["answer"])
        return {"prompt": [question], "answer": answer, "entry": entry, "reasoning_gym_dataset": self.dataset}


class ReasoningGymData(PromptDataModule):
    """`PromptDataModule` on a reasoning-gym dataset by name; see there and `ReasoningGym` for the arguments."""

    def __init__(
        self,
        task: str,
        model_path: str,
        prompts_per_rollout: int,
        max_prompt_length: int,
        overlong_prompts: OverlongPrompts = "error",
        validation_batch_size: int = 64,
        seed: int = 0,
        chat_template_kwargs: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        instruction: str = ReasoningGym.instruction,
        num_validation: int = 128,
    ) -> None:
        super().__init__(
            ReasoningGym(task, options or {}, instruction, seed, num_validation),
            model_path, prompts_per_rollout, max_prompt_length, overlong_prompts, validation_batch_size, None,
            chat_template_kwargs,
        )  # fmt: skip


def reasoning_gym_score(
    completions: list[Any],
    entry: list[dict[str, Any]],
    reasoning_gym_dataset: list[str],
    partial: bool = False,
    **_: Any,
) -> list[float]:
    """1 if the task's verifier gives full score to the content of ``<answer>`` tags (or the whole text), else 0.

    Some verifiers give 0.01 to 0.05 to any text; ``partial=True`` returns the verifier's own score. A verifier that
    raises on the model's text gives 0.
    """
    rewards = []
    for completion, row, dataset in zip(completions, entry, reasoning_gym_dataset, strict=True):
        text = text_of(completion)
        found = _TAGGED.match(text)
        try:
            score = float(_verifier(dataset).score_answer((found[1] if found else text).strip(), row))
        except UserError:
            raise
        except Exception:  # noqa: BLE001 - a hundred parsers of others on a model's text; what they raise is not listed
            score = 0.0
        rewards.append(score if partial else float(score >= 1.0))
    return rewards


@lru_cache(maxsize=8)
def _verifier(dataset: str) -> Any:
    return _dataset(dataset, "{}", 0, 1)


@lru_cache(maxsize=32)
def _dataset(name: str, options: str, seed: int, size: int) -> Any:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise UserError(f"data=reasoning_gym needs `pip install reasoning-gym==0.1.25` ({error})") from error
    if name not in DATASETS:
        near = (
            ", ".join(sorted(other for other in DATASETS if name[:4] in other)) or "see reasoning_gym.factory.DATASETS"
        )
        raise UserError(f"data.task={name}: reasoning-gym has no such dataset; {near}")
    try:
        return reasoning_gym.create_dataset(name, **json.loads(options), seed=seed, size=size)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"data.options={options}: {name} refuses them: {error}") from error
