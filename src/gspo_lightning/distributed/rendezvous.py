"""Where the ranks of one machine meet: a port that is taken from the moment it is chosen."""

from __future__ import annotations

import atexit
import gc
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.lsf import LSFEnvironment
from lightning.fabric.plugins.environments.mpi import MPIEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from gspo_lightning.errors import UserError

CLUSTERS = (SLURMEnvironment, TorchElasticEnvironment, LSFEnvironment, MPIEnvironment)
"""Environments in which another program starts the ranks."""


class OnePort(LightningEnvironment):
    """Lightning's own start of ranks, except that rank 0 listens on the port before it tells the others.

    Lightning looks for a free port, gives it back and binds it later, after the other ranks were started: another
    program may have taken it by then (EADDRINUSE), and two runs that begin at once may even meet each other's ranks.
    """

    def __init__(self) -> None:
        super().__init__()
        self._store: Any = None

    @property
    def main_port(self) -> int:
        """The port: MASTER_PORT if it is set, else one on which this process listens from now on."""
        if self._main_port == -1 and not {"MASTER_PORT", "STANDALONE_PORT"} & os.environ.keys():
            # torch gives a second store of this process at the same port the same server, if both are multi_tenant.
            self._store = dist.TCPStore(  # type: ignore[attr-defined]
                self.main_address, 0, is_master=True, wait_for_workers=False, multi_tenant=True,
                timeout=timedelta(seconds=60),
            )  # fmt: skip
            self._main_port = self._store.port
        return super().main_port

    def teardown(self) -> None:
        """Leaves the server to the process group, so that a later group at this port meets at a fresh one."""
        super().teardown()
        self._store = None


def own_environment(num_nodes: int) -> list[LightningEnvironment]:
    """The plugin of a Trainer that starts its ranks itself; none under srun, torchrun and the like.

    Raises:
        UserError: several nodes, and nothing says where they meet: each would wait at a port of its own.
    """
    if any(cluster.detect() for cluster in CLUSTERS):
        return []
    if num_nodes > 1 and (missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]):
        raise UserError(
            f"trainer.num_nodes={num_nodes}: {' and '.join(missing)} must be set in the environment of every node (the "
            "address of the node with NODE_RANK=0 and a free port there), or start the nodes by srun or torchrun"
        )
    return [OnePort()]


@contextmanager
def naming_the_port() -> Iterator[None]:
    """Context in which a port that is taken, such as MASTER_PORT or the one that Slurm's job number gives, is a line.

    Raises:
        UserError: names the port.
    """
    try:
        yield
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = re.search(r"port: (\d+)", str(error))
        raise UserError(
            f"port {port[1] if port else ''} of this machine, at which the ranks were to meet, is taken by another "
            "program; set MASTER_PORT in the environment of every node to a free one, or on one node leave it unset"
        ) from error


def leave_at_exit() -> None:
    """Has the process group ended before the interpreter, when this process ends; may be called again.

    Gloo's threads let go of the tensors of a sum a moment after it is done, for which they need the interpreter's
    lock. A thread that asks for it while the interpreter ends is ended by it, and then C++ ends the process by SIGABRT.
    """
    atexit.unregister(_leave)
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_available() and dist.is_initialized():
        gc.collect()  # threads end with the last reference to their group, which sharded weights have too
        dist.destroy_process_group()
