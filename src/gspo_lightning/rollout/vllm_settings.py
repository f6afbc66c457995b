"""Settings that in-process vLLM is started with, and refusals before that."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gspo_lightning.distributed.ranks import world_size
from gspo_lightning.errors import UserError, is_out_of_memory
from gspo_lightning.policy.model import Policy
from gspo_lightning.precision import dtype_of_new_tensors, without_autocast
from gspo_lightning.rollout.weights import adapter_rank

_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def refuse_other_gpus(device: torch.device) -> None:
    """Refuses devices other than cuda:0, which the engine always takes. Every rank reaches the same verdict."""
    if not torch.cuda.is_available():
        return
    if world_size() > 1:
        raise UserError(
            f"rollout=vllm samples only on the first GPU, but {world_size()} processes train; use "
            "rollout=vllm_server, or trainer.devices=1"
        )
    if device.type == "cuda" and device.index:
        raise UserError(
            f"rollout=vllm samples on cuda:0, but the policy is on {device}; use rollout=vllm_server, or choose the "
            f"GPU with CUDA_VISIBLE_DEVICES={_name_of_gpu(device.index)} and trainer.devices=1"
        )


def _name_of_gpu(index: int) -> str:
    """Name in ``CUDA_VISIBLE_DEVICES`` of torch's GPU number ``index``: torch counts the GPUs named there."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return names[index].strip() if index < len(names) else str(index)


def lora_settings(policy: Policy) -> dict[str, Any]:
    """Settings for one adapter of the policy's rank and its part in the vision tower, which vLLM else leaves out."""
    rank = adapter_rank(policy)
    fitting = [size for size in _LORA_RANKS if size >= rank]
    if not fitting:
        raise UserError(f"model.lora.r={rank} is more than vLLM supports; use rollout.engine.lora_sync=merged")
    tower = policy.vision is not None and not policy.vision.is_frozen
    settings = {"enable_lora": True, "max_loras": 1, "max_lora_rank": fitting[0]}
    return settings | ({"enable_tower_connector_lora": True} if tower else {})


def memory_settings(fraction: float | None, cache_gb: float | None) -> dict[str, Any]:
    """Settings for the share of a GPU that the engine takes, or for the size of its key/value cache."""
    if not torch.cuda.is_available():
        return {"kv_cache_memory_bytes": int((cache_gb or 1.0) * 2**30)}
    if cache_gb is None:
        return {"gpu_memory_utilization": 0.3 if fraction is None else fraction}
    size = int(cache_gb * 2**30)
    # With a size, vLLM uses this share for nothing but a test at its start: so much must be free. The default, 0.92,
    # never is beside a trainer.
    share = min(1.0, size / torch.cuda.get_device_properties(0).total_memory)
    return {"kv_cache_memory_bytes": size, "gpu_memory_utilization": share}


def engine_dtype(setting: str, policy: Policy) -> torch.dtype:
    """The dtype the engine computes in: by default the trainer's, so that the two differ only by rounding."""
    if setting != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[setting]
    kind = policy.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return torch.float32 if policy.output_weight.dtype == torch.float64 else policy.output_weight.dtype


@contextmanager
def own_precision() -> Iterator[None]:
    """Context of vLLM's own work, on which the precision of the trainer must not act.

    Under a GPU's autocast the angles of its rotations would be products in bfloat16, in which neighbouring positions
    above 256 are one; bf16-true would give another dtype to whatever it makes without naming one.
    """
    with dtype_of_new_tensors(torch.float32), without_autocast():
        yield


@contextmanager
def precision_of_products_kept() -> Iterator[None]:
    """Context of vLLM's start, which sets the precision of float32 products for the whole process.

    The trainer would lose TensorFloat-32 that a program has chosen and, on a CPU, `packing.products.onednn_float32`.
    """
    backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        older: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:  # chosen by the newer names alone
        older = None
    try:
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


@contextmanager
def refusals_in_one_line(max_model_len: int) -> Iterator[None]:
    """Turns vLLM's refusal of its settings into one line, in place of a hundred lines of traceback."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"vLLM does not start: {_reason(error)}; check rollout.engine (kv_cache_gb, memory_fraction, max_num_seqs) "
            f"and data.max_prompt_length + rollout.max_completion_length={max_model_len}, or use rollout=transformers"
        ) from error


@contextmanager
def unsupported_in_one_line(is_first: bool) -> Iterator[None]:
    """Turns the failure of vLLM's first forward into one line: a kernel may not have the shapes of the model."""
    try:
        yield
    except RuntimeError as error:
        if not is_first or is_out_of_memory(error):
            raise
        raise UserError(f"vLLM cannot run this model here: {_reason(error)}; use rollout=transformers") from error


def _reason(error: Exception) -> str:
    """The error's first sentence: what follows is advice about settings under vLLM's own names."""
    details = getattr(error, "errors", None)  # a pydantic error, whose text repeats all of its input
    if callable(details):
        first = details()[0]
        where = ".".join(str(part) for part in first["loc"])
        said = f"{where}: {first['msg']}" if where else first["msg"].removeprefix("Value error, ")
    else:
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return " ".join(said.split()).partition(". ")[0].rstrip(".")


def whole_prompts(max_model_len: int) -> dict[str, Any]:
    """Settings against prompts in chunks on a CPU: vLLM 0.32 then rewinds a request's generator, which fails."""
    if torch.cuda.is_available():
        return {}
    return {"enable_chunked_prefill": False, "max_num_batched_tokens": max(max_model_len, 4096)}
