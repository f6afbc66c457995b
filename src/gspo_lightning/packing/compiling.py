"""What torch.compile is told, in a way that all supported versions of torch understand."""

from __future__ import annotations

import torch

GRAPHS = 64


def allow_graphs() -> None:
    """So many graphs of one function, in this process; torch stops at 8 and goes on without any."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, GRAPHS)
