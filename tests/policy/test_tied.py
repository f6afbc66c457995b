"""A tied embedding's gradient without a table of zeros: the numbers of ordinary autograd, and what is not made."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import embedding
from torch.utils._python_dispatch import TorchDispatchMode

from gspo_lightning.packing import pack
from gspo_lightning.policy.tied import tied_weight
from tests.support import micro_policy, random_groups, relative_distance

VOCABULARY, WIDTH = 11, 4
IDS = torch.tensor([[3, 1, 3, 2, 10, 0]])


def loss_of(table: nn.Embedding) -> torch.Tensor:
    """A loss of an embedding whose rows are read and multiplied with, by `tied_weight`."""
    with tied_weight(table, table.weight) as head:
        hidden = table(IDS)
    return ((hidden @ head.t()).sin() * torch.arange(1.0, VOCABULARY + 1, dtype=torch.float64)).sum()


@pytest.mark.parametrize("padding", [None, 2])
def test_the_gradient_is_that_of_autograd(padding):
    torch.manual_seed(0)
    table = nn.Embedding(VOCABULARY, WIDTH, padding_idx=padding).double()
    weight = table.weight.detach().clone().requires_grad_()
    hidden = embedding(IDS, weight, padding_idx=padding)
    expected = ((hidden @ weight.t()).sin() * torch.arange(1.0, VOCABULARY + 1, dtype=torch.float64)).sum()
    (derivative,) = torch.autograd.grad(expected, weight)
    loss = loss_of(table)
    loss.backward()
    assert relative_distance(loss, expected) < 1e-15
    assert relative_distance(table.weight.grad, derivative) < 1e-14
    assert "forward" not in vars(table)


class Operations(TorchDispatchMode):
    """Notes the names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def gradients(policy, packed, loss):
    policy.zero_grad()
    logprobs, _ = policy(packed)
    with Operations() as operations:
        loss(logprobs).backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters()}, operations.seen


def test_a_policy_with_one_table_makes_no_dense_gradient_of_its_embedding(micro_model_dir):
    policy, other = micro_policy(micro_model_dir), micro_policy(micro_model_dir)
    assert policy.base_model.get_input_embeddings().weight is policy.output_weight
    packed = pack(random_groups([(7, [3, 5]), (4, [2, 9])], 40), torch.device("cpu"))

    def loss(logprobs):
        return (logprobs * torch.arange(1.0, len(logprobs) + 1, dtype=torch.float64)).sum()

    found, seen = gradients(policy, packed, loss)
    assert "embedding_dense_backward" not in seen
    table = other.base_model.get_input_embeddings()
    table.forward = lambda ids: embedding(ids, table.weight, table.padding_idx)  # somebody else's: left alone
    expected, seen = gradients(other, packed, loss)
    assert "embedding_dense_backward" in seen
    for name, gradient in expected.items():
        assert relative_distance(found[name], gradient) < 1e-13, name


def test_what_is_not_tied_or_not_trained_is_left_alone():
    table, head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
    with tied_weight(table, head.weight) as weight:
        assert weight is head.weight and "forward" not in vars(table)
    with torch.no_grad(), tied_weight(table, table.weight) as weight:
        assert weight is table.weight and "forward" not in vars(table)
    table.weight.requires_grad_(False)
    with tied_weight(table, table.weight) as weight:
        assert weight is table.weight and "forward" not in vars(table)


def test_the_table_is_itself_again_after_an_error():
    table = nn.Embedding(VOCABULARY, WIDTH)
    with pytest.raises(MemoryError), tied_weight(table, table.weight):
        raise MemoryError
    assert "forward" not in vars(table)
