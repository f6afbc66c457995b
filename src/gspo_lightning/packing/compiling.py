"""What torch.compile is told, in a way that all supported versions of torch understand."""

from __future__ import annotations

import torch

GRAPHS = 64


def allow_graphs() -> None:
    """So many graphs of one function, in this process (with torch 2.13 in this thread); torch stops at 8 otherwise."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, GRAPHS)
