"""What the fresh processes of both sides start with."""

from __future__ import annotations

import os

from gspo_lightning.program.threads import SPIN_COUNT


def environment(threads: int) -> dict[str, str]:
    """Environment variables: so many threads, which spin as long as the caller's ``GOMP_SPINCOUNT`` says."""
    spin = os.environ.get("GOMP_SPINCOUNT", str(SPIN_COUNT))
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": spin, "HF_HUB_OFFLINE": "1"}
