"""The policy of the reference: transformers' own model over one unpadded sequence at a time, and textbook optimizers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from gspo_lightning.types import Prompt
from tests.whole_update.case import Case

Weights = dict[str, Tensor]

SEEING = tuple(
    f"model.{part}." for part in ("visual", "vision_tower", "multi_modal_projector", "vision_model", "connector")
)
"""Beginnings of the names of the half that sees."""


class Network:
    """A causal language model in float64, which may see images, as a function of its weights."""

    def __init__(self, folder: Any) -> None:
        config = AutoConfig.from_pretrained(folder)
        self.sees = hasattr(config, "vision_config")
        kind: Any = AutoModelForImageTextToText if self.sees else AutoModelForCausalLM
        # Not "eager", whose softmax transformers computes in float32, but for gpt-oss, which has no other.
        attention = "eager" if config.model_type == "gpt_oss" else "sdpa"
        self.model = kind.from_pretrained(folder, dtype=torch.float64, attn_implementation=attention)
        if self.model._can_set_experts_implementation():
            self.model.set_experts_implementation("eager")  # the others have no float64
        self.model.eval()
        self.start: Weights = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        kinds = ("image_token_id", "video_token_id")
        self.placeholders = [getattr(config, name) for name in kinds if self.sees and hasattr(config, name)]
        self.has_prefix = config.model_type == "paligemma"
        """Whether tokens of type 0 see each other, and those of type 1 none behind them; in others 0 is text."""

    def log_distributions(
        self, weights: Weights, prompt: Prompt, completion: Tensor, temperature: float, without: bool = False
    ) -> Tensor:
        """``(C, V)``: log-probabilities of every next token, from which each token of the completion is drawn.

        ``without``: of a distribution in which no placeholder follows images, as padded rows have it.
        """
        tokens = torch.cat([prompt.input_ids, completion])[None]
        media = dict(prompt.mm_inputs)
        inputs = {"use_cache": False, **media}
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in media:
                own = torch.full((len(completion),), int(self.has_prefix))
                inputs[name] = torch.cat([media[name].flatten(), own])[None]
        if self.has_prefix and not media:  # text without an image is no prefix
            inputs["token_type_ids"] = torch.ones_like(tokens)
        logits = functional_call(self.model, weights, (tokens,), inputs).logits[0]
        if without and media:
            logits = logits.index_fill(1, torch.tensor(self.placeholders), -1e9)  # not infinite: its entropy is 0
        return torch.log_softmax(logits[len(prompt.input_ids) - 1 : -1] / temperature, dim=-1)

    def balance(self, weights: Weights, prompts: list[Prompt]) -> Tensor:
        """The mean over prompts of ``E sum_e f_e p_e``, added over the layers (Switch Transformer, arXiv 2101.03961).

        ``f_e`` are the expert's choices per token and ``p_e`` is the mean of its probability, over the prompt's tokens.
        """
        total = torch.zeros((), dtype=torch.float64)
        for prompt in prompts:
            asked = {"use_cache": False, "output_router_logits": True}
            output = functional_call(self.model, weights, (prompt.input_ids[None],), asked)
            for logits in output.router_logits:
                count, experts = logits.shape
                chosen = logits.topk(self.model.config.num_experts_per_tok, dim=1).indices
                for expert in range(experts):
                    share = (chosen == expert).sum().item() / count
                    total = total + experts * share * logits.softmax(dim=1)[:, expert].sum() / count
        return total / len(prompts)


class Trained:
    """The trained tensors, and the weights of the network that they make."""

    def __init__(
        self,
        start: Weights,
        adapter: dict[str, tuple[Tensor, Tensor]] | None,
        scales: dict[str, float],
        vision: str = "trained",
    ) -> None:
        self.start, self.scales, self.adapted = start, scales, list(adapter or ())
        seeing = {name for name in start if name.startswith(SEEING)}
        own = {"frozen": start.keys() - seeing, "trained": start.keys(), "alone": seeing}[vision]
        tensors = {name: value for name, value in start.items() if name in own} if adapter is None else {}
        for name, (a, b) in (adapter or {}).items():
            tensors[f"{name}:A"], tensors[f"{name}:B"] = a, b
        self.tensors = {name: value.detach().clone().requires_grad_() for name, value in tensors.items()}

    def weights(self) -> Weights:
        """``W`` themselves, or with LoRA (arXiv 2106.09685) ``W + scale B A``."""
        if not self.adapted:
            return {**self.start, **self.tensors}
        change = {name: self.scales[name] * self._product(name) for name in self.adapted}
        return {name: value + change[name] if name in change else value for name, value in self.start.items()}

    def _product(self, name: str) -> Tensor:
        """``B A``; of stacked experts one for each, whose rows are those of A in a row and of B in turns (peft)."""
        a, b, shape = self.tensors[f"{name}:A"], self.tensors[f"{name}:B"], self.start[name].shape
        if len(shape) != 3:
            return b @ a
        rank = len(a) // shape[0]
        products = [b[:, e :: shape[0]] @ a[rank * e : rank * (e + 1)] for e in range(shape[0])]
        return torch.stack([p if p.shape == shape[1:] else p.T for p in products])


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
