"""The name of the processor on systems that tell it in other ways than Linux on x86."""

from __future__ import annotations

import subprocess

import pytest

from gspo_lightning.program import threads
from gspo_lightning.report import machine

X86 = "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel\t\t: 1\nmodel name\t: AMD EPYC 9B14\nflags\t\t: fpu\n\n"
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nCPU implementer\t: 0x41\nCPU variant\t: 0x3\nCPU part\t: 0xd0c\n\n"


@pytest.mark.parametrize(
    ("info", "name"),
    [
        (X86 + X86.replace("EPYC", "another"), "AMD EPYC 9B14"),
        (ARM + ARM.replace("d0c", "d41"), "aarch64 implementer 0x41 part 0xd0c"),
        ("processor\t: 0\n", "aarch64"),
        (None, "aarch64"),
    ],
)
def test_on_linux_it_is_what_the_kernel_says(info, name, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(machine.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(machine.platform, "processor", lambda: "")
    monkeypatch.setattr(machine.sys, "platform", "linux")
    if info is not None:
        (tmp_path / "cpuinfo").write_text(info)
    assert machine._cpu_name() == name


@pytest.mark.parametrize(("brand", "name"), [("Apple M3 Pro\n", "Apple M3 Pro"), ("", "arm")])
def test_on_a_mac_it_is_its_brand(brand, name, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(machine, "_CPU_INFO", tmp_path / "missing")
    monkeypatch.setattr(machine.platform, "processor", lambda: "arm")
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    answer = subprocess.CompletedProcess([], 0, brand, "")
    monkeypatch.setattr(threads.subprocess, "run", lambda command, **_: asked.append(command) or answer)
    assert machine._cpu_name() == name
    assert asked == [["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]]
