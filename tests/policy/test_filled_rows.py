"""Rows of a bfloat16 forward on a CPU are filled up to whole tiles; nothing but the shape of the products changes."""

from __future__ import annotations

import pytest
import torch

from gspo_lightning.packing import pack
from gspo_lightning.packing.products import rows_missing
from gspo_lightning.policy.load import PolicyLoader
from gspo_lightning.policy.micro_gpt_oss import build_micro_gpt_oss
from tests.support import flat_gradient, random_groups, relative_distance

CPU = torch.device("cpu")
GROUPS = random_groups([(7, [3, 5]), (4, [2, 9])], 90)
TOKENS = 7 + 2 + 4 + 4 + 1 + 8


def outcome(policy):
    """Log-probabilities, entropies and gradient; and the tokens that the layers saw."""
    seen = []
    handle = policy.body.layers[0].register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1]))
    policy.zero_grad()
    logprobs, entropy = policy(pack(GROUPS, CPU), with_entropy=True)
    (logprobs.sum() + 0.1 * entropy.sum()).backward()
    handle.remove()
    return logprobs.detach(), entropy.detach(), flat_gradient(policy), seen


@pytest.mark.parametrize("architecture", ["Llama", "gpt-oss"])
def test_in_float64_filled_rows_give_the_same_numbers(architecture, micro_model_dir, tmp_path, monkeypatch):
    folder = micro_model_dir
    if architecture == "gpt-oss":
        folder = tmp_path
        build_micro_gpt_oss(folder)
    policy = PolicyLoader(str(folder), dtype="float64").load()
    *expected, seen = outcome(policy)
    assert seen == [TOKENS]
    for where in ("policy.model", "packing.logprobs"):
        monkeypatch.setattr(f"gspo_lightning.{where}.rows_missing", lambda rows, *_: -rows % 32)
    *found, seen = outcome(policy)
    assert seen == [32]
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_distance(ours, theirs) < 1e-12


def test_only_bfloat16_products_on_a_cpu_are_filled(micro_model_dir):
    policy = PolicyLoader(str(micro_model_dir)).load()
    assert outcome(policy)[-1] == [TOKENS]
    with torch.autocast("cpu", torch.bfloat16):
        assert outcome(policy)[-1] == [32]
    assert rows_missing(33, torch.device("cuda"), torch.bfloat16) == 0
    assert [rows_missing(n, CPU, torch.bfloat16) for n in (0, 1, 31, 32, 33)] == [0, 31, 1, 0, 31]
