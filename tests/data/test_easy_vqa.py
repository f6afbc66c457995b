"""The questions of easy-vqa with the images of others."""

from __future__ import annotations

from gspo_lightning.data import easy_vqa
from tests.conf.probes.data import FakeEasyVQA


def test_the_shuffle_of_the_images_is_that_of_the_accuracy_in_the_docs(monkeypatch):
    monkeypatch.setattr(easy_vqa, "_package", FakeEasyVQA)
    rows = easy_vqa.EasyVQA(num_validation=8, shuffle_images=True).validation_rows()
    assert [row["prompt"][0]["content"][0]["image"] for row in rows] == [
        f"test{number}.png" for number in (5, 9, 13, 15, 17, 11, 19, 3)
    ]
