"""Environments of several dialogues at the same time: `environment.workers`."""

from __future__ import annotations

import copy
import functools
import gc
import string
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch

from gspo_lightning.dialogue import Environments, Tools
from gspo_lightning.dialogue.threads import Threads
from gspo_lightning.errors import UserError
from gspo_lightning.rollout import TransformersEngine
from gspo_lightning.rollout.turn_by_turn import sample_dialogues
from gspo_lightning.types import SamplingParams
from tests.dialogue import tools_that_misbehave as tools
from tests.dialogue.test_sampling import Says
from tests.dialogue.test_turn_by_turn import followed, turn, whole_turns
from tests.support import make_prompt, micro_policy

GREEDY = SamplingParams(1, 30, temperature=0.0, stop=tuple(string.printable))


@pytest.fixture(scope="module")
def policy(micro_model_dir):
    return micro_policy(micro_model_dir)


class Meets(Says):
    """Every call waits until as many dialogues are in the same call: alone it would wait for ever."""

    def __init__(self, barrier, seen):
        super().__init__()
        self.barrier, self.seen = barrier, seen

    def meet(self):
        self.barrier.wait(30)
        self.seen.append(threading.current_thread())

    def reset(self, row, seed):
        self.meet()
        super().reset(row, seed)

    def step(self, text):
        self.meet()
        return super().step(text)

    def reward(self):
        self.meet()
        return super().reward()


def meeting(count):
    seen = []
    make = functools.partial(Meets, threading.Barrier(count), seen)
    return Environments(make, 4, workers=count), seen


def test_environments_run_at_the_same_time_and_the_dialogues_are_those_of_one_thread(policy):
    """Four generations of one prompt, drawn greedily, end their turns together."""
    prompt = make_prompt([5, 6, 7], uid="t:0")
    greedy = replace(GREEDY, num_generations=4)

    def sampled(environments):
        return TransformersEngine(environments=environments).generate(policy, [prompt], greedy, 3).completions[0]

    environments, seen = meeting(4)
    expected = sampled(Environments(Says, 4))[0]
    assert expected.dialogue.num_turns == 3
    for completion in sampled(environments):
        assert completion.token_ids.tolist() == expected.token_ids.tolist()
        assert (completion.text, completion.dialogue.reward) == (expected.text, expected.dialogue.reward)
    assert len(seen) == 4 * 5 and len(set(seen)) == 4  # begun, three steps, rewarded
    assert threading.main_thread() not in seen


def test_engines_with_whole_turns_go_on_while_environments_are_asked(policy):
    """The engine answers both requests before it looks at what follows; only then can the two environments meet."""
    environments, seen = meeting(2)

    def complete(requests, next_of):
        answers = iter([turn([7]), turn([8]), turn([9], "length"), turn([10, 11], "length")])
        asked = [next_of(number, [next(answers)]) for number in range(2)]
        following = [followed(future) for future in asked]
        assert [len(prompt.input_ids) for prompt, _, _ in following] == [5, 5]  # one token, and three of the reply
        ended = [[next(answers)], [next(answers)]]
        assert [next_of(number, ended[number]) for number in range(2)] == [None, None]
        return ended

    prompts = [make_prompt([3], uid="t:0"), make_prompt([4], uid="t:1")]
    ((first,), (second,)) = sample_dialogues(complete, policy, prompts, SamplingParams(1, 40), 0, environments)
    reply = policy.tokenizer("<1>", add_special_tokens=False)["input_ids"]
    assert first.token_ids.tolist() == [7, *reply, 9] and second.token_ids.tolist() == [8, *reply, 10, 11]
    assert len(seen) == 2 * 3 and threading.main_thread() not in seen  # begun, one step, rewarded


def test_whole_turns_are_the_same_with_threads(policy):
    prompts = [make_prompt(torch.arange(5, 5 + n), uid=f"t:{n}") for n in (3, 9, 1, 6)]
    one, four = (
        sample_dialogues(whole_turns(policy, []), policy, prompts, GREEDY, 3, Environments(Says, 4, workers=workers))
        for workers in (1, 4)
    )
    assert max(completion.dialogue.num_turns for (completion,) in one) == 3
    for (a,), (b,) in zip(one, four, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist() and a.dialogue.messages == b.dialogue.messages


def test_one_worker_calls_in_the_callers_thread_in_order_and_stops_at_the_first_error():
    called = []

    def one(number):
        called.append((number, threading.current_thread()))
        if number == 2:
            raise ValueError("two")
        return number

    assert Threads(1).submit(functools.partial(one, 0)).result() == 0
    failed = Threads(1).submit(functools.partial(one, 2))
    assert isinstance(failed.exception(), ValueError)
    called.clear()
    with pytest.raises(ValueError, match="two"):
        Threads(1).all([functools.partial(one, number) for number in range(5)])
    assert called == [(number, threading.current_thread()) for number in range(3)]


def test_ctrl_c_is_not_kept_for_later():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Threads(1).submit(interrupted)


def test_an_error_is_told_while_another_call_hangs_and_what_waits_is_not_begun():
    """Two threads: call 0 hangs, call 1 fails, and call 2 is the only one that can begin before it is known."""
    released, called, threads = threading.Event(), [], Threads(2)

    def hangs(number):
        called.append(number)
        released.wait(60)

    def fails():
        raise ValueError("1")

    later = [functools.partial(hangs, number) for number in range(2, 9)]
    with pytest.raises(ValueError, match="^1$"):
        threads.all([functools.partial(hangs, 0), fails, *later])
    released.set()
    assert threads.all([lambda: 5]) == [5]
    assert set(called) <= {0, 2}


def test_a_program_ends_although_a_call_hangs():
    code = "import time, sys; from gspo_lightning.dialogue.threads import Threads; t = Threads(2); {}; sys.exit(3)"
    for count in (1, 5):  # with five, three have not begun
        calls = code.format("; ".join(["t.submit(lambda: time.sleep(3600))"] * count))
        assert subprocess.run([sys.executable, "-c", calls], timeout=240).returncode == 3


def test_calls_have_the_modes_of_the_callers_thread():
    def modes():
        kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), kind

    threads = Threads(2)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        assert threads.submit(modes).result() == modes() == (False, False, torch.float16)
    with torch.inference_mode():
        assert threads.submit(modes).result() == modes() == (False, True, None)
    assert threads.submit(modes).result() == modes() == (True, False, None)


def test_threads_end_with_the_object():
    threads = Threads(2)
    (one,) = threads.all([threading.current_thread])
    assert one.is_alive() and one.daemon
    del threads
    gc.collect()
    one.join(60)
    assert not one.is_alive()


def test_tools_with_a_limit_run_in_a_process_for_each_thread(tmp_path):
    """Each tool waits for the other's file: in one process, one after another, the first would be stopped."""
    made = Tools([tools.wait_for], timeout_s=60.0, workers=2)
    limited = made.make.args[2]
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    asked = [{"mine": one, "other": two}, {"mine": two, "other": one}]
    calls = [functools.partial(limited.call, "wait_for", 0, tools.wait_for, arguments) for arguments in asked]
    first, second = made.threads.all(calls)
    assert first[0] == second[0] == "said" and first[1] != second[1]  # numbers of two processes
    assert len(limited.idle) == 2
    assert len(copy.deepcopy(limited).idle) == 0  # which starts its own
    third = made.threads.all(calls[:1])[0]
    assert third[1] in (first[1], second[1]) and len(limited.idle) == 2  # warm


def test_a_copy_has_as_many_threads_of_its_own():
    environments = Environments(Says, workers=2)
    copied = copy.deepcopy(environments)
    assert copied.workers == 2 and copied.threads is not environments.threads
    barrier = threading.Barrier(2)
    assert sorted(copied.threads.all([lambda: barrier.wait(30)] * 2)) == [0, 1]


def test_no_workers_are_refused():
    with pytest.raises(UserError, match="environment.workers=0 must be at least 1"):
        Environments(Says, workers=0)
    with pytest.raises(UserError, match="environment.workers=-1 must be at least 1"):
        Tools([tools.nap], workers=-1)
