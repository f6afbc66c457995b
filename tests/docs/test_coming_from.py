"""The dictionaries of docs/coming-from.md: every name of ours exists, every name of TRL is there, every override composes."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

from gspo_lightning.config import checks
from gspo_lightning.objective.mismatch import MismatchCorrection
from tests.conf.test_groups import resolved
from tests.scripted import Settings, update_of

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/coming-from.md").read_text()
SOURCE = "\n".join(path.read_text() for path in (ROOT / "src/gspo_lightning").rglob("*.py"))
TRL = (Path(__file__).parent / "trl_1_16_0_metrics.txt").read_text().split()
OF_TRANSFORMERS = {"grad_norm", "learning_rate", "loss"}
VERL_ESTIMATORS = {
    "gae", "gdpo", "gpg", "grpo", "grpo_passk", "grpo_vectorized", "opo", "optimal_token_baseline",
    "reinforce_plus_plus", "reinforce_plus_plus_baseline", "remax", "rloo", "rloo_vectorized",
    "tir_optimal_token_baseline",
}  # fmt: skip


def section(heading):
    return re.split(r"^#{2,3} ", PAGE.split(f"{heading}\n", 1)[1], flags=re.MULTILINE)[0]


def quoted(cell):
    return re.findall(r"`([^`]+)`", cell)


def rows(text):
    """(cells of a row, each a list of what is in backticks), without the heads of the tables."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and "`" in line]
    return [[quoted(cell) for cell in line.strip("|").split(" | ")] for line in lines]


DICTIONARIES = [row for heading in ("### TRL 1.16.0", "### verl") for row in rows(section(heading))]


def test_every_name_of_ours_in_the_dictionaries_is_defined_on_the_page_of_metrics():
    table = [line for line in (ROOT / "docs/metrics.md").read_text().splitlines() if line.startswith("| `")]
    defined = {name for line in table for name in quoted(line.split(" | ")[0])}
    prefixes = {name.split("/")[0] for name in defined if "/" in name}
    ours = {name for row in DICTIONARIES for name in row[1]}
    # What the remarks say of other names of ours.
    ours |= {name for row in DICTIONARIES for name in row[2] if name.split("/")[0] in prefixes and "/" in name}
    assert len(DICTIONARIES) > 45 and len(ours) > 35
    assert ours - defined == set()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_name_of_ours_in_the_dictionaries_is_written_by_the_program(micro_model_dir):
    settings = Settings(
        objective={
            "beta": 0.1,
            "entropy_coef": 0.01,
            "entropy_target": 1.0,
            "mismatch": MismatchCorrection("sequence", "truncate", 2.0),
        },
        update={"num_minibatches": 2},
    )
    _, module = update_of(micro_model_dir, settings)
    written = {*module.last_metrics, *module.validator.names, "step"}  # the last is a column of the recorder

    def is_made(name):
        parts = re.split(r"<\w+>|(?<=@)k$", name)  # what the program fills in
        return re.search(r"\{[^}]*\}".join(map(re.escape, parts)), SOURCE)

    ours = {name for row in DICTIONARIES for name in row[1]}
    # Filled in, of dialogues, or of a GPU.
    dialogue = {"dialogue/turns", "dialogue/tool_calls", "dialogue/tool_failures"}
    elsewhere = dialogue | {"perf/peak_gpu_gb", "reward/<function>", "reward_log/<name>", "val/pass@k"}
    assert ours - written - elsewhere == set()
    assert [name for name in elsewhere if not is_made(name)] == []


def test_the_dictionary_of_trl_has_all_names_of_its_trainer_and_no_other():
    theirs = [name for row in rows(section("### TRL 1.16.0")) for name in row[0]]
    assert len(theirs) == len(set(theirs))
    assert set(theirs) - {"log_metric", "eval_reward"} == {*TRL, *OF_TRANSFORMERS}


def test_every_estimator_of_verl_has_a_row_and_what_it_becomes_composes():
    estimators, losses = section("### Estimators and losses of verl").split("| `policy_loss.loss_mode`")
    assert {name for row in rows(estimators)[1:] for name in row[0]} == VERL_ESTIMATORS
    texts = {text for row in [*rows(estimators), *rows(losses)] for text in row[1]}
    # An override names one of our groups; other words are verl's settings and names.
    warnings.filterwarnings("error", message=".*are widths for the ratio of a sequence")  # not those of verl
    ours = [text for text in texts if re.match(r"(advantages|objective|reward)\b\S*=", text)]
    assert len(ours) >= 12
    for text in ours:
        if re.fullmatch(r"\w+=\w+", text):
            assert (ROOT / "conf" / f"{text.replace('=', '/')}.yaml").exists(), text
        else:
            checks.check(resolved(*text.split()))
