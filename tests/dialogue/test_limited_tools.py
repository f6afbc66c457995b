"""Tools that hang, exit, print or return what is no text, with a time limit and without."""

from __future__ import annotations

import os

import pytest

from gspo_lightning.dialogue import Tools
from gspo_lightning.errors import UserError
from gspo_lightning.types import ToolCounts
from tests.dialogue import tools_that_misbehave as tools
from tests.dialogue.test_tools import answers, begun
from tests.dialogue.tool_support import call

LIMIT = {"timeout_s": 0.5}


def test_a_tool_that_takes_too_long_is_stopped_and_the_model_is_told():
    dialogue = begun([tools.nap], **LIMIT)
    long, short = call("nap", '{"seconds": 60}'), call("nap", '{"seconds": 0}')
    assert answers(dialogue, long + short) == ["error: nap took longer than its timeout_s=0.5 and was stopped", "awake"]
    assert dialogue.tool_counts == ToolCounts(2, 1)


def test_an_object_keeps_its_state_through_calls_in_the_process_and_a_stopped_call_leaves_none():
    first, second = begun([tools.Counter], **LIMIT), begun([tools.Counter], **LIMIT)
    quick, slow = call("count_up", '{"seconds": 0}'), call("count_up", '{"seconds": 60}')
    assert answers(first, quick + quick) == ["1", "2"] and answers(second, quick) == ["1"]
    assert answers(first, slow + quick) == ["error: count_up took longer than its timeout_s=0.5 and was stopped", "3"]
    assert (first.result()[0], second.result()[0]) == (3.0, 1.0)


@pytest.mark.parametrize("limit", [{}, LIMIT])
def test_what_tools_do_is_told_alike_with_a_limit_and_without(limit, capfd):
    dialogue = begun([tools.leave, tools.shout, tools.sort, tools.measure, tools.draw], max_turns=9, **limit)
    turn = "".join(
        call(*one) for one in [("leave", '{"code": 3}'), ("shout", '{"word": "hey"}'), ("measure", "{}"), ("sort", '{"numbers": [2, 1]}')]
    )  # fmt: skip
    assert answers(dialogue, turn) == ["error: SystemExit: 3", "null", '["{3}"]', "[1, 2]"]
    assert dialogue.messages[0]["content"] == turn and capfd.readouterr().err == ""
    with pytest.raises(UserError) as caught:
        answers(dialogue, call("draw", '{"size": 2}'))
    assert str(caught.value) == (
        "environment ToolDialogue.step: tool draw returned an image, but the policy is shown text alone; return a "
        "description (row t:3)"
    )


def test_a_tool_that_ends_its_process_does_not_end_the_run():
    dialogue = begun([tools.crash, tools.nap], **LIMIT)
    turn = call("crash", '{"code": 7}') + call("nap", '{"seconds": 0}')
    assert answers(dialogue, turn) == ["error: its process ended with exit code 7", "awake"]


def test_the_process_ends_with_the_tools():
    limited = Tools([tools.nap], **LIMIT).make.args[2]
    assert limited.call("nap", 0, tools.nap, {"seconds": 0})[:2] == ("said", "awake")
    pid = limited.idle[0]._process.pid
    del limited
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def local(a: int) -> int:
    """Doubles.

    Args:
        a: what
    """
    return 2 * a


def test_what_cannot_be_sent_to_a_process_is_refused_in_one_line():
    with pytest.raises(
        UserError, match=r"environment.timeout_s=0.5: an object of Locked cannot be sent to another process"
    ):
        begun([tools.Locked], **LIMIT).ask("step", "")
    with pytest.raises(
        UserError, match=r"tool break_object left its object with what cannot be sent from its process \("
    ):
        answers(begun([tools.Counter], **LIMIT), call("break_object", "{}"))
    assert answers(begun([tools.Locked]), call("break_object", "{}")) == ["broken"]
    with pytest.raises(UserError) as caught:  # nothing that the policy could be told
        answers(begun([tools.Half], **LIMIT), call("count_up", '{"seconds": 0}'))
    assert str(caught.value) == (
        "environment ToolDialogue.step: environment.timeout_s=0.5: a tool has a limit, but what it is given cannot be "
        "read in another process (ValueError: invalid literal for int() with base 10: 'x'); set timeout_s to null to "
        "run it in this one (row t:3)"
    )


def test_a_tool_of_the_started_script_is_refused_with_a_limit(monkeypatch):
    monkeypatch.setattr(local, "__module__", "__main__")
    with pytest.raises(UserError, match=r"^environment.timeout_s=0.5: local has a limit, but it "):
        Tools([local], **LIMIT)


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), 2e6])
def test_a_limit_is_a_positive_number_of_seconds(seconds):
    with pytest.raises(
        UserError, match=r"^environment.timeout_s=.* must be above 0 and at most 1000000; null means no li"
    ):
        Tools([tools.nap], timeout_s=seconds)
