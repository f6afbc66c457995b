"""What vLLM engines refuse before they start, so these need neither vLLM nor a GPU."""

from __future__ import annotations

import copy
import importlib.util
import sys
import threading
import types
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from gspo_lightning.errors import UserError
from gspo_lightning.rollout import VLLMEngine, VLLMServerEngine, vllm_engine, vllm_settings
from gspo_lightning.rollout.vllm_settings import (
    precision_of_products_kept,
    refusals_in_one_line,
    unsupported_in_one_line,
)
from gspo_lightning.rollout.weights import check_base
from gspo_lightning.types import SamplingParams
from tests.support import make_prompt, micro_policy

SAMPLING = SamplingParams(num_generations=3, max_completion_length=8, temperature=0.8)
PROMPTS = [make_prompt(torch.arange(5, 8), uid="t:0")]


def test_a_quantised_base_is_refused_where_the_adapter_is_merged_and_warned_of_else(micro_model_dir):
    policy = micro_policy(micro_model_dir, torch.float32)
    policy.base_model.is_quantized = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match="lora_sync=merged cannot add the adapter to a quantised base"):
            check_base(policy, "merged")
    with pytest.warns(UserWarning, match=r"base is quantised .*: sampler_mismatch/abs_mean shows the difference"):
        check_base(policy, "adapter")
    policy.base_model.is_quantized = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_base(policy, "merged")


def vllm_in_process(folder, monkeypatch):
    """Not started, so vLLM need not be installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    return VLLMEngine("no-model", 64, 8, lora_sync="merged")


def vllm_of_servers(folder, monkeypatch):
    return VLLMServerEngine(["http://127.0.0.1:9"], 64, 8, sync_dir=str(folder), lora_sync="merged")


def test_a_copied_module_shares_the_vllm_of_this_process(tmp_path, monkeypatch):
    """Callbacks that average weights copy the whole module, after a validation has started it."""
    engine = vllm_in_process(tmp_path, monkeypatch)
    engine._llm = threading.Lock()  # like vLLM, nothing that can be copied
    assert copy.deepcopy({"engine": engine})["engine"] is engine


@pytest.mark.parametrize("sleeps", [True, False])
def test_an_engine_whose_rollout_fails_sleeps_until_the_next_one(sleeps, micro_model_dir, tmp_path, monkeypatch):
    """Where the error is caught, as in a notebook, the trainer needs the memory of the GPU."""
    engine, policy, did = vllm_in_process(tmp_path, monkeypatch), micro_policy(micro_model_dir, torch.float32), []
    engine.sleep = sleeps

    def sleep(level):
        did.append("sleep")
        if len(did) == 2:
            raise RuntimeError("it cannot even sleep")

    engine._llm = SimpleNamespace(sleep=sleep, wake_up=lambda: did.append("wake"))
    monkeypatch.setattr(engine, "_synchronise", lambda policy: None)
    fail = {}

    def sampled(policy, requests, next_of=None):
        if fail:
            raise UserError("an environment failed")
        return [[] for _ in requests]

    monkeypatch.setattr(engine, "_sample", sampled)
    fail["now"] = True
    for _ in range(2):
        with pytest.raises(UserError, match="an environment failed"):
            engine.generate(policy, PROMPTS, SAMPLING, seed=0)
    fail.clear()
    engine.generate(policy, PROMPTS, SAMPLING, seed=0)
    assert did == (["wake", "sleep"] * 3 if sleeps else [])


@pytest.mark.parametrize("make", [vllm_in_process, vllm_of_servers])
def test_engines_look_at_the_base_before_they_start(make, micro_model_dir, tmp_path, monkeypatch):
    policy = micro_policy(micro_model_dir, torch.float32)
    policy.base_model.is_quantized = True
    with pytest.raises(UserError, match="lora_sync=merged cannot add"):
        make(tmp_path, monkeypatch).generate(policy, PROMPTS, SAMPLING, seed=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("gpu", "ranks", "device", "refused"),
    [
        (True, 1, "cuda:0", None),
        (True, 1, "cuda", None),
        (False, 2, "cpu", None),
        (
            True,
            1,
            "cuda:1",
            "the policy is on cuda:1; use rollout=vllm_server, or choose the GPU with CUDA_VISIBLE_DEVI",
        ),
        (True, 2, "cuda:0", "only on the first GPU, but 2 processes train; use rollout=vllm_server, or trainer.devi"),
        (True, 2, "cpu", "only on the first GPU, but 2 processes train"),  # whole copies of a policy that is split
    ],
)
def test_the_engine_in_process_is_refused_on_gpus_it_would_not_take(gpu, ranks, device, refused, tmp_path, monkeypatch):
    engine = vllm_in_process(tmp_path, monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(vllm_settings, "world_size", lambda: ranks)
    monkeypatch.setattr(vllm_engine, "check_base", lambda *_: (_ for _ in ()).throw(LookupError("next step")))
    with pytest.raises(UserError if refused else LookupError, match=refused or "next step"):
        engine.generate(SimpleNamespace(device=torch.device(device), is_padded=False), PROMPTS, SAMPLING, seed=0)


def test_the_memory_of_an_engine_that_wakes_up_is_free_for_the_driver(tmp_path, monkeypatch):
    engine, done = vllm_in_process(tmp_path, monkeypatch), []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("torch gives back what it does not use"))
    engine.sleep, engine._llm = True, SimpleNamespace(wake_up=lambda: done.append("the engine takes its own"))
    engine._wake(None)
    assert done == ["torch gives back what it does not use", "the engine takes its own"]
    engine.sleep = False
    engine._wake(None)
    assert len(done) == 2


@pytest.mark.parametrize(("visible", "named"), [(None, "1"), ("4,5", "5"), ("4, GPU-0a-b ,6", "GPU-0a-b"), ("4", "1")])
def test_a_gpu_is_called_what_the_environment_calls_it(visible, named, monkeypatch):
    """torch counts from 0 the GPUs that the variable names; its numbers are other people's GPUs."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError) as error:
        vllm_settings.refuse_other_gpus(torch.device("cuda", 1))
    assert str(error.value) == (
        "rollout=vllm samples on cuda:0, but the policy is on cuda:1; use rollout=vllm_server, or choose the GPU with "
        f"CUDA_VISIBLE_DEVICES={named} and trainer.devices=1"
    )


@pytest.mark.parametrize("make", [vllm_in_process, vllm_of_servers])
@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"temperature": 0.009},
            r"^rollout.temperature=0.009: vLLM samples at 0.01 instead; set at least that, or ",
        ),
        ({"top_p": 0.9, "min_p": 0.1}, r"^rollout.top_p=0.9 with rollout.min_p=0.1: vLLM applies min_p first and "),
    ],
)
def test_what_vllm_samples_otherwise_is_refused(make, changes, line, micro_model_dir, tmp_path, monkeypatch):
    policy, engine = micro_policy(micro_model_dir, torch.float32), make(tmp_path, monkeypatch)
    with pytest.raises(UserError, match=line) as error:
        engine.generate(policy, PROMPTS, replace(SAMPLING, **changes), seed=0)
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.01},
        {"temperature": 0.0, "top_p": 0.9, "min_p": 0.1},  # greedy: no filter acts
        {"top_p": 0.9, "top_k": 5},
        {"min_p": 0.1, "top_k": 5},
    ],
)
def test_what_vllm_samples_alike_is_not(changes, tmp_path, monkeypatch):
    engine = vllm_in_process(tmp_path, monkeypatch)
    monkeypatch.setattr(engine, "_wake", lambda policy: (_ for _ in ()).throw(LookupError("next step")))
    with pytest.raises(LookupError, match="next step"):
        engine.generate(SimpleNamespace(is_padded=False), PROMPTS, replace(SAMPLING, **changes), seed=0)


def test_images_on_the_padded_path_are_refused_and_text_is_not(micro_model_dir, tmp_path, monkeypatch):
    policy, engine = micro_policy(micro_model_dir, torch.float32), vllm_in_process(tmp_path, monkeypatch)
    monkeypatch.setattr(engine, "_wake", lambda policy: (_ for _ in ()).throw(LookupError("next step")))
    image = replace(PROMPTS[0], uid="t:1", mm_inputs={"pixel_values": torch.zeros(1)})
    for is_padded, prompts in ((False, [image]), (True, PROMPTS)):
        policy.is_padded = is_padded
        with pytest.raises(LookupError, match="next step"):
            engine.generate(policy, prompts, SAMPLING, seed=0)
    with pytest.raises(UserError) as error:
        engine.generate(policy, [*PROMPTS, image], SAMPLING, seed=0)
    assert str(error.value) == (
        "row t:1 has images, which rollout=vllm does not accept for llama: it runs through the padded path; "
        "use rollout=transformers"
    )


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"kv_cache_gb": 0}, "^rollout.engine.kv_cache_gb=0 must be above 0$"),
        ({"kv_cache_gb": -0.5}, "^rollout.engine.kv_cache_gb=-0.5 must be above 0$"),
        ({"max_num_seqs": 0}, "^rollout.engine.max_num_seqs=0 must be at least 1$"),
    ],
)
def test_sizes_of_nothing_are_refused(settings, line, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UserError, match=line):
        VLLMEngine("no-model", 64, 8, **settings)


class OfPydantic(ValueError):
    """Its text repeats everything; what is wrong stands in ``errors``."""

    def __init__(self, where, said):
        super().__init__(
            "1 validation error for ModelConfig\n  Value error [input_value=ArgsKwargs((), {...})]\n    see"
        )
        self.where, self.said = where, said

    def errors(self):
        return [{"loc": self.where, "msg": self.said}]


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (
            ValueError("To serve a request of 72, 1.5 GiB is needed. Try increasing `gpu_memory_utilization`. See x"),
            "To serve a request of 72, 1.5 GiB is needed",
        ),
        (RuntimeError("\n  no kernel\nException raised from x.cpp:3 (most recent call first)"), "no kernel"),
        (RuntimeError(), "RuntimeError"),
        (OfPydantic((), "Value error, max_model_len (72) is too large. Set X=1"), "max_model_len (72) is too large"),
        (OfPydantic(("max_num_seqs",), "Input should be at least 1"), "max_num_seqs: Input should be at least 1"),
    ],
)
def test_settings_that_vllm_refuses_are_one_line(raised, reason, micro_model_dir, tmp_path, monkeypatch):
    def refuse(*arguments, **settings):
        raise raised

    policy, engine = micro_policy(micro_model_dir, torch.float32), vllm_in_process(tmp_path, monkeypatch)
    vllm = types.ModuleType("vllm")
    vllm.LLM = refuse
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL", "VLLM_CPU_OMP_THREADS_BIND"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(vllm_engine, "resolve_model", lambda model: model)
    with pytest.raises(UserError) as error:
        engine.generate(policy, PROMPTS, SAMPLING, seed=0)
    assert str(error.value) == (
        f"vLLM does not start: {reason}; check rollout.engine (kv_cache_gb, memory_fraction, max_num_seqs) and "
        "data.max_prompt_length + rollout.max_completion_length=72, or use rollout=transformers"
    )


@pytest.mark.parametrize(
    ("gpu", "fraction", "cache_gb", "settings"),
    [
        (False, None, None, {"kv_cache_memory_bytes": 2**30}),
        (False, None, 0.5, {"kv_cache_memory_bytes": 2**29}),
        (True, None, None, {"gpu_memory_utilization": 0.3}),
        (True, 0.45, None, {"gpu_memory_utilization": 0.45}),
        (True, None, 8.0, {"kv_cache_memory_bytes": 2**33, "gpu_memory_utilization": 0.1}),
        (True, None, 800.0, {"kv_cache_memory_bytes": 100 * 2**33, "gpu_memory_utilization": 1.0}),
    ],
)
def test_with_a_size_for_its_cache_the_engine_starts_beside_a_trainer(gpu, fraction, cache_gb, settings, monkeypatch):
    """vLLM 0.32 (`vllm/v1/worker/utils.py: request_memory`) refuses to start unless ``gpu_memory_utilization`` of the
    GPU is free, 0.92 by default, whether the cache has a size or not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 2**30))
    assert vllm_settings.memory_settings(fraction, cache_gb) == settings


def test_memory_that_ran_out_keeps_its_own_advice():
    with pytest.raises(torch.OutOfMemoryError), refusals_in_one_line(72):
        raise torch.OutOfMemoryError("out of memory")


def test_a_model_that_vllm_has_no_kernel_for_is_refused_in_one_line_and_later_errors_are_not(
    micro_model_dir, monkeypatch
):
    """As vLLM does on processors with AVX2 alone for heads of 16, of the micro model."""

    def step(*_):
        raise RuntimeError("Unsupported CPU attention configuration: head_dim=16 isa=2\nmore")

    engine = vllm_in_process(None, monkeypatch)
    monkeypatch.setattr(engine, "_sample", step)
    policy, line = (
        micro_policy(micro_model_dir, torch.float32),
        "Unsupported CPU attention configuration: head_dim=16 isa=2",
    )
    engine.syncs = 1
    with pytest.raises(UserError, match=f"^vLLM cannot run this model here: {line}; use rollout=transformers$"):
        engine._prove(policy)
    engine.syncs = 2
    with pytest.raises(RuntimeError, match=line):
        engine._prove(policy)
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[enforce fail] can't allocate memory")):
        with pytest.raises(type(error), match="memory"), unsupported_in_one_line(is_first=True):
            raise error


MATMUL = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


@pytest.fixture
def _as_it_was():
    yield
    torch.set_float32_matmul_precision("highest")
    for backend in MATMUL:
        backend.fp32_precision = "none"


@pytest.mark.parametrize("chosen", ["nothing", "by the older name", "by the newer names"])
def test_the_precision_of_products_stays_as_a_program_has_chosen_it(chosen, _as_it_was):
    """vLLM's worker sets it for the whole process."""
    if chosen == "by the older name":
        torch.set_float32_matmul_precision("high")
    if chosen == "by the newer names":
        MATMUL[0].fp32_precision = "tf32"
    before = [backend.fp32_precision for backend in MATMUL]
    with precision_of_products_kept():
        torch.set_float32_matmul_precision("highest")
        assert [backend.fp32_precision for backend in MATMUL] == ["ieee", "ieee"]
    assert [backend.fp32_precision for backend in MATMUL] == before
    if chosen == "by the older name":
        assert torch.get_float32_matmul_precision() == "high"


class Stream:
    """A stream of a GPU: what it has waited for."""

    def __init__(self):
        self.waited = []

    def wait_stream(self, other):
        self.waited.append(other)


def test_the_trainer_has_its_own_stream_back_and_each_waits_for_the_other(tmp_path, monkeypatch):
    ours, theirs, now = Stream(), Stream(), []
    now.append(ours)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: now[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", now.append)
    monkeypatch.setattr(VLLMEngine, "_stream", None)
    engine, another = (vllm_in_process(tmp_path, monkeypatch) for _ in range(2))
    with engine._at_work():
        assert now[-1] is ours
    assert now == [ours]  # vLLM knows of no other stream that it could take for its own
    with engine._at_work():
        torch.cuda.set_stream(theirs)  # as vLLM does once, when it starts
    assert now[-1] is ours and ours.waited == [theirs] and theirs.waited == []
    with pytest.raises(RuntimeError), another._at_work():  # for which vLLM would make none
        assert now[-1] is theirs and theirs.waited == [ours]
        raise RuntimeError
    assert now[-1] is ours and ours.waited == [theirs, theirs]
