"""Float32 products from bfloat16 ones, whose units (exact products, float32 sums) float32 stands for; and by oneDNN."""

from __future__ import annotations

from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch

from gspo_lightning.packing import attention, products
from gspo_lightning.packing.products import float32_products, onednn_float32, rows_missing
from gspo_lightning.policy.load import PolicyLoader
from gspo_lightning.training.passes import float32_by_onednn
from tests.rollout.random_vlm import save_random_vlm
from tests.scripted import Batches, Settings, build_module, scripted_prompts, trainer, update_of
from tests.support import relative_distance

CPU = torch.device("cpu")
MATMUL = torch.backends.mkldnn.matmul
EPYC = {"cpu_name": "AMD EPYC", "avx512_f": True, "amx_tile": False}


@pytest.mark.parametrize(
    ("a_dtype", "b_dtype", "bound"),
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.float32, torch.bfloat16, 1e-5),
        (torch.bfloat16, torch.float32, 1e-5),
        (torch.bfloat16, torch.bfloat16, 1e-6),
    ],
    ids=str,
)
def test_the_product_is_that_of_float64(a_dtype, b_dtype, bound):
    a, b = torch.randn(37, 96).to(a_dtype), torch.randn(53, 96).to(b_dtype)
    product = float32_products(a, b_dtype)
    ours = torch.cat([product(b[:20]), product(b[20:])], dim=1)
    assert ours.dtype == torch.float32
    expected = a.double() @ b.double().t()
    assert relative_distance(ours.double(), expected) < bound
    rounded = (a.float() @ b.float().t()).bfloat16()
    assert relative_distance(rounded.double(), expected) > 1e-3  # what an ordinary bfloat16 product would give


def on(monkeypatch, **facts):
    """A processor of these facts, by default one on which oneDNN is asked."""
    monkeypatch.setattr(products.torch.cpu, "get_capabilities", lambda: {**EPYC, **facts})


def test_on_this_processor_products_by_onednn_have_all_digits():
    a, b = torch.randn(96, 640), torch.randn(640, 320)
    with onednn_float32(CPU):
        ours = a @ b
    assert relative_distance(ours.double(), a.double() @ b.double()) < 1e-6


def test_onednn_is_asked_inside_alone_and_rows_are_filled_there(monkeypatch):
    on(monkeypatch)
    monkeypatch.setattr(products, "_stays_float32", lambda: True)
    assert rows_missing(33, CPU, torch.float32) == 0
    with suppress(KeyError), onednn_float32(CPU):
        assert (MATMUL.fp32_precision, rows_missing(33, CPU, torch.float32)) == ("bf16", 31)
        assert rows_missing(33, CPU, torch.float64) == 0
        raise KeyError
    assert MATMUL.fp32_precision == "none"


@pytest.mark.parametrize(
    "facts", [{"cpu_name": "Intel Xeon"}, {"amx_tile": True}, {"avx512_f": False}, {"cpu_name": ""}], ids=str
)
def test_other_processors_multiply_as_before(facts, monkeypatch):
    on(monkeypatch, **facts)
    with onednn_float32(CPU):
        assert MATMUL.fp32_precision == "none"


def test_gpus_and_a_precision_that_the_user_chose_are_left_alone(monkeypatch):
    on(monkeypatch)
    with onednn_float32(torch.device("cuda")):
        assert MATMUL.fp32_precision == "none"
    try:
        for chosen in ("ieee", "bf16"):
            MATMUL.fp32_precision = chosen
            with onednn_float32(CPU):
                assert MATMUL.fp32_precision == chosen
            assert MATMUL.fp32_precision == chosen
    finally:
        MATMUL.fp32_precision = "none"


@pytest.mark.parametrize(("digits", "stays"), [(torch.bfloat16, False), (torch.float32, True)], ids=str)
def test_a_processor_that_rounds_after_all_is_found_out(digits, stays, monkeypatch):
    exact = torch.Tensor.__matmul__

    def rounding(a, b):  # in float64, so that it does not depend on the processor of the test
        return exact(*(x.to(digits if x.dtype == torch.float32 else x.dtype).double() for x in (a, b))).to(a.dtype)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding)
    with torch.autocast("cpu", torch.bfloat16):  # around every step in bf16-mixed
        assert products._stays_float32.__wrapped__() is stays
    assert MATMUL.fp32_precision == "none"


def test_an_update_in_float32_is_made_of_such_products_and_stays_what_it_was(micro_model_dir, monkeypatch):
    settings = Settings(dtype="float32", objective={"loss_type": "grpo", "importance_sampling_level": "token"})
    on(monkeypatch, cpu_name="Intel")
    before, _ = update_of(micro_model_dir, settings)
    on(monkeypatch)
    now, module = update_of(micro_model_dir, settings)
    assert relative_distance(now.double(), before.double()) < 1e-6

    asked = []
    monkeypatch.setattr(products, "_stays_float32", lambda: True)
    monkeypatch.setattr(module, "auxiliary_loss", lambda minibatch: asked.append(MATMUL.fp32_precision))
    module.max_rollouts = 2
    trainer().fit(module, Batches(scripted_prompts(), 1).loader())
    assert asked == ["bf16"]


def test_where_a_thread_samples_ahead_it_is_not_asked(micro_model_dir, monkeypatch):
    on(monkeypatch)
    monkeypatch.setattr(products, "_stays_float32", lambda: True)
    module, asked = build_module(micro_model_dir, Settings(dtype="float32")), []
    monkeypatch.setattr(module, "auxiliary_loss", lambda minibatch: asked.append(MATMUL.fp32_precision))
    module.ahead = SimpleNamespace(is_stale=False, sampling_of=lambda prompts, seed: None)
    monkeypatch.setattr("gspo_lightning.module.sample_ahead", lambda module: None)
    trainer().fit(module, Batches(scripted_prompts(), 1).loader())
    assert asked == ["none"]


@pytest.mark.parametrize(
    ("dtype", "kind", "asked"),
    [
        ("float32", "packed", "bf16"),
        ("float32", "padded", "none"),
        ("float32", "vision", "none"),
        ("bfloat16", "padded", "bf16"),
        ("bfloat16", "vision", "bf16"),
    ],
)
def test_it_is_asked_where_the_rows_of_float32_products_come_again(
    dtype, kind, asked, micro_model_dir, smollm2_dir, tmp_path, monkeypatch
):
    """Numbers of tokens of padded rows and of patches do not; in bfloat16 only the head's products are in float32."""
    on(monkeypatch)
    monkeypatch.setattr(products, "_stays_float32", lambda: True)
    folder = micro_model_dir
    if kind == "vision":
        folder = save_random_vlm(tmp_path, smollm2_dir, tmp_path)
    policy = PolicyLoader(str(folder), dtype=dtype).load()
    if kind == "padded":
        policy.fall_back()
    with float32_by_onednn(SimpleNamespace(policy=policy, device=CPU, ahead=None)):
        assert MATMUL.fp32_precision == asked


def test_attention_of_such_an_update_is_made_of_such_products_too(micro_model_dir, monkeypatch):
    on(monkeypatch)
    monkeypatch.setattr(products, "_stays_float32", lambda: True)
    whole, backwards = [], []

    def spy(name, seen):
        function = getattr(attention, name)
        monkeypatch.setattr(attention, name, lambda *given: (seen.append(MATMUL.fp32_precision), function(*given))[1])

    spy("_weights", whole)  # in both directions
    spy("_batch_backward", backwards)
    module = build_module(micro_model_dir, Settings(dtype="float32"))
    trainer().fit(module, Batches(scripted_prompts(), 1).loader())
    assert set(whole) == {"none", "bf16"}  # the rollout's prefill is not of the update
    assert whole.count("bf16") >= 2 * len(backwards) > 0
    assert set(backwards) == {"bf16"}
