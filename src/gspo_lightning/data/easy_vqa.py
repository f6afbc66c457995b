"""Open questions about small images, from the package ``easy-vqa`` (MIT): real images, no network.

The package has 4,000 training images. Even numbers belong to the supervised warm-up of ``bundled:tiny-vlm``, odd ones
to reinforcement learning, so that no image is in both; its 1,000 test images are held out from both.
Yes/no questions (three in four) are left out: they can be guessed.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from gspo_lightning.data.tasks import Row
from gspo_lightning.errors import UserError

Question = tuple[str, str, str]
"""Question, answer, path of the image."""


COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
"""The answers that are colours; all others are shapes."""


@dataclass(frozen=True)
class EasyVQA:
    """Questions for the colour or the shape in an image of 64 x 64 pixels, each answered by one word.

    ``shuffle_images`` gives every training and held-out question the image of another one: the accuracy of a model
    that uses the images falls to what the text alone allows.
    """

    part: Literal["rl", "warmup"] = "rl"
    num_validation: int = 256
    shuffle_images: bool = False
    name: str = "easy_vqa"

    def check(self) -> None:
        """Raises if the package is missing."""
        _package()

    @property
    def questions(self) -> list[Question]:
        """The questions of the training rows, as the package has them."""
        return self._train

    @property
    def text_only_accuracy(self) -> float:
        """Held-out accuracy of each question's most frequent training answer: the best that text alone allows."""
        counts: dict[str, Counter[str]] = {}
        for text, answer, _ in self._train:
            counts.setdefault(text, Counter())[answer] += 1
        best = {text: own.most_common(1)[0][0] for text, own in counts.items()}
        return sum(best.get(text) == answer for text, answer, _ in self._held_out) / len(self._held_out)

    @property
    def num_train_rows(self) -> int:
        """Number of questions about this part's images."""
        return len(self._train)

    def train_row(self, index: int) -> Row:
        """An image and a question."""
        return _row(self._train[index])

    def validation_rows(self) -> list[Row]:
        """Questions about test images, chosen by a fixed shuffle; those of the two parts do not overlap."""
        return [_row(question) for question in self._held_out]

    @cached_property
    def _train(self) -> list[Question]:
        package = _package()
        odd = self.part == "rl"
        return self._shuffled(
            _questions(package.get_train_questions(), package.get_train_image_paths(), lambda i: i % 2 == odd)
        )

    @cached_property
    def _held_out(self) -> list[Question]:
        package = _package()
        odd = self.part == "rl"
        found = _questions(package.get_test_questions(), package.get_test_image_paths(), lambda i: i % 2 == odd)
        if not 0 < self.num_validation <= len(found):
            raise UserError(f"data.task.num_validation={self.num_validation} must be between 1 and {len(found)}")
        random.Random("held-out questions").shuffle(found)
        return self._shuffled(found[: self.num_validation])

    def _shuffled(self, questions: list[Question]) -> list[Question]:
        if not self.shuffle_images:
            return questions
        images = [image for _, _, image in questions]
        random.Random("other pictures").shuffle(images)  # a seed: docs/vision.md was measured with it
        return [(text, answer, image) for (text, answer, _), image in zip(questions, images, strict=True)]


def _questions(found: Any, paths: dict[int, str], belongs: Any) -> list[Question]:
    return [
        (text, answer, paths[image])
        for text, answer, image in zip(*found, strict=True)
        if answer not in ("yes", "no") and belongs(image)
    ]


def _row(question: Question) -> Row:
    text, answer, image = question
    content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
    return {"prompt": [{"role": "user", "content": content}], "answer": answer, "question": text}


def _package() -> Any:
    try:
        import easy_vqa
    except ImportError as error:
        raise UserError("the images come from the package easy-vqa; run: pip install easy-vqa==1.0") from error
    return easy_vqa
