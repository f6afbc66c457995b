"""Autograd's backward without its engine, which asks for the streams of a GPU that is not there."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction


@torch.no_grad()
def backward(output: Tensor) -> None:
    """Gradients of a scalar into ``grad`` of the leaves."""
    root: Any = output.grad_fn
    missing, arrived = _edges_into(root), {root: [torch.ones_like(output)]}
    ready = [root]
    while ready:
        node = ready.pop()
        gradients = arrived.pop(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            leaf.grad = gradients[0]
            continue
        for (target, place), gradient in zip(node.next_functions, _results(node, gradients), strict=False):
            if target is None:
                continue
            _add(arrived.setdefault(target, [None] * len(target._input_metadata)), place, gradient, target)
            missing[target] -= 1
            if not missing[target]:
                ready.append(target)


def _edges_into(root: Any) -> Counter[Any]:
    counts: Counter[Any] = Counter()
    seen, stack = {root}, [root]
    while stack:
        for target, _ in stack.pop().next_functions:
            if target is not None:
                counts[target] += 1
                if target not in seen:
                    seen.add(target)
                    stack.append(target)
    return counts


def _results(node: Any, gradients: list[Any]) -> tuple[Any, ...]:
    if isinstance(node, BackwardCFunction):
        metas = node._input_metadata  # type: ignore[attr-defined]
        given = [_zeros(meta) if g is None else g for meta, g in zip(metas, gradients, strict=True)]
        found = node.apply(*given)  # type: ignore[attr-defined]
    else:
        found = node(*gradients)
    return found if isinstance(found, tuple) else (found,)


def _zeros(meta: Any) -> Tensor:
    return torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device)


def _add(places: list[Any], place: int, gradient: Tensor | None, target: Any) -> None:
    if gradient is None:
        return
    meta = target._input_metadata[place]
    assert gradient.device == meta.device, target
    gradient = gradient.sum_to_size(meta.shape).to(meta.dtype)  # as the engine does
    places[place] = gradient if places[place] is None else places[place] + gradient
