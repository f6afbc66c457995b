"""reasoning-gym behind a stand-in of the same interface, and the real package where it is installed."""

from __future__ import annotations

import sys
import types
from importlib.util import find_spec

import pytest

from gspo_lightning.data import reasoning_gym as ours
from gspo_lightning.errors import UserError

INSTALLED = find_spec("reasoning_gym") is not None


class Sums:
    """Like most of the real datasets: row i of seed s is row i - 1 of seed s + 1."""

    def __init__(self, seed, size, top=1000):
        if top < 2:
            raise AssertionError("top must be 2 or more")
        self.seed, self.size, self.top = seed, size, top

    def __getitem__(self, index):
        number = (self.seed + index) * 7919 % self.top
        return {"question": f"{number} + 1?", "answer": str(number + 1), "metadata": {}}

    def score_answer(self, answer, entry):
        return 1.0 if int(answer) == int(entry["answer"]) else 0.01


@pytest.fixture
def package(monkeypatch):
    module, factory = types.ModuleType("reasoning_gym"), types.ModuleType("reasoning_gym.factory")
    factory.DATASETS = {"sums": (Sums, None)}
    module.create_dataset = lambda name, **options: Sums(**options)
    monkeypatch.setitem(sys.modules, "reasoning_gym", module)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)
    ours._dataset.cache_clear()
    ours._verifier.cache_clear()
    yield
    ours._dataset.cache_clear()
    ours._verifier.cache_clear()


def questions(task, count):
    return [task.train_row(index)["prompt"][0]["content"] for index in range(count)]


def test_rows_depend_on_seed_and_index_alone_and_differ_between_seeds(package):
    first, second = (ours.ReasoningGym("sums", {"top": 10**9}, seed=1) for _ in range(2))
    assert questions(first, 40) == [second.train_row(i)["prompt"][0]["content"] for i in reversed(range(40))][::-1]
    assert set(questions(first, 40)) != set(questions(ours.ReasoningGym("sums", {"top": 10**9}, seed=2), 40))


def test_no_training_row_is_held_out_and_the_held_out_set_does_not_depend_on_the_seed(package):
    one, two = (ours.ReasoningGym("sums", seed=seed, num_validation=500) for seed in (0, 1))
    held_out = [row["prompt"][0]["content"] for row in one.validation_rows()]
    assert held_out == [row["prompt"][0]["content"] for row in two.validation_rows()]
    assert not set(held_out) & set(questions(one, 300))


def test_holding_out_everything_is_refused(package):
    with pytest.raises(UserError, match="holds out nearly every question"):
        ours.ReasoningGym("sums", {"top": 20}, num_validation=100).train_row(0)


def test_the_verifier_judges_tags_or_the_whole_text_and_nonsense_gets_nothing(package):
    entry = {"question": "4 + 1?", "answer": "5", "metadata": {}}
    texts = ["5", " 5\n", "I think <answer>4</answer> no <answer>5</answer>", "6", "five", "<answer>x</answer>5"]
    arguments = {"entry": [entry] * 6, "reasoning_gym_dataset": ["sums"] * 6}
    assert ours.reasoning_gym_score(texts, **arguments) == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert ours.reasoning_gym_score(texts, **arguments, partial=True) == [1.0, 1.0, 1.0, 0.01, 0.0, 0.0]


def test_an_unknown_dataset_and_refused_options_are_named(package):
    with pytest.raises(UserError, match=r"data.task=sumz: reasoning-gym has no such dataset; .*sums|see"):
        ours.ReasoningGym("sumz").validation_rows()
    with pytest.raises(UserError, match="sums refuses them: top must be 2"):
        ours.ReasoningGym("sums", {"top": 1}).validation_rows()
    with pytest.raises(UserError, match="sums refuses them: .*unexpected keyword"):
        ours.ReasoningGym("sums", {"tip": 1}).validation_rows()


def test_without_the_package_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    ours._dataset.cache_clear()
    with pytest.raises(UserError, match="pip install reasoning-gym==0.1.25"):
        ours.ReasoningGym("gcd").validation_rows()


@pytest.mark.skipif(not INSTALLED, reason="needs reasoning-gym")
@pytest.mark.parametrize("name", ["gcd", "products", "basic_arithmetic", "propositional_logic", "countdown"])
def test_real_tasks_give_rows_and_their_verifiers_survive_any_text(name):
    task = ours.ReasoningGym(name, num_validation=16)
    rows = [*task.validation_rows(), *(task.train_row(index) for index in range(20))]
    assert len({row["prompt"][0]["content"] for row in rows}) > 10
    for text in ("", "nonsense", "12", "((", "\x00"):
        scores = ours.reasoning_gym_score([text] * len(rows), [r["entry"] for r in rows], [name] * len(rows))
        assert set(scores) <= {0.0, 1.0} and sum(scores) < len(rows) / 2
    known = [row for row in rows if row["answer"]]
    if name != "countdown":
        answers = [row["answer"] for row in known]
        assert all(ours.reasoning_gym_score(answers, [r["entry"] for r in known], [name] * len(known)))
