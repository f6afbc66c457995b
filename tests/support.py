"""Models and independent reference computations that several tests share."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from gspo_lightning.policy.attention import ATTENTION_NAME, register
from gspo_lightning.policy.model import Policy
from gspo_lightning.types import Completion, Prompt


def has_module(name: str) -> bool:
    """Whether a module can be imported; `find_spec` raises where the package around it is missing."""
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


Group = tuple[Tensor, list[Tensor]]


def micro_policy(folder: Any, dtype: torch.dtype = torch.float64) -> Policy:
    """The micro model as a policy, in the given precision, with transformers' layers but for the norms of a float64 one."""
    register()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=ATTENTION_NAME).train()
    if dtype == torch.float64:
        use_plain_norms(model)
    return Policy(model, AutoTokenizer.from_pretrained(folder))


def use_plain_norms(model: torch.nn.Module) -> None:
    """Root-mean-square norms by their formula; transformers computes them in float32 whatever the model is in."""

    def plain(module: Any, x: Tensor) -> Tensor:
        return module.weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + module.variance_epsilon)

    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = functools.partial(plain, module)


def random_groups(shapes: Sequence[tuple[int, Sequence[int]]], vocabulary: int, seed: int = 0) -> list[Group]:
    """Groups of random tokens: ``[(prompt length, [completion length, ...]), ...]``."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> Tensor:
        return torch.randint(0, vocabulary, (count,), generator=generator)

    return [(draw(prompt), [draw(length) for length in lengths]) for prompt, lengths in shapes]


def padded_logprobs(model: PreTrainedModel, groups: Sequence[Group], temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies by the textbook way: every sequence its own padded row, prompt included."""
    rows = [(prompt, completion) for prompt, completions in groups for completion in completions]
    width = max(len(p) + len(c) for p, c in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(rows):
        ids[row, : len(prompt) + len(completion)] = torch.cat([prompt, completion])
        mask[row, : len(prompt) + len(completion)] = 1
    log_p = torch.log_softmax(model(input_ids=ids, attention_mask=mask).logits / temperature, dim=-1)
    chosen, entropies = [], []
    for row, (prompt, completion) in enumerate(rows):
        predictions = log_p[row, len(prompt) - 1 : len(prompt) + len(completion) - 1]
        chosen.append(predictions.gather(1, completion[:, None]).squeeze(1))
        entropies.append(-(predictions.exp() * predictions).sum(dim=-1))
    return torch.cat(chosen), torch.cat(entropies)


def relative_distance(a: Tensor, b: Tensor) -> float:
    """``|a - b| / |b|`` of whole vectors."""
    return ((a - b).norm() / b.norm()).item()


def flat_gradient(module: torch.nn.Module) -> Tensor:
    """All gradients as one vector; parameters without one count as zero."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in module.parameters()])


def make_prompt(ids: Sequence[int] | Tensor, uid: str = "test:0", **columns: Any) -> Prompt:
    """A prompt of the given token ids."""
    return Prompt(uid=uid, prompt="", input_ids=torch.as_tensor(ids), sample=columns)


def make_completion(ids: Sequence[int] | Tensor, text: str = "", finish_reason: str = "stop") -> Completion:
    """A completion of the given token ids with sampler log-probabilities of zero."""
    tokens = torch.as_tensor(ids)
    return Completion(tokens, text, torch.zeros(len(tokens)), finish_reason)  # type: ignore[arg-type]
