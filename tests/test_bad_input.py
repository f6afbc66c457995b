"""The table of bad input: each gives one clear line that names the key, row or file, before any model is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from gspo_lightning import config
from gspo_lightning.errors import UserError
from gspo_lightning.policy.load import PolicyLoader

CONF = str(Path(__file__).parents[1] / "conf")

BAD = {
    "an unknown key": (["rollout.temprature=1"], "rollout.temprature"),
    "an unknown choice of a group": (["objective=gpso"], "objective"),
    "a wrong type": (["update.num_minibatches=two"], "update.num_minibatches='two' has the wrong type"),
    "a wrong type in a model": (
        ["model.gradient_checkpointing=7"],
        "model.gradient_checkpointing=7 has the wrong type",
    ),
    "a wrong choice": (["objective.importance_sampling_level=word"], "one of token, sequence, sequence_token"),
    "an unknown loss": (["objective.loss_type=gppo"], "there is no such loss; choose grpo"),
    "a group of one": (["rollout.num_generations=1"], "rollout.num_generations=1 must be at least 2"),
    "minibatches that do not divide": (["update.num_minibatches=3"], "update.num_minibatches=3 does not divide"),
    "a clip that cannot act": (["update.num_minibatches=1"], "objective.epsilon cannot act"),
    "greedy rollouts": (["rollout.temperature=0"], "rollout.temperature=0 must be above 0"),
    "a repetition penalty": (["rollout.repetition_penalty=1.2"], "rollout.repetition_penalty must be 1.0"),
    "a budget below one sequence": (["update.max_tokens_per_microbatch=50"], "raise it to at least that"),
    "a prompt that is too long": (["data.max_prompt_length=2"], "more than data.max_prompt_length=2"),
    "a model folder that is not one": (["model.path=./docs"], "config.json"),
    "a reward that cannot be imported": (["reward.functions.letter_share.function.path=nowhere.f"], "nowhere"),
    "a missing file": (["data=rows", "data.task.source=missing.jsonl"], "missing.jsonl: cannot read the file"),
    "a missing mandatory value": (["data=rows"], "data.task.source"),
    "LoRA dropout": (["lora=language", "+model.lora.dropout=0.1"], "model.lora.dropout must be 0"),
    "a dataset option misspelt": (["+data.max_prompt_len=3"], "data.max_prompt_len"),
    "full fine-tuning in bfloat16": (["trainer.precision=bf16-true"], "rounds the updates of full fine-tuning away"),
    "bfloat16 weights without an adapter": (["model.dtype=bfloat16"], "model.dtype=bfloat16 rounds the updates"),
    "a negative seed": (["seed=-1"], "seed=-1 must be at least 0"),
    "no rollouts": (["max_rollouts=0"], "max_rollouts=0 must be at least 1"),
}


def start(*arguments):
    """Everything a run does before it loads a model."""
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("train", ["experiment=micro", *arguments], return_hydra_config=False)
    plain = config.resolve(cfg)
    config.check(plain)
    config.build_data(plain)
    config.build_module(plain)


@pytest.fixture(autouse=True)
def no_model_is_loaded(monkeypatch):
    def refuse(self):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(PolicyLoader, "load_model", refuse)


def test_the_sound_config_passes():
    start()


@pytest.mark.parametrize(("arguments", "text"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_with_a_line_that_names_it(arguments, text):
    with pytest.raises((UserError, HydraException)) as caught:
        start(*arguments)
    assert text in " ".join(str(caught.value).split())


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


GOOD = [{"prompt": f"{number}a:", "letter": "a"} for number in range(12)]
ROWS = {
    "an empty file": ("", [], "the dataset is empty"),
    "a missing column": (lines(*({"question": f"{n}"} for n in range(12))), [], "column 'prompt' is missing (data.task.prompt_column); the row has question"),
    "an empty prompt": (lines(*GOOD, {"prompt": "", "letter": "a"}), [], "the prompt is empty"),
    "fewer rows than a rollout": (lines(*GOOD[:4]), [], "data.prompts_per_rollout=8 is more than the 3 training rows"),
    "nothing left to train on": (lines(*GOOD), ["data.task.num_validation=12"], "data.task.num_validation=12 must be less than the 12 rows"),
    "a template without its column": (lines(*GOOD), ["data.task.template='{question}?'"], "column 'question' is missing (data.task.template)"),
    "a mapped column that is not there": (lines(*GOOD), ["+data.task.columns={answer: solution}"], "column 'solution' is missing (data.task.columns.answer)"),
    "a column that the reward needs": (lines({"prompt": "x:"}, *GOOD), [], "there is no column 'letter', which reward function letter_share needs"),
    "a long prompt": (lines(*GOOD, {"prompt": "a" * 2000, "letter": "a"}), [], "has 2000 tokens, more than data.max_prompt_length=1024"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "arguments", "text"), ROWS.values(), ids=ROWS.keys())
def test_a_row_with_a_mistake_is_named(content, arguments, text, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(content)
    with pytest.raises(UserError) as caught:
        start(
            "data=rows",
            f"data.task.source={file}",
            "data.task.num_validation=1",
            "data.task.conversational=false",
            *arguments,
        )
    assert text in str(caught.value)
