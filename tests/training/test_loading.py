"""In which order weights are loaded and split over ranks."""

from __future__ import annotations

import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from gspo_lightning.distributed.sharding import FSDP2Strategy
from gspo_lightning.errors import UserError
from gspo_lightning.policy.load import PolicyLoader
from gspo_lightning.training import loading
from tests.scripted import Batches, Settings, build_module, scripted_prompts, trainer


def test_the_policy_is_split_before_its_reference_is_loaded(micro_model_dir, monkeypatch):
    """So no rank has two whole models in memory."""
    events = []

    def noted(owner, name):
        function = getattr(owner, name)

        def call(*arguments, **named):
            events.append(name)
            return function(*arguments, **named)

        monkeypatch.setattr(owner, name, call)

    noted(PolicyLoader, "load_model")
    noted(loading, "choose_forward")
    monkeypatch.setattr(loading, "shard_policy", lambda policy, mesh, **_: events.append(("split", policy)))
    module = build_module(micro_model_dir, Settings(objective={"beta": 0.1}))
    module._device_mesh = object()
    strategy, state = SimpleNamespace(gather_for_rollouts=True), SimpleNamespace(fn="fit")
    module._trainer = SimpleNamespace(strategy=strategy, state=state, callbacks=[])
    module.configure_model()
    policy, reference = module.policy, module.references[0]
    assert events == ["load_model", "choose_forward", ("split", policy), "load_model", ("split", reference)]


def test_a_check_of_the_forward_that_broke_off_is_made_again(micro_model_dir, monkeypatch):
    """Without it a model that does not pack would be trained on packed rows."""
    asked = []

    def check(policy):
        asked.append(policy)
        if len(asked) == 1:
            raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(loading, "choose_forward", check)
    module = build_module(micro_model_dir, Settings())
    with pytest.raises(torch.OutOfMemoryError):
        trainer().fit(module, Batches(scripted_prompts()).loader())
    for _ in range(2):
        trainer().fit(module, Batches(scripted_prompts()).loader())
    assert asked == [module.policy] * 2


def test_a_model_whose_completions_nothing_ends_is_warned_of_once(micro_model_dir):
    def said(**sampling):
        module = build_module(micro_model_dir, Settings())
        module.configure_model()
        module.policy.base_model.generation_config.eos_token_id = None
        module.policy.tokenizer.eos_token = None
        module.sampling = replace(module.sampling, **sampling)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loading.choose_forwards(module)
            loading.choose_forwards(module)
        return [str(w.message) for w in caught if "end-of-sequence" in str(w.message)]

    (line,) = said()
    assert line.startswith("the model has no end-of-sequence token") and line.endswith("or set rollout.stop")
    assert said(stop=("\n",)) == []


def test_a_policy_that_was_loaded_whole_is_not_trained_by_a_strategy_that_splits(micro_model_dir):
    """Every rank would train a model of its own."""
    module = build_module(micro_model_dir, Settings(dtype="float32"))
    trainer().validate(module, Batches(scripted_prompts()).loader(), verbose=False)
    assert module.policy is not None
    try:
        with pytest.raises(UserError, match="the policy was loaded before this fit, whole"):
            trainer(strategy=FSDP2Strategy()).fit(module, Batches(scripted_prompts()).loader())
    finally:
        torch.distributed.destroy_process_group()
