"""Proof that an engine applies an adapter, part by part.

A new adapter is a product with a zero factor, so an engine that leaves it out could not be told from one that uses it,
and one that leaves out the vision tower's part stays within the tolerance of bfloat16. Each part is therefore given
random values once, and the log-probabilities of what the engine then samples must be nearer to those of the policy with
that part than without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from gspo_lightning.policy.model import Policy
from gspo_lightning.policy.vision import vision_parts
from gspo_lightning.rollout.engine import WeightSyncError
from gspo_lightning.rollout.fingerprint import probe_logprobs
from gspo_lightning.rollout.weights import adapter_scale, trained_parameters
from gspo_lightning.types import Completion, Prompt


@dataclass(frozen=True)
class AdapterPart:
    """A part of the adapter that an engine may leave out while it applies the others."""

    name: str
    parameters: Sequence[Tensor]
    size: float
    """Standard deviation of the random values, times the square root of the number of terms that a factor sums."""


def adapter_parts(policy: Policy) -> list[AdapterPart]:
    """The adapter's parts: that of the language model, and of each module of the vision tower (blocks, merger)."""
    children = [
        (f"{tower}.{name}", child)
        for tower, module in vision_parts(policy.base_model).items()
        for name, child in module.named_children()
    ]
    vision = [(name, [p for p in child.parameters() if p.requires_grad]) for name, child in children]
    inside = {id(parameter) for _, parameters in vision for parameter in parameters}
    language = [parameter for parameter in trained_parameters(policy) if id(parameter) not in inside]
    # The adapter adds about this share of what it is added to, whatever its scale: it moves the output well beyond the
    # rounding of bfloat16 and keeps it accurate. Features of an image are a few tokens among many.
    scale = adapter_scale(policy)
    parts = [AdapterPart("the language model", language, (0.2 / scale) ** 0.5)]
    parts += [AdapterPart(name, parameters, (0.4 / scale) ** 0.5) for name, parameters in vision]
    return [part for part in parts if part.parameters]


@contextmanager
def shaken(part: AdapterPart) -> Iterator[None]:
    """Puts random values into both factors of every product of the part; restores it bit for bit afterwards."""
    generator = torch.Generator().manual_seed(0)
    values = [
        part.size * torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
        for parameter in part.parameters
    ]
    with _replaced(part.parameters, values):
        yield


@torch.no_grad()
def refuse_left_out(policy: Policy, part: AdapterPart, probe: Prompt, completions: Sequence[Completion]) -> None:
    """Compares what an engine sampled, while the part was `shaken`, with the policy with and without that part.

    Raises:
        WeightSyncError: the engine does not apply the part.
    """
    theirs = torch.cat([c.sampler_logprobs for c in completions]).double()
    with_it = probe_logprobs(policy, probe, completions)
    with _replaced(part.parameters, [torch.zeros_like(parameter) for parameter in part.parameters]):
        without = probe_logprobs(policy, probe, completions)
    if not (theirs - with_it).square().sum() < (theirs - without).square().sum():
        raise WeightSyncError(
            f"the vLLM engine does not apply the adapter of {part.name}: log-probabilities of the probe are nearer to "
            "the policy without it; set rollout.engine.lora_sync=merged"
        )


@contextmanager
def _replaced(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        _set(parameters, values)
        yield
    finally:
        _set(parameters, before)


@torch.no_grad()
def _set(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
