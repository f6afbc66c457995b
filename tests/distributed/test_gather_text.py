"""Texts of several ranks, gathered in pieces."""

from __future__ import annotations

from tests.command_line import run


def test_texts_of_any_length_arrive_whole_in_the_order_of_ranks(tmp_path):
    assert run(tmp_path, script="tests/distributed/run_gather_text.py").stdout == "gathered\n"
