"""The loop over vLLM's steps, with a stand-in for vLLM: what happens to requests and environments when something fails."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from gspo_lightning.rollout import VLLMEngine, vllm_engine


class Steps:
    """vLLM's engine: every step finishes the oldest request; ``loses`` are forgotten when they come up."""

    def __init__(self, loses=()):
        self.queue, self.aborted, self.loses = [], [], set(loses)

    def has_unfinished_requests(self):
        self.queue = [name for name in self.queue if name not in self.loses]
        return bool(self.queue)

    def step(self):
        return [SimpleNamespace(request_id=self.queue.pop(0), finished=True)]

    def abort_request(self, names):
        self.aborted += names


@pytest.fixture
def engine(monkeypatch):
    def make(**settings):
        steps = Steps(**settings)
        made = VLLMEngine.__new__(VLLMEngine)
        made._llm = SimpleNamespace(llm_engine=steps)

        def ask(policy, requests):
            names = {f"{number}:{seed}": number for number, (_, _, seed) in requests.items()}
            steps.queue += names
            return {name: (number, requests[number]) for name, number in names.items()}

        monkeypatch.setattr(made, "_ask", ask)
        return made, steps

    monkeypatch.setattr(vllm_engine, "completions_of", lambda policy, prompt, output: [output.request_id])
    return make


def requests(*prompts):
    return [(prompt, "sampling", 0) for prompt in prompts]


def test_what_follows_takes_the_number_and_the_place_of_the_request_before(engine):
    made, steps = engine()

    def next_of(number, completions):
        if number != 1 or completions == ["1:7"]:
            return None
        following = Future()
        following.set_result(lambda: ("b again", "sampling", 7))
        return following

    assert made._sample("policy", requests("a", "b", "c"), next_of) == [["0:0"], ["1:7"], ["2:0"]]
    assert steps.aborted == []


def test_requests_that_vllm_has_lost_end_the_rollout_instead_of_waiting_for_ever(engine):
    made, steps = engine(loses=["1:0", "2:0"])
    with pytest.raises(RuntimeError, match="vLLM has lost 2 requests"):
        made._sample("policy", requests("a", "b", "c"))
    assert sorted(steps.aborted) == ["1:0", "2:0"]


def test_where_an_environment_fails_requests_in_progress_are_aborted_and_other_answers_not_waited_for(engine):
    made, steps = engine()
    waits, fails = Future(), Future()
    fails.set_exception(ConnectionError("the game is over"))

    def next_of(number, completions):
        return {0: waits, 1: fails}[number]

    with pytest.raises(ConnectionError, match="the game is over"):
        made._sample("policy", requests("a", "b", "c", "d"), next_of)
    assert waits.cancelled()
    assert sorted(steps.aborted) == ["2:0", "3:0"]
