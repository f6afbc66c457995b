"""A run can be trained again on its own completions, without sampling, to the last bit."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from gspo_lightning.errors import UserError
from gspo_lightning.rollout import ReplayEngine, TransformersEngine
from gspo_lightning.rollout.seeds import rollout_of_seed, rollout_seed
from gspo_lightning.types import SamplingParams
from tests.conf.test_every_key import run
from tests.support import make_prompt

SMALL = ["max_rollouts=3", "rollout.max_completion_length=6"]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    return folder, run(folder, *SMALL, "record_tokens=true")


def test_the_weights_are_bit_identical_and_nothing_is_sampled(recorded, tmp_path, monkeypatch):
    folder, first = recorded
    sampled = []
    generate = TransformersEngine.generate
    monkeypatch.setattr(
        TransformersEngine,
        "generate",
        lambda self, p, prompts, *rest: (sampled.extend(x.uid for x in prompts), generate(self, p, prompts, *rest))[1],
    )
    again = run(tmp_path, *SMALL, "rollout=replay", f"rollout.engine.run={folder}", "rollout.max_completion_length=6")
    assert again["completions"] == first["completions"] and again["metrics"] == first["metrics"]
    one, two = (load_file(f / "model" / "model.safetensors") for f in (folder, tmp_path))
    assert one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)
    assert sampled and all(":validation:" in uid for uid in sampled)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("seed=1", None),
        (
            "data.prompts_per_rollout=8",
            "is not in rollout 1 of .*replay with the data, seed and data.prompts_per_rollout",
        ),
        ("max_rollouts=4", "row micro_letters:train:12 is not in rollout 4 of .*no more rollouts than it has"),
        ("rollout.num_generations=2", "has 4 completions of a prompt; set rollout.num_generations=4"),
        ("rollout.temperature=0.5", "rollout.temperature=0.5: .* was sampled at 0.9"),
        ("rollout.top_k=2", "rollout.top_k=2: .* was sampled at 0; set it to that"),
        ("rollout.top_p=0.5", "rollout.top_p=0.5: .* was sampled at 1.0; set it to that"),
    ],
)
def test_what_does_not_match_is_one_line(change, line, recorded, tmp_path):
    replay = [*SMALL, "rollout=replay", f"rollout.engine.run={recorded[0]}", "rollout.max_completion_length=6"]
    if line is None:  # these prompts do not depend on the seed
        run(tmp_path, *replay, change)
        return
    with pytest.raises(UserError, match=line):
        run(tmp_path, *replay, change)


def test_a_run_without_tokens_and_a_folder_without_a_run_are_refused(tmp_path):
    with pytest.raises(UserError, match="rollout.engine.run=.*there is no completions.jsonl"):
        ReplayEngine(str(tmp_path))
    (tmp_path / "completions.jsonl").write_text('{"step": 1, "uid": "a", "completion": "b"}\n')
    with pytest.raises(UserError, match="did not record tokens; record_tokens=true does"):
        ReplayEngine(str(tmp_path))._records  # noqa: B018


def test_what_is_not_recorded_as_a_whole_is_refused(tmp_path):
    sampling = SamplingParams(num_generations=1, max_completion_length=4)
    line = '{"step": 1, "uid": "a", "completion": "b", "token_ids": [5], "sampler_logprobs": [0.0]'
    (tmp_path / "completions.jsonl").write_text(line + ', "messages": []}\n')
    with pytest.raises(UserError, match="are dialogues, whose records do not say which tokens are the policy's"):
        ReplayEngine(str(tmp_path))._records  # noqa: B018
    (tmp_path / "completions.jsonl").write_text(line + "}\n")
    (tmp_path / "config.yaml").write_text("dynamic_sampling: {max_draws: 2}\nrollout: {temperature: 1.0}\n")
    with pytest.raises(UserError, match="it replaced prompts .* it cannot be replayed"):
        ReplayEngine(str(tmp_path)).generate(None, [make_prompt([5], uid="a")], sampling, 0)


def test_the_rollout_of_a_seed_is_found_again():
    assert [rollout_of_seed(rollout_seed(seed, n)) for seed in (0, 7) for n in (0, 5, 99_999)] == [0, 5, 99_999] * 2
