"""A script in a fork is what it is in a process of its own."""

from __future__ import annotations

import os
import signal

import pytest

from tests import forked
from tests.command_line import run, start

if not hasattr(os, "pidfd_open"):
    pytest.skip("needs os.pidfd_open, which is Linux's", allow_module_level=True)


@pytest.fixture(autouse=True)
def forks(monkeypatch):
    monkeypatch.delenv("GSPO_TEST_FORK", raising=False)


TELLS = """
import __main__, atexit, multiprocessing, os, pickle, sys, threading, time
import torch

class Mine: ...

def child():
    print("spawned", __name__, os.getcwd(), flush=True)

if __name__ == "__main__":
    print(__name__, __file__, __main__.Mine is Mine, pickle.dumps(Mine()), sys.argv, sys.path[0], os.getcwd(), flush=True)
    print(torch.get_num_threads(), sorted(os.listdir("/proc/self/fd")), repr(sys.stdin.read()), flush=True)
    print("to the other stream", file=sys.stderr)
    spawned = multiprocessing.get_context("spawn").Process(target=child)
    spawned.start()
    spawned.join()
    atexit.register(print, "at exit")
    threading.Thread(target=lambda: (time.sleep(0.1), print("of a thread"))).start()
    sys.exit(7)
"""


def test_it_sees_and_says_the_same_and_ends_the_same(tmp_path, monkeypatch):
    (tmp_path / "tells.py").write_text(TELLS)
    assert forked.can_fork()
    fork = run("a b", "--c", script=tmp_path / "tells.py", cwd=tmp_path, expect=7)
    monkeypatch.setenv("GSPO_TEST_FORK", "0")
    own = run("a b", "--c", script=tmp_path / "tells.py", cwd=tmp_path, expect=7)
    assert (fork.stdout, fork.stderr) == (own.stdout, own.stderr)
    assert "at exit" in own.stdout and "spawned __mp_main__" in own.stdout


def test_two_after_one_another_have_orders_of_sets_of_their_own(tmp_path):
    (tmp_path / "order.py").write_text("print(list({str(n) for n in range(100)}))")
    orders = [run(script=tmp_path / "order.py", cwd=tmp_path).stdout for _ in range(4)]
    assert orders[:2] == orders[2:] and orders[0] != orders[1]


def test_each_draws_seeds_of_its_own(tmp_path):
    (tmp_path / "draws.py").write_text(
        "import random, numpy, torch\nprint(random.random(), numpy.random.rand(), torch.rand(1).item())"
    )
    drawn = [run(script=tmp_path / "draws.py", cwd=tmp_path).stdout.split() for _ in range(4)]
    assert all(len(set(numbers)) == 4 for numbers in zip(*drawn, strict=True))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_as_it_ends_a_process(how, tmp_path, monkeypatch):
    (tmp_path / "waits.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)")
    found = []
    for _ in range(2):
        process, written = start(script=tmp_path / "waits.py")
        with written:
            assert written.readline() == "ready\n"
            process.send_signal(how)
            found.append((process.wait(30), written.read().splitlines()[-1:]))
        monkeypatch.setenv("GSPO_TEST_FORK", "0")
    assert found[0] == found[1]


@pytest.mark.parametrize(("name", "is_read"), [("DIES", False), ("TORCH_LOGS", True), ("PYTHONPATH", True)])
def test_an_environment_that_imports_read_otherwise_makes_it_a_process(name, is_read, monkeypatch, tmp_path):
    (tmp_path / "tells.py").write_text(f"import os, sys\nprint(os.environ[{name!r}], 'torch' in sys.modules)")
    monkeypatch.setenv(name, "of the test")
    assert run(script=tmp_path / "tells.py", cwd=tmp_path).stdout == f"of the test {not is_read}\n"
