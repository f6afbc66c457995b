"""Settings of torch.compile, in a form that all supported versions of torch understand."""

from __future__ import annotations

import torch

GRAPHS = 64


def allow_graphs() -> None:
    """Allows `GRAPHS` graphs per function in this process (with torch 2.13: in this thread); torch's default is 8."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, GRAPHS)
