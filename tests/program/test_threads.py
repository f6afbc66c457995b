"""Thread settings are in the environment before torch reads it, and never override the user's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gspo_lightning.program import threads


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of two cores with two hyper-threads each (0 and 2, 1 and 3), no quota, no settings."""
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(siblings + "\n")
    monkeypatch.setattr(threads, "_CPU_FOLDER", tmp_path)
    monkeypatch.setattr(threads, "_QUOTA_FILE", tmp_path / "cpu.max")
    monkeypatch.setattr(threads, "_affinity", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(threads, "_is_ours", False)
    for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "LOCAL_WORLD_SIZE", "SLURM_CPUS_ON_NODE"):
        # Set, then delete: so that what configure_threads writes is taken back at the end.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return tmp_path


def test_hyper_threads_of_a_core_count_once(machine: Path) -> None:
    assert threads.available_cores() == 2


def test_affinity_limits_the_count(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_affinity", lambda: {1, 3})
    assert threads.available_cores() == 1


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 2), ("150000 100000", 2), ("100000 100000", 1), ("5000 100000", 1)]
)
def test_a_container_quota_limits_the_count(machine: Path, quota: str, cores: int) -> None:
    (machine / "cpu.max").write_text(quota + "\n")
    assert threads.available_cores() == cores


def test_without_topology_every_cpu_counts(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_CPU_FOLDER", machine / "missing")
    assert threads.available_cores() == 4


@pytest.mark.filterwarnings("ignore:configure_threads:RuntimeWarning")
def test_defaults_are_set_and_shared_among_ranks(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert threads.configure_threads() == 2
    assert threads.os.environ["OMP_NUM_THREADS"] == "2"
    assert threads.os.environ["GOMP_SPINCOUNT"] == "1000"
    assert "KMP_BLOCKTIME" not in threads.os.environ
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert threads.configure_threads() == 1


@pytest.mark.filterwarnings("ignore:configure_threads:RuntimeWarning")
def test_ranks_on_one_machine_share_its_cores_and_the_next_job_of_a_sweep_has_them_all(machine: Path) -> None:
    threads.configure_threads()
    threads.share_threads(2)
    assert (threads.os.environ["OMP_NUM_THREADS"], torch.get_num_threads()) == ("1", 1)
    threads.share_threads(1)
    assert (threads.os.environ["OMP_NUM_THREADS"], torch.get_num_threads()) == ("2", 2)
    threads.share_threads(8)
    assert (threads.os.environ["OMP_NUM_THREADS"], torch.get_num_threads()) == ("1", 1)


@pytest.mark.filterwarnings("ignore:configure_threads:RuntimeWarning")
@pytest.mark.parametrize(("of_the_job", "count"), [("4", "1"), ("8", "2")])
def test_a_rank_that_srun_has_bound_to_its_own_cores_does_not_share_them(
    machine: Path, monkeypatch: pytest.MonkeyPatch, of_the_job: str, count: str
) -> None:
    """Four CPUs (two cores) are seen: all that the job has here, or half of them."""
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", of_the_job)
    threads.configure_threads()
    threads.share_threads(2)
    assert threads.os.environ["OMP_NUM_THREADS"] == count


def test_a_count_of_the_users_is_not_shared(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads.share_threads(2)
    assert "OMP_NUM_THREADS" not in threads.os.environ
    monkeypatch.setenv("OMP_NUM_THREADS", "7,2")
    threads.configure_threads()
    threads.share_threads(2)
    assert (threads.os.environ["OMP_NUM_THREADS"], torch.get_num_threads()) == ("7,2", 1)


def test_the_users_values_stand(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7,2")
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    assert threads.configure_threads() == 7
    assert threads.os.environ["OMP_NUM_THREADS"] == "7,2"
    assert threads.os.environ["GOMP_SPINCOUNT"] == "5"


def on_macos(monkeypatch: pytest.MonkeyPatch, facts: dict[str, str]) -> None:
    """A Mac whose ``sysctl -n`` knows ``facts``: on other names it fails."""

    def run(command: list[str], **settings: object) -> subprocess.CompletedProcess[str]:
        program, flag, name = command
        assert (program, flag) == ("/usr/sbin/sysctl", "-n")
        return subprocess.CompletedProcess(command, name not in facts, f"{facts.get(name, '')}\n", "")

    monkeypatch.setattr(threads.sys, "platform", "darwin")
    monkeypatch.setattr(threads.subprocess, "run", run)
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 10)


@pytest.mark.parametrize(
    ("facts", "cores"),
    [
        ({"hw.perflevel0.physicalcpu": "4", "hw.physicalcpu": "10"}, 4),
        ({"hw.physicalcpu": "6"}, 6),  # an Intel Mac has one kind
        ({"hw.perflevel0.physicalcpu": "0"}, 10),
        ({}, 10),
    ],
)
def test_a_mac_gives_its_performance_cores(
    machine: Path, monkeypatch: pytest.MonkeyPatch, facts: dict[str, str], cores: int
) -> None:
    on_macos(monkeypatch, facts)
    assert threads.available_cores() == cores


def test_without_sysctl_every_cpu_of_a_mac_counts(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_macos(monkeypatch, {})
    monkeypatch.setattr(threads.subprocess, "run", lambda *a, **k: (machine / "missing").read_text())
    assert threads.available_cores() == 10


@pytest.mark.filterwarnings("ignore:configure_threads:RuntimeWarning")
@pytest.mark.parametrize(("given", "expected"), [(None, "0"), ("200", "200")])
def test_on_a_mac_the_openmp_of_its_torch_does_not_spin_unless_the_user_wants_it(
    machine: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, expected: str
) -> None:
    on_macos(monkeypatch, {"hw.perflevel0.physicalcpu": "4"})
    if given is not None:
        monkeypatch.setenv("KMP_BLOCKTIME", given)
    assert threads.configure_threads() == 4
    assert threads.os.environ["KMP_BLOCKTIME"] == expected


def test_native_windows_is_refused_in_one_line(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(threads.sys, "platform", "win32")
    with pytest.raises(SystemExit) as ended:
        threads.configure_threads()
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", "error: native Windows is not supported; use WSL2\n")
    assert "OMP_NUM_THREADS" not in threads.os.environ


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"])
@pytest.mark.parametrize("value", ["many", "0", "-1", "²"])
def test_a_setting_that_is_no_count_is_named_in_one_line(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        threads.configure_threads()
    line = f"error: {name}='{value}' is not a positive whole number; unset it or give a count\n"
    assert (ended.value.code, capsys.readouterr().err) == (2, line)


def test_a_call_after_torch_was_imported_warns(machine: Path) -> None:
    with pytest.warns(RuntimeWarning, match="after torch was imported"):
        threads.configure_threads()


def test_torch_obeys_when_configured_before_its_import() -> None:
    code = (
        "import os, sys; os.environ.pop('OMP_NUM_THREADS', None)\n"
        "from gspo_lightning.program import threads; assert 'torch' not in sys.modules\n"
        "threads.available_cores = lambda: 1; threads.configure_threads()\n"
        "import torch; print(torch.get_num_threads())"
    )
    source = Path(threads.__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(source)},
    )
    assert result.stdout.strip() == "1"
