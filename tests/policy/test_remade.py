"""Tensors that are made again for the backward: the same bits, once for all that ask, and nothing else is touched."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from gspo_lightning.packing import pack
from gspo_lightning.policy import lean
from gspo_lightning.policy.load import LoraSettings, PolicyLoader
from gspo_lightning.policy.remade import Remade, remade
from tests.support import flat_gradient

GROUPS = [(torch.arange(3, 9), [torch.arange(20, 24), torch.arange(30, 37)]), (torch.arange(5), [torch.arange(9, 12)])]


@pytest.mark.parametrize("lora", [None, LoraSettings(r=3)], ids=["all weights", "adapter"])
@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bf16-mixed"])
def test_gradients_have_the_same_bits_as_with_everything_kept(lora, mixed, micro_model_dir, monkeypatch):
    found = []
    for hooks in (remade, lambda x: nullcontext()):
        monkeypatch.setattr(lean, "remade", hooks)
        torch.manual_seed(0)
        policy = PolicyLoader(str(micro_model_dir), lora=lora).load()
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:  # of zeros, it would hide what the other half of the adapter reads
                torch.nn.init.normal_(parameter, std=0.05)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            logprobs, _ = policy(pack(GROUPS, torch.device("cpu")))
            logprobs.square().sum().backward()
        found.append((logprobs.detach(), flat_gradient(policy)))
    for ours, kept in zip(*found, strict=True):
        assert kept.abs().max() > 0 and torch.equal(ours, kept)


def test_norms_of_a_policy_are_not_kept(micro_model_dir, monkeypatch):
    policy = PolicyLoader(str(micro_model_dir)).load()
    row = pack(GROUPS, torch.device("cpu"))
    tokens, hidden = row.input_ids.numel(), policy.base_model.config.hidden_size

    def kept_rows():
        kept = {}

        def keep(tensor):
            if tensor.numel() == tokens * hidden:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with saved_tensors_hooks(keep, lambda x: x):
            policy(row)
        return len(kept)

    ours = kept_rows()
    monkeypatch.setattr(lean, "remade", lambda x: nullcontext())
    assert kept_rows() - ours == 2 * policy.base_model.config.num_hidden_layers


def test_a_tensor_is_made_once_for_all_that_read_it_and_others_pass_by():
    x, weights = torch.randn(4, 3, requires_grad=True), torch.randn(3, 3, requires_grad=True)
    made, outside = [], []

    def make():
        made.append(x.detach().exp())
        return made[-1]

    def keep(tensor):
        outside.append(tensor)
        return len(outside) - 1

    with saved_tensors_hooks(keep, outside.__getitem__):
        y = x.exp()
        first = len(outside)
        again = Remade(y, make)
        with again.hooks():
            out = (y @ weights).sum() + (y[1:] @ weights).sum()
    assert [t.shape for t in outside[first:]] == [weights.t().shape] * 2
    expected = torch.autograd.grad((x.exp() @ weights).sum() + (x.exp()[1:] @ weights).sum(), (x, weights))
    for found, exact in zip(torch.autograd.grad(out, (x, weights)), expected, strict=True):
        assert torch.equal(found, exact)
    assert len(made) == 1 and again.made is None
