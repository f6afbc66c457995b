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
from torch._subclasses.fake_tensor import FakeTensorMode

from gspo_lightning.config import hardware
from gspo_lightning.config.devices import is_sharded
from gspo_lightning.data.datamodule import PromptDataModule
from gspo_lightning.module import GSPOModule
from gspo_lightning.packing import least_common_on
from gspo_lightning.policy.bundled import resolve_model
from gspo_lightning.policy.fake import fake_policy, saved_bytes
from gspo_lightning.policy.load import PolicyLoader
from gspo_lightning.program.memory_parts import (
    GATHERED,
    Ranks,
    Work,
    cache_slots,
    model_parts,
    reused_bytes,
    rollout_bytes,
)
from gspo_lightning.rollout.engine import traits
from gspo_lightning.screen import counted
from gspo_lightning.training.timing import rss_gb
from gspo_lightning.training.update import MicroBatch, build_micro_batch, split_minibatches
from gspo_lightning.types import Completion, Prompt, ScoredRollout

GIB = 2**30
ACTIVATIONS = "activations of the largest micro-batch"


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
    reused: float = 0.0
    """Bytes of ``rollout`` that lie where the gradients of the last update were."""

    @property
    def total(self) -> float:
        """Bytes at the peak. A GPU's allocator reuses the memory of the rollout; a process on a CPU keeps it, and
        reuses that of gradients for copies of the weights in the same dtype."""
        passing = (ACTIVATIONS, GATHERED)
        kept = sum(value for name, value in self.parts.items() if name not in passing)
        needed = (sum(self.parts.get(name, 0.0) for name in passing), self.rollout + self.whole)
        return kept + (max(needed) if self.on_gpu else sum(needed) - self.reused)

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


def estimate_run(plain: dict[str, Any], datamodule: PromptDataModule, module: GSPOModule) -> Estimate:
    """`estimate` for the first prompts of a run, and of them for the rank whose prompts are longest.

    Args:
        plain: the resolved config.
        datamodule: its prompts.
        module: not yet set up.
    """
    prompts, ranks = datamodule.batch_at(0).prompts, _ranks(plain)
    size = len(prompts) // ranks.count
    held_out = min(datamodule.validation_batch_size, math.ceil(datamodule.num_held_out / ranks.count))
    shares = [prompts[start : start + size] for start in range(0, size * ranks.count, size)]
    work = Work(
        num_generations=module.sampling.num_generations,
        max_completion_length=module.sampling.max_completion_length,
        validation_rows=held_out * module.validator.sampled.num_generations,
        max_concurrent=traits(module.engine).max_concurrent,
        update=module.update_settings,
        optimizer=plain["optimizer"]["_target_"].rpartition(".")[2],
        needs_reference=module.objective.needs_ref,
        precision=plain["trainer"]["precision"],
        on_gpu=hardware.on_gpu(plain["trainer"]["accelerator"]),
        validation_generations=module.validator.sampled.num_generations,
        samples_ahead=module.ahead is not None,
        ranks=ranks,
        own=tuple(module.parameters()),  # the policy is not loaded
        not_counted=own_parts(module),
    )
    longest = max(shares, key=lambda share: sum(len(prompt.input_ids) for prompt in share))
    return estimate(module.policy_loader, longest, work)


def _ranks(plain: dict[str, Any]) -> Ranks:
    sharded = is_sharded(plain)
    gather = sharded and plain["trainer"]["strategy"].get("gather_for_rollouts", True)
    return Ranks(hardware.ranks(plain), sharded, gather_for_rollouts=gather)


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
    slots = cache_slots(prompts, work, training, held_out)
    resolve_model(loader.path)  # a model that has to be built first is built of real tensors
    with FakeTensorMode(allow_non_fake_inputs=True):
        policy = fake_policy(loader)
        activations = saved_bytes(policy, micro.packed, work.precision)
        parts = model_parts(policy, loader, work, several=micro_batches > work.update.num_minibatches)
        rollout = rollout_bytes(policy, loader, work, max(training, held_out), slots)
        reused = min(reused_bytes(policy, loader, work), parts["gradients"])
        everything = (*policy.parameters(), *work.own)
        count = sum(p.numel() for p in everything)
        trained = sum(p.numel() for p in everything if p.requires_grad)
    is_whole = work.max_concurrent and work.ranks.sharded and work.ranks.gather_for_rollouts
    whole = parts["weights"] * work.ranks.count if is_whole else 0.0  # in addition to this process's share
    parts[ACTIVATIONS] = activations
    if not work.on_gpu:
        parts["program and libraries"] = rss_gb() * GIB
    pace = _pace(
        len(prompts),
        work,
        max(training, held_out),
        f"{_tokens(micro)} tokens, {counted(micro_batches, 'micro-batch', 'micro-batches')}",
    )
    if work.not_counted:
        pace["not counted"] = work.not_counted
    return Estimate(count, trained, parts, rollout, whole, pace, work.on_gpu, reused)


def own_parts(module: GSPOModule) -> str:
    """What may have parameters that are made only together with the policy; empty for nothing."""
    is_ours = type(module).configure_model is GSPOModule.configure_model
    return "" if is_ours else f"what {type(module).__name__}.configure_model adds"


def _pace(prompts: int, work: Work, rows: int, forwarded: str) -> dict[str, str]:
    each = " on each process" if work.ranks.count > 1 else ""
    return {
        "processes": str(work.ranks.count),
        f"per rollout{each}": f"{counted(prompts, 'prompt')} x {counted(work.num_generations, 'completion')}",
        "longest completion": counted(work.max_completion_length, "token"),
        "decoded at a time": counted(rows, "completion") if work.max_concurrent else "elsewhere",
        "optimizer steps per rollout": str(work.update.num_minibatches * work.update.num_iterations),
        "forwarded at a time": forwarded,
        "precision": work.precision,
    }


def _largest_micro_batch(prompts: list[Prompt], work: Work) -> tuple[MicroBatch, int]:
    """The largest micro-batch of a rollout of completions of maximum length, and its number of micro-batches."""
    length = work.max_completion_length
    one = Completion(torch.zeros(length, dtype=torch.long), "", torch.zeros(length), "length")
    rewards = torch.zeros(len(prompts), work.num_generations, dtype=torch.float64)
    completions = [[one] * work.num_generations for _ in prompts]
    scored = ScoredRollout(prompts, completions, (), rewards[..., None], rewards, rewards)
    order, cpu = list(range(len(prompts))), torch.device("cpu")
    least = least_common_on(torch.device("cuda") if work.on_gpu else cpu)
    minibatches = split_minibatches(
        scored, work.update, zero_advantage_is_free=False, mask_truncated=False, order=order, least_common=least
    )
    plans = [plan for minibatch in minibatches for plan in minibatch.plan]
    return max((build_micro_batch(scored, plan, cpu, least) for plan in plans), key=_tokens), len(plans)


def _tokens(micro: MicroBatch) -> int:
    return micro.packed.num_tokens
