"""Names the first layer whose output or gradient is not finite."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gspo_lightning.errors import NonFiniteGradientError, UserError


class NonFiniteLayerError(NonFiniteGradientError):
    """A layer produced a number that is not finite."""


class DetectAnomaly(L.Callback):
    """Checks the output of every leaf module of the policy, forward and backward; the first bad one ends the run.

    Forwards of rollouts are checked too. The weights are checked before each rollout, so that a non-finite weight is
    named instead of the layers after it.

    Raises:
        NonFiniteLayerError: names the module and whether it was forward or backward.
    """

    def __init__(self) -> None:
        self._hooks: list[RemovableHandle] = []

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Refuses compiled layers: they call no hook of what is in them, and what comes after them would be named."""
        if pl_module.policy_loader.compile:
            raise UserError(
                "callbacks: DetectAnomaly (debug=detect_anomaly) cannot look into compiled layers; set "
                "model.compile=false"
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Checks the weights and registers the hooks."""
        check_weights(pl_module.policy, "from the start")
        for name, module in pl_module.policy.named_modules():
            if not any(module.children()):
                self._hooks.append(module.register_forward_hook(self._forward_hook(name)))
                self._hooks.append(module.register_full_backward_hook(self._backward_hook(name)))

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Checks the weights."""
        check_weights(pl_module.policy, f"before rollout {pl_module.rollouts_done + 1}")

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Removes the hooks."""
        self._remove_hooks()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Removes the hooks: Lightning calls no `teardown` after an error."""
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @staticmethod
    def _forward_hook(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            _check(f"forward: {name} ({type(module).__name__}) returned", output)

        return hook

    @staticmethod
    def _backward_hook(name: str) -> Any:
        def hook(module: nn.Module, grad_input: Any, grad_output: Any) -> None:
            _check(f"backward: {name} ({type(module).__name__}) received", grad_output)
            _check(f"backward: {name} ({type(module).__name__}) returned", grad_input)

        return hook


def _check(did: str, value: Any) -> None:
    for tensor in tensors_of(value):
        if not torch.isfinite(tensor).all():
            raise NonFiniteLayerError(f"{did} {what(tensor)}")


def check_weights(policy: nn.Module, when: str) -> None:
    """Refuses a weight that is not finite."""
    for name, parameter in policy.named_parameters():
        if not torch.isfinite(parameter).all():
            raise NonFiniteLayerError(f"the weight {name} is not finite {when}")


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in an output, however it is nested."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item)
    elif isinstance(value, dict):
        yield from tensors_of(list(value.values()))


def what(tensor: Tensor) -> str:
    """Text with the numbers of NaN and infinite values of a tensor."""
    nan, inf = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    return f"{nan} NaN and {inf} infinite of {tensor.numel()} values"
