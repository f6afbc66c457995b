"""The server engine against servers that fail: nothing lost, nothing twice, nothing sampled from other weights."""

from __future__ import annotations

import copy
import dataclasses
import shutil
import time

import pytest
import torch

from gspo_lightning.config.build import with_environments
from gspo_lightning.dialogue import Environments
from gspo_lightning.errors import UserError
from gspo_lightning.packing import pack
from gspo_lightning.policy.load import LoraSettings, PolicyLoader
from gspo_lightning.rollout import (
    EngineUnavailableError,
    TransformersEngine,
    VLLMServerEngine,
    WeightSyncError,
    server_pool,
)
from gspo_lightning.rollout.http_client import Server
from gspo_lightning.types import SamplingParams
from tests.dialogue.test_sampling import Says
from tests.rollout.fake_server import FakeServer
from tests.support import make_prompt, micro_policy

SAMPLING = SamplingParams(num_generations=3, max_completion_length=8, temperature=0.8)
PROMPTS = [make_prompt(torch.arange(5, 6 + n), uid=f"t:{n}") for n in range(6)]
GENERATE = "/v1/completions"


@pytest.fixture()
def policy(micro_model_dir):
    return micro_policy(micro_model_dir, torch.float32)


@pytest.fixture()
def start(micro_model_dir, tmp_path):
    """``start(fault, fault, ...)``: an engine and one server for each."""
    servers, engines = [], []

    def make(*faults, **settings):
        servers.extend(FakeServer(micro_model_dir, fault) for fault in faults)
        (tmp_path / "sync").mkdir(exist_ok=True)
        patience = {"ready_timeout_s": 5.0, "request_timeout_s": 5.0, "give_up_after_s": 0.3, "pause_s": 0.02}
        urls = [server.url for server in servers]
        engine = VLLMServerEngine(urls, 64, 8, sync_dir=str(tmp_path / "sync"), **{**patience, **settings})
        engines.append(engine)
        return engine, servers

    yield make
    for engine in engines:
        engine.close()
    for server in servers:
        server.close()


def move(policy, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def assert_whole_and_on_policy(policy, rollout):
    """Every prompt has its completions, in order, and each log-probability is that of the policy's weights."""
    assert [prompt.uid for prompt in rollout.prompts] == [prompt.uid for prompt in PROMPTS]
    assert [len(group) for group in rollout.completions] == [3] * len(PROMPTS)
    groups = [(p.input_ids, [c.token_ids for c in g]) for p, g in zip(PROMPTS, rollout.completions, strict=True)]
    with torch.no_grad():
        own = policy(pack(groups, torch.device("cpu")), 0.8)[0]
    theirs = torch.cat([c.sampler_logprobs for group in rollout.completions for c in group])
    assert (own - theirs).abs().max() < 1e-5


def tokens(rollout):
    return [[c.token_ids.tolist() for c in group] for group in rollout.completions]


def test_two_servers_share_the_prompts_and_sample_what_one_would(policy, start):
    engine, (first, second) = start(None, None)
    rollout = engine.generate(policy, PROMPTS, SAMPLING, seed=4)
    assert_whole_and_on_policy(policy, rollout)
    # One request each is the probe.
    assert first.count(GENERATE) - 1 == second.count(GENERATE) - 1 == 3
    second.fault = lambda path, number: "500"
    assert tokens(engine.generate(policy, PROMPTS, SAMPLING, seed=4)) == tokens(rollout)
    assert tokens(engine.generate(policy, PROMPTS, SAMPLING, seed=5)) != tokens(rollout)


def test_a_closed_engine_leaves_no_weights_and_can_sample_again(policy, start, tmp_path):
    engine, _ = start(None)
    first = engine.generate(policy, PROMPTS, SAMPLING, seed=5)
    assert len(list((tmp_path / "sync").glob("gspo-weights-*/*"))) == 1
    engine.close()
    engine.close()
    assert list((tmp_path / "sync").iterdir()) == []
    assert tokens(engine.generate(policy, PROMPTS, SAMPLING, seed=5)) == tokens(first)


@pytest.mark.parametrize("moves", [True, False])
@pytest.mark.parametrize("lost", ["gspo-weights-*", "gspo-weights-*/*"])
def test_weights_that_somebody_has_removed_are_written_again(lost, moves, policy, start, tmp_path):
    """As systemd does with /dev/shm when a user logs out, and cleaners do with old temporary files."""
    engine, (server,) = start(None)
    engine.generate(policy, PROMPTS, SAMPLING, seed=5)
    (folder,) = (tmp_path / "sync").glob(lost)
    shutil.rmtree(folder)
    if moves:
        move(policy)
    else:
        server.restart()  # and needs them
    assert_whole_and_on_policy(policy, engine.generate(policy, PROMPTS, SAMPLING, seed=5))
    engine.close()
    assert list((tmp_path / "sync").iterdir()) == []


def test_a_copied_module_shares_the_engine_and_its_servers(policy, start):
    """As `EMAWeightAveraging` copies it, before a run or after a validation."""
    engine, (server,) = start(None)
    module = torch.nn.Module()
    module.policy, module.engine = policy, engine
    averaged = copy.deepcopy(module)
    first = engine.generate(policy, PROMPTS, SAMPLING, seed=5)
    again = copy.deepcopy(averaged)
    move(again.policy)
    other = again.engine.generate(again.policy, PROMPTS, SAMPLING, seed=5)
    assert_whole_and_on_policy(again.policy, other)
    assert tokens(other) != tokens(first)
    assert tokens(engine.generate(policy, PROMPTS, SAMPLING, seed=5)) == tokens(first)
    assert server.count("gspo_load_folder") == engine.syncs == 3


def test_weights_travel_when_they_changed_and_only_then(policy, start, tmp_path):
    engine, (server,) = start(None)
    for _ in range(3):
        engine.generate(policy, PROMPTS[:1], SAMPLING, seed=0)
    assert server.count("gspo_load_folder") == engine.syncs == 1
    move(policy)
    assert_whole_and_on_policy(policy, engine.generate(policy, PROMPTS, SAMPLING, seed=0))
    assert server.count("gspo_load_folder") == engine.syncs == 2
    assert [server.count(f"/reset_{name}_cache") for name in ("prefix", "mm", "encoder")] == [2, 2, 2]
    assert len(list((tmp_path / "sync").glob("*/*"))) == 1, "one version at a time"


@pytest.mark.parametrize(
    ("where", "fault"),
    [
        (where, fault)
        for where in (GENERATE, "gspo_status", "gspo_load_folder", "/reset_prefix_cache")
        for fault in ("500", "404", "garbage", "nonsense", "cut", "hang", "restart")
    ]
    + [(GENERATE, "short"), ("gspo_load_folder", "misread"), ("/reset_prefix_cache", "in use")],
)
def test_a_fault_anywhere_loses_nothing_and_counts_nothing_twice(fault, where, policy, start):
    # The second call of each kind: behind the probe, the first status, the first load.
    # Only one that hangs is to be waited for: a busy machine may be silent for longer.
    patience = 1.0 if fault == "hang" else 30.0
    engine, (server, _) = start(
        lambda path, number: fault if (path, number) == (where, 1) else None, None, request_timeout_s=patience
    )
    for seed in range(3):
        rollout = engine.generate(policy, PROMPTS, SAMPLING, seed)
        assert_whole_and_on_policy(policy, rollout)
        move(policy, seed)
    assert server.injected == 1


@pytest.mark.parametrize(
    ("where", "fault", "line"),
    [
        ("gspo_load_folder", "misread", "loaded weights other than those written to"),
        ("/reset_prefix_cache", "in use", "did not reset its prefix cache; is somebody else using it"),
        ("gspo_status", "404", "is not a rollout server; start one with scripts/serve_rollouts.sh"),
    ],
)
def test_weights_that_do_not_arrive_whole_are_never_sampled_from(where, fault, line, policy, start):
    engine, (server,) = start(lambda path, number: fault if path == where else None, ready_timeout_s=0.3)
    with pytest.raises(EngineUnavailableError, match=line):
        engine.generate(policy, PROMPTS, SAMPLING, seed=0)
    assert server.count(GENERATE) == 0


@pytest.mark.parametrize(
    ("what", "line"),
    [
        (
            {"logprobs_mode": "raw_logprobs"},
            "ignores the temperature; start it with --logprobs-mode processed_logprobs",
        ),
        ({"dtype": "bfloat16"}, "computes in bfloat16; start it with --dtype float32"),
    ],
)
def test_a_server_with_other_settings_is_not_used(what, line, policy, start):
    engine, (server,) = start(None, ready_timeout_s=0.3)
    server.status_changes = what
    with pytest.raises(EngineUnavailableError, match=line):
        engine.generate(policy, PROMPTS, SAMPLING, seed=0)
    assert server.count("gspo_load_folder") == server.count(GENERATE) == 0


def test_a_server_without_adapters_is_not_used_for_one(micro_model_dir, start):
    policy = PolicyLoader(str(micro_model_dir), dtype="float32", lora=LoraSettings(r=2)).load()
    engine, (server,) = start(None, ready_timeout_s=0.3)
    with pytest.raises(
        EngineUnavailableError, match="does not accept adapters; start it with --enable-lora, or set lora_sync"
    ):
        engine.generate(policy, PROMPTS, SAMPLING, seed=0)
    assert server.count("/v1/load_lora_adapter") == server.count(GENERATE) == 0


def test_a_server_whose_base_was_replaced_is_not_used_for_an_adapter(micro_model_dir, start):
    policy = PolicyLoader(str(micro_model_dir), dtype="float32", lora=LoraSettings(r=2)).load()
    engine, (server,) = start(None, ready_timeout_s=0.3)
    server.status_changes = {"lora": True, "base_replaced": True}
    with pytest.raises(
        EngineUnavailableError, match="no longer has the base of the adapter: another run replaced it; restart it$"
    ):
        engine.generate(policy, PROMPTS, SAMPLING, seed=0)
    assert server.count("/v1/load_lora_adapter") == server.count(GENERATE) == 0


def test_weights_of_another_run_during_the_probe_are_no_fault_of_ours(policy, start):
    server_of_two, probes = [], []

    def intrude(path, number):
        if path == GENERATE and probes and probes.pop():
            move(server_of_two[0].policy, seed=7)
            server_of_two[0].version = "gspo-weights-other-1"

    engine, (server,) = start(intrude, give_up_after_s=5.0)
    server_of_two.append(server)
    assert_whole_and_on_policy(policy, engine.generate(policy, PROMPTS, SAMPLING, seed=0))
    move(policy)
    probes.append(True)
    assert_whole_and_on_policy(policy, engine.generate(policy, PROMPTS, SAMPLING, seed=0))
    assert server.count("gspo_load_folder") == 3 and not probes


def test_a_server_that_another_run_keeps_taking_is_said_to_be_shared(policy, start):
    servers = []
    engine, servers = start(
        lambda path, number: setattr(servers[0], "version", f"other-{number}") if path == GENERATE else None,
        ready_timeout_s=0.3,
    )
    with pytest.raises(EngineUnavailableError, match="got other weights during the probe; does another run use it\\?$"):
        engine.generate(policy, PROMPTS, SAMPLING, seed=0)


def test_a_prompt_that_a_server_refuses_is_named(policy, start):
    engine, (server,) = start(None)
    engine.generate(policy, PROMPTS[:1], SAMPLING, seed=0)
    server.fault = lambda path, number: "400" if path == GENERATE else None
    with pytest.raises(UserError, match=r"row t:0: .*injected"):
        engine.generate(policy, PROMPTS[:1], SAMPLING, seed=0)


def test_a_server_restarted_between_rollouts_gets_the_weights_again_before_it_is_used(policy, start):
    engine, (server,) = start(None)
    engine.generate(policy, PROMPTS, SAMPLING, seed=0)
    server.restart()
    assert_whole_and_on_policy(policy, engine.generate(policy, PROMPTS, SAMPLING, seed=0))
    assert server.count("gspo_load_folder") == 2


def test_a_server_restarted_with_another_model_is_left_out(policy, start):
    engine, (first, second) = start(None, None)
    engine.generate(policy, PROMPTS, SAMPLING, seed=0)
    first.restart()
    first.shape_changes = {"num_hidden_layers": 7}
    used = first.count(GENERATE)
    assert_whole_and_on_policy(policy, engine.generate(policy, PROMPTS, SAMPLING, seed=1))
    assert first.count(GENERATE) == used
    second.fault = lambda path, number: "cut"
    with pytest.raises(EngineUnavailableError, match="runs another model"):
        engine.generate(policy, PROMPTS, SAMPLING, seed=2)


def drop_a_tensor(weights):
    del weights["model.layers.1.mlp.down_proj.weight"]


def test_a_corrupted_synchronisation_stops_the_run(policy, start):
    engine, (server,) = start(None)
    engine.generate(policy, PROMPTS, SAMPLING, seed=0)
    server.corrupt = drop_a_tensor
    move(policy)
    with pytest.raises(WeightSyncError, match="does not run the policy's weights"):
        engine.generate(policy, PROMPTS, SAMPLING, seed=0)


def test_a_server_that_takes_nothing_stops_the_run_even_within_the_tolerance(policy, start):
    engine, (server,) = start(None, tolerance=100.0)
    engine.generate(policy, PROMPTS, SAMPLING, seed=0)
    server.corrupt = dict.clear
    move(policy)
    with pytest.raises(WeightSyncError, match="repeats bit for bit"):
        engine.generate(policy, PROMPTS, SAMPLING, seed=0)


def test_a_server_that_was_never_right_is_not_used(policy, start):
    engine, (first, _) = start(None, None)
    first.corrupt = drop_a_tensor
    assert_whole_and_on_policy(policy, engine.generate(policy, PROMPTS, SAMPLING, seed=0))


@pytest.mark.parametrize("fault", ["500", "garbage", "cut", "hang"])
def test_with_no_server_left_the_run_stops_in_bounded_time_with_one_line(fault, policy, start):
    engine, servers = start(None, None)
    engine.generate(policy, PROMPTS, SAMPLING, seed=0)
    engine.timeout_s = 0.4  # not before: a busy machine may need longer for an answer
    for server in servers:
        server.fault = lambda path, number: fault
    begin = time.monotonic()
    with pytest.raises(
        EngineUnavailableError, match=r"no rollout server was usable for 0.3 s \(give_up_after_s\)"
    ) as error:
        engine.generate(policy, PROMPTS, SAMPLING, seed=0)
    assert time.monotonic() - begin < 10
    assert "\n" not in str(error.value) and servers[0].url in str(error.value)


def test_servers_that_are_not_up_yet_are_waited_for_with_a_line(policy, start, capsys, monkeypatch):
    monkeypatch.setattr("gspo_lightning.rollout.server_pool._SAY_EVERY_S", 0.05)
    engine, _ = start(lambda path, number: "500" if path == "gspo_status" and number < 4 else None)
    assert_whole_and_on_policy(policy, engine.generate(policy, PROMPTS, SAMPLING, seed=0))
    assert "waiting for rollout servers: 0 of 1 ready" in capsys.readouterr().err


def test_a_server_that_never_comes_up_is_named(policy, tmp_path):
    engine = VLLMServerEngine(["http://127.0.0.1:9"], 64, 8, sync_dir=str(tmp_path), ready_timeout_s=0.2)
    with pytest.raises(EngineUnavailableError, match=r"ready_timeout_s.*127.0.0.1:9.*ConnectionRefused"):
        engine.generate(policy, PROMPTS, SAMPLING, seed=0)
    engine.close()


def test_a_wrong_key_is_said_at_once(policy, start):
    engine, _ = start(lambda path, number: "401" if path == GENERATE else None)
    with pytest.raises(UserError, match="GSPO_ROLLOUT_KEY"):
        engine.generate(policy, PROMPTS, SAMPLING, seed=0)


def test_a_prompt_that_no_server_can_answer_ends_the_run(policy, start):
    engine, _ = start(
        lambda path, number: "500" if path == GENERATE and number else None, max_attempts=3, give_up_after_s=60.0
    )
    with pytest.raises(EngineUnavailableError, match="failed 3 times"):
        engine.generate(policy, PROMPTS, SAMPLING, seed=0)


def test_images_are_refused_with_one_line(policy, start):
    engine, (server,) = start(None)
    prompt = dataclasses.replace(PROMPTS[0], mm_inputs={"pixel_values": torch.zeros(1)})
    with pytest.raises(UserError, match="row t:0 has images.*rollout=transformers"):
        engine.generate(policy, [prompt], SAMPLING, seed=0)
    assert not server.calls


@pytest.mark.parametrize("urls", [[], ["http://a:1", "http://a:1"], ["127.0.0.1:8000"], ["ftp://a"]])
def test_addresses_are_checked_before_anything_starts(urls):
    with pytest.raises(UserError, match="rollout.engine.urls"):
        VLLMServerEngine(urls, 64, 8)


def test_a_server_that_failed_rests_for_the_pause_and_then_longer(monkeypatch):
    monkeypatch.setattr(server_pool.time, "monotonic", lambda: 100.0)
    member, waits = server_pool.Member(Server("http://127.0.0.1:1")), []
    for _ in range(3):
        member.ready = True
        member.rest(RuntimeError("gone"), pause_s=0.25)
        member.rest(RuntimeError("gone too"), pause_s=0.25)  # another job in flight fails with it
        waits.append(member.retry_at - 100.0)
    assert waits == [0.25, 0.5, 1.0]


def test_dialogues_are_those_of_the_policy_itself_also_when_a_server_dies_in_between(policy, start):
    """Greedy, so that they can be compared: the turns of the second server, which fails after its third, go to the first."""
    prompts = [make_prompt(torch.arange(n, n + 9) * 7 % 90 + 3, uid=f"u:{n}") for n in range(6)]
    greedy = SamplingParams(1, 30, temperature=0.0, stop=tuple("aeiounrst"))
    environments = Environments(Says, 4)
    expected = TransformersEngine(environments=environments).generate(policy, prompts, greedy, 3).completions
    engine, (_, second) = start(None, None)
    engine = with_environments(engine, environments)
    second.fault = lambda path, number: "500" if path == GENERATE and number > 3 else None
    found = engine.generate(policy, prompts, greedy, 3).completions
    engine.close()
    assert second.injected > 0 and max(c.dialogue.num_turns for (c,) in expected) == 3
    for (a,), (b,) in zip(expected, found, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist() and a.text == b.text
        assert (a.dialogue.trained == b.dialogue.trained).all() and a.finish_reason == b.finish_reason
        assert (a.sampler_logprobs - b.sampler_logprobs).abs().max() < 1e-5


def test_an_engine_with_environments_uses_its_own_weights_and_leaves_the_first_one_alone(policy, start):
    engine, (server,) = start(None)
    made = with_environments(engine, Environments(Says, 4))
    assert made.pool is not engine.pool and engine.environments is None
    sampling = SamplingParams(2, 12, temperature=1.0, stop=tuple("aeiou"))
    made.generate(policy, PROMPTS, sampling, seed=0)
    made.close()
    assert (made.syncs, engine.syncs) == (1, 0)
    assert_whole_and_on_policy(policy, engine.generate(policy, PROMPTS, SAMPLING, seed=4))
