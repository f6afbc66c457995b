"""The policy of the reference: transformers' own model over one unpadded sequence at a time, and textbook optimizers."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tests.whole_update.case import Case

Weights = dict[str, Tensor]


def float64_norms() -> AbstractContextManager[Any]:
    """Within it Llama's norm stays in float64; transformers casts its input to float32, whatever the model's dtype."""

    def norm(self: Any, x: Tensor) -> Tensor:
        return self.weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.variance_epsilon)

    return patch.object(LlamaRMSNorm, "forward", norm)


class Network:
    """A causal language model in float64 as a function of its weights."""

    def __init__(self, folder: Any) -> None:
        # Not "eager", whose softmax transformers computes in float32.
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa")
        self.model.eval()
        self.start: Weights = {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def log_distributions(self, weights: Weights, prompt: Tensor, completion: Tensor, temperature: float) -> Tensor:
        """``(C, V)``: log-probabilities of every next token, from which each token of the completion is drawn."""
        tokens = torch.cat([prompt, completion])[None]
        logits = functional_call(self.model, weights, (tokens,), {"use_cache": False}).logits[0]
        return torch.log_softmax(logits[len(prompt) - 1 : -1] / temperature, dim=-1)


class Trained:
    """The trained tensors, and the weights of the network that they make."""

    def __init__(self, start: Weights, adapter: dict[str, tuple[Tensor, Tensor]] | None, scale: float) -> None:
        self.start, self.scale, self.adapted = start, scale, list(adapter or ())
        tensors = dict(start) if adapter is None else {}
        for name, (a, b) in (adapter or {}).items():
            tensors[f"{name}:A"], tensors[f"{name}:B"] = a, b
        self.tensors = {name: value.detach().clone().requires_grad_() for name, value in tensors.items()}

    def weights(self) -> Weights:
        """``W`` themselves, or with LoRA (arXiv 2106.09685) ``W + alpha / r B A``."""
        if not self.adapted:
            return dict(self.tensors)
        change = {n: self.scale * self.tensors[f"{n}:B"] @ self.tensors[f"{n}:A"] for n in self.adapted}
        return {name: value + change[name] if name in change else value for name, value in self.start.items()}


class Optimizer:
    """SGD with momentum, or AdamW (arXiv 1711.05101); vectors, which are norms here, have no weight decay."""

    BETAS, EPSILON = (0.9, 0.999), 1e-3
    # A large epsilon: with 1e-8 an entry whose gradient is rounding alone would move as far as any other.

    def __init__(self, case: Case, tensors: Weights) -> None:
        self.case, self.tensors = case, tensors
        self.steps = 0
        self.first = {name: torch.zeros_like(value) for name, value in tensors.items()}
        self.second = {name: torch.zeros_like(value) for name, value in tensors.items()}

    @torch.no_grad()
    def step(self, gradients: Weights, rate: float) -> None:
        """Moves the tensors in place."""
        self.steps += 1
        for name, gradient in gradients.items():
            tensor = self.tensors[name]
            decay = self.case.weight_decay if tensor.ndim >= 2 else 0.0
            if self.case.optimizer == "sgd":
                self.first[name] = self.case.momentum * self.first[name] + gradient + decay * tensor
                tensor.copy_(tensor - rate * self.first[name])
            else:
                one, two = self.BETAS
                self.first[name] = one * self.first[name] + (1 - one) * gradient
                self.second[name] = two * self.second[name] + (1 - two) * gradient**2
                mean = self.first[name] / (1 - one**self.steps)
                root = torch.sqrt(self.second[name] / (1 - two**self.steps))
                tensor.copy_(tensor - rate * decay * tensor - rate * mean / (root + self.EPSILON))


def clipped(gradients: Weights, largest: float) -> tuple[Weights, float]:
    """The gradients scaled so that their L2 norm over all parameters is at most ``largest``; and the norm before."""
    norm = math.sqrt(sum((g * g).sum().item() for g in gradients.values()))
    factor = min(1.0, largest / (norm + 1e-6))
    return {name: g * factor for name, g in gradients.items()}, norm


def learning_rate(case: Case, step: int) -> float:
    """Of the step counted from 0, skipped ones included: linear warm-up, then the schedule."""
    warmup = math.ceil(case.warmup_ratio * case.steps)
    if step < warmup:
        return case.lr * (step + 1) / warmup
    if case.schedule == "constant":
        return case.lr
    done = min(1.0, (step - warmup) / max(1, case.steps - warmup))
    shape = (1 + math.cos(math.pi * done)) / 2 if case.schedule == "cosine" else 1 - done
    return case.lr * (case.min_ratio + (1 - case.min_ratio) * shape)
