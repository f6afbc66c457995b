"""A run's file that is broken ends the report and the comparison in one line that names it."""

from __future__ import annotations

import pytest

from gspo_lightning.report import __main__ as report
from gspo_lightning.report import compare

LATIN = b"\xff\xfe\x00"
BROKEN = {
    "config.yaml": {
        "latin": (LATIN, "config.yaml: cannot be read (it is not UTF-8); restore it, or move it away"),
        "list": (b"[1, 2]", "config.yaml: holds no settings; restore it, or "),
        "number": (b"5", "config.yaml: cannot be read ("),
        "folder": (None, "config.yaml: cannot be read (Is a directory); restore it, or move it away"),
        "cut": (b"a: [", "config.yaml: cannot be read (while parsing"),
    },
    "metrics.csv": {
        "latin": (LATIN, "metrics.csv: cannot be read (it is not UTF-8)"),
        "folder": (None, "metrics.csv: cannot be read (Is a directory)"),
        "other": (b"a,b\n1,2\n", "metrics.csv:2: is no row of a run's metrics; fix or remove that row"),
        "wide": (b"step,b\n1,2,3\n", "metrics.csv:2: is no row of a run's metrics"),
    },
    "summary.json": {
        "latin": (LATIN, "summary.json: cannot be read (it is not UTF-8)"),
        "folder": (None, "summary.json: cannot be read (Is a directory)"),
        "word": (b'{"val_sampled_after": "0.9"}', "summary.json: val_sampled_after='0.9' is neither a number nor null"),
    },
}
CASES = [(name, kind) for name, kinds in BROKEN.items() for kind in kinds]


@pytest.mark.parametrize("main", [report.main, compare.main], ids=["report", "compare"])
@pytest.mark.parametrize(("name", "kind"), CASES, ids=lambda value: value)
def test_a_broken_file_is_named_in_one_line(name, kind, main, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "metrics.csv").write_text("step,reward/mean\n1,0.5\n")
    (tmp_path / "summary.json").write_text("{}")
    assert main([str(tmp_path)]) == 0
    content, line = BROKEN[name][kind]
    (tmp_path / name).unlink()
    if content is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(content)
    capsys.readouterr()
    assert main([str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {tmp_path}/{line}") and err.count("\n") == 1
