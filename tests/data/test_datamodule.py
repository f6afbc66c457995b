"""The prompt stream: each row once an epoch, the same for any number of ranks, exact resume and no cut."""

from __future__ import annotations

import pickle
import warnings
from copy import copy
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from gspo_lightning.data import LargestOfFour, MicroLetters, Mixture, PromptDataModule, RowsTask
from gspo_lightning.data import datamodule as datamodule_module
from gspo_lightning.data.first_rows import FirstRows
from gspo_lightning.data.stream import PromptStream
from gspo_lightning.errors import UserError
from gspo_lightning.policy.load import PolicyLoader
from gspo_lightning.types import PromptBatch


def _finite(lengths: list[int], **settings: Any) -> RowsTask:
    """Plain prompts of these many characters, which are as many tokens."""
    rows = [{"prompt": chr(ord("a") + i) * length, "answer": str(i)} for i, length in enumerate(lengths)]
    return RowsTask(rows, **{"num_validation": 0, "conversational": False, **settings})


def _data(task: Any, folder: str, prompts: int = 4, longest: int = 16, **settings: Any) -> PromptDataModule:
    return PromptDataModule(task, folder, prompts_per_rollout=prompts, max_prompt_length=longest, **settings)


def _uids(batches: list[PromptBatch]) -> list[str]:
    return [prompt.uid for batch in batches for prompt in batch.prompts]


def _as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, ranks: int) -> None:
    monkeypatch.setattr(datamodule_module, "rank", lambda: rank)
    monkeypatch.setattr(datamodule_module, "world_size", lambda: ranks)


def test_an_epoch_of_a_finite_task_holds_each_row_once_in_an_order_of_seed_and_epoch() -> None:
    task = _finite([1] * 10)
    order = [uid for uid, _ in map(PromptStream(task, 3).row_at, range(20))]
    every = {f"rows:train:{i}" for i in range(10)}
    assert set(order[:10]) == every and set(order[10:]) == every and order[:10] != order[10:]
    assert [PromptStream(task, 3).row_at(cursor)[0] for cursor in reversed(range(20))] == order[::-1]
    assert [uid for uid, _ in map(PromptStream(task, 4).row_at, range(10))] != order[:10]


@pytest.mark.parametrize(
    ("task", "settings", "line"),
    [
        (_finite([1] * 3), {}, "data.prompts_per_rollout=4 is more than the 3 training rows; lower it"),
        (MicroLetters(), {"seed": 1}, "data.seed=1 has no effect: micro_letters never runs out and has no order"),
        (MicroLetters(), {"min_pixels": 9}, "data.min_pixels and data.max_pixels have no effect"),
    ],
)
def test_settings_are_checked_in_a_program_that_does_not_call_check(
    task: Any, settings: dict[str, Any], line: str, tokenizer_dir: str
) -> None:
    with pytest.raises(UserError, match=f"^{line}"):
        _data(task, tokenizer_dir, **settings).train_dataloader()


def test_another_task_is_refused_and_not_left_unread(tokenizer_dir: str) -> None:
    """Prompts would go on to be those of the first one."""
    data = _data(MicroLetters(), tokenizer_dir)
    with pytest.raises(UserError, match="^data.task: a PromptDataModule keeps the task that it was made with"):
        data.task = LargestOfFour()
    assert data.task.name == "micro_letters"


def test_a_batch_carries_row_ids_text_and_the_position_behind_it(tokenizer_dir: str) -> None:
    batch = next(iter(_data(MicroLetters(), tokenizer_dir, prompts=2).train_dataloader()))
    assert isinstance(batch, PromptBatch) and batch.cursor == 2 and batch.dropped == 0
    first, second = batch.prompts
    assert (first.uid, first.prompt, first.sample["letter"]) == ("micro_letters:train:0", "0a:", "a")
    assert (second.uid, second.prompt) == ("micro_letters:train:1", "1b:")
    # The vocabulary is three special tokens, newline, then ASCII from the space on: "0" is 4 + 48 - 32.
    assert first.input_ids.tolist() == [4 + ord(c) - 32 for c in "0a:"] and first.input_ids.dtype == torch.int64


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_of_a_loader_take_the_rollouts_in_turn(workers: int, tokenizer_dir: str) -> None:
    data = _data(MicroLetters(num_validation=5), tokenizer_dir, prompts=2, validation_batch_size=2)
    for loader, count in ((data.train_dataloader(), 7), (data.val_dataloader(), 3)):
        again = DataLoader(loader.dataset, batch_size=None, num_workers=workers)
        assert _uids(list(islice(again, count))) == _uids(list(islice(loader, count)))
    assert len(list(again)) == 3


def test_no_prompt_comes_twice_in_a_rollout_and_epochs_roll_on(tokenizer_dir: str) -> None:
    data = _data(_finite([1] * 10), tokenizer_dir, prompts=4)
    batches = list(islice(data.train_dataloader(), 6))
    assert data.rollouts_per_epoch == 2
    assert [batch.cursor for batch in batches] == [4, 8, 14, 18, 24, 28]
    for first in (0, 2, 4):
        assert len(set(_uids(batches[first : first + 2]))) == 8


@pytest.mark.parametrize("seed", range(6))
def test_rows_passed_over_at_the_end_of_an_epoch_can_be_drawn_as_fresh_prompts(
    seed: int, tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 10 rows the second rollout takes 8 out of a new epoch; the other two are fresh, passed over or not."""
    data = _data(_finite([1] * 10), tokenizer_dir, prompts=8, seed=seed)
    data.cursor = 8
    first = data.first()
    assert (len(first), first.cursor) == (8, 18)
    fresh = data.draw(first, [2])
    assert len(set(_uids([first, fresh]))) == 10 and fresh.cursor == 20
    shares = []
    for rank in range(2):
        _as_rank(monkeypatch, rank, 2)
        shares.append((share := data.first(), data.draw(share, [1, 1])))
    assert _uids([share for share, _ in shares]) == _uids([first])
    assert _uids([drawn for _, drawn in shares]) == _uids([fresh])


def test_a_batch_is_made_when_it_is_read_and_then_no_more(tokenizer_dir: str) -> None:
    class Broken(MicroLetters):
        asked: list[int] = []

        def train_row(self, index: int) -> dict[str, Any]:
            self.asked.append(index)
            if index == 5:
                raise FileNotFoundError("5.png")
            return super().train_row(index)

    data = _data(Broken(), tokenizer_dir, prompts=2)
    batches = list(islice(data.train_dataloader(), 3))
    assert Broken.asked == []
    assert batches[1].cursor == 4 and len(batches[1]) == 2 and Broken.asked == [0, 1, 2, 3]
    for _ in range(2):
        with pytest.raises(UserError, match=r"raised FileNotFoundError: 5\.png"):
            len(batches[2])


def test_ranks_together_see_what_one_rank_sees(tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [1, 9, 1, 1, 9, 1, 1, 1, 9, 1, 1, 1]
    data = _data(_finite(lengths), tokenizer_dir, prompts=6, longest=5, overlong_prompts="drop")
    made = lambda: [copy(batch) for batch in islice(data.train_dataloader(), 4)]  # noqa: E731 - by the rank that asks
    alone, shares = made(), []
    for rank in range(3):
        _as_rank(monkeypatch, rank, 3)
        shares.append(made())
    for number, whole in enumerate(alone):
        assert _uids([share[number] for share in shares]) == _uids([whole])
        assert {(share[number].cursor, share[number].dropped) for share in shares} == {(whole.cursor, whole.dropped)}


def test_ranks_share_the_held_out_prompts_without_repeats(tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = _data(MicroLetters(num_validation=11), tokenizer_dir, validation_batch_size=2)
    seen: list[str] = []
    for rank in range(3):
        _as_rank(monkeypatch, rank, 3)
        batches = list(data.val_dataloader())
        assert all(len(batch) <= 2 for batch in batches)
        seen += _uids(batches)
    assert sorted(seen) == sorted(f"micro_letters:validation:{i}" for i in range(11))


def test_prompts_per_rollout_must_be_divisible_by_the_ranks(
    tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _as_rank(monkeypatch, 0, 3)
    with pytest.raises(UserError, match=r"data\.prompts_per_rollout=4 must be divisible by the number of ranks, 3"):
        _data(MicroLetters(), tokenizer_dir).train_dataloader()


def test_a_prompt_of_exactly_the_maximum_passes_and_one_token_more_does_not(tokenizer_dir: str) -> None:
    _data(_finite([5, 5]), tokenizer_dir, prompts=2, longest=5).check()
    with pytest.raises(
        UserError, match=r"row rows:train:1: the prompt has 6 tokens, more than data\.max_prompt_length=5"
    ):
        _data(_finite([5, 6]), tokenizer_dir, prompts=2, longest=5).check()


def test_dropped_prompts_are_replaced_and_counted_when_their_rollout_is_finished(tokenizer_dir: str) -> None:
    data = _data(_finite([1, 9, 1, 9, 1, 1, 1, 1]), tokenizer_dir, prompts=3, longest=5, overlong_prompts="drop")
    data.check()
    first, second = islice(data.train_dataloader(), 2)
    assert len(first) == len(second) == 3
    assert {"rows:train:1", "rows:train:3"}.isdisjoint(_uids([first, second]))
    # Six rows fit; how many long ones lie among them depends on the order, which the cursor shows.
    assert first.dropped == first.cursor - 3 and second.dropped == second.cursor - first.cursor - 3
    assert data.dropped_prompts == 0
    data.finish(first)
    data.finish(second)
    assert data.dropped_prompts == second.cursor - 6 and data.cursor == second.cursor


def test_a_row_that_is_dropped_counts_as_seen_in_an_epoch(tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = _data(_finite([1, 9] * 11), tokenizer_dir, prompts=2, longest=5, overlong_prompts="drop")
    data.check()
    assert data.rollouts_per_epoch == 11 // 2
    taken = _uids(list(islice(data.train_dataloader(), data.rollouts_per_epoch)))
    assert len(set(taken)) == len(taken) == 10  # each row once; one more rollout would begin another epoch
    monkeypatch.setattr(datamodule_module, "ROWS_CHECKED", 4)  # rows 0, 6, 12 and 18 of 22, all short
    data.check()
    assert data.rollouts_per_epoch == 22 // 2


def test_dropping_everything_is_an_error_and_not_an_endless_loop(tokenizer_dir: str) -> None:
    with pytest.raises(UserError, match=r"data\.max_prompt_length=5: \d+ prompts are longer; too few remain for"):
        _data(_finite([1, 9, 9, 9]), tokenizer_dir, prompts=2, longest=5, overlong_prompts="drop").check()
    with pytest.raises(UserError, match=r"data\.max_prompt_length=2: 1000 prompts are longer"):
        _data(MicroLetters(), tokenizer_dir, longest=2, overlong_prompts="drop").check()


def test_a_held_out_prompt_is_never_dropped(tokenizer_dir: str) -> None:
    task = MicroLetters(num_validation=11)  # "v10c:" is one longer than all others
    with pytest.raises(UserError, match=r"row micro_letters:validation:10: longer than data\.max_prompt_length=4"):
        _data(task, tokenizer_dir, longest=4, overlong_prompts="drop").check()


def test_a_mistake_deep_in_a_dataset_is_found_before_the_run(tokenizer_dir: str) -> None:
    rows = [{"prompt": f"q{i}"} for i in range(300)]
    rows[217] = {"question": "q"}
    with pytest.raises(UserError, match=r"rows row 217: column 'prompt' is missing"):
        _data(RowsTask(rows, num_validation=0), tokenizer_dir, longest=64).check()


def test_columns_that_rewards_need_are_checked_in_every_row(tokenizer_dir: str) -> None:
    data = _data(_finite([1] * 5), tokenizer_dir)
    data.check({"answer": "reward function exact_match"})
    with pytest.raises(
        UserError, match=r"row rows:train:\d: there is no column 'letter', which reward function f needs"
    ):
        data.check({"letter": "reward function f"})


@pytest.mark.parametrize(
    ("answer", "problem"), [(None, "is null"), ("", "is blank"), (" \n", "is blank"), (float("nan"), "is NaN")]
)
def test_an_answer_that_is_none_is_found_before_the_run(answer: Any, problem: str, tokenizer_dir: str) -> None:
    rows = [{"prompt": f"q{i}", "answer": "1"} for i in range(50)]
    rows[37]["answer"] = answer
    data = _data(RowsTask(rows, num_validation=0, conversational=False), tokenizer_dir)
    data.check()
    with pytest.raises(
        UserError, match=rf"row rows:train:37: column 'answer' {problem}, which reward function f needs; the row has"
    ):
        data.check({"answer": "reward function f"})


def test_the_check_walks_the_rows_of_each_task_of_a_mixture(tokenizer_dir: str) -> None:
    rows = [{"prompt": f"q{i}", "answer": "1"} for i in range(300)]
    rows[217]["answer"] = None
    finite = RowsTask(rows, num_validation=0, conversational=False)
    data = _data(Mixture({"letters": MicroLetters(), "mine": finite}), tokenizer_dir)
    data.check({"answer": {"letters of others": "reward function f"}, "letter": {"letters": "reward function g"}})
    with pytest.raises(UserError, match=r"row mixture\.mine:train:217: column 'answer' is null, which f needs"):
        data.check({"answer": {"mine": "f"}})
    rows[150]["prompt"] = "q" * 17
    with pytest.raises(UserError, match=r"row mixture\.mine:train:150: the prompt has 17 tokens"):
        _data(Mixture({"letters": MicroLetters(), "mine": finite}), tokenizer_dir).check()


def test_the_check_of_a_mixture_shares_its_rows_among_the_tasks() -> None:
    finite = [RowsTask([{"prompt": f"q{i}"} for i in range(size)], num_validation=0) for size in (100, 3)]
    mixture = Mixture({"a": finite[0], "b": finite[1], "c": MicroLetters()})
    uids = [uid for uid, _ in mixture.spaced_rows(30)]
    # Ten of each: every tenth row of a, all three of b, and of an endless task its first.
    assert uids == [
        *(f"mixture.a:train:{i}" for i in range(0, 100, 10)), *(f"mixture.b:train:{i}" for i in range(3)), "mixture.c:train:0"
    ]  # fmt: skip
    # Fewer than there are tasks: still one of each.
    assert [uid for uid, _ in mixture.spaced_rows(2)] == [f"mixture.{name}:train:0" for name in "abc"]


def test_prompts_with_special_tokens_in_their_text_are_counted_before_the_run(tokenizer_dir: str) -> None:
    rows = [{"prompt": f"{n}<|im_end|>" if n % 2 else f"{n}"} for n in range(8)]
    with pytest.warns(UserWarning, match="^4 of the prompts that were checked have special tokens in their text, the"):
        _data(RowsTask(rows, num_validation=2), tokenizer_dir, longest=99).check()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _data(RowsTask(rows, num_validation=2, conversational=False), tokenizer_dir, longest=99).check()


def test_fewer_rows_than_a_rollout_are_refused(tokenizer_dir: str) -> None:
    with pytest.raises(UserError, match=r"data\.prompts_per_rollout=4 is more than the 3 training rows"):
        _data(_finite([1] * 3), tokenizer_dir).check()


@pytest.mark.parametrize("size", [6.0, lambda self: 6])
def test_a_task_that_counts_its_rows_by_a_method_or_in_parts_is_refused(size: Any, tokenizer_dir: str) -> None:
    task = type("Mine", (MicroLetters,), {"num_train_rows": size})()
    with pytest.raises(
        UserError, match=r"^data\.task: num_train_rows of Mine is of type (float|method); it must be a "
    ):
        _data(task, tokenizer_dir).check()


def test_a_task_may_yield_its_held_out_rows(tokenizer_dir: str) -> None:
    task = type("Mine", (MicroLetters,), {"validation_rows": lambda self: iter(MicroLetters().validation_rows())})()
    data, listed = _data(task, tokenizer_dir), _data(MicroLetters(), tokenizer_dir)
    for one in (data, listed):
        one.check()
    assert _uids(list(data.val_dataloader())) == _uids(list(listed.val_dataloader())) != []


@pytest.mark.parametrize("prompts", [0, -2])
def test_a_rollout_without_prompts_is_refused(prompts: int, tokenizer_dir: str) -> None:
    with pytest.raises(UserError, match=f"^data.prompts_per_rollout={prompts} must be at least 1$"):
        _data(MicroLetters(), tokenizer_dir, prompts=prompts)


def test_template_options_without_effect_are_refused(tokenizer_dir: str) -> None:
    with pytest.raises(UserError, match=r"chat_template_kwargs\.enable_thinking has no effect"):
        _data(LargestOfFour(), tokenizer_dir, longest=200, chat_template_kwargs={"enable_thinking": True}).check()
    with pytest.raises(UserError, match=r"chat_template_kwargs has no effect on plain string prompts"):
        _data(MicroLetters(), tokenizer_dir, chat_template_kwargs={"messages": []}).check()


def test_a_data_module_survives_pickling_for_spawned_ranks(tokenizer_dir: str) -> None:
    data = _data(_finite([1] * 8), tokenizer_dir)
    wanted = _uids([data.batch_at(4)])
    assert _uids([pickle.loads(pickle.dumps(data)).batch_at(4)]) == wanted


class _Reader(L.LightningModule):
    """Notes the prompts it is given and says when a rollout is finished, as the real module does."""

    def __init__(self, stop_after: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.stop_after, self.seen = stop_after, []

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self.seen += [prompt.uid for prompt in batch.prompts]
        self.trainer.datamodule.finish(batch)
        self.trainer.should_stop = self.trainer.should_stop or len(self.seen) >= self.stop_after

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def _fit(folder: str, stop_after: int, ckpt_path: str | None = None) -> tuple[list[str], L.Trainer]:
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    task = _finite([1, 1, 9, 1, 1, 1, 9, 1, 1, 1])
    data = _data(task, folder, prompts=2, longest=5, overlong_prompts="drop", seed=1)
    module = _Reader(stop_after)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return module.seen, trainer


@pytest.mark.filterwarnings("ignore")
def test_a_run_resumed_in_lightning_sees_the_prompts_an_unbroken_one_sees(tokenizer_dir: str, tmp_path: Path) -> None:
    unbroken, _ = _fit(tokenizer_dir, 24)
    head, trainer = _fit(tokenizer_dir, 10)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    tail, resumed = _fit(tokenizer_dir, 14, str(tmp_path / "last.ckpt"))
    assert head + tail == unbroken and len(unbroken) == 24
    assert resumed.datamodule.dropped_prompts > trainer.datamodule.dropped_prompts > 0


def test_a_run_that_is_resumed_with_other_held_out_prompts_is_told_so(tokenizer_dir: str) -> None:
    def data(rows: int, **settings: Any) -> PromptDataModule:
        task = RowsTask([{"prompt": f"{i}", "answer": i} for i in range(rows)], num_validation=3, **settings)
        return _data(task, tokenizer_dir, longest=99)

    first = data(20)
    unread = first.state_dict()  # before a validation
    assert set(unread) == {"cursor", "dropped_prompts"}
    first.val_dataloader()
    state = first.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for same in (data(20), data(20, columns={"solution": "answer"})):
            same.load_state_dict(state)
            assert same.state_dict() == state
        data(30).load_state_dict(unread)
    for other in (data(30), data(20, system_prompt="Be brief."), _data(MicroLetters(), tokenizer_dir)):
        with pytest.warns(UserWarning, match="^the held-out prompts are not those of the run that is resumed"):
            other.load_state_dict(state)
        assert other.state_dict()["held_out"] != state["held_out"]


def test_held_out_prompts_are_the_same_wherever_their_images_are(tokenizer_dir: str) -> None:
    def data(folder: str, text: str = "How many?") -> PromptDataModule:
        def prompt(number: int) -> list[Any]:
            image = {"type": "image", "image": f"{folder}/{number}.png"}
            return [{"role": "user", "content": [image, {"type": "text", "text": text}]}]

        return _data(RowsTask([{"prompt": prompt(i)} for i in range(9)], num_validation=3), tokenizer_dir)

    first = data("/here")
    first._validation_rows()
    state = first.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data("/there").load_state_dict(state)
    with pytest.warns(UserWarning, match="^the held-out prompts are not those"):
        data("/here", "How few?").load_state_dict(state)


def test_an_old_checkpoint_reads_no_held_out_rows(tokenizer_dir: str) -> None:
    class Gone(MicroLetters):
        def validation_rows(self) -> list[Any]:
            raise FileNotFoundError("held_out.jsonl")

    _data(Gone(), tokenizer_dir).load_state_dict({"cursor": 3, "dropped_prompts": 0})


class OwnTask:
    """A task of a user's own that fails at one row, or where it holds rows out."""

    name = "own"
    num_train_rows = 6

    def __init__(self, row: int | None = None, held_out: Any = ()) -> None:
        self.row, self.held_out = row, held_out

    def train_row(self, index: int) -> dict[str, Any]:
        if index == self.row:
            raise KeyError("question")
        return {"prompt": f"{index}a:", "letter": "a"}

    def validation_rows(self) -> Any:
        if isinstance(self.held_out, Exception):
            raise self.held_out
        return self.held_out


AT_FOUR = "OwnTask.train_row(4) raised KeyError: 'question'"


@pytest.mark.parametrize(
    ("task", "line"),
    [
        (OwnTask(row=4), f"row own:train:4: {AT_FOUR}"),
        (FirstRows(OwnTask(row=4), 5), f"row own:train:4: {AT_FOUR}"),
        (Mixture({"mine": OwnTask(row=4)}, seed=1), f"row own:train:4: {AT_FOUR}"),
        (
            OwnTask(held_out=FileNotFoundError("no\nheld-out file")),
            "task own: OwnTask.validation_rows() raised FileNotFoundError: no held-out file",
        ),
        (
            OwnTask(held_out=None),
            "task own: OwnTask.validation_rows() raised TypeError: 'NoneType' object is not iterable",
        ),
        (
            Mixture({"mine": OwnTask(held_out=[None])}),
            "a row of task mine is of type NoneType; return a dict with the column prompt",
        ),
    ],
)  # fmt: skip
def test_what_a_task_of_ones_own_raises_is_one_line_with_its_row(task: Any, line: str, tokenizer_dir: str) -> None:
    with pytest.raises(UserError) as refused:
        _data(task, tokenizer_dir, prompts=5 if isinstance(task, FirstRows) else 6).check()
    assert str(refused.value) == line


@pytest.mark.parametrize("missing", ["name", "num_train_rows", "train_row", "validation_rows"])
def test_what_is_no_task_is_refused(missing: str, tokenizer_dir: str) -> None:
    members = {"name": "own", "num_train_rows": 6, "train_row": len, "validation_rows": list}
    task = type("Half", (), {name: value for name, value in members.items() if name != missing})()
    with pytest.raises(UserError, match=rf"^data\.task: Half has no {missing}; a task has name, num_train_rows, "):
        _data(task, tokenizer_dir).check()


def test_a_column_whose_name_is_no_text_is_refused_before_the_run(micro_model_dir: Path) -> None:
    """As of pandas for a file without a header: reward functions get columns as arguments."""
    rows = [{"prompt": f"{number}", 0: "a"} for number in range(8)]
    data = _data(RowsTask(rows, num_validation=0, conversational=False), str(micro_model_dir))
    with pytest.raises(UserError, match=r"^row rows:train:\d: the name of the column 0 is no text, .*; rename it$"):
        data.check()


def test_files_and_models_may_be_paths_of_a_program(micro_model_dir: Path, tmp_path: Path) -> None:
    for name in ("train", "held_out"):
        lines = "".join(f'{{"prompt": "{name[0]}{number}", "answer": "1"}}\n' for number in range(4))
        (tmp_path / f"{name}.jsonl").write_text(lines)
    train, held_out = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"
    task = RowsTask(train, validation_split=held_out, num_validation=None, conversational=False)  # type: ignore[arg-type]
    data = PromptDataModule(task, Path(micro_model_dir), prompts_per_rollout=2, max_prompt_length=16)  # type: ignore[arg-type]
    data.check()
    assert sorted(prompt.prompt for batch in data.val_dataloader() for prompt in batch.prompts) == [
        "h0",
        "h1",
        "h2",
        "h3",
    ]
    assert PolicyLoader(Path(micro_model_dir)).load().tokenizer.vocab_size == data.tokenizer.vocab_size  # type: ignore[arg-type]
