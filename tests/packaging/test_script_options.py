"""A script that is asked for its help, or for what it does not know, does nothing else."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path for path in (ROOT / "scripts").glob("*.py") if "__main__" in path.read_text())
HANDS_ON = ("quickstart_seeds.py",)
"""Scripts that give train.py what they do not know, which refuses it."""


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / "benchmarks" / "gpu_attention.py"], ids=lambda path: path.name)
def test_help_is_printed_and_an_unknown_option_refused_before_anything_is_done(script, monkeypatch, capsys):
    def never(*args, **settings):
        raise AssertionError(f"{script.name} has begun")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "path", [str(ROOT), str(script.parent), *sys.path])
    monkeypatch.setattr(subprocess, "run", never)
    monkeypatch.setattr(Path, "write_text", never)
    for option, code in (("--help", 0), ("--no-such-option", 2)):
        if code and script.name in HANDS_ON:
            continue
        monkeypatch.setattr(sys, "argv", [str(script), option])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(script), run_name="__main__")
        out, err = capsys.readouterr()
        assert (ended.value.code, "usage: " in (err if code else out)) == (code, True)
