"""A reward function of a user whose module chooses the GPU of its model itself."""

from __future__ import annotations

import os

os.environ["CUDA_VISIBLE_DEVICES"] = "7"

from tests.rewards import functions_on_a_gpu  # which imports torch


def current_gpu(completions, **_):
    return functions_on_a_gpu.current_gpu(completions)
