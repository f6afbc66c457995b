"""From prompts and completions to the one packed row that the model sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gspo_lightning.errors import UserError
from gspo_lightning.packing.layout import GroupLayout, SharedPrefixLayout
from gspo_lightning.types import Prompt

LEAST_COMMON = 16
"""Fewer common tokens are forwarded with every prompt: a block of them takes as long as it saves."""

LEAST_COMMON_ON_GPU = 128
"""The same on a GPU, where they cost a few more kernels in every layer."""


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch without padding."""

    input_ids: Tensor
    """``(1, T)``: what all prompts begin with; then the rest of every prompt, and its completions without their last
    tokens."""
    position_ids: Tensor
    """``(1, T)``: positions inside each sequence. Models with several position axes derive theirs from the prompts."""
    layout: SharedPrefixLayout
    predictor_index: Tensor
    """``(L,)``: the row position whose hidden state predicts each completion token."""
    target_ids: Tensor
    """``(L,)``: the trained completion tokens, sequence after sequence."""
    sequence_index: Tensor
    """``(L,)`` in ``[0, S)``: the sequence of each completion token."""
    lengths: Tensor
    """``(S,)``: trained completion tokens per sequence."""
    prompts: tuple[Prompt, ...] = ()
    """The prompts of the row with their vision inputs, one per group; empty if no vision inputs are needed."""

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.shape[1])


def pack(
    groups: Sequence[tuple[Tensor, Sequence[Tensor]]],
    device: torch.device,
    prompts: Sequence[Prompt] = (),
    trained: Sequence[Tensor | None] = (),
    least_common: int | None = None,
) -> PackedBatch:
    """Packs groups of ``(prompt ids (P,), [completion ids (C_i,), ...])``.

    The last token of a completion is a target but never an input: nothing is predicted from it, so leaving it
    out changes no log-probability and no gradient. What all prompts begin with is in the row once (`common_prefix`).

    Args:
        groups: at least one; every prompt and every completion holds at least one token.
        device: where the tensors go.
        prompts: one per group, in the same order, for models that read vision inputs.
        trained: per completion, in the order of the row, ``(C_i,)`` bool: the tokens whose log-probability is needed.
            The others are context. None, or no entry, means all tokens.
        least_common: as in `common_prefix`; None takes that of the device.

    Raises:
        UserError: a prompt or a completion holds no token.
    """
    least = least_common_on(device) if least_common is None else least_common
    common = common_prefix([ids for ids, _ in groups], least, prompts)
    tokens = [groups[0][0][:common]] if common else []
    predictors: list[Tensor] = []
    targets: list[Tensor] = []
    lengths: list[int] = []
    layouts: list[GroupLayout] = []
    start = common
    masks = iter(trained)
    for number, (prompt, completions) in enumerate(groups):
        if not len(prompt) or not all(map(len, completions)):
            # A completion would be predicted from the end of the group before it.
            raise UserError(f"pack: group {number} has a prompt or a completion without a token; each needs one")
        inputs = [completion[:-1] for completion in completions]
        layouts.append(GroupLayout(len(prompt), tuple(len(x) for x in inputs)))
        tokens.extend([prompt[common:], *inputs])
        cursor = start + len(prompt) - common
        last_of_prompt = cursor - 1
        for completion, forwarded in zip(completions, inputs, strict=True):
            predictor = torch.cat([torch.tensor([last_of_prompt]), torch.arange(cursor, cursor + len(forwarded))])
            kept = next(masks, None)
            predictors.append(predictor if kept is None else predictor[kept])
            targets.append(completion if kept is None else completion[kept])
            lengths.append(len(targets[-1]))
            cursor += len(forwarded)
        start = cursor
    layout = SharedPrefixLayout(tuple(layouts), device, common)
    counts = torch.tensor(lengths, dtype=torch.long)
    return PackedBatch(
        input_ids=torch.cat([x.cpu() for x in tokens]).unsqueeze(0).to(device),
        position_ids=layout.positions.unsqueeze(0),
        layout=layout,
        predictor_index=_concatenate(predictors).to(device),
        target_ids=_concatenate(targets).to(device),
        sequence_index=torch.repeat_interleave(torch.arange(len(lengths)), counts).to(device),
        lengths=counts.to(device),
        prompts=tuple(prompts),
    )


def least_common_on(device: torch.device) -> int:
    """The fewest common tokens that are worth sharing on a device."""
    return LEAST_COMMON if device.type == "cpu" else LEAST_COMMON_ON_GPU


def common_prefix(ids: Sequence[Tensor], least: int, prompts: Sequence[Prompt] = ()) -> int:
    """How many tokens all prompts begin with, such as a system message; 0 for fewer than ``least``.

    The last token of a prompt is never among them: the log-probabilities of its completions are read there.

    Args:
        ids: ``(P,)`` each.
        least: the fewest that are shared.
        prompts: the same prompts; if any has images none is shared, as tokens do not tell which image they stand for.
    """
    if len(ids) < 2 or any(prompt.mm_inputs for prompt in prompts):
        return 0
    first, *others = (x.cpu() for x in ids)
    common = min(map(len, ids)) - 1
    for other in others:
        differs = (first[:common] != other[:common]).nonzero()
        common = int(differs[0]) if len(differs) else common
    return common if common >= least else 0


def _concatenate(parts: list[Tensor]) -> Tensor:
    return torch.cat([x.cpu() for x in parts]) if parts else torch.empty(0, dtype=torch.long)
