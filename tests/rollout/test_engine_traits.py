"""What the program asks of an engine is in one place, and holds through wrappers."""

from __future__ import annotations

import pytest

from gspo_lightning.dialogue import Environments
from gspo_lightning.rollout import EngineTraits, TransformersEngine
from gspo_lightning.rollout.engine import traits
from gspo_lightning.rollout.gathered import GatheredEngine
from gspo_lightning.training.one_step_off import OneStepOff


class Plain:
    """An engine of one's own, with nothing but completions."""

    def generate(self, policy, prompts, sampling, seed): ...


class Server(Plain):
    samples_on, staleness = "first_rank", 1


class Outer(Plain):
    """A wrapper of one's own that has a trait itself."""

    max_concurrent = 3

    def __init__(self, engine):
        self.engine = engine


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        (Plain(), EngineTraits("every_rank", 0, None, 0)),
        (Server(), EngineTraits("first_rank", 1, None, 0)),
        (OneStepOff(Server()), EngineTraits("first_rank", 1, None, 0)),
        (GatheredEngine(OneStepOff(Server()), None), EngineTraits("first_rank", 1, None, 0)),
        (Outer(Server()), EngineTraits("first_rank", 1, None, 3)),
        (Outer(TransformersEngine(max_concurrent=9)), EngineTraits("every_rank", 0, None, 3)),  # the outer one decides
    ],
    ids=["plain", "server", "one step off", "gathered", "of one's own", "outer first"],
)
def test_traits_are_those_of_the_engine_inside_unless_the_outer_has_them(engine, expected):
    assert traits(engine) == expected


def test_the_engine_of_this_process_says_what_it_decodes_and_whether_it_holds_dialogues():
    environments = Environments(make=lambda prompt: None)
    found = traits(TransformersEngine(max_concurrent=7, environments=environments))
    assert found == EngineTraits(environments=environments, max_concurrent=7)
