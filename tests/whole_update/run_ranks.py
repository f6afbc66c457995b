"""Cases on several ranks; writes the metrics and trained tensors of each. Run as a script by test_ranks.py."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.whole_update import product
from tests.whole_update.case import Case
from tests.whole_update.draw import draw
from tests.whole_update.float64 import float64_layers
from tests.whole_update.reference_model import Network
from tests.whole_update.scripted_rollouts import scripted_stream

RANKS = 2


def on_ranks(seed: int) -> Case:
    """The case of a seed with as many prompts for every rank, and memory enough: ranks do not repeat a forward."""
    case = draw(seed)
    return replace(case, prompts=case.prompts * RANKS, fits=0)


def main() -> None:
    folder, out, *seeds = sys.argv[1:]
    warnings.filterwarnings("ignore")
    network = Network(folder)
    for seed in map(int, seeds):
        case = on_ranks(seed)
        with float64_layers():
            stream = scripted_stream(case, network)
            module = product.prepared(folder, case)
            before = product.trained_tensors(module)
            recorder = product.train(
                module, case, stream, devices=RANKS, strategy=DDPStrategy(gradient_as_bucket_view=True)
            )
        if module.trainer.is_global_zero:
            torch.save({"before": before, "metrics": recorder.metrics, "tensors": recorder.tensors}, f"{out}/{seed}.pt")


if __name__ == "__main__":
    main()
