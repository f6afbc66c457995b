"""The data that flows through the program: one frozen type per phase, complete once constructed.

Shape letters of this package; modules with further letters (blocks, heads) define them:

====== ======================================================================
B      prompts per rank in one rollout
G      completions per prompt (``num_generations``)
K      reward functions
P      tokens of one prompt
C      tokens of one completion, the end-of-sequence token included if sampled; of a dialogue, all after the prompt
S      sequences (completions) in a minibatch or micro-batch
T      tokens of one packed row
L      completion tokens whose log-probability is computed
V      vocabulary size
====== ======================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from gspo_lightning.errors import UserError

Messages = list[dict[str, Any]]
"""A conversation in the chat format of transformers: ``{"role": ..., "content": ...}`` per turn."""

FinishReason = Literal["stop", "length"]
"""``stop``: an end-of-sequence token or a stop string; ``length``: cut at ``max_completion_length``."""


Metrics = dict[str, tuple[Tensor, Tensor]]
"""Name -> (sum, count), so that micro-batches and ranks add up to exact means."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt, tokenised and unpadded. Compared by identity, so that caches can be keyed by the object."""

    uid: str
    """Permanent name of the row (task and index); sampling seeds are derived from it."""
    prompt: str | Messages
    """The prompt in the dataset row; reward functions receive it unchanged."""
    input_ids: Tensor
    """``(P,)`` int64 token ids, chat template applied."""
    sample: dict[str, Any]
    """The dataset row: its columns become keyword arguments of reward functions."""
    mm_inputs: dict[str, Tensor] = field(default_factory=dict)
    """Images and the like, keyed by the keyword argument of the model's forward, and ``mm_token_type_ids`` ``(P,)``
    (0 text, 1 image, 2 video). Empty for text."""


class PromptBatch:
    """The prompts of one rollout on one rank.

    Not a dataclass on purpose: Lightning walks into dataclasses, and would move, cast or refuse what users keep in
    their dataset rows. Tensors go to the device when they are packed.

    Args:
        prompts: this rank's share of the rollout.
        cursor: position of the prompt stream after this batch, from which a run resumes (0 without a stream).
        dropped: prompts left out of this batch because they are too long, over all ranks.
    """

    def __init__(self, prompts: list[Prompt], cursor: int = 0, dropped: int = 0) -> None:
        self.prompts, self.cursor, self.dropped = prompts, cursor, dropped

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn. ``temperature=0`` is greedy."""

    num_generations: int
    max_completion_length: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    """Stop strings: a completion ends with the token that completes one of them."""

    def __post_init__(self) -> None:
        for key, low, high in (("top_p", 0.0, 1.0), ("min_p", 0.0, 1.0), ("top_k", 0, float("inf"))):
            value = getattr(self, key)
            if not low <= value <= high or (key == "top_p" and value == 0):
                bound = "at least 0 (0 keeps all)" if key == "top_k" else "between 0 and 1"
                raise UserError(f"rollout.{key}={value} must be {bound}")
        stop: object = self.stop
        is_list = isinstance(stop, Sequence) and not isinstance(stop, str | bytes)  # one of OmegaConf is no list
        if not is_list or not all(isinstance(text, str) and text for text in stop):  # type: ignore[attr-defined]
            raise UserError(f"rollout.stop={stop!r} must be a list of strings of at least one character")

    @property
    def full_support(self) -> bool:
        """Whether every token can be drawn, so that sampler and policy have the same distribution."""
        return self.top_p == 1.0 and self.top_k == 0 and self.min_p == 0.0


@dataclass(frozen=True)
class ToolCounts:
    """Calls of tools in a dialogue."""

    calls: int = 0
    failures: int = 0
    """Those whose result is an error."""


@dataclass(frozen=True)
class Dialogue:
    """Data of a completion of several turns, besides its tokens."""

    trained: Tensor
    """``(C,)`` bool: the tokens that the policy sampled. The others are the environment's: context, never trained on.
    The first and the last token are the policy's."""
    messages: Messages
    """The turns, from the policy's first one."""
    reward: float
    """The environment's reward for the whole dialogue."""
    turn_rewards: tuple[float, ...] = ()
    """One reward for each of the policy's turns; empty if the environment rewards only the whole dialogue."""
    begins: Tensor | None = None
    """``(C,)`` bool: the first token of each of the policy's turns. None: the environment has tokens between them."""
    tool_counts: ToolCounts | None = None
    """None if the environment offers no tools."""

    def turn_index(self) -> Tensor:
        """``(C,)`` int64: for each trained token, the number of the policy's turn it belongs to, from 0."""
        begins = self.begins
        if begins is None:
            begins = self.trained.clone()
            begins[1:] &= ~self.trained[:-1]
        return begins.long().cumsum(0) - 1

    @property
    def num_turns(self) -> int:
        """Number of the policy's turns; counted from the tokens, as other code may change the messages."""
        return int(self.turn_index()[-1]) + 1


@dataclass(frozen=True)
class Completion:
    """One sampled continuation of a prompt."""

    token_ids: Tensor
    """``(C,)`` int64 on the CPU, C >= 1; the end-of-sequence token is part of it when it was sampled."""
    text: str
    """The decoded text without special tokens; in harmony only the ``final`` channel, except in a dialogue."""
    sampler_logprobs: Tensor
    """``(C,)`` float32: log-probability of each token under the distribution it was drawn from (0 where it was not
    drawn: the tokens of an environment)."""
    finish_reason: FinishReason
    dialogue: Dialogue | None = None
    """Set if an environment took part."""
    thinking: str = ""
    """Text of the other channels, before ``text`` (harmony)."""

    @property
    def num_trained(self) -> int:
        """Number of tokens that the policy sampled."""
        return len(self.token_ids) if self.dialogue is None else int(self.dialogue.trained.sum())


@dataclass(frozen=True)
class Rollout:
    """G completions for each prompt, before any reward is known."""

    prompts: list[Prompt]
    completions: list[list[Completion]]
    """B lists of G."""


@dataclass(frozen=True)
class RewardedRollout:
    """A rollout whose completions have rewards, not yet compared with each other."""

    prompts: list[Prompt]
    completions: list[list[Completion]]
    reward_names: tuple[str, ...]
    rewards_by_function: Tensor
    """``(B, G, K)`` float64; NaN where a function does not apply."""
    rewards: Tensor
    """``(B, G)`` float64: the combined reward."""
    logged: Metrics = field(default_factory=dict, kw_only=True)
    """Metrics that reward functions logged by TRL's ``log_metric``."""
    extra_columns: dict[str, list[Any]] = field(default_factory=dict, kw_only=True)
    """Lists of B x G values that reward functions logged by TRL's ``log_extra``."""


@dataclass(frozen=True)
class ScoredRollout(RewardedRollout):
    """A rollout with everything the update needs except the policy's log-probabilities."""

    advantages: Tensor
    """``(B, G)`` float64."""
    turn_advantages: list[list[tuple[float, ...]] | None] | None = field(default=None, kw_only=True)
    """B lists of G: an advantage for each turn of a dialogue whose environment rewards turns; None for a group without
    such rewards, and if no group has any."""

    def of_turns(self, group: int) -> list[tuple[float, ...]] | None:
        """The ``turn_advantages`` of a group."""
        return None if self.turn_advantages is None else self.turn_advantages[group]

    def has_zero_advantage(self, group: int, number: int) -> bool:
        """Whether every token of a completion has advantage zero."""
        of_turns = self.of_turns(group)
        return not any(of_turns[number]) if of_turns is not None else self.advantages[group, number].item() == 0.0

    def token_advantages(self, group: int, number: int) -> Tensor:
        """``(trained tokens,)`` float64 advantages of a completion."""
        completion = self.completions[group][number]
        of_turns = self.of_turns(group)
        if of_turns is None or completion.dialogue is None:
            return self.advantages[group, number].expand(completion.num_trained)
        turns = torch.tensor(of_turns[number], dtype=torch.float64)
        return turns[completion.dialogue.turn_index()[completion.dialogue.trained]]


@dataclass(frozen=True)
class PolicyLoss:
    """The objective on one micro-batch, as a sum: divide by the global denominator of the minibatch."""

    loss: Tensor
    """Scalar with gradient: sum over the sequences of the micro-batch."""
    metrics: Metrics
    ratio: Tensor
    """Importance ratios without gradient, one per token or per sequence by the ratio's level."""
