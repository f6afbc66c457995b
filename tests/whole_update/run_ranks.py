"""Cases on several ranks; writes the metrics and trained tensors of each. Run as a script by test_ranks.py."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy

sys.path.insert(0, str(Path(__file__).parents[2]))

from gspo_lightning.distributed.sharding import FSDP2Strategy
from tests.whole_update import product
from tests.whole_update.case import Case
from tests.whole_update.controlled import CONTROLLED
from tests.whole_update.covariant import COVARIANT
from tests.whole_update.draw import draw
from tests.whole_update.draw_models import draw_model, draw_padded
from tests.whole_update.estimators import OF_ESTIMATORS
from tests.whole_update.float64 import float64_layers
from tests.whole_update.reference_model import Network
from tests.whole_update.scripted_rollouts import scripted_stream

RANKS = 2

DRAWN = {
    "text": draw,
    "model": draw_model,
    "padded": draw_padded,
    "control": {case.seed: case for case in CONTROLLED}.__getitem__,
    "tokens": {case.seed: case for case in OF_ESTIMATORS}.__getitem__,
    "covariant": {case.seed: case for case in COVARIANT}.__getitem__,
}


def on_ranks(name: str) -> Case:
    """The case of ``strategy-drawn-seed`` with as many prompts for every rank.

    Memory is enough, since ranks do not repeat a forward. FSDP2 refuses rollouts ahead and padded rows, and the terms
    that the subclass adds are of whole weights.
    """
    strategy, drawn, seed = name.split("-")
    case = DRAWN[drawn](int(seed))
    case = replace(case, prompts=case.prompts * RANKS, fits=0)
    return case if strategy == "ddp" else replace(case, stale=False, padded=False, auxiliary=0.0, balance=0.0)


def main() -> None:
    folders, out, *names = sys.argv[1:]
    warnings.filterwarnings("ignore")
    networks = {kind: Network(folder) for kind, folder in json.loads(folders).items()}
    for name in names:
        case = on_ranks(name)
        folder = json.loads(folders)[case.model]
        with float64_layers():
            stream = scripted_stream(case, networks[case.model])
            module = product.prepared(folder, case)
            before, strategy = product.trained_tensors(module), DDPStrategy(gradient_as_bucket_view=True)
            if name.startswith("fsdp"):
                # Loaded once more by the Trainer, which splits it.
                module, strategy = product.build(folder, case), FSDP2Strategy()
            recorder = product.train(module, case, stream, devices=RANKS, strategy=strategy)
        if module.trainer.is_global_zero:
            torch.save({"before": before, "metrics": recorder.metrics, "tensors": recorder.tensors}, f"{out}/{name}.pt")


if __name__ == "__main__":
    main()
