"""`dry_run=true`: counts by hand, and no weight is loaded."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from gspo_lightning import GSPOModule, cli
from gspo_lightning.config import hardware
from gspo_lightning.config.build import build_module
from gspo_lightning.packing import pack
from gspo_lightning.policy.load import LoraSettings, PolicyLoader
from gspo_lightning.program.estimate import ACTIVATIONS, GIB, estimate, own_parts
from gspo_lightning.program.memory_parts import Ranks, Work
from gspo_lightning.training.update import UpdateSettings
from tests.command_line import rows, run
from tests.conf.test_groups import resolved
from tests.support import make_prompt, micro_policy

PROMPTS = [make_prompt(torch.arange(3, 3 + n), uid=str(n)) for n in (5, 9, 7, 6)]
USUAL = {
    "num_generations": 3, "max_completion_length": 8, "validation_rows": 0, "max_concurrent": 256,
    "update": UpdateSettings(num_minibatches=2), "optimizer": "AdamW", "needs_reference": False, "precision": "32-true",
    "on_gpu": True,
}  # fmt: skip


def of(path="bundled:micro", loader=None, **changes):
    return estimate(loader or PolicyLoader(str(path)), PROMPTS, Work(**{**USUAL, **changes}))


def test_weights_gradients_and_moments_are_those_of_the_model(micro_model_dir):
    found, count = of(micro_model_dir), sum(p.numel() for p in micro_policy(micro_model_dir).parameters())
    assert found.parameters == found.trained == count
    assert found.parts["weights"] == found.parts["gradients"] == 4 * count
    assert found.parts["optimizer (AdamW)"] == 8 * count
    assert of(micro_model_dir, optimizer="AdamW8bit").parts["optimizer (AdamW8bit)"] == 2 * count
    assert of(micro_model_dir, needs_reference=True).parts["reference"] == 4 * count
    assert (
        of(micro_model_dir, loader=PolicyLoader(str(micro_model_dir), dtype="bfloat16")).parts["weights"] == 2 * count
    )


def test_a_bundled_model_that_has_not_been_built_yet_is_built_first(tmp_path, monkeypatch):
    known = of("bundled:micro-gpt-oss")
    monkeypatch.setenv("GSPO_CACHE", str(tmp_path))
    assert of("bundled:micro-gpt-oss").parameters == known.parameters


def test_only_the_adapter_has_gradients_and_it_needs_no_reference(micro_model_dir):
    loader = PolicyLoader(str(micro_model_dir), lora=LoraSettings(r=2))
    found = of(loader=loader, needs_reference=True)
    trained = sum(p.numel() for p in loader.load().parameters() if p.requires_grad)
    assert found.trained == trained < found.parameters / 5
    assert found.parts["gradients"] == 4 * trained
    assert "reference" not in found.parts


@pytest.mark.parametrize(
    ("model", "dtype"), [("micro", "float32"), ("micro-gpt-oss", "float32"), ("micro-gpt-oss", "bfloat16")]
)
def test_activations_are_what_autograd_keeps_of_the_largest_micro_batch(model, dtype):
    """Two groups a minibatch; the largest is that of the prompts of 5 and 9 tokens or of 7 and 6: 14 and 3 x 7 x 2."""
    loader = PolicyLoader(f"bundled:{model}", dtype=dtype)
    found = of(loader=loader)
    assert found.pace["forwarded at a time"].startswith("56 tokens")
    policy = loader.load()
    own = {p.data_ptr() for p in policy.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    completion = torch.zeros(8, dtype=torch.long)
    row = pack([(p.input_ids, [completion] * 3) for p in PROMPTS[:2]], torch.device("cpu"))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        policy(row)
    real = sum(size for size, _ in kept.values())
    assert found.parts[ACTIVATIONS] == pytest.approx(real, rel=0.001)


@pytest.mark.parametrize(("on_gpu", "tokens"), [(True, 96), (False, 76)])
def test_what_prompts_begin_with_is_in_the_row_as_often_as_it_will_be(on_gpu, tokens):
    """20 tokens before each of those prompts: 25 + 29 and 3 x 7 x 2, of which a CPU forwards 20 less."""
    prompts = [make_prompt(torch.cat([torch.arange(50, 70), torch.arange(n, 2 * n)])) for n in (5, 9, 7, 6)]
    found = estimate(PolicyLoader("bundled:micro"), prompts, Work(**{**USUAL, "on_gpu": on_gpu}))
    assert found.pace["forwarded at a time"].startswith(f"{tokens} tokens")


def test_under_fsdp_a_process_holds_its_share_and_what_is_gathered(micro_model_dir):
    """By hand: a quarter of everything; embeddings and two layers whole, twice the gradients of the larger unit or its
    weights; and all weights once more while it samples.
    """
    policy = micro_policy(micro_model_dir)
    layers = [sum(p.numel() for p in layer.parameters()) for layer in policy.base_model.get_decoder().layers]
    count = sum(p.numel() for p in policy.parameters())
    outside = count - sum(layers)
    split = {"ranks": Ranks(4, sharded=True, gather_for_rollouts=False), "needs_reference": True}
    found = of(micro_model_dir, **split)
    for part, bytes_each in {"weights": 4, "gradients": 4, "optimizer (AdamW)": 8, "reference": 4}.items():
        assert found.parts[part] == bytes_each * count / 4
    assert of(micro_model_dir, **split, optimizer="AdamW8bit").parts["optimizer (AdamW8bit)"] == 2 * count / 4
    gathered = "layers gathered to compute"
    assert found.parts[gathered] == 4 * (outside + 2 * layers[0] + 2 * max(outside, layers[0]))
    adapter = of(loader=PolicyLoader(str(micro_model_dir), lora=LoraSettings(r=2)), ranks=Ranks(4, sharded=True))
    trained = adapter.trained // len(layers)
    layer = layers[0] + trained
    assert adapter.parts[gathered] == 4 * (outside + 2 * layer + max(outside, layer, 2 * trained))
    whole = of(micro_model_dir, ranks=Ranks(4, sharded=True))
    assert (whole.rollout, whole.whole, found.whole) == (found.rollout, 4 * count, 0)
    fixed = sum(4 * n * count / 4 for n in (1, 1, 2))
    assert whole.total == fixed + max(whole.parts[gathered] + whole.parts[ACTIVATIONS], whole.rollout + whole.whole)
    # Nothing is packed where weights are split.
    assert of(micro_model_dir, ranks=Ranks(4, sharded=True), on_gpu=False).rollout == found.rollout
    every = of(micro_model_dir, ranks=Ranks(4))
    assert every.parts["weights"] == 4 * count and not {gathered, "gradients in transit"} & every.parts.keys()
    small = UpdateSettings(num_minibatches=2, max_tokens_per_microbatch=40)
    assert of(micro_model_dir, ranks=Ranks(4), update=small).parts["gradients in transit"] == 4 * count
    assert "gradients in transit" not in of(micro_model_dir, update=small).parts


def test_the_cache_of_a_rollout_by_hand(micro_model_dir):
    """2 layers of keys and values, 2 heads of 16, float32: prompts once, whole completions; 4 x logits of all rows."""
    vocabulary = micro_policy(micro_model_dir).output_weight.shape[0]

    def by_hand(prompts, rows):
        return 2 * 2 * (prompts * 9 + rows * 8) * 2 * 16 * 4 + 4 * rows * vocabulary * 4

    assert of(micro_model_dir).rollout == by_hand(4, 12)
    assert of(micro_model_dir, validation_rows=40).rollout == by_hand(40, 40)
    assert of(micro_model_dir, validation_rows=40, max_concurrent=30).rollout == by_hand(30, 30)
    assert of(micro_model_dir, max_concurrent=0).rollout == 0
    # At least one prompt's completions: 3 rows of training; 4 of two prompts that are measured; 16 of one.
    assert of(micro_model_dir, max_concurrent=2).rollout == by_hand(1, 3)
    held_out = {"validation_rows": 32, "max_concurrent": 5}
    assert of(micro_model_dir, **held_out, validation_generations=2).rollout == by_hand(4, 4)
    found = of(micro_model_dir, **held_out, validation_generations=16)
    assert found.rollout == by_hand(16, 16) and found.pace["decoded at a time"] == "16 completions"


def test_a_rollout_ahead_is_sampled_from_a_copy_of_what_is_trained(micro_model_dir):
    plain, ahead = (of(micro_model_dir, samples_ahead=ahead, max_concurrent=0) for ahead in (False, True))
    copy = 4 * sum(p.numel() for p in micro_policy(micro_model_dir).parameters())
    assert ahead.total == plain.total + copy and ahead.parts["copy that samples ahead"] == copy
    loader = PolicyLoader(str(micro_model_dir), lora=LoraSettings(r=2))
    adapter = of(loader=loader, samples_ahead=True)
    assert adapter.parts["copy that samples ahead"] == 4 * adapter.trained


@pytest.mark.parametrize(("precision", "item"), [("32-true", 4), ("bf16-mixed", 2)])
def test_a_rollout_holds_its_weights_once_more_and_on_a_cpu_a_prompt_for_every_block_of_rows(
    micro_model_dir, precision, item, monkeypatch
):
    policy = micro_policy(micro_model_dir)
    linear = sum(m.weight.numel() for m in policy.base_model.model.modules() if isinstance(m, torch.nn.Linear))
    copy = (linear + policy.output_weight.numel()) * item
    gpu, cpu = (of(micro_model_dir, precision=precision, on_gpu=gpu).rollout for gpu in (True, False))
    # On a GPU weights are copied where autocast would narrow them for every token.
    plain = gpu - (copy if item == 2 else 0)
    assert cpu == plain + copy
    # In float32 they lie where the gradients of the last update were, unless sampling and updates overlap.
    on_cpu = of(micro_model_dir, precision=precision, on_gpu=False)
    ahead = of(micro_model_dir, precision=precision, on_gpu=False, samples_ahead=True)
    assert (on_cpu.reused, ahead.reused) == (copy if item == 4 else 0, 0)
    adapter = of(loader=PolicyLoader(str(micro_model_dir), lora=LoraSettings(r=2)), precision=precision, on_gpu=False)
    assert adapter.reused == (adapter.parts["gradients"] if item == 4 else 0)
    monkeypatch.setattr("gspo_lightning.rollout.block_cache.MOST_ROWS", 2)
    blocks = of(micro_model_dir, precision=precision, on_gpu=False)
    # Two blocks of two places for three rows: four prompts more, and four places.
    assert blocks.rollout == cpu + 2 * 2 * (4 * 9 + 4 * 8) * 2 * 16 * item
    assert of(micro_model_dir, on_gpu=False, max_concurrent=0).rollout == 0


def test_the_peak_of_a_gpu_is_that_of_the_phase_that_needs_more(micro_model_dir):
    found, process = of(micro_model_dir), of(micro_model_dir, on_gpu=False)
    fixed = found.parts["weights"] + found.parts["gradients"] + found.parts["optimizer (AdamW)"]
    assert found.total == fixed + max(found.parts[ACTIVATIONS], found.rollout)
    program = process.parts["program and libraries"]
    assert 0.1 * GIB < program < 4 * GIB
    assert process.total == fixed + found.parts[ACTIVATIONS] + process.rollout + program - process.reused


def test_a_quantised_base_takes_a_fraction_of_its_linear_layers(micro_model_dir):
    whole = of(loader=PolicyLoader(str(micro_model_dir), dtype="bfloat16", lora=LoraSettings(r=2))).parts["weights"]
    nf4 = PolicyLoader(str(micro_model_dir), dtype="bfloat16", lora=LoraSettings(r=2), quantization="nf4")
    policy = micro_policy(micro_model_dir)
    linear = 2 * sum(m.weight.numel() for m in policy.base_model.model.modules() if isinstance(m, torch.nn.Linear))
    assert of(loader=nf4).parts["weights"] == pytest.approx(whole - linear * (1 - 4.13 / 16), rel=1e-6)


def test_the_command_counts_the_copy_that_samples_ahead_and_the_validation_of_one_prompt():
    ahead = ["rollout=vllm_server", "rollout.engine.staleness=1"]
    one = ["rollout.engine.max_concurrent=1", "rollout.num_generations=4", "validation.num_generations=9"]
    few = [
        "data.task.num_validation=7",
        "rollout.num_generations=2",
        "data.prompts_per_rollout=4",
        "validation.num_generations=3",
    ]
    printed = [run("experiment=micro", "dry_run=true", *more).stdout for more in (ahead, one, few)]
    assert ["copy that samples ahead" in text for text in printed] == [True, False, False]
    assert "9 completions" in printed[1]
    assert "21 completions" in printed[2]  # of seven held-out prompts: there are no more


def test_the_command_prints_the_table_of_one_of_its_processes_and_leaves_nothing(tmp_path):
    folder = tmp_path / "run"
    done = run(
        "experiment=micro", "dry_run=true", f"hydra.run.dir={folder}", "trainer=fsdp", "trainer.devices=2",
        "trainer.num_nodes=2", "trainer.accelerator=cpu", "data.prompts_per_rollout=16",
    )  # fmt: skip
    assert "no weights were loaded" in done.stdout and "peak of the process" in done.stdout
    assert "per rollout on each process" in done.stdout and "4 prompts x" in done.stdout
    assert "layers gathered" in done.stdout
    assert not folder.exists()


@pytest.mark.parametrize(
    ("devices", "nodes", "gpus", "expected"),
    [(2, 3, 0, 6), ([0, 2, 5], 1, 8, 3), ("auto", 2, 8, 16), (-1, 1, 4, 4), ("auto", 2, 0, 2)],
)
def test_how_many_processes_a_run_has(devices, nodes, gpus, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    trainer = {"devices": devices, "num_nodes": nodes, "accelerator": "auto"}
    assert hardware.ranks({"trainer": trainer}) == expected
    on_cpu = {**trainer, "accelerator": "cpu"}
    assert hardware.ranks({"trainer": on_cpu}) == (expected if isinstance(devices, list) or devices == 2 else nodes)


@pytest.mark.slow
def test_the_quickstart_needs_what_was_estimated_within_15_percent(tmp_path):
    """The bar of this estimate; the peak is reached in the second rollout, behind the optimizer's first step."""
    arguments = ["max_rollouts=3", "data.task.num_validation=8", "export.enabled=false"]
    run(*arguments, f"hydra.run.dir={tmp_path}")
    measured = max(float(row["perf/peak_rss_gb"]) for row in rows(tmp_path) if row["perf/peak_rss_gb"])
    table = run(*arguments, "dry_run=true").stdout
    estimated = float(table.partition("peak of the process")[2].split()[1])
    assert abs(estimated / measured - 1) < 0.15


def test_a_model_that_reads_images_and_one_of_experts_are_estimated_too(smollm2_dir, tmp_path):
    from gspo_lightning.policy.tiny_vlm import SPECIAL_IDS
    from tests.vision.models import small_config

    small_config(SPECIAL_IDS).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()  # read by nobody
    seeing = of(loader=PolicyLoader(str(tmp_path)))
    assert seeing.trained < seeing.parameters
    screen = io.StringIO()
    Console(file=screen, width=120).print(of(loader=PolicyLoader("bundled:micro-gpt-oss", dtype="bfloat16")).table())
    assert "forwarded at a time" in screen.getvalue()


class Headed(GSPOModule):
    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.head, self.scale = torch.nn.Linear(99, 10), torch.nn.Parameter(torch.ones(7), requires_grad=False)


class Later(GSPOModule):
    def configure_model(self):
        super().configure_model()
        self.head = torch.nn.Linear(99, 10)


def test_parameters_that_a_subclass_adds_are_counted_or_named(micro_model_dir, capsys):
    own, without = tuple(build_module(resolved("experiment=micro", made_by(Headed))).parameters()), of(micro_model_dir)
    found = of(micro_model_dir, own=own)
    assert found.parameters == without.parameters + 1007 and found.trained == without.trained + 1000
    assert found.parts.pop("parameters beside the policy's") == 4 * 7 + 16 * 1000
    assert found.parts == without.parts
    plain = [resolved("experiment=micro", *module) for module in ([], [made_by(Headed)], [made_by(Later)])]
    named = [own_parts(build_module(settings)) for settings in plain]
    assert named == ["", "", "what Later.configure_model adds"]
    assert of(micro_model_dir, not_counted=named[2]).pace["not counted"] == named[2]
    cli._dry_run(plain[1])
    assert "parameters beside the policy's" in capsys.readouterr().out


def made_by(cls):
    return f"module._target_={cls.__module__}.{cls.__name__}"
