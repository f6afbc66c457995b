"""What `train.py` and `evaluate.py` do; with `config.py` the only place that knows Hydra."""

from __future__ import annotations

import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from gspo_lightning import config
from gspo_lightning.callbacks.checkpoint import GracefulStop, RolloutCheckpoint
from gspo_lightning.errors import UserError
from gspo_lightning.module import GSPOModule, NonFiniteGradientError
from gspo_lightning.policy.export import export_policy


def run(main: Callable[[], Any]) -> None:
    """Runs a Hydra main: a mistake of the user prints one line and exits with code 2, without a traceback."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        main()
    except (UserError, HydraException, OmegaConfBaseException, NonFiniteGradientError) as error:
        if "debug=true" in sys.argv:
            traceback.print_exc()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(2 if not isinstance(error, NonFiniteGradientError) else 3)


def train(cfg: DictConfig) -> float | None:
    """One training run; returns the held-out sampled accuracy after it, for sweeps."""
    _quieten()
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    plain = config.resolve(cfg)
    config.check(plain)
    datamodule = config.build_data(plain)
    _write_config(plain, run_dir)
    L.seed_everything(plain["seed"], workers=True, verbose=False)
    job = _Run(plain, run_dir, config.build_module(plain), datamodule)
    return job.execute()
