"""Checks once, before training, that a model's packed forward gives the same as its padded forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from gspo_lightning.packing import logits_logprobs, pack
from gspo_lightning.policy.attention import ATTENTION_NAME
from gspo_lightning.policy.model import Policy
from gspo_lightning.policy.padded import padded_logits
from gspo_lightning.types import Prompt

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Relative L2 distance of the log-probabilities. Float32 has measured distances near 1e-6; a layout bug gives 1e-1."""

LONGEST_WINDOW = 1024
"""Windows up to this many tokens are checked with a longer prompt; for wider ones that would take long on a CPU."""

NARROW_FACTOR = 2.5
"""Bound in narrower dtypes, as a multiple of the effect of rounding. Correct models measured 0.1 to 0.9 times it
(bfloat16 and 4 bits, 2 to 30 layers, trained or not); forgotten sinks, windows or images gave 3 times and more."""


class PackingMismatchError(RuntimeError):
    """The packed forward of this architecture is not its padded forward; training on it would be wrong."""


def choose_forward(policy: Policy) -> None:
    """Leaves a policy packed if that is exact; else sets ``policy.is_padded``, with a warning."""
    if policy.is_padded:
        return
    try:
        check_packing(policy)
    except (PackingMismatchError, NotImplementedError) as error:
        policy.fall_back()
        rank_zero_warn(f"{error}; {SLOW}")


SLOW = (
    "falling back to padded forwards: exact, but prompts and images are computed once per completion, which is "
    "several times slower"
)


@torch.no_grad()
def check_packing(policy: Policy) -> float:
    """Compares two small groups of random tokens, packed and padded; returns the relative distance.

    Their prompts begin alike, which the packed row holds once; for a model that reads images it is one group, with an
    image. This checks the layout, not a kernel: a GPU that trains float32 weights with bfloat16 products uses another.

    Raises:
        PackingMismatchError: the distance exceeds the bound of the model's dtype, or the model was loaded by something
            else than `PolicyLoader`, with another attention than ours.
    """
    attention = policy.config.get_text_config()._attn_implementation
    if not str(attention).startswith(ATTENTION_NAME):
        raise PackingMismatchError(
            f"{type(policy.base_model).__name__}: its attention is {attention}, which knows nothing of packed rows; "
            "load it by PolicyLoader"
        )
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(policy.output_weight.shape[0], 1000)
    lengths = (prompt_length(policy), 5, 9, 2)
    prompt, *completions = (torch.randint(3, vocabulary, (n,), generator=generator) for n in lengths)
    vision = None if policy.vision is None else policy.vision.probe(prompt, generator)
    if vision is not None:
        prompt = vision.input_ids
    groups = [(prompt, completions)]
    if vision is None:
        end = torch.randint(3, vocabulary, (3,), generator=generator)
        groups.append((torch.cat([prompt[: -len(end)], end]), completions[:1]))
    row = pack(groups, policy.device, [] if vision is None else [vision], least_common=1)
    row.layout.may_compile = False
    packed, _ = policy(row)
    _refuse_unseen(policy)

    def padded() -> Tensor:
        return torch.cat([reference_logprobs(policy, *group, vision) for group in groups])

    plain = padded()
    dtype = coarsest_dtype(policy)
    bound, size = TOLERANCE.get(dtype), plain.norm()
    if bound is None:
        # Log-probabilities of random tokens are far from 0 and near to each other.
        size = (plain - plain.mean()).norm()
        with rounded_embeddings(policy, dtype):
            rounded = padded()
        bound = NARROW_FACTOR * ((rounded - plain).norm() / size).item()
    distance = ((packed - plain).norm() / size).item()
    if not distance <= bound:
        raise PackingMismatchError(
            f"{type(policy.base_model).__name__}: packed log-probabilities are {distance:.1e} away from "
            f"padded ones (bound {bound:.1e}); this architecture does something in attention that shared-prefix "
            "packing does not support"
        )
    return distance


def _refuse_unseen(policy: Policy) -> None:
    """Refuses what a comparison cannot show: a bias of zeros is trained, small logits grow into a soft cap, and a wide
    window is not reached."""
    config = policy.config.get_text_config()
    why = None
    if getattr(policy.base_model.get_output_embeddings(), "bias", None) is not None:
        why = "its output embedding has a bias"
    elif getattr(config, "final_logit_softcapping", None):
        why = "its logits are soft-capped"
    elif config.model_type == "qwen2_moe" and "sliding_attention" in config.layer_types:
        why = "its attention is not told of the sliding window"
    if why is not None:
        raise PackingMismatchError(f"{type(policy.base_model).__name__}: {why}, which packing does not support")


def coarsest_dtype(policy: Policy) -> torch.dtype:
    """Dtype that a forward rounds to: a quantised base multiplies in a narrow dtype, whatever the rest is in."""
    return torch.bfloat16 if getattr(policy.base_model, "is_quantized", False) else policy.output_weight.dtype


@contextmanager
def rounded_embeddings(policy: Policy, dtype: torch.dtype) -> Iterator[None]:
    """Makes every output of the input embedding too large or too small, by half the machine epsilon of ``dtype``."""
    embedding = policy.base_model.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)

    def moved(module: Any, inputs: Any, output: Tensor) -> Tensor:
        signs = 2 * torch.randint(0, 2, output.shape, generator=generator, device="cpu") - 1
        return (output * (1 + signs.to(output.device) * torch.finfo(dtype).eps / 2)).to(output.dtype)

    hook = embedding.register_forward_hook(moved)
    try:
        yield
    finally:
        hook.remove()


def prompt_length(policy: Policy) -> int:
    """Prompt length at which a sliding window, if there is one up to `LONGEST_WINDOW`, hides the prompt's beginning."""
    window = getattr(policy.config.get_text_config(), "sliding_window", None)
    return 11 if not isinstance(window, int) or window > LONGEST_WINDOW else window + 3


def reference_logprobs(
    policy: Policy, prompt: Tensor, completions: list[Tensor], vision: Prompt | None = None
) -> Tensor:
    """Log-probabilities of the completions from one right-padded row each, through the model's own head."""
    prompt, completions = prompt.to(policy.device), [completion.to(policy.device) for completion in completions]
    logits = padded_logits(policy.base_model, prompt, completions, vision)[:, len(prompt) - 1 :]
    rows = zip(logits, completions, strict=True)
    return torch.cat([logits_logprobs(row[: len(completion)], completion)[0] for row, completion in rows])
