"""What vLLM in process is started with, and what is refused before."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gspo_lightning.distributed import world_size
from gspo_lightning.errors import UserError
from gspo_lightning.policy.model import Policy
from gspo_lightning.rollout.weights import adapter_rank

_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def refuse_other_gpus(device: torch.device) -> None:
    """The engine takes cuda:0, whatever the trainer's device is. Every rank comes to the same answer."""
    if not torch.cuda.is_available():
        return
    if world_size() > 1:
        raise UserError(
            f"rollout=vllm samples on the first GPU alone, and {world_size()} processes train; use "
            "rollout=vllm_server, or trainer.devices=1"
        )
    if device.type == "cuda" and device.index:
        raise UserError(
            f"rollout=vllm samples on cuda:0, and the policy is on {device}; use rollout=vllm_server, or choose the "
            f"GPU by CUDA_VISIBLE_DEVICES={_name_of_gpu(device.index)} with trainer.devices=1"
        )


def _name_of_gpu(index: int) -> str:
    """What ``CUDA_VISIBLE_DEVICES`` calls torch's GPU of this number: torch counts those that it names."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return names[index].strip() if index < len(names) else str(index)


def lora_settings(policy: Policy) -> dict[str, Any]:
    """Room for one adapter of the policy's rank, and for its part in the vision tower, which vLLM else leaves out."""
    rank = adapter_rank(policy)
    fitting = [size for size in _LORA_RANKS if size >= rank]
    if not fitting:
        raise UserError(f"model.lora.r={rank} is more than vLLM takes; use rollout.engine.lora_sync=merged")
    tower = policy.vision is not None and not policy.vision.is_frozen
    settings = {"enable_lora": True, "max_loras": 1, "max_lora_rank": fitting[0]}
    return settings | ({"enable_tower_connector_lora": True} if tower else {})


def engine_dtype(setting: str, policy: Policy) -> torch.dtype:
    """The dtype the engine computes in: the trainer's, so that sampler and trainer differ by rounding alone."""
    if setting != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[setting]
    kind = policy.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return torch.float32 if policy.output_weight.dtype == torch.float64 else policy.output_weight.dtype


@contextmanager
def refusals_in_one_line(max_model_len: int) -> Iterator[None]:
    """What vLLM says about its settings, in place of a hundred lines of where it says so."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"vLLM does not start: {_reason(error)}; check rollout.engine (kv_cache_gb, memory_fraction, max_num_seqs) "
            f"and data.max_prompt_length + rollout.max_completion_length={max_model_len}, or use rollout=transformers"
        ) from error


def _reason(error: Exception) -> str:
    """The first sentence: what follows is advice about settings under vLLM's own names."""
    details = getattr(error, "errors", None)  # of pydantic: its text repeats all that it was given
    if callable(details):
        first = details()[0]
        where = ".".join(str(part) for part in first["loc"])
        said = f"{where}: {first['msg']}" if where else first["msg"].removeprefix("Value error, ")
    else:
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return " ".join(said.split()).partition(". ")[0].rstrip(".")
