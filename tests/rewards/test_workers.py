"""Rewards with a timeout run in warm processes that are really ended."""

from __future__ import annotations

import asyncio
import copy
import functools
import importlib
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gspo_lightning.errors import LONGEST_S, UserError
from gspo_lightning.rewards import ForTasks, RewardSet, RewardSpec, worker
from gspo_lightning.rewards.calling import TrainerState
from gspo_lightning.types import Completion, Prompt
from tests.rewards import functions_of_users as users
from tests.rewards import functions_on_a_gpu

ROOT = Path(__file__).parents[2]


def batch(**columns):
    prompts = [Prompt(f"t:{p}", "hi", torch.tensor([1]), {"answer": "xy"[p], **columns}) for p in range(2)]
    completions = [
        [Completion(torch.tensor([g]), f"c{p}{g}", torch.zeros(1), "stop") for g in range(2)] for p in range(2)
    ]
    return prompts, completions


@pytest.fixture
def reward_set():
    made = []

    def make(timeout_s=20.0, **functions):
        made.append(RewardSet({name: RewardSpec(f, timeout_s=timeout_s) for name, f in functions.items()}))
        return made[-1]

    yield make
    for rewards in made:
        rewards.close()


def test_a_copy_of_rewards_that_have_been_called_has_processes_of_its_own(reward_set):
    """Callbacks that average weights copy the whole module, after a validation."""
    rewards = reward_set(one=users.pid)
    (own,) = {*rewards(*batch()).flatten().tolist()}
    copied = copy.deepcopy(rewards)
    try:
        (others,) = {*copied(*batch()).flatten().tolist()}
    finally:
        copied.close()
    assert others not in (own, os.getpid())
    assert {*rewards(*batch()).flatten().tolist()} == {own}


@pytest.mark.parametrize(("used", "current", "told"), [(True, 1, 1.0), (True, 0, -1.0), (False, 1, -1.0)])
def test_a_process_has_the_gpu_of_its_rank(used, current, told, reward_set, monkeypatch):
    rewards = reward_set(one=functions_on_a_gpu.current_gpu)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: used)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: None)  # of the thread that waits for the process
    assert rewards(*batch()).flatten().tolist() == [told] * 4


def test_a_process_whose_module_chose_its_gpus_keeps_to_the_first_of_them(reward_set, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")  # which importing the module here would change for good
    monkeypatch.delitem(sys.modules, "tests.rewards.functions_on_a_chosen_gpu", raising=False)
    chosen = importlib.import_module("tests.rewards.functions_on_a_chosen_gpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: None)
    assert reward_set(one=chosen.current_gpu)(*batch()).flatten().tolist() == [-1.0] * 4


def test_a_function_that_needs_no_torch_is_served_without_it(reward_set, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: None)
    assert reward_set(one=users.has_torch)(*batch()).flatten().tolist() == [0.0] * 4


def gone(pid):
    """Whether a process has ended (a zombie that waits for its parent has)."""
    if not Path("/proc/self/stat").exists():  # macOS
        state = subprocess.run(
            ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False
        ).stdout
        return state.strip()[:1] in ("", "Z")
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_one_warm_process_serves_all_calls_and_is_gone_after_close(reward_set):
    rewards = reward_set(pid=users.pid)
    first, second = (rewards(*batch()).unique().tolist() for _ in range(2))
    assert first == second != [float(os.getpid())] and len(first) == 1
    rewards.close()
    assert gone(int(first[0]))
    assert rewards(*batch()).unique().tolist() != first  # and it starts again when it is needed


def test_what_takes_too_long_is_ended_with_its_children(reward_set, tmp_path):
    file = tmp_path / "pids"
    rewards = reward_set(slow=users.hangs_with_a_child, timeout_s=3.0)
    with pytest.raises(UserError, match=r"reward function slow took longer than its timeout_s=3\.0 and was stopped"):
        rewards(*batch(file=str(file)))
    for pid in file.read_text().split():
        wait_until(lambda pid=pid: gone(pid))


def test_a_function_that_hangs_does_not_hold_up_another_past_its_timeout(reward_set):
    rewards = RewardSet({"a": RewardSpec(users.hangs, timeout_s=0.2), "b": RewardSpec(users.hangs, timeout_s=900.0)})
    try:
        with pytest.raises(UserError, match="reward function a took longer"):
            rewards(*batch())
    finally:
        rewards.close()


@pytest.mark.parametrize("timeout_s", [None, 20.0])
def test_a_function_that_raises_names_itself_and_the_row(timeout_s, reward_set):
    with pytest.raises(UserError, match=r"^reward function f raised ZeroDivisionError: .* \(row t:1\)$"):
        reward_set(timeout_s=timeout_s, f=users.raises_on_y)(*batch())


def test_the_error_of_a_function_that_raises_late_is_told_and_not_that_its_row_was_looked_for_too_long(reward_set):
    with pytest.raises(
        UserError, match=r"^reward function f raised RuntimeError: the judge is down \(one of the rows t:0 to t:1\)$"
    ):
        reward_set(timeout_s=2.0, f=users.raises_late)(*batch())


def test_a_process_that_dies_is_told(reward_set):
    with pytest.raises(UserError, match="reward function f raised its process ended with exit code 7"):
        reward_set(f=users.dies)(*batch())


def test_a_call_that_has_not_begun_when_another_function_fails_is_not_made(tmp_path):
    """It would be waited for, up to its limit, before the error is shown."""
    failing, other = RewardSpec(users.raises_on_y), RewardSpec(users.notes_its_call, timeout_s=20.0)
    rewards = RewardSet({"a": failing, "b": other})
    columns = {"file": str(tmp_path / "called"), "slow": users.SlowToSend()}
    try:
        with pytest.raises(UserError, match="reward function a raised ZeroDivisionError"):
            rewards(*batch(**columns))
        assert not (tmp_path / "called").exists()
        rewards.functions["a"] = RewardSpec(users.pid)  # mended, as in a notebook
        assert rewards(*batch(**columns))[..., 1].flatten().tolist() == [1.0] * 4
        assert (tmp_path / "called").exists()
    finally:
        rewards.close()


def test_a_process_that_can_no_longer_answer_is_ended_and_not_waited_for(reward_set):
    rewards = reward_set(f=users.closes_what_it_inherited)
    with pytest.raises(UserError, match="reward function f raised its process ended with exit code -9"):
        rewards(*batch())


def test_tensors_go_to_a_process_and_back(reward_set):
    rewards = reward_set(f=users.tensor)(*batch(given=torch.tensor([0.0, 0.5, 1.0, 1.5])))
    assert rewards.flatten().tolist() == [1.0, 1.5, 2.0, 2.5]


def test_what_cannot_be_sent_to_a_process_or_read_there_is_told(reward_set):
    with pytest.raises(UserError, match=r"^reward function f: what it is given cannot be sent to another process \(.*"):
        reward_set(f=users.pid)(*batch(given=lambda: None))
    with pytest.raises(UserError) as caught:
        reward_set(f=users.pid)(*batch(given=users.Unreadable()))
    assert str(caught.value) == (
        "reward function f: what it is given cannot be read in another process (ValueError: invalid literal for int() "
        "with base 10: 'x'); set timeout_s to null to run it in this one"
    )
    with pytest.raises(
        UserError, match=r"^reward function f: what it returned cannot be sent from another process \(.*"
    ):
        reward_set(f=users.not_sent_back)(*batch())
    with pytest.raises(
        UserError, match=r"^reward function f: what it returned cannot be read from another process \(V"
    ):
        reward_set(f=users.unreadable)(*batch())


@pytest.mark.parametrize("timeout_s", [None, 20.0])
def test_arguments_of_trl_and_what_it_logs_work_in_both_places(timeout_s, reward_set):
    rewards = reward_set(timeout_s=timeout_s, f=users.asynchronous)
    rewards.trainer_state = TrainerState(global_step=7, max_steps=28)
    assert rewards(*batch()).unique().tolist() == [7.0]
    assert rewards.trainer_state.epoch == 0.25
    assert rewards.log.columns == {"text": ["c00", "c01", "c10", "c11"]}
    (total, count) = rewards.logged_metrics()["reward_log/mean_length"]
    assert (total.item(), count.item()) == (2.0, 1.0)


@pytest.mark.parametrize("timeout_s", [None, 60.0])
def test_an_asynchronous_function_may_keep_a_connection_from_call_to_call(timeout_s, reward_set):
    """Calls of one event loop, as in TRL: in another one a connection, and a lock that somebody waits for, fail."""
    rewards = reward_set(timeout_s=timeout_s, f=users.Judge())
    for _ in range(3):
        assert rewards(*batch()).flatten().tolist() == [3.0] * 4
    copied = copy.deepcopy(RewardSet({"f": RewardSpec(users.asynchronous)}))
    for _ in range(2):  # closed, it begins afresh
        assert copied(*batch()).flatten().tolist() == [0.0] * 4
        copied.close()


def test_rewards_are_closed_where_an_event_loop_runs_as_in_a_notebook():
    rewards = RewardSet({"f": RewardSpec(users.asynchronous)})

    async def cell():
        rewards(*batch())
        copy.deepcopy(rewards).close()
        rewards.close()

    asyncio.run(cell())


def test_a_process_gets_the_function_as_it_is_when_it_starts(monkeypatch):
    """A rank knows its GPU only after its rewards were made."""
    placed = worker.Worker(users.Placed())
    monkeypatch.setattr(users.Placed, "place", "where it trains")
    try:
        assert placed(timeout_s=60.0) == "where it trains"
    finally:
        placed.close()


def test_what_cannot_be_sent_to_a_process_is_refused_at_construction():
    with pytest.raises(UserError, match="reward function f has a timeout_s, but it cannot be sent"):
        RewardSet({"f": RewardSpec(lambda completions: [], timeout_s=1.0)})


@pytest.mark.parametrize("wrapped", [lambda f: f, functools.partial, lambda f: ForTasks(f, ["a"])])
def test_a_function_of_the_started_script_is_refused_at_construction(wrapped, monkeypatch):
    """There it is found, in the other process it is not."""

    def own(completions):
        return []

    own.__module__, own.__qualname__ = "__main__", "own"
    monkeypatch.setattr(sys.modules["__main__"], "own", own, raising=False)
    with pytest.raises(
        UserError, match="^reward function f has a timeout_s, but it is defined in the script that was st"
    ):
        RewardSet({"f": RewardSpec(wrapped(own), timeout_s=1.0)})


@pytest.mark.parametrize(
    "bad",
    [
        {"timeout_s": 0.0}, {"timeout_s": math.nextafter(LONGEST_S, math.inf)}, {"timeout_s": math.nan},
        {"weight": math.nan}, {"weight": -math.inf},
    ],
)  # fmt: skip
def test_bad_settings_are_refused_by_name(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        RewardSpec(users.pid, **bad)
    assert RewardSpec(users.pid, timeout_s=LONGEST_S, weight=-1.0).timeout_s == LONGEST_S


def test_a_set_survives_pickling_before_it_has_run(reward_set):
    from gspo_lightning.rewards import MathVerify

    assert pickle.loads(pickle.dumps(MathVerify(tag="A"))).tag == "A"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_process_is_left_when_the_trainer_is_interrupted_or_killed(how, tmp_path):
    file = tmp_path / "pids"
    # A shell starts what it runs in the background with SIGINT ignored, and children inherit that.
    script = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {str(ROOT)!r})
from tests.rewards.test_workers import batch, users
from gspo_lightning.rewards import RewardSet, RewardSpec
rewards = RewardSet({{"f": RewardSpec(users.hangs_with_a_child, timeout_s=900.0)}})
rewards(*batch(file={str(file)!r}))
"""
    trainer = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: file.exists() and len(file.read_text().split()) == 2)
        worker, child = file.read_text().split()
        trainer.send_signal(how)
        trainer.wait(20)
        wait_until(lambda: gone(worker))
        if how == signal.SIGINT:  # what is killed cannot end the children of its children
            wait_until(lambda: gone(child))
    finally:
        trainer.kill()
        if file.exists():
            subprocess.run(["kill", "-9", *file.read_text().split()], stderr=subprocess.DEVNULL, check=False)


# Starts what is served as on a system without prctl.
SERVED = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("serve", {str(worker._SERVE)!r})
serve = importlib.util.module_from_spec(spec)
spec.loader.exec_module(serve)
serve.HAS_PRCTL, serve.LOOK_S = False, 0.05
serve.main(int(sys.argv[1]), int(sys.argv[2]))
"""


def test_where_there_is_no_prctl_a_busy_worker_ends_with_its_trainer_too(tmp_path):
    """As on macOS: the trainer ends without a word to anyone, and the worker is in the middle of a call."""
    served, file = tmp_path / "served.py", tmp_path / "pids"
    served.write_text(SERVED)
    script = f"""
import os, sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from gspo_lightning.rewards import worker
from tests.rewards import functions_of_users as users
worker._SERVE = Path({str(served)!r})
busy = worker.Worker(users.hangs_with_a_child)
threading.Thread(target=lambda: busy([], [{str(file)!r}], timeout_s=None), daemon=True).start()
time.sleep(60)
"""
    trainer = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: file.exists() and len(file.read_text().split()) == 2)
        pid, _ = file.read_text().split()
        assert not gone(pid)
        trainer.kill()
        trainer.wait(20)
        wait_until(lambda: gone(pid))
    finally:
        trainer.kill()
        if file.exists():
            subprocess.run(["kill", "-9", *file.read_text().split()], stderr=subprocess.DEVNULL, check=False)
