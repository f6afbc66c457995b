"""Settings of torch.compile."""

from __future__ import annotations

import torch


def allow_graphs() -> None:
    """Allows 64 graphs per function in this thread; torch's default is 8."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 64)
