"""What each argument of a task and of the data module does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from transformers import AutoTokenizer

from gspo_lightning.data import easy_vqa, reasoning_gym, rows
from gspo_lightning.policy.bundled import resolve_model
from tests.conf.probes.base import ORACLE, Probe, built, or_error


def prompts_of(node: dict[str, Any]) -> Any:
    """The first prompts exactly as the model sees them, training and held out."""

    def read() -> Any:
        data = built(node)
        data.encoder.tokenizer = TOKENIZER(resolve_model(data.model_path))
        data.check()
        batches = [data.batch_at(0), *data.val_dataloader()]
        return [
            (p.uid, str(p.prompt), p.input_ids.tolist(), {k: str(v) for k, v in p.sample.items()}, shapes(p))
            for batch in batches
            for p in batch.prompts
        ]

    return or_error(read)


TOKENIZER = functools.cache(AutoTokenizer.from_pretrained)
"""Loading one takes longer than the rest of a test."""


def shapes(prompt: Any) -> Any:
    return {name: tuple(value.shape) for name, value in prompt.mm_inputs.items()}


def data(node: dict[str, Any], folder: Path) -> Any:
    return prompts_of(node)


def hub_rows(source: str, config_name: str | None, split: str) -> list[dict[str, Any]]:
    """A dataset that says what was asked for."""
    mark = f"{source} {config_name} {split}"
    return [
        {
            "prompt": f"{mark} plain {n}", "question": f"{mark} question {n}", "hint": f"hint {n} #### {n}", "answer": n % 2,
            "right": 1 - n % 2, "options": ["yes", "no"], "choices": ["one", "two"], "kind": "even" if n % 2 == 0 else "odd",
        }
        for n in range(12)
    ]  # fmt: skip


def puzzles(node: dict[str, Any], folder: Path) -> Any:
    """Prompts of a reasoning-gym whose questions say what was asked of it; every second training one is long."""

    def dataset(name: str, options: str, seed: int, size: int) -> list[dict[str, Any]]:
        filler = " very long" * 20
        return [
            {"question": f"{name} {options} {seed % 7} {n}{filler if n % 2 and size > 9 else ''}", "answer": str(n)}
            for n in range(size)
        ]

    with mock.patch.object(reasoning_gym, "_dataset", dataset):
        return prompts_of(node)


def task_in(file_node: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[dict[str, Any], Path], Any]:
    """Observes a task through a data module around it."""

    def observe(node: dict[str, Any], folder: Path) -> Any:
        with mock.patch.object(rows, "read_hub", hub_rows):
            return prompts_of(file_node(node))

    return observe


def around(task: dict[str, Any]) -> dict[str, Any]:
    return {
        "_target_": "gspo_lightning.data.PromptDataModule", "task": task, "model_path": "bundled:smollm2-135m-instruct",
        "prompts_per_rollout": 4, "max_prompt_length": 256,
    }  # fmt: skip


class FakeEasyVQA:
    """Questions and paths in the form of the package."""

    def _questions(self, count: int) -> Any:
        numbers = range(count)
        return [f"what? {n}" for n in numbers], [f"a{n}" for n in numbers], list(numbers)

    def get_train_questions(self) -> Any:
        return self._questions(40)

    def get_test_questions(self) -> Any:
        return self._questions(20)

    def get_train_image_paths(self) -> dict[int, str]:
        return {n: f"train{n}.png" for n in range(40)}

    def get_test_image_paths(self) -> dict[int, str]:
        return {n: f"test{n}.png" for n in range(20)}


def easy_questions(node: dict[str, Any], folder: Path) -> Any:
    with mock.patch.object(easy_vqa, "_package", FakeEasyVQA):
        task = built(node)
        return [task.train_row(n) for n in range(5)], task.validation_rows()


def image_sizes(node: dict[str, Any], folder: Path) -> Any:
    """Patches of an image of 64 x 96 pixels, by the processor of a model that sees."""
    from PIL import Image

    from gspo_lightning.data.vision import encode_conversation
    from gspo_lightning.policy import tiny_vlm

    image = {"type": "image", "image": Image.new("RGB", (96, 64))}
    with mock.patch.object(easy_vqa, "_package", FakeEasyVQA):
        settings = built(node).vision_settings
    processor = tiny_vlm.build_processor(Path(resolve_model("bundled:smollm2-135m-instruct")), folder)
    _, inputs = encode_conversation([{"role": "user", "content": [image]}], processor, settings, {}, "row")
    return {name: tuple(value.shape) for name, value in inputs.items()}


LETTERS = {"_target_": "gspo_lightning.data.MicroLetters", "letters": "ab", "num_validation": 2}
MICRO = {"model_path": "bundled:micro", "prompts_per_rollout": 2, "validation_batch_size": 8}
TALKING = {"model_path": "bundled:smollm2-135m-instruct", "prompts_per_rollout": 4}
HUB = {"source": "someone/set", "num_validation": 3}

ROWS_CHANGES = {
    "source": "someone/other", "name": "other", "split": "test", "config_name": "main", "validation_split": "test",
    "prompt_column": "hint", "template": "{hint}?", "system_prompt": "Be brief.", "conversational": False,
    "image_columns": ["hint"], "keep_rows": {"kind": "even"}, "columns": {"answer": "right"}, "patterns": {"hint": "#### (.*)"},
}  # fmt: skip


PROBES = [
    Probe(["data=micro_digit"], "data.task", task_in(around), {"digits": "57"}, {"num_validation": 2}),
    Probe(["data=arithmetic"], "data.task", task_in(around), {"op": "*", "digits": 2, "seed": 5, "num_validation": 3}),
    Probe(["data=largest_of_four"], "data.task", task_in(around), {"seed": 5, "num_validation": 3}, {"num_validation": 4}),
    Probe(["data=rows", "data.task.source=x"], "data.task", task_in(around), ROWS_CHANGES, HUB),
    Probe(["data=multiple_choice", "data.task.source=x"], "data.task", task_in(around), {
        **ROWS_CHANGES,
        "choices_column": "options", "answer_column": "right", "prompt_column": "question", "template": "{question} {options}?",
    }, {**HUB, "template": None}),
    Probe(["data=mixture"], "data.task", task_in(around), {
        "name": "other", "seed": 5, "weights": {"a": 1, "b": 2},
    }, {"tasks": {"a": LETTERS, "b": {"_target_": "gspo_lightning.data.RowsTask", "source": str(ORACLE),
                                      "prompt_column": "question", "num_validation": 2}}, "weights": {"a": 2, "b": 1}}),
    Probe(["data=easy_vqa"], "data.task", easy_questions, {"part": "warmup", "shuffle_images": True}, {"num_validation": 4}),
    Probe(["data=easy_vqa"], "data", image_sizes, {"min_pixels": 56 * 56 * 16, "max_pixels": 28 * 28}),
    Probe(["data=largest_of_four"], "data", data, {
        "model_path": "bundled:micro", "max_prompt_length": 3, "chat_template_kwargs": {"enable_thinking": False},
    }, {**TALKING, "task": {"_target_": "gspo_lightning.data.LargestOfFour", "num_validation": 2}}),
    Probe(["data=micro_letters"], "data", data, {"overlong_prompts": "drop"}, {
        **MICRO, "max_prompt_length": 4,
        "task": {"_target_": "gspo_lightning.data.RowsTask", "conversational": False, "num_validation": 1,
                 "source": [{"prompt": f"{n}ab" * (1 + n // 5)} for n in range(6)]},
    }),
    Probe(["data=reasoning_gym", "data.task=gcd"], "data", puzzles, {
        "task": "lcm", "options": {"max": 9}, "instruction": "?", "num_validation": 3, "model_path": "bundled:micro",
        "max_prompt_length": 3, "chat_template_kwargs": {"enable_thinking": False}, "overlong_prompts": "error",
    }, {"num_validation": 2, "prompts_per_rollout": 2, "max_prompt_length": 52, "overlong_prompts": "drop"}),
]  # fmt: skip
