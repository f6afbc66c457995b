"""Code that runs inside vLLM's worker (``worker_extension_cls``): it loads weights and reports which ones it has.

`reload_weights` of vLLM 0.32 alone is not enough, and fails silently: with tied embeddings on a CPU the output
embedding keeps a packed copy of the old weights, gpt-oss keeps its old experts and attention sinks, and models that
read images scale pixels at random. The functions below fix that; `tests/rollout/test_vllm_*.py` show what happens
without them.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gspo_lightning.rollout.weights import RunningChecksum, checksum, load_weights

NamedWeights = Callable[[], Iterator[tuple[str, Tensor]]]

_INSTANCE = uuid.uuid4().hex


class WeightSync:
    """Mixed into vLLM's worker class; ``self`` is the worker. Methods are called by ``collective_rpc``."""

    model_runner: Any

    def gspo_status(self) -> dict[str, Any]:
        """Identity of this worker and what it runs; ``instance`` changes with every start of the process."""
        config = self.model_runner.model_config
        return {
            "instance": _INSTANCE,
            "version": getattr(self, "gspo_version", None),
            "shape": model_shape(config.hf_config),
            "dtype": str(config.dtype).removeprefix("torch."),
            "logprobs_mode": str(config.logprobs_mode),
            "lora": self.model_runner.lora_config is not None,
            "base_replaced": getattr(self, "gspo_base_replaced", False),
        }

    def gspo_set_version(self, version: str) -> None:
        """Remembers the version that the caller has loaded in another way (an adapter)."""
        self.gspo_version: str | None = version

    def gspo_load_folder(self, path: str, version: str, expected: str) -> dict[str, Any]:
        """Loads all weights from a folder of `save_weights`; returns the checksum of what vLLM was given.

        The weights count as ``version`` only if the checksum is the expected one.
        """
        passes: list[RunningChecksum] = []

        def weights() -> Iterator[tuple[str, Tensor]]:
            passes.append(running := RunningChecksum())
            for name, value in load_weights(Path(path)):
                running.add(value)
                yield name, value

        self.gspo_load_weights(weights, version)
        if str(passes[0].total) != expected:
            self.gspo_version = None
        return {"checksum": passes[0].total}

    def gspo_load_weights(self, weights: NamedWeights, version: str) -> None:
        """Loads all weights, named as on the hub; ``weights`` may be called twice."""
        self.gspo_version, self.gspo_base_replaced = None, True
        self.model_runner.reload_weights(weights_iterator=weights())
        model = self.model_runner.get_model()
        load_what_reload_skips(model, weights)
        restore_pixel_norm(model, self.model_runner.vllm_config)
        repack_cpu_linears(model)
        self.gspo_version = version

    def gspo_base_checksum(self) -> dict[str, Any]:
        """Checksum of the base weights as the engine holds them, without adapters."""
        state = self.model_runner.get_model().state_dict()
        return {"checksum": checksum(state[name] for name in sorted(state) if "lora_" not in name)}


def model_shape(config: Any) -> dict[str, Any]:
    """Entries of a transformers config that distinguish models quickly."""
    text = config.get_text_config()
    keys = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    return {"model_type": config.model_type, **{key: getattr(text, key, None) for key in keys}}


def repack_cpu_linears(model: nn.Module) -> None:
    """Packs the CPU kernels' copies of the weights again; a tied output embedding would keep its old one."""
    for module in model.modules():
        if hasattr(module, "cpu_linear") and getattr(module, "weight", torch.empty(0)).numel() > 0:
            module.quant_method.process_weights_after_loading(module)  # type: ignore[union-attr, operator]


def restore_pixel_norm(model: nn.Module, config: Any) -> None:
    """Restores the scaling of pixels, which no checkpoint holds and a start from random weights overwrites."""
    norm = getattr(getattr(model, "visual", None), "input_norm", None)
    if norm is None or not norm.state_dict():
        return
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.fusion.mm_input_norm import build_mm_input_norm

    with set_current_vllm_config(config):
        norm.load_state_dict(build_mm_input_norm(config.model_config).state_dict())


def load_what_reload_skips(model: nn.Module, weights: NamedWeights) -> None:
    """Loads experts and attention sinks of gpt-oss, which the layerwise reload leaves unchanged."""
    if type(model).__name__ != "GptOssForCausalLM":
        return
    with torch.no_grad():
        model.load_weights(  # type: ignore[operator]
            (name, value) for name, value in weights() if ".experts." in name or name.endswith(".sinks")
        )
    for module in model.modules():
        if hasattr(module, "w13_weight"):
            module.quant_method.moe_kernel = None  # type: ignore[union-attr]
            module.quant_method.process_weights_after_loading(module)  # type: ignore[union-attr, operator]
