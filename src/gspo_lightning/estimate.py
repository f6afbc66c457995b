"""What a run will need, before any weight is loaded: ``python train.py ... dry_run=true``.

The model is built with fake tensors (torch's `FakeTensorMode`), which have shapes and no memory. The largest
micro-batch of the first rollout goes through the training forward, and what autograd would keep is counted tensor by
tensor: nothing is known here about any architecture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.table import Table
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from gspo_lightning.errors import UserError
from gspo_lightning.policy.attention import attention_implementation, register
from gspo_lightning.policy.lean import lighten
from gspo_lightning.policy.load import DTYPES, PolicyLoader, add_lora
from gspo_lightning.policy.model import Policy
from gspo_lightning.policy.reading import load_config
from gspo_lightning.policy.vision import packs_pictures, vision_parts
from gspo_lightning.rollout.block_cache import rows_per_block
from gspo_lightning.timing import rss_gb
from gspo_lightning.types import Completion, Prompt, ScoredRollout
from gspo_lightning.update import MicroBatch, UpdateSettings, build_micro_batch, split_minibatches

GIB = 2**30
OPTIMIZER_BYTES = {"AdamW8bit": 2.0, "PagedAdamW8bit": 2.0, "SGD": 0.0}
"""Bytes of state per trained parameter; every other optimizer keeps two moments in the dtype of the weights."""
LOGITS_COPIES = 4
"""Of the logits of a decoding step: raw, float32, probabilities and their running sums."""


@dataclass(frozen=True)
class Estimate:
    """Bytes by part, and what they follow from."""

    parameters: int
    trained: int
    parts: dict[str, float]
    """Name -> bytes."""
    rollout: float
    """Bytes of the key/value cache and the logits of a decoding step."""
    pace: dict[str, str]
    """What decides how long a rollout takes."""
    on_gpu: bool

    @property
    def total(self) -> float:
        """Bytes at the peak. A GPU's allocator uses memory of the rollout again; a process on a CPU keeps it."""
        kept = sum(value for name, value in self.parts.items() if name != ACTIVATIONS)
        needed = (self.parts[ACTIVATIONS], self.rollout)
        return kept + (max(needed) if self.on_gpu else sum(needed))

    def table(self) -> Table:
        """For the screen."""
        title = "What the run will need (estimated; no weights were loaded)"
        table = Table(title=title, show_header=False, title_justify="left")
        table.add_column(style="bold", no_wrap=True)
        table.add_column(justify="right")
        table.add_row("parameters", f"{self.parameters / 1e6:,.1f} M")
        table.add_row("of which trained", f"{self.trained / 1e6:,.1f} M ({self.trained / self.parameters:.1%})")
        for name, value in {**self.parts, "rollout: keys, values, logits": self.rollout}.items():
            table.add_row(name, f"{value / GIB:.2f} GiB")
        table.add_row(f"peak of the {'GPU' if self.on_gpu else 'process'}", f"{self.total / GIB:.2f} GiB")
        for name, setting in self.pace.items():
            table.add_row(name, setting)
        return table


ACTIVATIONS = "activations of the largest micro-batch"


def estimate(
    loader: PolicyLoader,
    prompts: list[Prompt],
    *,
    num_generations: int,
    max_completion_length: int,
    validation_rows: int,
    max_concurrent: int,
    update: UpdateSettings,
    optimizer: str,
    needs_reference: bool,
    precision: str,
    on_gpu: bool,
) -> Estimate:
    """The memory of a run on one device.

    Args:
        loader: of the policy.
        prompts: of one rollout on one rank.
        num_generations: completions per prompt.
        max_completion_length: every completion is taken to be as long.
        validation_rows: completions of a batch of held-out prompts.
        max_concurrent: completions decoded at a time; 0 where an engine elsewhere samples.
        update: minibatches and micro-batches.
        optimizer: name of its class.
        needs_reference: whether the objective needs one; an adapter's is the policy without it.
        precision: as the Trainer names it.
        on_gpu: whether the memory is a GPU's; then the program and its libraries are not counted.
    """
    register()
    completions = _longest(len(prompts), num_generations, max_completion_length)
    scored = _scored(prompts, completions)
    minibatches = split_minibatches(
        scored, update, zero_advantage_is_free=False, mask_truncated=False, order=list(range(len(prompts)))
    )
    plans = [plan for minibatch in minibatches for plan in minibatch.plan]
    micro = max((build_micro_batch(scored, plan, torch.device("cpu")) for plan in plans), key=_tokens)
    wrapped = _without_weights(loader)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _make_fake(wrapped)
        policy = _policy(loader, wrapped)
        activations = _saved_bytes(policy, micro, precision)
        named = list(policy.parameters())
        trained = [p for p in named if p.requires_grad]
        weights = sum(_bytes(p) for p in named) * (_quantised_share(loader, policy))
        gradients = sum(_bytes(p) for p in trained)
        count, trained_count = sum(p.numel() for p in named), sum(p.numel() for p in trained)
        rows = min(max(len(prompts) * num_generations, validation_rows), max_concurrent)
        longest = max(len(prompt.input_ids) for prompt in prompts)
        # Prompts are held once, on a CPU once per block of their rows; those of a validation have a row each.
        width = num_generations if on_gpu else rows_per_block(num_generations, longest, max_completion_length)
        blocks = min(len(prompts), max_concurrent // num_generations) * math.ceil(num_generations / width)
        alone = min(validation_rows, max_concurrent)
        slots = max(blocks, alone) * longest + max(blocks * width, alone) * max_completion_length
        rollout = _rollout_bytes(policy, rows, slots, _product_bytes(policy, precision))
        if max_concurrent and loader.quantization is None and not loader.compile:
            rollout += _packed_bytes(policy, precision, on_gpu)
    per_parameter = OPTIMIZER_BYTES.get(optimizer)
    parts = {
        "weights": weights,
        "gradients": float(gradients),
        f"optimizer ({optimizer})": 2.0 * gradients if per_parameter is None else per_parameter * trained_count,
    }
    if needs_reference and loader.lora is None:
        parts["reference"] = weights
    parts[ACTIVATIONS] = activations
    if not on_gpu:
        parts["program and libraries"] = rss_gb() * GIB
    pace = {
        "per rollout": f"{len(prompts)} prompts x {num_generations} completions",
        "longest completion": f"{max_completion_length} tokens",
        "decoded at a time": f"{rows} completions" if max_concurrent else "elsewhere",
        "optimizer steps per rollout": str(update.num_minibatches * update.num_iterations),
        "forwarded at a time": f"{_tokens(micro)} tokens, {len(plans)} micro-batches",
        "precision": precision,
    }
    return Estimate(count, trained_count, parts, rollout, pace, on_gpu)


def _without_weights(loader: PolicyLoader) -> nn.Module:
    """The model as `PolicyLoader.load` builds it, adapter included, on the meta device."""
    config = load_config(loader.path)
    for name, value in loader.overrides.items():
        setattr(config, name, value)
    vision = packs_pictures(config)
    kind: Any = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    attention = attention_implementation("sdpa", vision)
    if loader.dtype != "bfloat16" and getattr(config.get_text_config(), "num_local_experts", None):
        raise UserError(
            f"dry_run: a model with experts can be estimated with model.dtype=bfloat16 alone, not {loader.dtype}: "
            "torch knows no shape for their grouped product otherwise"
        )
    with torch.device("meta"):
        model = kind.from_config(config, attn_implementation=attention, dtype=DTYPES[loader.dtype]).train()
        if not loader.compile:
            lighten(model, recomputed=loader.gradient_checkpointing, check=False)
        if loader.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if not loader.train_vision:
            for part in vision_parts(model).values():
                part.requires_grad_(False)
        return model if loader.lora is None else add_lora(model, loader.lora, loader.train_vision)


def _make_fake(model: nn.Module) -> None:
    """Puts fake tensors in place of those of the meta device; tied ones stay tied. Moving a module would swap them."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fresh = nn.Parameter(torch.empty_like(parameter, device="cpu"), parameter.requires_grad)
                module._parameters[name] = made.setdefault(id(parameter), fresh)  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")


def _policy(loader: PolicyLoader, model: nn.Module) -> Policy:
    vision = packs_pictures(load_config(loader.path))
    return Policy(model, None, has_adapter=loader.lora is not None, has_vision=vision)


def _saved_bytes(policy: Policy, micro: MicroBatch, precision: str) -> float:
    """What autograd keeps of a training forward, parameters left out. Casts of weights to bfloat16 are among it."""
    own = {parameter.untyped_storage()._cdata for parameter in policy.parameters()}
    seen: dict[int, int] = {}
    # What is kept must live until it is counted: a storage that is freed may give its address to the next one.
    alive: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = storage.nbytes()
        return tensor

    mixed = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), mixed:
        policy(replace(micro.packed, prompts=()))
    return float(sum(seen.values()))


def _rollout_bytes(policy: Policy, rows: int, slots: int, item: int) -> float:
    """Keys and values of ``item`` bytes of so many tokens, prompts once, and the logits of one step of all rows."""
    text = policy.config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache = 2 * text.num_hidden_layers * slots * text.num_key_value_heads * size * item
    return float(cache + LOGITS_COPIES * rows * policy.output_weight.shape[0] * 4)


def _product_bytes(policy: Policy, precision: str) -> int:
    narrow = "bf16" in precision or "16" in str(policy.output_weight.dtype)
    return 2 if narrow else policy.output_weight.element_size()


def _packed_bytes(policy: Policy, precision: str, on_gpu: bool) -> float:
    """The copy of the weights that `gspo_lightning.rollout.prepacked` holds while a rollout lasts."""
    is_narrowed = precision.endswith("-mixed") and policy.output_weight.dtype == torch.float32
    if policy.output_weight.dtype == torch.float64 or (on_gpu and not is_narrowed):
        return 0.0
    count = sum(m.weight.numel() for m in policy.body.modules() if type(m) is nn.Linear) + policy.output_weight.numel()
    return float(count * _product_bytes(policy, precision))


def _quantised_share(loader: PolicyLoader, policy: Policy) -> float:
    """Bytes that are left of the weights by quantising the linear layers of the language half (4.13 or 8 bits)."""
    if loader.quantization is None:
        return 1.0
    bits = {"nf4": 4.13, "int8": 8.0}[loader.quantization]
    linear = sum(
        _bytes(m.weight) for m in policy.body.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad
    )
    everything = sum(_bytes(p) for p in policy.parameters())
    return 1.0 - linear / everything * (1.0 - bits / (8 * DTYPES[loader.dtype].itemsize))


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tokens(micro: MicroBatch) -> int:
    return micro.packed.num_tokens


def _longest(groups: int, generations: int, length: int) -> list[list[Completion]]:
    one = Completion(torch.zeros(length, dtype=torch.long), "", torch.zeros(length), "length")
    return [[one] * generations for _ in range(groups)]


def _scored(prompts: list[Prompt], completions: list[list[Completion]]) -> ScoredRollout:
    rewards = torch.zeros(len(prompts), len(completions[0]), dtype=torch.float64)
    return ScoredRollout(prompts, completions, (), rewards[..., None], rewards, rewards)
