"""Two ranks with FSDP2: engines see whole weights, and ranks with different numbers of forwards stay in step."""

from __future__ import annotations

import functools
import sys
import warnings
import weakref
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from gspo_lightning.distributed import sharding
from gspo_lightning.distributed.ranks import rank, whole
from gspo_lightning.distributed.sharding import FSDP2Strategy
from gspo_lightning.policy.load import LoraSettings
from gspo_lightning.rollout import TransformersEngine
from gspo_lightning.training import run_state as run_state_module
from gspo_lightning.types import Rollout, SamplingParams
from tests.scripted import Batches, Settings, build_module, scripted_prompts, trainer

GREEDY = SamplingParams(num_generations=2, max_completion_length=8, temperature=1.0)


class Seeing:
    """Samples nothing; keeps the policy it is given."""

    def __init__(self, samples_on: str) -> None:
        self.samples_on = samples_on
        self.seen = []

    def generate(self, policy, prompts, sampling, seed):
        self.seen.append(policy)
        return Rollout(prompts, [prompt.sample["completions"] for prompt in prompts])


def check_engine(model: str, samples_on: str, lora: LoraSettings | None) -> None:
    torch.manual_seed(0)
    # The base of an adapter is narrowed behind the loading.
    precision, dtype = ("bf16-true", "float32") if lora else ("32-true", "float64")
    module = build_module(model, Settings(lora=lora, rollouts=2, dtype=dtype))
    module.engine = engine = Seeing(samples_on)
    most = count_whole_weights()
    runner = trainer(devices=2, strategy=FSDP2Strategy(), precision=precision)
    runner.fit(module, Batches(scripted_prompts(count=2), 2).loader())
    module.engine.generate(module.policy, [], GREEDY, 0)
    gets_copy = samples_on == "every_rank" or rank() == 0
    assert (engine.seen[-1] is not module.policy) == gets_copy
    exported = sharding.whole_policy(module.policy, module.policy_loader)
    copies = [engine.seen[-1]] * gets_copy + [exported] * (rank() == 0)
    for number, (name, mine) in enumerate(module.policy.named_parameters()):
        value = whole(mine.detach())  # of all ranks
        for copy in copies:
            assert torch.equal(value, list(copy.parameters())[number]), name
    assert all(policy is engine.seen[-1] for policy in engine.seen)
    assert most == [1]


def count_whole_weights() -> list[int]:
    """The largest number of gathered weights that were there at one time, from now on."""
    there: list[weakref.ref] = []
    most = [0]

    def counted(tensor):
        value = whole(tensor)
        there[:] = [reference for reference in there if reference() is not None] + [weakref.ref(value)]
        most[0] = max(most[0], len(there))
        return value

    sharding.whole = counted
    return most


class OnDevice:
    """A gathered weight that is counted until it is brought to the CPU, as one on a GPU."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value

    def cpu(self) -> torch.Tensor:
        return self.value


def check_reference(model: str) -> None:
    """A reference that has moved is saved whole, by rank 0 alone, and gathered one weight at a time."""
    update = {"ref_sync_every_n_rollouts": 1}
    module = build_module(model, Settings(objective={"beta": 0.1}, update=update))
    trainer(devices=2, strategy=FSDP2Strategy()).fit(module, Batches(scripted_prompts(count=2)).loader())
    (reference,) = module.references
    expected = {name: whole(value) for name, value in reference.state_dict().items()}  # of all ranks
    there: list[weakref.ref] = []
    most, calls = 0, 0

    def counted(tensor):
        nonlocal most, calls
        value = OnDevice(whole(tensor))
        there[:] = [known for known in there if known() is not None] + [weakref.ref(value)]
        most, calls = max(most, len(there)), calls + 1
        return value

    run_state_module.whole = counted
    (saved,) = run_state_module.run_state(module)["reference"]
    run_state_module.whole = whole
    assert (most, calls) == (1, len(expected))
    assert list(saved) == (list(expected) if rank() == 0 else [])
    for name, value in saved.items():
        assert type(value) is torch.Tensor and value.device.type == "cpu", name
        assert torch.equal(value, expected[name]), name


def check_unequal(model: str, gather: bool) -> None:
    """Rank 0 has three prompts in three batches, rank 1 one: what they sample is what one process samples."""
    settings = Settings(optimizer=functools.partial(torch.optim.SGD, lr=0.0))
    alone = build_module(model, settings)
    alone.configure_model()
    prompts = scripted_prompts(count=4)
    expected = TransformersEngine(max_concurrent=2).generate(alone.policy, prompts, GREEDY, 7)
    module = build_module(model, settings)
    strategy = FSDP2Strategy(gather_for_rollouts=gather)
    trainer(devices=2, strategy=strategy).fit(module, Batches(prompts).loader())
    mine = slice(0, 3) if rank() == 0 else slice(3, 4)
    got = TransformersEngine(max_concurrent=2).generate(module.policy, prompts[mine], GREEDY, 7)
    for ours, theirs in zip(got.completions, expected.completions[mine], strict=True):
        assert [c.token_ids.tolist() for c in ours] == [c.token_ids.tolist() for c in theirs]
    # Parts again: nothing is left whole, and there is something to gather.
    assert all(hasattr(p, "full_tensor") for p in module.policy.parameters())
    assert all(p.to_local().numel() < p.numel() for p in module.policy.parameters() if p.shape[0] > 1)
    # A rank without any prompt runs along.
    engine = TransformersEngine(max_concurrent=2)
    again = engine.generate(module.policy, prompts[3:] if rank() else [], GREEDY, 7)
    for ours, theirs in zip(again.completions, expected.completions[3:], strict=False):
        assert [c.token_ids.tolist() for c in ours] == [c.token_ids.tolist() for c in theirs]
    assert len(again.completions) == rank()


def main() -> None:
    warnings.filterwarnings("ignore")
    model, *cases = sys.argv[1:]
    for case in cases:
        if case in ("gathered", "layer by layer"):
            check_unequal(model, case == "gathered")
        elif case == "reference":
            check_reference(model)
        else:
            check_engine(model, case.removesuffix("-lora"), LoraSettings(r=2) if case.endswith("-lora") else None)
        Path(f"{case}-{rank()}.done").touch()


if __name__ == "__main__":
    main()
