"""Callbacks that record, show and guard a run: recorder, progress line, checkpoints, graceful stop, checks."""

from gspo_lightning.callbacks.checkpoint import RolloutCheckpoint
from gspo_lightning.callbacks.completions import CompletionsTable
from gspo_lightning.callbacks.detect_anomaly import DetectAnomaly, NonFiniteLayerError
from gspo_lightning.callbacks.graceful_stop import GracefulStop
from gspo_lightning.callbacks.health import Health
from gspo_lightning.callbacks.progress import ProgressLine
from gspo_lightning.callbacks.recorder import RunRecorder
from gspo_lightning.callbacks.watchdog import Watchdog

__all__ = [
    "CompletionsTable",
    "DetectAnomaly",
    "GracefulStop",
    "Health",
    "NonFiniteLayerError",
    "ProgressLine",
    "RolloutCheckpoint",
    "RunRecorder",
    "Watchdog",
]
