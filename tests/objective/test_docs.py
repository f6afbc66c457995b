"""The table of objectives is the code's, and every objective has a page and a config."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from gspo_lightning.config.build import build
from gspo_lightning.objective import LOSSES, LossSpec, Objective
from gspo_lightning.objective.losses import SURROGATE_CLIP, clipped_surrogate
from scripts import objective_page
from tests.conf.test_groups import of_file

ROOT = Path(__file__).parents[2]
README = (ROOT / "docs" / "objectives" / "README.md").read_text()


@pytest.mark.parametrize("file", objective_page.WRITTEN)
def test_what_is_written_from_the_registry_is_current(file):
    assert (ROOT / file).read_text() == objective_page.current(file), "run: python scripts/objective_page.py"


def test_a_row_says_what_the_loss_is():
    rows = {line.split("`")[1]: line for line in objective_page.table().splitlines()[2:]}
    assert rows.keys() == LOSSES.keys()
    assert "| token; one loss per completion | `1/S sum_i 1/\\|y_i\\| sum_t` | 0.4 / 0.4 | `epsilon`, " in rows["gmpo"]
    assert "| token, sequence, sequence_token | `1/S " in rows["grpo"]
    assert "| token 0.2 / 0.27; sequence 0.0003 / 0.0004 | `epsilon`, `epsilon_high`, `delta` |" in rows["grpo"]
    assert rows["cispo"].endswith("| ratio at most 5 | `epsilon_high` |")
    assert rows["kl_cov"].endswith("| none | `ppo_kl_coef`, `kl_cov_ratio` |")
    assert rows["reinforce"].endswith("| none | `1/(sum_i \\|y_i\\|) sum_i sum_t` | none | none |")
    assert objective_page._clip(LossSpec(clipped_surrogate, "tokens", SURROGATE_CLIP, levels=("token",))) == (
        "token 0.2 / 0.27"
    )


def test_the_loss_of_ones_own_on_the_page_is_what_the_page_says():
    (snippet,) = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    names = {}
    exec(snippet, names)
    objective = Objective(max_completion_length=4, importance_sampling_level="token", loss_type=names["CAPPED"])
    old, advantages = torch.zeros(3, dtype=torch.float64), torch.tensor([1.0, 1.0, -2.0], dtype=torch.float64)
    new = torch.tensor([1.2, 2.0, 0.5], dtype=torch.float64).log().requires_grad_()
    loss = objective(new, old, advantages, torch.tensor([0, 0, 1]), torch.tensor([2, 1])).loss
    assert loss.item() / objective.denominator(2, 3) == pytest.approx((-1.2 - 1.3 + 2 * 0.5) / 3)
    assert torch.autograd.grad(loss, new)[0].tolist() == pytest.approx([-1.2, 0.0, 1.0])


def test_the_config_lists_the_losses_to_choose_from():
    lines = (ROOT / "conf" / "_objective.yaml").read_text()
    assert f"\n{objective_page.names()}\nloss_type: ???\n" in lines
    assert objective_page.names().replace("\n#", "") == f"# {' | '.join(LOSSES)}"


def test_every_choice_of_advantages_has_a_row_that_says_whether_it_takes_rewards_of_turns():
    rows = re.findall(r"^\| `(\w+)`.* \| (compared|refused) \|$", README, re.MULTILINE)
    choices = {file.stem: build(of_file(file)) for file in (ROOT / "conf" / "advantages").glob("*.yaml")}
    assert dict(rows) == {
        name: "compared" if estimator.takes_turns and estimator.scale_rewards != "batch" else "refused"
        for name, estimator in choices.items()
    }
    assert len(rows) == len(choices)


def test_every_loss_has_a_page_and_a_config():
    for name in LOSSES:
        assert f"objective.loss_type={name}" in (ROOT / "docs" / "objectives" / f"{name}.md").read_text()
        assert any(f"loss_type: {name}\n" in file.read_text() for file in (ROOT / "conf" / "objective").glob("*.yaml"))
