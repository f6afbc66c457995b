"""Settings that depend on the machine: accelerator, number of processes, precision, tokens of a micro-batch."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from gspo_lightning.errors import UserError

LARGE_GPU = 40 * 2**30
"""Memory of a card with room for 16384 tokens; with fewer tokens, starting kernels takes longer than running them."""


def choose_accelerator(name: str) -> str:
    """Resolves ``trainer.accelerator=auto``: a GPU through CUDA (or ROCm) if there is one, else the CPU.

    Lightning's own choice may be the GPU of an Apple machine, which has no float64 for the sums of a rollout.

    Raises:
        UserError: ``name`` is another accelerator.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda", "gpu"):
        raise UserError(f"trainer.accelerator={name} is not supported; use cuda, cpu, or auto")
    return "cpu" if name == "cpu" else "cuda"


def on_gpu(name: str) -> bool:
    """Whether a run with this ``trainer.accelerator`` computes on a GPU."""
    return choose_accelerator(name) == "cuda" and torch.cuda.is_available()


def ranks(plain: dict[str, Any]) -> int:
    """Number of processes that will train together; if ``devices`` names no number, one per GPU of this machine."""
    trainer = plain["trainer"]
    devices = trainer["devices"]
    if isinstance(devices, list):
        devices = len(devices)
    if not isinstance(devices, int) or devices < 1:
        devices = torch.cuda.device_count() if on_gpu(trainer["accelerator"]) else 1
    return int(devices * trainer["num_nodes"])


def choose_precision(precision: str, accelerator: str) -> str:
    """Resolves ``auto``: bf16-mixed if the hardware multiplies bfloat16 matrices fast, else 32-true."""
    if precision != "auto":
        return precision
    if on_gpu(accelerator):
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    return "bf16-mixed" if cpu_has_bf16() else "32-true"


def warn_of_slow_products(plain: dict[str, Any]) -> None:
    """Says that a CPU without units for bfloat16 was asked for products in it: torch takes a hundred times as long for
    them as in float32 on one with AVX2 alone (docs/performance.md)."""
    if on_gpu(plain["trainer"]["accelerator"]) or cpu_has_bf16():
        return
    precision, dtype = str(plain["trainer"]["precision"]), plain["model"]["dtype"]
    for key, value, fast in (("trainer.precision", precision, "32-true"), ("model.dtype", dtype, "float32")):
        if value.startswith("bf16") or value == "bfloat16":
            warnings.warn(
                f"{key}={value}: this CPU has no units for bfloat16, and products take up to 100 times as long as with "
                f"{key}={fast}",
                stacklevel=2,
            )


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AVX512-BF16 or AMX)."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def choose_token_budget(plain: dict[str, Any]) -> int:
    """Resolves ``update.max_tokens_per_microbatch=auto``."""
    gpu = on_gpu(plain["trainer"]["accelerator"])
    rollout = plain["rollout"]
    return token_budget(
        plain["data"]["max_prompt_length"],
        rollout["max_completion_length"],
        rollout["num_generations"],
        busy_tokens(gpu, narrow=str(plain["trainer"]["precision"]).endswith("-mixed")),
    )


def busy_tokens(on_gpu: bool, narrow: bool) -> int:
    """Tokens of a micro-batch that keep the device busy; more only take memory.

    oneDNN runs a bfloat16 product of about 600 to 1300 rows on one thread if the result is a few hundred columns wide,
    as in many layers: two micro-batches of 800 tokens take longer than one of 1600.

    Args:
        on_gpu: whether on a GPU; else on a CPU.
        narrow: whether products are in a narrower dtype than the weights.
    """
    if on_gpu:
        return 16384 if _gpu_memory() >= LARGE_GPU else 8192
    return 2304 if narrow else 1024


def _gpu_memory() -> float:
    """Bytes of the smallest GPU; infinite if there is none to ask."""
    devices = range(torch.cuda.device_count())
    return min((torch.cuda.get_device_properties(d).total_memory for d in devices), default=torch.inf)


def token_budget(prompt: int, completion: int, generations: int, busy: int) -> int:
    """The value of ``max_tokens_per_microbatch=auto``.

    A group that does not fit is split, and its prompt is forwarded once per part. So for long prompts the budget holds
    the whole group, or at least enough that the prompt makes up no more than a quarter.

    Args:
        prompt: longest prompt, in tokens.
        completion: longest completion, in tokens.
        generations: completions per prompt.
        busy: tokens that keep the device busy; the result is at least this.
    """
    return max(busy, prompt + completion, min(prompt + generations * completion, 4 * prompt))
