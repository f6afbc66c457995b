"""Ranks meet at a port that nobody else can take, and leave without SIGABRT."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys

import pytest
import torch.distributed as dist

from gspo_lightning.config.build import build_trainer
from gspo_lightning.distributed.rendezvous import OnePort, own_environment
from gspo_lightning.errors import UserError
from tests.conf.test_groups import resolved

_OF_LAUNCHERS = ("MASTER_ADDR", "MASTER_PORT", "STANDALONE_PORT", "LOCAL_RANK", "NODE_RANK", "TORCHELASTIC_RUN_ID")


@pytest.fixture(autouse=True)
def _started_by_hand(monkeypatch):
    for name in _OF_LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


def test_the_port_is_taken_from_the_moment_it_is_chosen(monkeypatch):
    environment = OnePort()
    port = environment.main_port
    assert environment.main_port == port
    with socket.socket() as other, pytest.raises(OSError) as refused:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("", port))
        other.listen()
    assert refused.value.errno == errno.EADDRINUSE
    assert OnePort().main_port != port
    # The process group of the same process meets there all the same.
    monkeypatch.setenv("MASTER_ADDR", environment.main_address)
    monkeypatch.setenv("MASTER_PORT", str(port))
    dist.init_process_group("gloo", rank=0, world_size=1)
    environment.teardown()
    dist.destroy_process_group()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("", port))
        other.listen()


def test_a_port_of_the_users_own_stays(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "29511")
    assert OnePort().main_port == 29511


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_trainer_of_a_config_starts_its_ranks_so(strategy, tmp_path):
    trainer = build_trainer(resolved(f"trainer={strategy}", "trainer.accelerator=cpu", "logger=none"), [], tmp_path)
    assert type(trainer.strategy.cluster_environment) is OnePort


def test_torchrun_has_its_own_way(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert own_environment(2) == []


def test_nodes_that_could_not_meet_are_refused(monkeypatch):
    with pytest.raises(UserError) as refused:
        own_environment(2)
    assert str(refused.value) == (
        "trainer.num_nodes=2: MASTER_ADDR and MASTER_PORT must be set in the environment of every node (the address of "
        "the node with NODE_RANK=0 and a free port there), or start the nodes by srun or torchrun"
    )
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29511")
    assert [type(found) for found in own_environment(2)] == [OnePort]


LEAVES = """
import atexit, os, sys
atexit.register(lambda: print(threads() - before))  # runs last
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from gspo_lightning.distributed.rendezvous import leave_at_exit

def threads():
    return len(os.listdir("/proc/self/task"))

def work():
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    dist.all_reduce(torch.ones(10), group=mesh["data_parallel"].get_group())

before = threads()
leave_at_exit()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
work()
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="counts threads by Linux's /proc")
def test_the_threads_of_gloo_end_before_the_interpreter(tmp_path):
    """One that asks for the interpreter's lock while the interpreter ends would end the process by SIGABRT."""
    done = subprocess.run(
        [sys.executable, "-c", LEAVES], capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr
