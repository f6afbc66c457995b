"""The targets of the tiny tower's warm-up, on images whose edges are known."""

from __future__ import annotations

import math

import torch
from PIL import Image, ImageDraw

from gspo_lightning.policy.tiny_vlm_sight import DIRECTIONS, edge_histograms


def with_rectangle(box):
    image = Image.new("RGB", (84, 84), (200, 200, 200))
    ImageDraw.Draw(image).rectangle(box, fill=(200, 200, 0))
    return image


def test_edges_are_counted_by_direction_and_field():
    """A rectangle inside the first of 3 x 3 fields: columns 7 to 20 and rows 8 to 19, dark in the blue channel."""
    counts = edge_histograms([with_rectangle((7, 8, 20, 19))])[0].expm1().round()
    assert counts[1:].sum() == 0, "an edge outside the field of the rectangle"
    found = {direction: int(counts[0, direction]) for direction in counts[0].nonzero().flatten().tolist()}

    def bin_of(across, down):
        return min(DIRECTIONS - 1, int((math.atan2(down, across) + math.pi) / (2 * math.pi) * DIRECTIONS))

    # Central differences see each side twice: 12 pixels outside and 10 inside on the left and on the right, 14 and 12
    # above and below; in the four corner pixels both differences act, and their direction is diagonal.
    left, right, top, bottom = bin_of(-200, 0.0), bin_of(200, 0), bin_of(0, -200), bin_of(0, 200)
    straight = {left: 22, right: 22, top: 26, bottom: 26}
    assert {d: found[d] for d in straight} == straight
    assert sum(found.values()) - sum(straight.values()) == 4


def test_a_plain_image_has_no_edges():
    assert edge_histograms([Image.new("RGB", (84, 84), (9, 99, 199))]).abs().max() == 0
    assert edge_histograms([with_rectangle((0, 0, 83, 83)), with_rectangle((60, 60, 70, 70))]).shape == torch.Size(
        [2, 9, DIRECTIONS]
    )


class Package:
    """Four images; the odd ones are for reinforcement learning, and so are the odd test images."""

    def get_train_questions(self):
        return ["shape?"] * 4 + ["colour?"], ["circle", "circle", "triangle", "circle", "red"], [1, 3, 1, 5, 3]

    def get_test_questions(self):
        return ["shape?", "shape?", "colour?", "size?"], ["circle", "triangle", "red", "big"], [1, 3, 1, 3]

    def get_train_image_paths(self):
        return {number: str(number) for number in range(6)}

    get_test_image_paths = get_train_image_paths


def test_text_alone_gets_the_most_frequent_answer_of_training(monkeypatch):
    """``circle`` and ``red``: right on one of two shapes, on the colour, and never on a question that is new."""
    from gspo_lightning.data import easy_vqa

    monkeypatch.setattr(easy_vqa, "_package", Package)
    assert easy_vqa.EasyVQA(num_validation=4).text_only_accuracy == 0.5
