"""Refuses devices and strategies that a run cannot use, and what cannot be split over ranks."""

from __future__ import annotations

from typing import Any

import torch

from gspo_lightning.errors import UserError
from gspo_lightning.training.callback_checks import NOT_IN_PARTS

MOST_PROCESSES = 1024
"""Most processes of a machine, and most machines: of a mistyped number Lightning would make a list first."""


def check_devices(plain: dict[str, Any]) -> None:
    """Refuses devices that are not there, and strategies under which a run cannot be resumed or sampled from."""
    trainer = plain["trainer"]
    for key in ("devices", "num_nodes"):
        if isinstance(trainer[key], int) and trainer[key] > MOST_PROCESSES:
            raise UserError(f"trainer.{key}={trainer[key]} must be at most {MOST_PROCESSES}")
    if trainer["accelerator"] in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(
            f"trainer.accelerator={trainer['accelerator']}: there is no GPU here; accelerator=auto uses what there "
            "is, and experiment=gspo_qwen_vl_tiny runs the vision path offline on a CPU"
        )
    strategy = trainer["strategy"]
    name = str(strategy.get("_target_")).rpartition(".")[2] if isinstance(strategy, dict) else str(strategy)
    if name.startswith(("ddp_spawn", "ddp_fork", "ddp_notebook")):
        raise UserError(f"trainer.strategy={name} starts processes that cannot be resumed or stopped; use trainer=ddp")
    if name.startswith(("fsdp", "FSDPStrategy", "deepspeed", "DeepSpeed")):
        raise UserError(
            f"trainer.strategy={name} flattens or moves the weights that rollouts and LoRA need as they are; use "
            "trainer=fsdp, which is FSDP2, or trainer=ddp"
        )


def is_sharded(plain: dict[str, Any]) -> bool:
    """Whether the weights are split over ranks: trainer=fsdp."""
    strategy = plain["trainer"]["strategy"]
    return isinstance(strategy, dict) and str(strategy.get("_target_")).endswith(
        (".FSDP2Strategy", ".ModelParallelStrategy")
    )


def check_sharding(plain: dict[str, Any]) -> None:
    """What cannot be split over ranks."""
    if plain["model"].get("quantization"):
        raise UserError(
            f"trainer=fsdp cannot split weights of model.quantization={plain['model']['quantization']}; use trainer=ddp"
        )
    if str(plain["optimizer"].get("_target_")).startswith("bitsandbytes."):
        raise UserError(
            "trainer=fsdp can split only the states of torch's own optimizers; use optimizer=adamw, or trainer=ddp"
        )
    for name, node in (plain["callbacks"] or {}).items():
        if (kind := str((node or {}).get("_target_")).rpartition(".")[2]) in ("EMAWeightAveraging", "WeightAveraging"):
            raise UserError(f"callbacks.{name}: {kind} {NOT_IN_PARTS}")
    if plain["rollout"]["engine"].get("staleness"):
        raise UserError("rollout.engine.staleness=1 needs whole weights in one process; set it to 0 with trainer=fsdp")
