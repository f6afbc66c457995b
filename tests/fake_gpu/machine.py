"""A GPU that computes nothing: tensors on ``cuda:0`` with shape, dtype and device, but without numbers.

torch's `FakeTensorMode` runs every operation as far as these three. It raises where devices, dtypes or shapes do not fit,
and where a number is read back, which on a GPU waits for all of its work and cannot be recorded in a CUDA graph. So
branches that a CPU never takes run here, on machines without a GPU; `tests/gpu` compares their numbers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

from gspo_lightning.packing import PackedBatch, SharedPrefixLayout, flex, pack
from gspo_lightning.policy.adapter import LoraSettings, add_lora
from gspo_lightning.policy.attention import attention_implementation, register
from gspo_lightning.policy.lean import lighten
from gspo_lightning.policy.model import Policy
from gspo_lightning.policy.vision import packs_images
from gspo_lightning.rollout.cache import DecodeCache

GPU = torch.device("cuda:0")
H100 = SimpleNamespace(shared_memory_per_block_optin=232_448, total_memory=80 * 2**30)

_REGISTRY = "_ZN3c104impl26device_guard_impl_registryE"
_CUDA, _META = 1, 14
"""Numbers of these kinds of devices in torch."""


@contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Context in which ``cuda:0`` is an H100 without numbers."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: H100)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(flex, "has_triton", lambda: True)
    monkeypatch.setattr(flex, "_compiled", lambda: _flex_kernel)
    # Their results depend on numbers; they are called between the steps of a rollout, or once per row.
    monkeypatch.setattr(torch, "bincount", lambda x, minlength: x.new_empty(minlength, dtype=torch.long))
    monkeypatch.setattr(SharedPrefixLayout, "owners", _owners)
    monkeypatch.setattr(DecodeCache, "_arrange", _arrange)
    with _devices_to_switch_to(), FakeTensorMode(allow_non_fake_inputs=True):
        yield


@contextmanager
def _devices_to_switch_to() -> Iterator[None]:
    """Lets operations make the GPU the current device, without effect: builds of torch without CUDA have no function
    for it. In builds with CUDA `FakeTensorMode` does the same where there is no GPU."""
    if torch.backends.cuda.is_built():
        yield
        return
    library = next((Path(torch.__file__).parent / "lib").glob("libc10.*"))
    functions = (ctypes.c_void_p * (_META + 1)).in_dll(ctypes.CDLL(str(library)), _REGISTRY)
    before, functions[_CUDA] = functions[_CUDA], functions[_META]
    try:
        yield
    finally:
        functions[_CUDA] = before


def _flex_kernel(
    query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, return_aux: AuxRequest, **_: Any
) -> tuple[Tensor, AuxOutput]:
    """Stands for the compiled kernel: checks what it is given, and gives what it would."""
    tables = [table for table in block_mask.as_tuple() if isinstance(table, Tensor)]
    assert {x.device for x in (query, key, value, *tables)} == {GPU}
    assert query.dtype == key.dtype == value.dtype
    assert (block_mask.shape[-2:]) == (query.shape[2], key.shape[2])
    out = query + 0 * (key.sum() + value.sum())
    return out, AuxOutput(lse=out[..., 0].float() if return_aux.lse else None, max_scores=None)


_OWNERS = SharedPrefixLayout.owners


def _owners(self: SharedPrefixLayout) -> tuple[Tensor, Tensor]:
    with unset_fake_temporarily():
        owner, prompt = _OWNERS(SharedPrefixLayout(self.groups, torch.device("cpu"), self.common))
    return owner.to(self.device), prompt.to(self.device)


def _arrange(self: DecodeCache) -> None:
    """As if rows had left: each is looked up in the table of prompts by rows."""
    self._most, self._places = self.rows, torch.arange(self.rows, device=GPU)


def fake_policy(config: PreTrainedConfig, dtype: torch.dtype, lora: LoraSettings | None = None) -> Policy:
    """A policy of this architecture on the GPU, as `PolicyLoader.load` makes it; to be called within `fake_gpu`."""
    register()
    vision = packs_images(config)
    kind: Any = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(config, attn_implementation=attention_implementation("auto", vision), dtype=dtype)
        lighten(model.train(), check=False)
        wrapped: nn.Module = model if lora is None else add_lora(model, lora, train_vision=False)
    made: dict[int, nn.Parameter] = {}
    for module in wrapped.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device=GPU), parameter.requires_grad)
            module._parameters[name] = None if parameter is None else made[id(parameter)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty_like(buffer, device=GPU)
    return Policy(wrapped, None, has_vision=vision)  # type: ignore[arg-type]


def fake_row(groups: Any, prompts: Any = ()) -> PackedBatch:
    """`pack`, whose tokens are real, then on the GPU; to be called within `fake_gpu`."""
    with unset_fake_temporarily():
        row = pack(groups, torch.device("cpu"), prompts)
    there = {name: value.to(GPU) for name, value in vars(row).items() if isinstance(value, Tensor)}
    return replace(row, **there, layout=SharedPrefixLayout(row.layout.groups, GPU, row.layout.common))


def recorded(function: Callable[[], None]) -> Callable[[], None]:
    """Stands for `cuda_graph`: refuses what cannot be recorded. Reading a number is refused everywhere."""
    with _NothingFromTheHost():
        function()
    return function


class _NothingFromTheHost(TorchDispatchMode):
    """Refuses operations with tensors of the CPU: a recorded copy would read memory that is somebody else's by then."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        assert all(x.device == GPU for x in tensors), f"{func} is given or makes a tensor of the CPU"
        return out
