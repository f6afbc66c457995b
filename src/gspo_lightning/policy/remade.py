"""Tensors that autograd does not keep, and that are recomputed when a backward needs them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


class Remade:
    """A tensor that operations save for their backward without keeping it.

    It is recomputed once, shared by all of them, and freed after the last use.

    Args:
        tensor: the tensor not to keep; the operations may save views of it.
        make: recomputes it bit for bit.
    """

    def __init__(self, tensor: Tensor, make: Callable[[], Tensor]) -> None:
        self.storage, self.make = tensor.untyped_storage()._cdata, make
        self.saved = self.taken = 0
        self.made: Tensor | None = None

    def hooks(self) -> AbstractContextManager[None]:
        """Context for the operations; hooks that are set outside of it still see all other tensors."""
        outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
        pack, unpack = outer or (lambda x: x, lambda x: x)

        def save(tensor: Tensor) -> Any:
            if tensor.untyped_storage()._cdata != self.storage:
                return None, pack(tensor)
            self.saved += 1
            return (tensor.shape, tensor.stride(), tensor.storage_offset()), None

        def take(saved: Any) -> Tensor:
            view, other = saved
            return unpack(other) if view is None else self._take().as_strided(*view)

        return torch.autograd.graph.saved_tensors_hooks(save, take)

    def _take(self) -> Tensor:
        if self.made is None:
            with torch.no_grad():
                self.made = self.make()
        made, self.taken = self.made, self.taken + 1
        if self.taken % self.saved == 0:
            self.made = None
        return made


def remade(x: Tensor) -> AbstractContextManager[None]:
    """Context for operations that read x: they do not keep it if it can be recomputed."""
    own = getattr(x, "remade", None)
    return nullcontext() if own is None else own.hooks()
