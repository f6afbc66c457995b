"""A random configuration of a run whose model sees images or has experts, or whose loss is a user's own."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

from tests.whole_update.case import Case
from tests.whole_update.draw import draw
from tests.whole_update.models import KINDS, MIXTURES, SEEING
from tests.whole_update.own_losses import OWN
from tests.whole_update.padded_models import PADDED


def draw_model(seed: int) -> Case:
    """The case of a seed on another model, which is smaller where rows with images are long."""
    case, random = draw(seed), Random(f"model {seed}")
    case = _of(case, random.choice(KINDS))
    if case.model in SEEING:
        case = replace(
            case, vision=random.choice(["frozen", "trained"] if case.lora else ["frozen", "trained", "alone"])
        )
    if case.model in MIXTURES:
        case = replace(case, balance=random.choice([0.0, 0.0, 0.05]))
    return _smaller(case)


def draw_padded(seed: int) -> Case:
    """The case of a seed on a model that always runs padded, whose half that sees is never trained."""
    return _smaller(replace(_of(draw(seed), Random(f"padded {seed}").choice(PADDED)), padded=True))


def _of(case: Case, model: str) -> Case:
    return replace(case, model=model, lora=case.lora or (case.ref_sync_every == 0 and case.seed % 5 == 0))


def _smaller(case: Case) -> Case:
    if case.max_grad_norm == math.inf:  # deeper models amplify a step more
        case = replace(case, max_grad_norm=1.0)
    limit = {"prompts": max(case.minibatches, 2), "generations": 3, "rollouts": 2, "iterations": 2}
    return replace(case, **{key: min(value, getattr(case, key)) for key, value in limit.items()})


def draw_own_loss(seed: int) -> Case:
    """The case of a seed with a loss that the package does not have, and settings that this loss reads."""
    case, random = draw(seed), Random(f"own loss {seed}")
    name = random.choice(sorted(OWN))
    own = OWN[name]
    case = replace(case, loss=name, level=random.choice(own.levels), constant_length=None, turns=None)
    epsilon, high = random.choice([None, 0.05, 0.3]), random.choice([None, 0.05, 0.02])
    return replace(
        case,
        epsilon=epsilon if "epsilon" in own.reads else None,
        epsilon_high=high if "epsilon_high" in own.reads else None,
        delta=random.choice([None, 1.5]) if "delta" in own.reads else None,
        tau_positive=random.choice([1.0, 3.0]) if "tau_positive" in own.reads else 1.0,
        tau_negative=1.05,
        top_entropy_quantile=case.top_entropy_quantile if own.by_token(case) else 1.0,
        mismatch=case.mismatch if own.by_token(case) or not case.mismatch or case.mismatch[1] != "mask" else None,
        keep_zero_advantage=case.keep_zero_advantage and own.free_of_zeros,
    )
