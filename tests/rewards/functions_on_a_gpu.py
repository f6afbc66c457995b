"""A reward function of a user whose module imports torch, as one that runs a model on a GPU does."""

from __future__ import annotations

import torch


def current_gpu(completions, **_):
    """The GPU that torch makes the current one when it is first used, in a process where none is; -1: it is left."""
    asked = []
    torch.cuda.set_device = asked.append
    for call, _ in torch.cuda._queued_calls:
        if "make_current" in call.__qualname__:
            call()
    return [float(*asked or [-1])] * len(completions)
