"""Fixtures shared by every test: fixed threads and random state, and the models that need no network."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

# The set-up has fetched all that the tests need; a test that reaches for the network is a bug. The thread
# count is fixed before torch is imported, so that sums are added in the same order on every machine.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Programs that tests start write into pipes as users' programs do, buffered: some faults show only then.
os.environ.pop("PYTHONUNBUFFERED", None)

# The background job of a shell ignores Ctrl-C, and so would all programs that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch


@pytest.fixture(autouse=True)
def _fixed_numerics() -> Iterator[None]:
    """One thread and one seed for each test; a test that changes a global of torch does not leak it."""
    dtype = torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_grad_enabled(True)


_OF_A_RANK = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")


@pytest.fixture(autouse=True)
def _no_rank_stays() -> Iterator[None]:
    """What Lightning tells the environment in a test that is a rank itself does not reach those that start ranks."""
    before = {name: os.environ.get(name) for name in _OF_A_RANK}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="session")
def micro_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The micro model (seed 0) in Hugging Face format. Shared by the session: do not write into it."""
    from gspo_lightning.policy.micro import build_micro_model

    folder = tmp_path_factory.mktemp("micro_model")
    build_micro_model(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct from the cache that ``scripts/setup.sh`` filled. Do not write into it."""
    from gspo_lightning.policy.bundled import resolve_model

    return Path(resolve_model("bundled:smollm2-135m-instruct"))


def pytest_collection_finish() -> None:
    """What has been imported stays: Python need not look through it for garbage in every test."""
    gc.collect()
    gc.freeze()
