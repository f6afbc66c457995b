"""The first half of the tiny model's warm-up: its vision tower learns to see, without the language model.

A small transformer does not learn shapes from two thousand labels alone: it stays at the level of guessing. So the
tower also predicts, for each of its output tokens, how many edges of each direction lie there (histograms of oriented
gradients, as in MaskFeat, arXiv 2112.09133), which the images themselves say. Its outputs are drawn to the language
model's embeddings of the words for what is in the image: the first tokens to the colour, the others to the shape. To
the language model an image then begins as a few words that it knows.
"""

from __future__ import annotations

import logging
import math
import random
import time
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from gspo_lightning.data.easy_vqa import COLOURS, EasyVQA

log = logging.getLogger(__name__)

SIDE, TOKENS = 84, 9
"""Pixels of a side, and output tokens of an image (3 x 3)."""
COLOUR_TOKENS = 4
DIRECTIONS = 32
EDGE = 20.0
"""Difference of two pixels (of 255) above which there is an edge."""
BATCH, STEPS, RATE = 64, 900, 1e-3

Labels = dict[str, dict[str, str]]
"""Path of an image -> ``colour`` and ``shape``, each if a question asks for it."""


def learn_to_see(model: Any, processor: Any, task: EasyVQA) -> None:
    """Trains the vision tower of ``model`` on the images of ``task``; two to four minutes on two cores."""
    tower, start = model.model.visual, time.perf_counter()
    labelled = list(labels_of(task).items())
    words = _embeddings(model, processor.tokenizer)
    width = next(iter(words.values())).shape[-1]
    generator = random.Random(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        edges = torch.nn.Linear(width, DIRECTIONS)
    optimizer = torch.optim.AdamW([*tower.parameters(), *edges.parameters()], lr=RATE, weight_decay=0.01)
    for step in range(1, STEPS + 1):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, step / 50, (STEPS - step + 1) / (0.3 * STEPS))
        batch = generator.sample(labelled, BATCH)
        images = [_opened(path, generator) for path, _ in batch]
        features = features_of(tower, processor, images)
        loss = _word_loss(features, [labels for _, labels in batch], words) + _edge_loss(edges(features), images)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            log.info("sight: step %d of %d, %.0f s, loss %.3f", step, STEPS, time.perf_counter() - start, loss.item())


def labels_of(task: EasyVQA) -> Labels:
    """What the training questions say about each image."""
    labels: Labels = {}
    for _, answer, path in task.questions:
        labels.setdefault(path, {})["colour" if answer in COLOURS else "shape"] = answer
    return labels


def features_of(tower: Any, processor: Any, images: list[Any]) -> Tensor:
    """``(N, TOKENS, H)`` float32 outputs of the tower."""
    inputs = processor.image_processor(images, return_tensors="pt")
    with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported()):
        output = tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    return getattr(output, "pooler_output", output).float().view(len(images), TOKENS, -1)


def edge_histograms(images: list[Any]) -> Tensor:
    """``(N, TOKENS, DIRECTIONS)``: log(1 + edge pixels) of each direction in each of the 3 x 3 fields of an image."""
    pixels = torch.stack(
        [torch.frombuffer(bytearray(i.resize((SIDE, SIDE)).tobytes()), dtype=torch.uint8) for i in images]
    )
    x = pixels.view(len(images), SIDE, SIDE, 3).float()
    across, down = x[:, 1:-1, 2:] - x[:, 1:-1, :-2], x[:, 2:, 1:-1] - x[:, :-2, 1:-1]
    # Each pixel by the colour channel in which it changes most.
    channel = (across.square() + down.square()).argmax(-1, keepdim=True)
    across, down = across.gather(-1, channel)[..., 0], down.gather(-1, channel)[..., 0]
    direction = ((torch.atan2(down, across) + math.pi) / (2 * math.pi) * DIRECTIONS).long().clamp(0, DIRECTIONS - 1)
    edge = (across.square() + down.square()).sqrt() > EDGE
    counts = torch.zeros(len(images), SIDE, SIDE, DIRECTIONS)
    counts[:, 1:-1, 1:-1].scatter_(-1, direction[..., None], edge[..., None].float())
    side = math.isqrt(TOKENS)
    fields = counts.view(len(images), side, SIDE // side, side, SIDE // side, DIRECTIONS).sum((2, 4))
    return torch.log1p(fields.view(len(images), TOKENS, DIRECTIONS))


def _edge_loss(predicted: Tensor, images: list[Any]) -> Tensor:
    wanted = edge_histograms(images)
    return (predicted - wanted).square().mean() / wanted.var(dim=(0, 1)).mean()


def _word_loss(features: Tensor, labels: list[dict[str, str]], words: dict[str, Tensor]) -> Tensor:
    scale = torch.stack(list(words.values())).square().sum(-1).mean()
    loss = features.new_zeros(())
    for part, kind in ((features[:, :COLOUR_TOKENS], "colour"), (features[:, COLOUR_TOKENS:], "shape")):
        known = [number for number, own in enumerate(labels) if kind in own]
        target = torch.stack([words[labels[number][kind]][: part.shape[1]] for number in known])
        loss = loss + (part[known] - target).square().sum(-1).mean() / scale
    return loss


def _embeddings(model: Any, tokenizer: Any) -> dict[str, Tensor]:
    """``(TOKENS, H)`` of each answer: the embeddings of its tokens after a space, again and again."""
    weight = model.get_output_embeddings().weight.detach()
    ids = {word: tokenizer(" " + word)["input_ids"] for word in (*COLOURS, "circle", "rectangle", "triangle")}
    return {word: weight[(own * TOKENS)[:TOKENS]] for word, own in ids.items()}


def _opened(path: str, generator: random.Random) -> Any:
    image = Image.open(path).convert("RGB")
    return ImageOps.mirror(image) if generator.randrange(2) else image
