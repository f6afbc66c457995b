"""Hydra's flags stand anywhere among the overrides, and a mistake in them is one line."""

from __future__ import annotations

import logging
import sys

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra

from gspo_lightning.program import command_line, ending


@pytest.mark.parametrize(
    ("line", "arranged"),
    [
        ("a=1 -cn x b=2", "a=1 b=2 -cn x"),
        ("a=1 --multi ~b +c=-1", "a=1 ~b +c=-1 --multi"),
        ("-c job a=1 --resolve -p model b=2", "a=1 b=2 -c job --resolve -p model"),
        ("--config-name=x a=1 -m a=1", "a=1 a=1 --config-name=x -m"),
        ("-cn a=1 a=1", "a=1 -cn a=1"),
        ("a=1 --info config b=2", "a=1 b=2 --info config"),
        ("a=1 --info", "a=1 --info"),
        ("-- a=1 -m", "a=1 -m"),
        ("a=1 --hydra-help", "--hydra-help"),
    ],
)
def test_overrides_come_first_and_flags_keep_their_values(line, arranged):
    read = command_line.read(line.split())
    assert (read.arguments, read.info) == (arranged.split(), "--info" in line)


@pytest.mark.parametrize(
    ("line", "mistake"),
    [
        ("a=1 --seed=1 b=2", "there is no flag --seed=1"),
        ("a=1 -cn", "argument --config-name/-cn: expected one argument"),
        ("--resolve a=1", "--resolve goes only with --cfg or --help"),
        ("-m a=1 --cfg job", "--multirun and --cfg do not go together"),
    ],
)
def test_a_mistake_in_the_flags_is_one_line(line, mistake, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", *line.split()])
    with pytest.raises(SystemExit) as ended:
        ending.run(lambda: None)
    assert ended.value.code == 2
    told = f"error: command line: {mistake}; settings are written key=value, and --hydra-help shows the flags\n"
    assert capsys.readouterr() == ("", told)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "experiment=micro,",
            "'experiment=micro,' cannot be read as key=value: mismatched input '<EOF>'; put a value with spaces, commas, "
            "brackets or quotes into quotes of its own: \"key='a, b'\"",
        ),
        ("=5", "'=5' names no key; settings are written key=value"),
        (
            "hydra.run.dir=",
            "hydra.run.dir= is empty, and files would go into the current folder; name a folder (. is this one)",
        ),
        ("reward.functions=[]", "Error merging override reward.functions=[]: Cannot merge DictConfig with ListConfig"),
    ],
)
def test_a_mistake_in_an_override_is_one_line_that_names_it(override, line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "experiment=micro", override])
    with pytest.raises(SystemExit) as ended:
        ending.run(hydra.main(version_base="1.3", config_path="pkg://gspo_lightning.conf", config_name="train")(print))
    GlobalHydra.instance().clear()
    assert (ended.value.code, capsys.readouterr()) == (2, ("", f"error: {line}\n"))


def test_info_is_shown(monkeypatch, capsys):
    monkeypatch.setattr(logging.root, "handlers", [])  # which Hydra sets for it, with the level
    monkeypatch.setattr(logging.root, "level", logging.root.level)
    monkeypatch.setattr(sys, "argv", ["train.py", "experiment=micro", "--info", "config", "seed=77"])
    ending.run(hydra.main(version_base="1.3", config_path="pkg://gspo_lightning.conf", config_name="train")(print))
    GlobalHydra.instance().clear()
    assert "\nseed: 77\n" in capsys.readouterr().out
