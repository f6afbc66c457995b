"""gpt-oss on the shared-prefix path: sinks, alternating sliding windows, experts, and the harmony format."""

from __future__ import annotations

import shutil
from dataclasses import replace

import openai_harmony as harmony
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GptOssConfig

from gspo_lightning.callbacks.recorder import completion_entries
from gspo_lightning.data.templating import encode_prompt
from gspo_lightning.errors import UserError
from gspo_lightning.packing import attention, pack
from gspo_lightning.policy import load
from gspo_lightning.policy.adapter import LoraSettings, add_lora
from gspo_lightning.policy.bundled import resolve_model
from gspo_lightning.policy.check import PackingMismatchError, check_packing
from gspo_lightning.policy.load import PolicyLoader
from gspo_lightning.policy.micro_gpt_oss import WINDOW
from gspo_lightning.report import sections
from gspo_lightning.rewards import RewardSet, RewardSpec
from gspo_lightning.rewards.reward_set import call_arguments
from gspo_lightning.rollout import TransformersEngine
from gspo_lightning.rollout.text import answer_and_thinking
from gspo_lightning.rollout.vllm_requests import completion
from gspo_lightning.training.validation import ValidationSettings, Validator
from gspo_lightning.types import SamplingParams, ScoredRollout
from tests.command_line import metrics, run
from tests.scripted import ScriptedEngine
from tests.support import make_prompt, padded_logprobs, random_groups, relative_distance

MODEL = "bundled:micro-gpt-oss"
HARMONY = harmony.load_harmony_encoding(harmony.HarmonyEncodingName.HARMONY_GPT_OSS)
# Prompts and completions on both sides of the window, and a completion that begins inside and ends outside of it.
GROUPS = random_groups([(40, (30, 3, 18)), (5, (4, 25)), (17, (1,))], 100)


@pytest.fixture
def policy():
    return PolicyLoader(MODEL, dtype="float64").load()


@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-6), ("float32", 1e-5)])
@pytest.mark.parametrize("lora", [None, LoraSettings(r=4)], ids=["full", "LoRA"])
def test_packed_equals_transformers_in_log_probabilities_and_gradients_routing_included(lora, dtype, bound):
    ours = PolicyLoader(MODEL, dtype=dtype, lora=lora).load()
    theirs = eager(ours, lora)
    logprobs, _ = ours(pack(GROUPS, torch.device("cpu")), 0.7)
    expected, _ = padded_logprobs(theirs, GROUPS, 0.7)
    weights = torch.randn(len(expected), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (logprobs.double() @ weights).backward()
    (expected @ weights).backward()
    assert relative_distance(logprobs.double(), expected) < bound
    parts = ("router", "experts", "sinks", "self_attn.q_proj") if lora is None else ("lora_A", "lora_B")
    for part in parts:
        found, wanted = (
            torch.cat([p.grad.double().flatten() for name, p in model.named_parameters() if part in name])
            for model in (ours.base_model if lora is None else ours, theirs)
        )
        assert wanted.norm() > 1e-3, part
        assert relative_distance(found, wanted) < bound, part


def eager(policy, lora):
    """The same weights in float64 through the attention and experts that transformers ships for the model."""
    model = AutoModelForCausalLM.from_pretrained(
        resolve_model(MODEL), dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    ).train()
    if lora is None:
        return model
    adapted = add_lora(model, lora, False)
    generator = torch.Generator().manual_seed(0)
    drawn = {
        name: 0.03 * torch.randn(p.shape, generator=generator)
        for name, p in adapted.named_parameters()
        if p.requires_grad
    }
    for whose in (policy, adapted):
        for name, parameter in whose.named_parameters():
            if parameter.requires_grad:
                (value,) = [v for n, v in drawn.items() if name.endswith(n.removeprefix("base_model."))]
                parameter.data.copy_(value)
    return adapted


def test_the_sampler_gives_the_log_probabilities_of_the_packed_pass_beyond_the_window(policy):
    prompts = [make_prompt(prompt, uid=str(n)) for n, (prompt, _) in enumerate(GROUPS)]
    rollout = TransformersEngine().generate(policy, prompts, SamplingParams(3, 2 * WINDOW, temperature=0.7), 1)
    groups = [
        (p.input_ids, [c.token_ids for c in group]) for p, group in zip(prompts, rollout.completions, strict=True)
    ]
    assert max(len(c) for _, completions in groups for c in completions) > WINDOW
    with torch.no_grad():
        own, _ = policy(pack(groups, torch.device("cpu")), 0.7)
    theirs = torch.cat([c.sampler_logprobs for group in rollout.completions for c in group])
    torch.testing.assert_close(own.float(), theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-6), ("bfloat16", 0.01)])
@pytest.mark.parametrize("forgotten", ["window", "sinks"])
def test_the_first_use_check_passes_and_sees_a_forgotten_window_or_sink(forgotten, dtype, bound, monkeypatch):
    policy = PolicyLoader("bundled:micro-gpt-oss", dtype=dtype).load()
    assert check_packing(policy) < bound
    original = attention.shared_prefix_attention

    def without(*args, **kwargs):
        if forgotten == "window":
            return original(*args, **{**kwargs, "window": None})
        return original(*args, **{**kwargs, "sinks": torch.full_like(kwargs["sinks"], -1e9)})

    from gspo_lightning.policy import attention as policy_attention

    monkeypatch.setattr(policy_attention, "shared_prefix_attention", without)
    with pytest.raises(PackingMismatchError):
        check_packing(policy)


@pytest.mark.parametrize("effort", harmony.ReasoningEffort)
def test_a_prompt_is_rendered_as_by_the_harmony_library(effort):
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(MODEL))
    turns = [("developer", "Be brief."), ("user", "hi"), ("assistant", "Hello"), ("user", "again")]
    messages = [{"role": role, "content": text} for role, text in turns]
    ids = encode_prompt(messages, tokenizer, {"reasoning_effort": effort.value.lower()})
    system = harmony.SystemContent(
        model_identity=None, reasoning_effort=effort, knowledge_cutoff=None, conversation_start_date=None
    ).with_required_channels(["analysis", "commentary", "final"])
    instructions = harmony.DeveloperContent.new().with_instructions("Be brief.")
    message = harmony.Message.from_role_and_content
    talk = [
        message(harmony.Role.SYSTEM, system), message(harmony.Role.DEVELOPER, instructions),
        message(harmony.Role.USER, "hi"), message(harmony.Role.ASSISTANT, "Hello").with_channel("final"),
        message(harmony.Role.USER, "again"),
    ]  # fmt: skip
    theirs = HARMONY.render_conversation_for_completion(
        harmony.Conversation.from_messages(talk), harmony.Role.ASSISTANT
    )
    assert tokenizer.decode(ids) == HARMONY.decode_utf8(theirs)


CALL = '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}<|call|>'


@pytest.mark.parametrize(
    "said",
    [
        "<|channel|>analysis<|message|>2+2\n= 4<|end|><|start|>assistant<|channel|>final<|message|> 4.\n<|return|>",
        "<|channel|>final<|message|>4<|return|>",
        "<|message|>of no channel<|return|>",
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant" + CALL,
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant to=functions.f<|message|>{}<|call|>",
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant to=functions.f<|channel|>commentary<|message|>{}",
        "<|channel|>analysis<|message|>one<|end|><|start|>assistant<|channel|>commentary<|message|>two<|end|>"
        "<|start|>assistant<|channel|>final<|message|>three",
        "<|channel|>analysis<|message|>cut bef",
    ],
)
@pytest.mark.parametrize("whose", ["micro", "gpt-oss"])
def test_the_answer_is_the_final_channel_as_the_harmony_library_reads_it(said, whose):
    """With the characters of the micro model, and with the vocabulary of gpt-oss."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(MODEL)) if whose == "micro" else OfGptOss()
    if whose == "micro":
        said = said.replace("<|constrain|>", "")  # which its vocabulary does not have
    answer, thinking = answer_and_thinking(tokenizer, tokenizer.encode(said))
    parsed = HARMONY.parse_messages_from_completion_tokens(
        HARMONY.encode(said, allowed_special="all"), harmony.Role.ASSISTANT
    )
    for_reader = [message.channel in (None, "final") and message.recipient is None for message in parsed]
    texts = [message.content[0].text for message in parsed]
    assert answer == "".join(text for text, read in zip(texts, for_reader, strict=True) if read)
    assert thinking == "\n".join(text for text, read in zip(texts, for_reader, strict=True) if not read)


class OfGptOss:
    """The harmony library's tokenizer with the methods of transformers' that are asked for."""

    unk_token_id = None

    def encode(self, text):
        return HARMONY.encode(text, allowed_special="all")

    def convert_tokens_to_ids(self, token):
        ids = self.encode(token)
        return ids[0] if len(ids) == 1 else None

    def decode(self, ids, skip_special_tokens):
        return HARMONY.decode_utf8([i for i in ids if not HARMONY.is_special_token(i)])


@pytest.mark.parametrize(
    ("said", "answer", "thinking"),
    [
        ("only e", "only e", ""),
        ("<|channel|>only e", "only e", ""),  # a header that never ended
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>fin", "", "a"),
        ("", "", ""),
    ],
)
def test_what_is_not_harmony_is_text(said, answer, thinking):
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(MODEL))
    assert answer_and_thinking(tokenizer, tokenizer.encode(said)) == (answer, thinking)


def test_marks_spelled_out_are_text_to_a_tokenizer_without_them(micro_model_dir):
    said = "<|channel|>analysis<|message|>a<|end|>"
    plain = AutoTokenizer.from_pretrained(micro_model_dir)
    assert answer_and_thinking(plain, plain.encode(said, add_special_tokens=False)) == (said, "")


def test_rewards_and_records_get_the_answer_and_beside_it_the_thinking(policy):
    said = "<|channel|>analysis<|message|>a 7<|end|><|start|>assistant<|channel|>final<|message|>a 4<|return|>"
    ids = policy.tokenizer.encode(said)
    one = completion(policy, ids, [0.0] * len(ids), "stop")
    assert (one.text, one.thinking) == ("a 4", "a 7")
    prompt = make_prompt(torch.arange(3, 8), uid="p")
    arguments = call_arguments([replace(prompt, prompt=[{"role": "user", "content": "?"}])], [[one]])
    assert arguments["completions"] == [[{"role": "assistant", "thinking": "a 7", "content": "a 4"}]]
    assert call_arguments([replace(prompt, prompt="?")], [[one]])["completions"] == ["a 4"]
    scored = ScoredRollout([prompt], [[one]], ("r",), *(torch.zeros(shape) for shape in ((1, 1, 1), (1, 1), (1, 1))))
    (entry,) = completion_entries(1, scored)
    assert (entry["completion"], entry["thinking"]) == ("a 4", "a 7")
    rewards = RewardSet({"length": RewardSpec(lambda completions, **_: [float(len(c)) for c in completions])})
    validator = Validator(ValidationSettings(1), rewards, SamplingParams(1, len(ids)), seed=0)
    validator.update(policy, ScriptedEngine(), [replace(prompt, prompt="?", sample={"completions": [one]})])
    (sample,) = validator.samples
    assert sample == {
        "prompt": "?", "completion": "a 4", "reward": 3.0, "right": True, "answer": None, "thinking": "a 7",
    }  # fmt: skip
    page = sections.completions(validator.samples, validator.samples)
    assert page.count("a 7</div>") == page.count("a 4</div>") == 2


def test_every_end_of_harmony_ends_a_completion(policy):
    names = {policy.tokenizer.convert_ids_to_tokens(token) for token in policy.eos_token_ids}
    assert names == {"<|return|>", "<|endoftext|>", "<|call|>"}


def test_published_weights_are_expanded_from_mxfp4_and_never_quantised_again(monkeypatch):
    config = GptOssConfig()
    config.quantization_config = {"quant_method": "mxfp4"}
    asked = {}

    def from_pretrained(path, **kwargs):
        asked.update(kwargs)
        raise UserError("stop here")

    monkeypatch.setattr(load, "load_config", lambda path: config)
    monkeypatch.setattr(load.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(load, "resolve_model", lambda path: path)
    with pytest.raises(UserError, match="stop here"):
        PolicyLoader("openai/gpt-oss-20b").load_model()
    assert asked["quantization_config"].dequantize is True
    with pytest.raises(UserError, match="model.quantization=nf4: the experts of gpt_oss"):
        PolicyLoader("openai/gpt-oss-20b", quantization="nf4", lora=LoraSettings()).load_model()


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs a sandbox (apt-get install bubblewrap)")
@pytest.mark.parametrize("rollouts", [4, pytest.param(15, marks=pytest.mark.slow)])  # as many as the recipe has
def test_the_offline_recipe_runs_the_code_of_completions_and_learns_the_letter(rollouts, tmp_path):
    done = run("experiment=gspo_gpt_oss_tiny", f"max_rollouts={rollouts}", f"hydra.run.dir={tmp_path}")
    assert "falling back" not in done.stderr
    share, judged = (
        [float(row[f"reward/{name}"]) for row in metrics(tmp_path) if row[f"reward/{name}"]]
        for name in ("letter_share", "matmul")
    )
    assert len(share) == len(judged) == rollouts
    assert share[0] < 0.05
    assert share[-1] > share[0] if rollouts == 4 else share[-1] > 0.2
    assert max(judged) < 0
