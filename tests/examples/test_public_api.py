"""What a user's own Lightning project can rely on."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import gspo_lightning
from gspo_lightning.module import GSPOModule
from gspo_lightning.types import PromptBatch
from tests.scripted import Settings, build_module, scripted_prompts, trainer, update_of, weights
from tests.support import flat_gradient, relative_distance

ROOT = Path(__file__).parents[2]


def test_the_api_page_is_current():
    spec = importlib.util.spec_from_file_location("api_page", ROOT / "scripts" / "api_page.py")
    api_page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(api_page)
    assert api_page.PAGE.read_text() == api_page.page(), "run: python scripts/api_page.py"


@pytest.mark.parametrize("name", sorted(set(gspo_lightning.__all__) - {"__version__"}))
def test_a_public_name_exists_is_documented_and_typed(name):
    thing = getattr(gspo_lightning, name)
    assert inspect.getdoc(thing), f"{name} has no docstring"
    if not getattr(thing, "_is_protocol", False) and not (inspect.isclass(thing) and issubclass(thing, Exception)):
        for parameter in inspect.signature(thing).parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty, f"{name}: {parameter.name} has no type"


def test_type_checkers_see_the_names_that_exist_at_run_time():
    tree = ast.parse(Path(gspo_lightning.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert seen == gspo_lightning._PUBLIC


def test_importing_the_package_does_not_import_torch():
    code = "import sys, gspo_lightning; dir(gspo_lightning); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------- the auxiliary loss


class Anchored(GSPOModule):
    def auxiliary_loss(self, minibatch):
        self.calls = getattr(self, "calls", 0) + 1
        return 0.3 * self.policy.output_weight.square().mean()


def step_of(cls, folder, prompts, **update):
    module = build_module(folder, Settings(update=update), generations=len(prompts[0].sample["completions"]))
    module.__class__ = cls
    module.configure_model()
    before = weights(module)
    trainer().fit(module, DataLoader([PromptBatch(prompts)], batch_size=None))
    return before - weights(module), module


def auxiliary_gradient(module_folder):
    module = build_module(module_folder, Settings())
    module.configure_model()
    (0.3 * module.policy.output_weight.square().mean()).backward()
    return flat_gradient(module.policy)


@pytest.mark.parametrize("budget", [4096, 24])
def test_an_auxiliary_loss_is_added_once_per_step_whatever_the_micro_batches(micro_model_dir, budget):
    plain, _ = update_of(micro_model_dir, Settings(), scripted_prompts())
    step, module = step_of(Anchored, micro_model_dir, scripted_prompts(), max_tokens_per_microbatch=budget)
    assert relative_distance(step, plain + auxiliary_gradient(micro_model_dir)) < 1e-6
    assert module.calls == 1
    mean = module.last_metrics["loss/auxiliary"]
    assert mean == pytest.approx(0.3 * build_weight(micro_model_dir).square().mean().item(), rel=1e-6)


def build_weight(folder):
    module = build_module(folder, Settings())
    module.configure_model()
    return module.policy.output_weight.detach()


@pytest.mark.parametrize("keep", [False, True])
def test_a_minibatch_without_signal_is_stepped_on_the_auxiliary_loss_alone(micro_model_dir, keep):
    prompts = scripted_prompts()[1:2] * 2  # rewards all equal
    step, module = step_of(Anchored, micro_model_dir, prompts, keep_zero_advantage=keep)
    assert relative_distance(step, auxiliary_gradient(micro_model_dir)) < 1e-6
    assert module.counts["optimizer_steps"] == 1
    step, module = step_of(GSPOModule, micro_model_dir, prompts, keep_zero_advantage=keep)
    assert not step.any() and module.counts["skipped_steps"] == 1


class Resting(GSPOModule):
    def auxiliary_loss(self, minibatch):
        return None


class Constant(GSPOModule):
    def auxiliary_loss(self, minibatch):
        return torch.zeros(())


@pytest.mark.parametrize("update", [{}, {"keep_zero_advantage": True}], ids=["left out", "kept"])
@pytest.mark.parametrize("cls", [Resting, Constant])
def test_without_a_term_and_without_signal_no_step_is_taken(cls, update, micro_model_dir):
    """One with a gradient of zero would move weights that decay or have momentum."""
    step, module = step_of(cls, micro_model_dir, scripted_prompts()[1:2] * 2, **update)
    assert not step.any()
    assert (module.counts["optimizer_steps"], module.counts["skipped_steps"]) == (0, 1)
    plain, _ = update_of(micro_model_dir, Settings(update=update), scripted_prompts())
    step, module = step_of(cls, micro_model_dir, scripted_prompts(), **update)
    assert torch.equal(step, plain) and module.counts["optimizer_steps"] == 1


def test_a_term_that_is_assigned_to_the_object_is_that_of_a_subclass(micro_model_dir):
    prompts = scripted_prompts()[1:2] * 2
    module = build_module(micro_model_dir, Settings(), generations=3)
    module.auxiliary_loss = lambda minibatch: 0.3 * module.policy.output_weight.square().mean()
    module.configure_model()
    before = weights(module)
    trainer().fit(module, DataLoader([PromptBatch(prompts)], batch_size=None))
    assert relative_distance(before - weights(module), auxiliary_gradient(micro_model_dir)) < 1e-6


# ---------------------------------------------------------------- LightningCLI

CHECKS = """
    assert cli.model.rollouts_done == 2, cli.model.rollouts_done
    assert cli.model.sampling.num_generations == 4 and cli.model.objective.clip == (0.03, 0.04)
    print("trained")
"""


def documented_program():
    """The program of docs/reuse.md, as it stands there."""
    (text,) = re.findall(
        r"^```python\n(# program\.py.*?)^```", (ROOT / "docs/reuse.md").read_text(), re.DOTALL | re.MULTILINE
    )
    return text


@pytest.mark.skipif(not importlib.util.find_spec("jsonargparse"), reason="needs jsonargparse")
def test_the_module_and_the_data_module_work_under_lightning_cli(tmp_path):
    (tmp_path / "program.py").write_text(documented_program() + CHECKS)
    config = ROOT / "examples" / "lightning_cli.yaml"
    for starts in (1, 2):
        done = subprocess.run(
            [sys.executable, "program.py", "fit", "--config", str(config), "--trainer.default_root_dir", str(tmp_path)],
            cwd=tmp_path, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0 and "trained" in done.stdout, done.stderr
        assert len(list(tmp_path.rglob("config.yaml"))) == starts
    assert torch.is_grad_enabled()
