"""Patches by a product: the numbers and derivatives of the convolution, and which layers are changed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from gspo_lightning.policy.patches import multiply_patches
from tests.support import relative_distance


@pytest.mark.parametrize("bias", [False, True])
def test_the_product_is_the_convolution_with_its_derivatives(bias):
    torch.manual_seed(0)
    layer = nn.Conv3d(3, 5, (2, 4, 4), stride=(2, 4, 4), bias=bias).double()
    patches = torch.randn(7, 3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    variables = [patches, *layer.parameters()]
    theirs = layer(patches)
    expected = torch.autograd.grad(theirs.square().sum(), variables)
    assert multiply_patches(nn.Sequential(layer)) == 1
    ours = layer(patches)
    assert ours.shape == theirs.shape == (7, 5, 1, 1, 1)
    assert relative_distance(ours, theirs) < 1e-14
    for found, derivative in zip(torch.autograd.grad(ours.square().sum(), variables), expected, strict=True):
        assert relative_distance(found, derivative) < 1e-14


def test_a_whole_image_is_still_convolved():
    layer = nn.Conv3d(3, 5, (2, 4, 4), stride=(2, 4, 4)).double()
    image = torch.randn(1, 3, 2, 8, 12, dtype=torch.float64)
    expected = layer(image)
    multiply_patches(layer)
    assert torch.equal(layer(image), expected)


@pytest.mark.parametrize("remake", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_multiplies_by_its_own_weight(remake):
    layer = nn.Conv3d(3, 5, (2, 4, 4), stride=(2, 4, 4)).double()
    multiply_patches(layer)
    patches = torch.randn(7, 3, 2, 4, 4, dtype=torch.float64)
    expected, other = layer(patches), remake(layer)
    nn.init.zeros_(layer.weight)
    assert torch.equal(other(patches), expected) and other.forward.func is layer.forward.func


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv3d(3, 6, (2, 4, 4), stride=(2, 2, 4)),  # patches that overlap
        nn.Conv3d(3, 6, (2, 4, 4), stride=(2, 4, 4), padding=1),
        nn.Conv3d(3, 6, (2, 4, 4), stride=(2, 4, 4), groups=3),
        nn.Conv3d(3, 6, (2, 4, 4), stride=(2, 4, 4), dilation=2),
        nn.Conv2d(3, 6, 4, stride=4),
    ],
)
def test_other_convolutions_stay_as_they_are(layer):
    assert multiply_patches(layer) == 0
    assert "forward" not in vars(layer)
