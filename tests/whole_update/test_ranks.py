"""Two processes that train together do what the equations say of all prompts at once."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_lightning.rollout.seeds import rollout_seed
from tests import command_line
from tests.whole_update import models, product
from tests.whole_update.case import Case
from tests.whole_update.float64 import float64_layers
from tests.whole_update.models import KINDS, SEEING
from tests.whole_update.padded_models import PADDED
from tests.whole_update.reference import Member, Rollout, Run
from tests.whole_update.run_ranks import RANKS, on_ranks
from tests.whole_update.scripted_rollouts import scripted_stream
from tests.whole_update.test_whole_update import metric_differences, network_of, weight_differences

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

TEXT = ("ddp-text-3", "ddp-text-61", "ddp-text-99", "ddp-text-209", "ddp-text-360", "ddp-text-534")
"""Among them each of `OCCURS`."""

OCCURS = {
    "scale of the batch": lambda c: c.scale == "batch",
    "GDPO": lambda c: c.combine == "normalize_then_sum",
    "selection of tokens": lambda c: c.top_entropy_quantile < 1,
    "prompts drawn anew": lambda c: c.max_draws > 0,
    "rollouts ahead": lambda c: c.stale,
    "turns": lambda c: c.turns == "dialogue",
    "turns with rewards": lambda c: c.turns == "rewarded",
    "KL with a moving reference": lambda c: c.ref_sync_every > 0,
    "LoRA": lambda c: c.lora,
    "auxiliary term": lambda c: c.auxiliary > 0,
    "zero advantages kept": lambda c: c.keep_zero_advantage,
    "entropy of what is left out": lambda c: c.log_entropy and not c.has_kl and not c.entropy_coef,
    "silent rollouts": lambda c: c.rewards == "silent",
    "clip of the gradient": lambda c: c.max_grad_norm < 1,
    "several micro-batches": lambda c: c.token_budget < 50,
    "truncation mask": lambda c: c.mask_truncated,
    "mean over tokens": lambda c: c.loss in ("dapo", "bnpo", "cispo", "reinforce"),
    "mean over sequences": lambda c: c.loss in ("grpo", "sapo", "gmpo"),
    "several minibatches": lambda c: c.minibatches > 1,
    "padded": lambda c: c.padded,
    "mismatch": lambda c: c.mismatch is not None,
}

MODELS = (
    "ddp-model-23", "fsdp-model-26", "fsdp-model-18", "ddp-padded-19", "ddp-control-91000", "ddp-covariant-95002",
    "fsdp-covariant-95000", "ddp-covariant-95010", "ddp-tokens-97000", "ddp-tokens-97002",
)  # fmt: skip
"""Of images and of experts, what takes seconds. In 18 ranks have different numbers of micro-batches and a reference; in
91000 the entropy bonus follows the entropy, which must be that of both ranks, and the last choose tokens among those of
both."""

MORE_MODELS = (
    *(f"ddp-model-{seed}" for seed in (12, 26, 33, 34, 36, 39, 58, 76, 93)),
    *(f"fsdp-model-{seed}" for seed in (0, 2, 5, 12, 16, 23, 36)),
    *(f"ddp-padded-{seed}" for seed in (2, 4, 6, 17)),
)


@dataclass
class Ranks:
    """What each rank has in a minibatch."""

    case: Case
    images: list[bool]
    survives: list[bool]

    @property
    def one_is_blind(self) -> bool:
        return not all(self.images) and any(self.images)

    @property
    def one_is_idle(self) -> bool:
        return not all(self.survives) and any(self.survives)


class Watched(Run):
    """Notes what the ranks have."""

    def __init__(self, case: Case, *arguments: Any) -> None:
        super().__init__(case, *arguments)
        self.seen: list[Ranks] = []

    def _step(self, rollout: Rollout, prompts: list[int], first: bool) -> None:
        share = len(rollout.prompts) // RANKS
        of_ranks = [[b for b in prompts if b // share == rank] for rank in range(RANKS)]
        members: list[list[Member]] = [self._in_denominator(rollout, own) for own in of_ranks]
        self.seen.append(
            Ranks(
                self.case,
                [any(rollout.prompts[b].mm_inputs for b in own) for own in of_ranks],
                [any(self._is_measured(rollout, member) for member in own) for own in members],
            )
        )
        super()._step(rollout, prompts, first)

    def _count_forwards(self, rollout: Rollout, members: list[Member]) -> None:
        share = len(rollout.prompts) // RANKS
        for rank in range(RANKS):
            super()._count_forwards(rollout, [(b, g) for b, g in members if b // share == rank])


@pytest.fixture(scope="session")
def folders(micro_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a model, made when it is first asked for."""

    @functools.cache
    def folder(kind: str) -> str:
        path = micro_model_dir if kind == "micro" else tmp_path_factory.mktemp(kind)
        if kind != "micro":
            models.build(kind, path)
        return str(path)

    return folder


@pytest.fixture(scope="session")
def on_two(folders: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What two ranks came to, by case; all cases of a tuple in one start of the processes."""

    @functools.cache
    def started(names: tuple[str, ...]) -> dict[str, Any]:
        out, kinds = tmp_path_factory.mktemp("ranks"), {on_ranks(name).model for name in names}
        script, of_kinds = Path(__file__).with_name("run_ranks.py"), json.dumps({kind: folders(kind) for kind in kinds})
        command_line.run(of_kinds, out, *names, script=script, timeout=600)
        return {name: torch.load(out / f"{name}.pt", weights_only=True) for name in names}

    return started


def differences(name: str, found: dict[str, Any], folders: Any) -> tuple[list[str], list[Ranks]]:
    """Where two ranks and the equations differ, and what the ranks had."""
    case, lines = on_ranks(name), []
    with float64_layers():
        network = network_of(folders(case.model))
        trained = product.starting_point(case, network.start, found["before"])
        reference = Watched(case, network, trained, scripted_stream(case, network))
        for number in range(case.rollouts):
            metrics = reference.rollout(rollout_seed(product.RUN_SEED, number))
            lines += metric_differences(case, found["metrics"][number], metrics)
            lines += weight_differences(found["before"], found["tensors"][number], trained.tensors)
    return lines, reference.seen


def test_two_ranks_give_the_weights_and_metrics_of_the_equations_for_images_and_experts(on_two, folders):
    ranks: list[Ranks] = []
    for name in MODELS:
        found, seen = differences(name, on_two(MODELS)[name], folders)
        assert found == [], on_ranks(name)
        ranks += seen
    assert any(step.one_is_blind and step.case.vision != "frozen" for step in ranks)
    assert any(step.one_is_idle for step in ranks)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_MODELS)
def test_two_ranks_give_the_weights_and_metrics_of_the_equations_for_more_models(name, on_two, folders):
    assert differences(name, on_two(MORE_MODELS)[name], folders)[0] == [], on_ranks(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXT)
def test_two_ranks_give_the_weights_and_metrics_of_the_equations(name, on_two, folders):
    assert differences(name, on_two(TEXT)[name], folders)[0] == [], on_ranks(name)


def test_what_ranks_exchange_is_among_the_seeds():
    cases = [on_ranks(name) for name in TEXT]
    assert [name for name, of in OCCURS.items() if not any(map(of, cases))] == []
    cases = [on_ranks(name) for name in (*MODELS, *MORE_MODELS) if on_ranks(name).seed < 90_000]
    assert {case.model for case in cases} == set(KINDS + PADDED)
    assert {(case.vision, case.lora) for case in cases if case.model in SEEING} == {
        *((half, adapted) for half in ("frozen", "trained") for adapted in (False, True)), ("alone", False)
    }  # fmt: skip
