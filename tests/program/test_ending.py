"""Ends of programs that are nobody's mistake."""

from __future__ import annotations

import os
import sys

import pytest

from gspo_lightning.program import ending


def test_a_program_whose_reader_leaves_ends_as_by_the_signal_for_that(monkeypatch, capsys):
    """As `python -m gspo_lightning.data.preview | head` does: without a word, also at Python's end."""
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "argv", ["preview"])
    with os.fdopen(write, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        with pytest.raises(SystemExit) as ended:
            ending.run(lambda: print("text", flush=True))
        monkeypatch.undo()
    assert ended.value.code == 141
    assert capsys.readouterr() == ("", "")


def test_another_pipe_that_breaks_is_a_mistake_of_the_program(monkeypatch):
    def main():
        raise BrokenPipeError("of a worker")

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(BrokenPipeError, match="of a worker"):
        ending.run(main)


def test_an_error_from_code_that_python_was_given_as_text_stays_that_error(monkeypatch):
    """Its globals have no name, as those of attrs and sympy have none."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(ValueError, match="of the user"):
        ending.run(lambda: exec("raise ValueError('of the user')", {}))
