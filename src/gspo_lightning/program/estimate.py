"""Estimates the memory of a run before any weight is loaded: ``python train.py ... dry_run=true``.

The largest micro-batch of the first rollout goes through the training forward of a policy whose tensors have no
memory (`gspo_lightning.policy.fake`), and the tensors that autograd would keep are counted one by one, so no formula
for an architecture is needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gspo_lightning.module import GSPOModule
from gspo_lightning.policy.bundled import resolve_model
from gspo_lightning.policy.fake import fake_policy, saved_bytes
from gspo_lightning.policy.load import DTYPES, PolicyLoader
from gspo_lightning.policy.model import Policy
from gspo_lightning.rollout.block_cache import rows_per_block
from gspo_lightning.training.timing import rss_gb
from gspo_lightning.training.update import MicroBatch, UpdateSettings, build_micro_batch, split_minibatches
from gspo_lightning.types import Completion, Prompt, ScoredRollout

GIB = 2**30
OPTIMIZER_BYTES = {"AdamW8bit": 2.0, "PagedAdamW8bit": 2.0, "SGD": 0.0}
"""Bytes of state per trained parameter; every other optimizer keeps two moments in the dtype of the weights."""
LOGITS_COPIES = 4
"""Copies of the logits in a decoding step: raw, float32, probabilities and their running sums."""


@dataclass(frozen=True)
class Estimate:
    """Memory by part, and the settings that decide the pace."""

    parameters: int
    trained: int
    parts: dict[str, float]
    """Name -> bytes."""
    rollout: float
    """Bytes of the key/value cache, the logits of a decoding step and the packed copy of the weights."""
    whole: float
    """Bytes of the whole weights that a process of trainer=fsdp holds while it samples."""
    pace: dict[str, str]
    """Settings that decide how long a rollout takes, by name."""
    on_gpu: bool

    @property
    def total(self) -> float:
        """Bytes at the peak. A GPU's allocator reuses the memory of the rollout; a process on a CPU keeps it."""
        passing = (ACTIVATIONS, GATHERED)
        kept = sum(value for name, value in self.parts.items() if name not in passing)
        needed = (sum(self.parts.get(name, 0.0) for name in passing), self.rollout + self.whole)
        return kept + (max(needed) if self.on_gpu else sum(needed))

    def table(self) -> Table:
        """The estimate as a table for the screen."""
        title = "What the run will need (estimated; no weights were loaded)"
        table = Table(title=title, show_header=False, title_justify="left")
        table.add_column(style="bold", no_wrap=True)
        table.add_column(justify="right")
        table.add_row("parameters", f"{self.parameters / 1e6:,.1f} M")
        table.add_row("of which trained", f"{self.trained / 1e6:,.1f} M ({self.trained / self.parameters:.1%})")
        sampling = {"rollout: cache, logits, packed weights": self.rollout}
        if self.whole:
            sampling["rollout: whole weights"] = self.whole
        for name, value in {**self.parts, **sampling}.items():
            table.add_row(name, f"{value / GIB:.2f} GiB")
        table.add_row(f"peak of the {'GPU' if self.on_gpu else 'process'}", f"{self.total / GIB:.2f} GiB")
        for name, setting in self.pace.items():
            table.add_row(name, setting)
        return table


ACTIVATIONS = "activations of the largest micro-batch"
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


def estimate(loader: PolicyLoader, prompts: list[Prompt], work: Work) -> Estimate:
    """Estimates the memory of each process of a run, on its device.

    Args:
        loader: of the policy.
        prompts: of one rollout on one rank.
        work: what is done with them.
    """
    micro, micro_batches = _largest_micro_batch(prompts, work)
    training = work.rows_at_once(len(prompts) * work.num_generations, work.num_generations)
    held_out = work.rows_at_once(work.validation_rows, work.validation_generations)
    slots = _cache_slots(prompts, work, training, held_out)
    resolve_model(loader.path)  # a model that has to be built first is built of real tensors
    with FakeTensorMode(allow_non_fake_inputs=True):
        policy = fake_policy(loader)
        activations = saved_bytes(policy, micro.packed, work.precision)
        parts = _model_parts(policy, loader, work, several=micro_batches > work.update.num_minibatches)
        rollout = _rollout_bytes(policy, loader, work, max(training, held_out), slots)
        everything = (*policy.parameters(), *work.own)
        count = sum(p.numel() for p in everything)
        trained = sum(p.numel() for p in everything if p.requires_grad)
    is_whole = work.max_concurrent and work.ranks.sharded and work.ranks.gather_for_rollouts
    whole = parts["weights"] * work.ranks.count if is_whole else 0.0  # in addition to this process's share
    parts[ACTIVATIONS] = activations
    if not work.on_gpu:
        parts["program and libraries"] = rss_gb() * GIB
    pace = _pace(len(prompts), work, max(training, held_out), f"{_tokens(micro)} tokens, {micro_batches} micro-batches")
    if work.not_counted:
        pace["not counted"] = work.not_counted
    return Estimate(count, trained, parts, rollout, whole, pace, work.on_gpu)


def own_parts(module: GSPOModule) -> str:
    """What may have parameters that are made only together with the policy; empty for nothing."""
    is_ours = type(module).configure_model is GSPOModule.configure_model
    return "" if is_ours else f"what {type(module).__name__}.configure_model adds"


def _pace(prompts: int, work: Work, rows: int, forwarded: str) -> dict[str, str]:
    each = " on each process" if work.ranks.count > 1 else ""
    return {
        "processes": str(work.ranks.count),
        f"per rollout{each}": f"{prompts} prompts x {work.num_generations} completions",
        "longest completion": f"{work.max_completion_length} tokens",
        "decoded at a time": f"{rows} completions" if work.max_concurrent else "elsewhere",
        "optimizer steps per rollout": str(work.update.num_minibatches * work.update.num_iterations),
        "forwarded at a time": forwarded,
        "precision": work.precision,
    }


def _largest_micro_batch(prompts: list[Prompt], work: Work) -> tuple[MicroBatch, int]:
    """The largest micro-batch of a rollout of completions of maximum length, and its number of micro-batches."""
    scored = _scored(prompts, _longest(len(prompts), work.num_generations, work.max_completion_length))
    minibatches = split_minibatches(
        scored, work.update, zero_advantage_is_free=False, mask_truncated=False, order=list(range(len(prompts)))
    )
    plans = [plan for minibatch in minibatches for plan in minibatch.plan]
    return max((build_micro_batch(scored, plan, torch.device("cpu")) for plan in plans), key=_tokens), len(plans)


def _model_parts(policy: Policy, loader: PolicyLoader, work: Work, *, several: bool) -> dict[str, float]:
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


def _cache_slots(prompts: list[Prompt], work: Work, training: int, held_out: int) -> int:
    """Tokens whose keys and values are held at a time, for ``training`` rows of a rollout or ``held_out`` rows.

    A prompt is held once (on a CPU once per block of its rows); in validation once per row.
    """
    generations, length = work.num_generations, work.max_completion_length
    longest = max(len(prompt.input_ids) for prompt in prompts)
    width = generations if work.on_gpu else rows_per_block(generations, longest, length)
    blocks = training // generations * math.ceil(generations / width)
    return max(blocks, held_out) * longest + max(blocks * width, held_out) * length


def _rollout_bytes(policy: Policy, loader: PolicyLoader, work: Work, rows: int, slots: int) -> float:
    """Bytes of the keys and values of ``slots`` tokens, of the logits of ``rows`` rows and of the packed weights."""
    text = policy.config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    item = _product_bytes(policy, work.precision)
    cache = 2 * text.num_hidden_layers * slots * text.num_key_value_heads * size * item
    logits = LOGITS_COPIES * rows * policy.output_weight.shape[0] * 4
    packs = work.max_concurrent and loader.quantization is None and not loader.compile and not work.ranks.sharded
    return float(cache + logits) + (_packed_bytes(policy, work.precision, work.on_gpu) if packs else 0.0)


def _product_bytes(policy: Policy, precision: str) -> int:
    narrow = "bf16" in precision or "16" in str(policy.output_weight.dtype)
    return 2 if narrow else policy.output_weight.element_size()


def _packed_bytes(policy: Policy, precision: str, on_gpu: bool) -> float:
    """Bytes of the copy of the weights that `gspo_lightning.rollout.prepacked` holds during a rollout."""
    is_narrowed = precision.endswith("-mixed") and policy.output_weight.dtype == torch.float32
    if policy.output_weight.dtype == torch.float64 or (on_gpu and not is_narrowed):
        return 0.0
    count = sum(m.weight.numel() for m in policy.body.modules() if type(m) is nn.Linear) + policy.output_weight.numel()
    return float(count * _product_bytes(policy, precision))


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


def _tokens(micro: MicroBatch) -> int:
    return micro.packed.num_tokens


def _longest(groups: int, generations: int, length: int) -> list[list[Completion]]:
    one = Completion(torch.zeros(length, dtype=torch.long), "", torch.zeros(length), "length")
    return [[one] * generations for _ in range(groups)]


def _scored(prompts: list[Prompt], completions: list[list[Completion]]) -> ScoredRollout:
    rewards = torch.zeros(len(prompts), len(completions[0]), dtype=torch.float64)
    return ScoredRollout(prompts, completions, (), rewards[..., None], rewards, rewards)
