"""Runs a job of a sweep that trains on several ranks as a separate program.

Lightning starts the other ranks by this program's command line, which is that of the whole sweep: each rank would run
all jobs by itself, a search would give every rank other settings, and a job that fails on one rank would leave the
others waiting.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from omegaconf import OmegaConf

from gspo_lightning.distributed.rendezvous import CLUSTERS
from gspo_lightning.errors import NonFiniteGradientError, UserError
from gspo_lightning.program.interrupt import Interrupted
from gspo_lightning.report.files import read_json
from gspo_lightning.rewards.serve import die_with
from gspo_lightning.rollout import RolloutError

ERROR = "error: "
CODES: dict[int, type[Exception]] = {2: UserError, 3: NonFiniteGradientError, 4: RolloutError}
"""Exit code -> the errors that end a program with it; Hydra's own end it with 2."""
# Asked before the first job: Lightning leaves its variables in the environment.
_IS_RANK = LightningEnvironment().creates_processes_externally
_LAUNCHERS = ("BasicLauncher", "JoblibLauncher")
"""Launchers that run jobs with the ``sys.argv`` of the sweep."""


class SweepStopped(Interrupted):
    """A signal ended a job of a sweep; not an Exception, on which Hydra would start the next job."""


def begins_ranks(trainer: dict[str, Any], ranks: int) -> bool:
    """Whether this is a job of a sweep whose ranks Lightning would start, and not srun, torchrun or the like.

    Args:
        trainer: settings of the Trainer. Any strategy but ``auto`` makes a process group, even for one rank, which
            would still exist in the next job.
        ranks: number of ranks.

    Raises:
        UserError: the launcher starts jobs by a program from which the other ranks cannot be started; or every rank
            already runs the whole sweep.
    """
    if HydraConfig.get().mode == RunMode.RUN or (ranks == 1 and trainer["strategy"] == "auto"):
        return False
    launcher = str(HydraConfig.get().launcher["_target_"])
    is_ours = launcher.endswith(_LAUNCHERS)
    if _IS_RANK or any(cluster.detect() for cluster in CLUSTERS):
        if is_ours and ranks > 1:
            raise UserError(
                "hydra.mode=MULTIRUN: every rank that srun or torchrun has started would run the whole sweep; "
                "start the sweep without it, or with hydra/launcher=slurm_gpu"
            )
        return False
    if not is_ours:
        raise UserError(
            f"hydra/launcher: {launcher.rpartition('.')[2]} must itself start the {ranks} ranks of a job (Slurm: "
            "hydra.launcher.tasks_per_node); or use the default launcher, or trainer.devices=1"
        )
    return True


def run_apart() -> float | None:
    """Runs this job with the program of the sweep, as a single run in the job's folder; signals are passed on to it.

    Returns:
        The held-out sampled accuracy at its end, for sweeps.

    Raises:
        UserError, NonFiniteGradientError, RolloutError: by the job's exit code; RuntimeError for any other code.
        SweepStopped: a signal ended it.
    """
    hydra = HydraConfig.get()
    parent, folder = os.getpid(), Path(hydra.runtime.output_dir)
    process = subprocess.Popen(
        command(hydra),
        cwd=hydra.runtime.cwd,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C reaches it once, by the handler here
        preexec_fn=lambda: die_with(parent, signal.SIGTERM),
    )
    with _passed_on(process) as received:
        line = _tell(process)
        code = process.wait()
    if received:
        name = signal.Signals(received[0]).name
        raise SweepStopped(f"{name}: the job in {folder} was the last one; the jobs after it were not run")
    if code:
        raise CODES.get(code, RuntimeError)(line or f"the job ended with code {code}")
    accuracy = read_json(folder / "summary.json").get("val_sampled_after")
    return None if accuracy is None else float(accuracy)


def command(hydra: Any) -> list[str]:
    """The command line of a single run with the settings and the folder of a sweep's job."""
    of_hydra, task = overrides_of(hydra)
    overrides = [text for text in of_hydra if not text.startswith("hydra.mode=")]
    folder = str(hydra.runtime.output_dir).replace("'", "\\'")
    return [
        sys.executable,
        os.path.join(hydra.runtime.cwd, sys.argv[0]),  # the job may have another working folder
        *_config_flags(hydra),
        *task,
        *overrides,
        f"hydra.run.dir='{folder}'",
        f"hydra.job.num={hydra.job.num}",
    ]


def overrides_of(hydra: Any) -> tuple[list[str], list[str]]:
    """The overrides of Hydra's own keys and all others, as they were typed.

    Read from the config one by one they would hold the value of each ``${key}``, which may be none, or no longer parse.
    """
    given: Any = OmegaConf.to_container(hydra.overrides, resolve=False)
    return given["hydra"], given["task"]


def _config_flags(hydra: Any) -> list[str]:
    """The flags of the sweep that say where configs come from."""
    flags = ["--config-name", str(hydra.job.config_name)]
    for source in hydra.runtime.config_sources:
        path = source.path if source.schema == "file" else f"{source.schema}://{source.path}"
        if source.provider == "main":
            flags += ["--config-path", path]
        elif source.provider == "command-line":
            flags += ["--config-dir", path]
    return flags


@contextmanager
def _passed_on(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Passes signals on to the job, which finishes its rollout and saves; yields the list of signals received."""
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        process.send_signal(number)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    heard = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    # Signals that this program was started to ignore (SIGINT under nohup or &) are ignored by the job too.
    before = {n: signal.signal(n, pass_on) for n in heard if signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell(process: subprocess.Popen[bytes]) -> str:
    """Copies the job's standard error to the screen, except its last error line, which is returned."""
    assert process.stderr is not None
    last = ""
    # Line ends are kept: a progress bar returns to the beginning of its line.
    for line in io.TextIOWrapper(process.stderr, errors="backslashreplace", newline=""):
        if not line.startswith(ERROR):
            sys.stderr.write(line)
        else:
            sys.stderr.write(last)
            last = line
        sys.stderr.flush()
    return last.removeprefix(ERROR).strip()
