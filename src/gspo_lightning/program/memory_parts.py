"""Bytes that the parts of a run take in each of its processes, counted on a policy whose tensors have no memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gspo_lightning.policy.load import DTYPES, PolicyLoader
from gspo_lightning.policy.model import Policy
from gspo_lightning.rollout.block_cache import rows_per_block
from gspo_lightning.training.update import UpdateSettings
from gspo_lightning.types import Prompt

OPTIMIZER_BYTES = {"AdamW8bit": 2.0, "PagedAdamW8bit": 2.0, "SGD": 0.0}
"""Bytes of state per trained parameter; every other optimizer keeps two moments in the dtype of the weights."""
LOGITS_COPIES = 4
"""Copies of the logits in a decoding step: raw, float32, probabilities and their running sums."""
GATHERED = "layers gathered to compute"


@dataclass(frozen=True)
class Ranks:
    """The processes that train together."""

    count: int = 1
    sharded: bool = False
    """Each holds its share of weights, gradients and optimizer states (trainer=fsdp), not all of them."""
    gather_for_rollouts: bool = True
    """The setting of `gspo_lightning.distributed.sharding.FSDP2Strategy`."""


@dataclass(frozen=True)
class Work:
    """What one process samples and trains on, in the settings that decide its memory."""

    num_generations: int
    """Completions per prompt."""
    max_completion_length: int
    """Assumed length of every completion."""
    validation_rows: int
    """Completions of a batch of held-out prompts."""
    max_concurrent: int
    """Completions decoded at a time, at least those of one prompt; 0 if another engine samples."""
    update: UpdateSettings
    optimizer: str
    """Class name of the optimizer."""
    needs_reference: bool
    """Whether the objective needs a reference; with an adapter that is the policy without it."""
    precision: str
    """As the Trainer names it."""
    on_gpu: bool
    """Whether the memory is a GPU's; then the program and its libraries are not counted."""
    validation_generations: int = 1
    """Completions per held-out prompt among ``validation_rows``."""
    samples_ahead: bool = False
    """Whether the next rollout is sampled during the update, from a copy of the trained weights."""
    ranks: Ranks = Ranks()
    """The processes, of which this is one."""
    own: tuple[nn.Parameter, ...] = ()
    """Parameters that a subclass of `GSPOModule` adds to those of the policy; each process has them whole."""
    not_counted: str = ""
    """What has parameters that are known only once the model is loaded; empty for nothing."""

    def rows_at_once(self, rows: int, generations: int) -> int:
        """Completions of ``rows`` decoded at a time: those of whole prompts, at least one; 0 if elsewhere."""
        return min(rows, max(1, self.max_concurrent // generations) * generations) if self.max_concurrent else 0


def model_parts(policy: Policy, loader: PolicyLoader, work: Work, *, several: bool) -> dict[str, float]:
    """Bytes of the model's parts in every process; ``several`` micro-batches accumulate before gradients are sent."""
    ranks, optimizer = work.ranks, work.optimizer
    share = 1 / ranks.count if ranks.sharded else 1.0
    trained = [p for p in policy.parameters() if p.requires_grad]
    weights = share * sum(_bytes(p) for p in policy.parameters()) * _quantised_share(loader, policy)
    gradients = share * sum(_bytes(p) for p in trained)
    parts = {
        "weights": weights,
        "gradients": gradients,
        f"optimizer ({optimizer})": share * _optimizer_bytes(optimizer, trained),
    }
    if work.own:
        own = [p for p in work.own if p.requires_grad]
        moments = _optimizer_bytes(optimizer, own)
        parts["parameters beside the policy's"] = sum(map(_bytes, (*work.own, *own))) + moments
    if work.needs_reference and loader.lora is None:
        parts["reference"] = weights
    if ranks.sharded:
        parts[GATHERED] = _gathered_bytes(policy)
    elif ranks.count > 1 and several:
        parts["gradients in transit"] = gradients
    if work.samples_ahead:
        parts["copy that samples ahead"] = sum(map(_bytes, trained))
    return parts


def _optimizer_bytes(optimizer: str, trained: list[nn.Parameter]) -> float:
    per_parameter = OPTIMIZER_BYTES.get(optimizer)
    return sum(2.0 * _bytes(p) if per_parameter is None else per_parameter * p.numel() for p in trained)


def _gathered_bytes(policy: Policy) -> float:
    """Bytes of the whole weights outside of the layers and of two layers, of which one arrives while the other
    computes; and of FSDP2's buffers for the largest of these units: its weights again, or its gradients twice.
    """
    layers: Any = policy.base_model.get_decoder().layers
    inside = [list(unit.parameters()) for unit in layers]
    known = {id(p) for unit in inside for p in unit}
    outside = [p for p in policy.parameters() if id(p) not in known]
    gradients = max(sum(_bytes(p) for p in unit if p.requires_grad) for unit in [outside, *inside])
    weights = [sum(map(_bytes, unit)) for unit in [outside, *inside]]
    return float(weights[0] + 2 * max(weights[1:]) + max(*weights, 2 * gradients))


def cache_slots(prompts: list[Prompt], work: Work, training: int, held_out: int) -> int:
    """Tokens whose keys and values are held at a time, for ``training`` rows of a rollout or ``held_out`` rows.

    A prompt is held once (on a CPU once per block of its rows); in validation once per row.
    """
    generations, length = work.num_generations, work.max_completion_length
    longest = max(len(prompt.input_ids) for prompt in prompts)
    width = generations if work.on_gpu else rows_per_block(generations, longest, length)
    blocks = training // generations * math.ceil(generations / width)
    return max(blocks, held_out) * longest + max(blocks * width, held_out) * length


def rollout_bytes(policy: Policy, loader: PolicyLoader, work: Work, rows: int, slots: int) -> float:
    """Bytes of the keys and values of ``slots`` tokens, of the logits of ``rows`` rows and of the packed weights."""
    text = policy.config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    item = _product_bytes(policy, work.precision)
    cache = 2 * text.num_hidden_layers * slots * text.num_key_value_heads * size * item
    logits = LOGITS_COPIES * rows * policy.output_weight.shape[0] * 4
    return float(cache + logits) + _packed_bytes(policy, loader, work)


def reused_bytes(policy: Policy, loader: PolicyLoader, work: Work) -> float:
    """Bytes of the packed weights that fit where gradients were: of the same dtype, and not while an update runs."""
    narrowed = _product_bytes(policy, work.precision) < policy.output_weight.element_size()
    return 0.0 if work.on_gpu or narrowed or work.samples_ahead else _packed_bytes(policy, loader, work)


def _product_bytes(policy: Policy, precision: str) -> int:
    narrow = "bf16" in precision or "16" in str(policy.output_weight.dtype)
    return 2 if narrow else policy.output_weight.element_size()


def _packed_bytes(policy: Policy, loader: PolicyLoader, work: Work) -> float:
    """Bytes of the copy of the weights that `gspo_lightning.rollout.prepacked` holds during a rollout."""
    if not work.max_concurrent or loader.quantization is not None or loader.compile or work.ranks.sharded:
        return 0.0
    is_narrowed = work.precision.endswith("-mixed") and policy.output_weight.dtype == torch.float32
    if policy.output_weight.dtype == torch.float64 or (work.on_gpu and not is_narrowed):
        return 0.0
    count = sum(m.weight.numel() for m in policy.body.modules() if type(m) is nn.Linear) + policy.output_weight.numel()
    return float(count * _product_bytes(policy, work.precision))


def _quantised_share(loader: PolicyLoader, policy: Policy) -> float:
    """Share of the weights' bytes left after quantising the language half's linear layers (4.13 or 8 bits)."""
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
