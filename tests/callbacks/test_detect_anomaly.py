"""The first layer with a number that is not finite is named, forward and backward."""

from __future__ import annotations

import pytest
import torch

from gspo_lightning.callbacks import DetectAnomaly, NonFiniteLayerError
from gspo_lightning.errors import UserError
from tests.scripted import Batches, Settings, build_module, scripted_prompts, trainer

LAYER = "model.model.layers.1.mlp.up_proj"


def fit(folder, plant):
    module = build_module(folder, Settings())
    module.configure_model()
    plant(module.policy)
    trainer(callbacks=[DetectAnomaly()]).fit(module, Batches(scripted_prompts()).loader())
    return module


def test_a_sound_run_passes_and_leaves_no_hooks(micro_model_dir):
    module = fit(micro_model_dir, lambda policy: None)
    assert module.rollouts_done == 1
    assert not any(m._forward_hooks or m._backward_hooks for m in module.policy.modules())


def test_the_first_layer_with_an_output_that_is_not_finite_is_named(micro_model_dir):
    def plant(policy):
        def broken(module, inputs, output):
            output = output.clone()
            output[..., 0, 0] = torch.inf
            return output

        policy.get_submodule(LAYER).register_forward_hook(broken)

    with pytest.raises(
        NonFiniteLayerError, match=rf"forward: {LAYER} \(Linear\) returned 0 NaN and 1 infinite of \d+ values"
    ):
        fit(micro_model_dir, plant)


def test_the_first_layer_with_a_gradient_that_is_not_finite_is_named(micro_model_dir):
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * torch.nan

    def plant(policy):
        policy.get_submodule(LAYER).register_forward_hook(lambda module, inputs, output: Broken.apply(output))

    with pytest.raises(
        NonFiniteLayerError, match=rf"backward: {LAYER} \(Linear\) returned (\d+) NaN and 0 infinite of \1 values"
    ):
        fit(micro_model_dir, plant)


def test_a_weight_that_is_not_finite_is_named_before_it_spreads(micro_model_dir):
    def plant(policy):
        with torch.no_grad():
            policy.get_submodule(LAYER).weight[0, 0] = torch.nan

    with pytest.raises(NonFiniteLayerError, match=rf"the weight {LAYER}.weight is not finite from the start"):
        fit(micro_model_dir, plant)


def test_a_run_that_it_ended_leaves_no_hooks(micro_model_dir):
    """Lightning calls no teardown after an error; the same module may be trained on with another rate."""
    module = build_module(micro_model_dir, Settings())
    module.configure_model()
    plain = module.policy.get_submodule(LAYER)
    broken = plain.register_forward_hook(lambda module, inputs, output: output * torch.inf)
    with pytest.raises(NonFiniteLayerError, match="^forward: "):
        trainer(callbacks=[DetectAnomaly()]).fit(module, Batches(scripted_prompts()).loader())
    broken.remove()
    assert not any(m._forward_hooks or m._backward_hooks for m in module.policy.modules())


def test_compiled_layers_are_refused_before_the_model_is_loaded(micro_model_dir):
    """They call no hook of what is in them, and a layer after them would be named."""
    module = build_module(micro_model_dir, Settings(compile=True))
    with pytest.raises(
        UserError, match="^callbacks: DetectAnomaly .* cannot look into compiled layers; set model.comp"
    ):
        trainer(callbacks=[DetectAnomaly()]).fit(module, Batches(scripted_prompts()).loader())
    assert module.policy is None
