"""One rollout with tools, from prompts through sampled turns to the gradient; the turns are scripted."""

from __future__ import annotations

import pytest
import torch

from gspo_lightning.data.templating import make_prompt
from gspo_lightning.dialogue import Tools
from gspo_lightning.rewards import RewardSet, RewardSpec
from gspo_lightning.rollout import TransformersEngine, dialogue_decoder, transformers_engine
from gspo_lightning.rollout.dialogue_decoder import DialogueDecoder
from gspo_lightning.types import SamplingParams, ToolCounts
from tests.dialogue import form_support as families
from tests.dialogue.tool_support import TEMPLATE, add, call, divide
from tests.scripted import Batches, Settings, build_module, trainer, weights
from tests.support import flat_gradient, micro_policy, padded_logprobs, relative_distance

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
END = "<|im_end|>"
BOTH = "\n".join([call("add", '{"a": 2, "b": 3}'), call("divide", '{"a": 1, "b": 0}')])
SCRIPTS = [[BOTH + END, "Five." + END], [call("add", '{"a": 2}') * 2 + END, "3" + END], ["7" + END]]
"""The turns of each generation: a call that fails among two, two that work, none."""
ROW = {"prompt": [{"role": "user", "content": "2 + 3?"}]}


class Scripted(DialogueDecoder):
    """Draws the tokens of `SCRIPTS`, with the log-probabilities that the model gives them."""

    turns_of = SCRIPTS

    def __init__(self, *arguments):
        super().__init__(*arguments)
        text = {g: "".join(turns) for g, turns in enumerate(self.turns_of)}
        ids = {g: self.policy.tokenizer(own, add_special_tokens=False)["input_ids"] for g, own in text.items()}
        self.script = {id(row): iter(ids[row.generation]) for row in self.rows}

    def _next(self, hidden, step):
        drawing = [row for row in self.active if not self.pending[id(row)]]
        wanted = torch.tensor([next(self.script[id(row)]) for row in drawing], dtype=torch.long)

        def scripted(logits, *_):
            return wanted, torch.log_softmax(logits.float(), dim=-1).gather(1, wanted[:, None]).squeeze(1)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dialogue_decoder, "sample", scripted)
            return super()._next(hidden, step)


class Keeps(TransformersEngine):
    """The engine, which keeps its rollouts."""

    kept: list = []

    def generate(self, *arguments):
        self.kept.append(super().generate(*arguments))
        return self.kept[-1]


def says_five(completions, **_):
    return [float("Five" in messages[-1]["content"]) for messages in completions]


@pytest.fixture()
def trained(micro_model_dir, monkeypatch):
    """The gradient of one update on a rollout of one prompt, the rollout, and what it recorded."""
    monkeypatch.setattr(transformers_engine, "DialogueDecoder", Scripted)
    monkeypatch.setattr(Keeps, "kept", [])
    settings = Settings(objective={"loss_type": "grpo", "importance_sampling_level": "token"})
    module = build_module(micro_model_dir, settings)
    module.rewards = RewardSet({"five": RewardSpec(says_five)})
    tools = Tools([add, divide])
    module.engine = Keeps(environments=tools)
    module.sampling = SamplingParams(num_generations=3, max_completion_length=500)
    module.configure_model()
    tokenizer = module.policy.tokenizer
    tokenizer.chat_template = TEMPLATE
    prompt = make_prompt(ROW, tokenizer, "t:0", tools.chat_template_kwargs)
    before = weights(module)
    trainer().fit(module, Batches([prompt]).loader())
    return before - weights(module), module, prompt, tokenizer


def test_tools_are_answered_and_what_they_say_is_no_target(trained, micro_model_dir):
    gradient, module, prompt, tokenizer = trained
    ((group,),) = (rollout.completions for rollout in module.engine.kept)
    for completion, turns in zip(group, SCRIPTS, strict=True):
        own = tokenizer.decode(completion.token_ids[completion.dialogue.trained])
        assert own == "".join(turns) and completion.finish_reason == "stop"
    answered = group[0].token_ids[~group[0].dialogue.trained]
    assert tokenizer.decode(answered) == (
        "\n<|im_start|>user\n<tool_response>\n5\n</tool_response>\n<tool_response>\nerror: ZeroDivisionError: division "
        "by zero\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    # By hand: rewards 1, 0, 0 have mean 1/3 and standard deviation 3^-1/2; each completion is the mean of its tokens.
    policy = micro_policy(micro_model_dir)
    logprobs, _ = padded_logprobs(policy.base_model, [(prompt.input_ids, [c.token_ids for c in group])])
    parts = logprobs.split([len(c.token_ids) for c in group])
    advantages = [(reward - 1 / 3) / (3**-0.5 + 1e-4) for reward in (1, 0, 0)]
    means = [part[c.dialogue.trained].mean() for part, c in zip(parts, group, strict=True)]
    (-sum(a * mean for a, mean in zip(advantages, means, strict=True)) / 3).backward()
    assert relative_distance(gradient, flat_gradient(policy)) < 1e-12


def test_every_message_is_recorded_and_calls_are_counted(trained):
    _, module, _, _ = trained
    ((group,),) = (rollout.completions for rollout in module.engine.kept)
    assert [c.dialogue.tool_counts for c in group] == [ToolCounts(2, 1), ToolCounts(2, 0), ToolCounts(0, 0)]
    assert group[0].dialogue.messages == [
        {"role": "assistant", "content": BOTH},
        {"role": "tool", "content": "5"},
        {"role": "tool", "content": "error: ZeroDivisionError: division by zero"},
        {"role": "assistant", "content": "Five."},
    ]
    values = module.last_metrics
    assert values["dialogue/tool_calls"] == pytest.approx(4 / 3) and values["dialogue/turns"] == pytest.approx(5 / 3)
    assert values["dialogue/tool_failures"] == pytest.approx(1 / 4)


def test_results_that_do_not_fit_are_left_out_together(micro_model_dir, monkeypatch):
    monkeypatch.setattr(transformers_engine, "DialogueDecoder", Scripted)
    policy, tools = micro_policy(micro_model_dir), Tools([add, divide])
    policy.tokenizer.chat_template = TEMPLATE
    prompt = make_prompt(ROW, policy.tokenizer, "t:0", tools.chat_template_kwargs)
    first_turn = len(policy.tokenizer(SCRIPTS[0][0], add_special_tokens=False)["input_ids"])
    sampling = SamplingParams(num_generations=3, max_completion_length=first_turn + 60)
    completion = TransformersEngine(environments=tools).generate(policy, [prompt], sampling, 0).completions[0][0]
    assert len(completion.token_ids) == first_turn and completion.finish_reason == "length"
    assert completion.dialogue.messages == [{"role": "assistant", "content": BOTH}]
    assert completion.dialogue.tool_counts == ToolCounts(2, 1)


XML = "<tool_call>\n<function=add>\n<parameter=a>\n2\n</parameter>\n</function>\n</tool_call>"
MASKS = [
    (families.HERMES, call("add", '{"a": 2}'), "\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n"),
    (families.LLAMA, '{"name": "add", "parameters": {"a": 2}}', "\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n"),
    (families.QWEN_CODER, XML, "\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n"),
    (families.GLM.replace("<|observation|>", END), "<tool_call>add<arg_key>a</arg_key><arg_value>2</arg_value></tool_call>",
     "\n<tool_response>\n3\n</tool_response><|assistant|>"),
    (families.MISTRAL_LIST.replace("</s>", END), '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 2}, "id": "Ab3dE6gH9"}]',
     '[TOOL_RESULTS] {"content": 3, "call_id": "Ab3dE6gH9"}[/TOOL_RESULTS]'),
    (families.FORGETS, "<think>\nadd or divide?\n</think>\n\n" + call("add", '{"a": 2}'),
     "\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "turn", "between"), MASKS)
def test_no_token_of_the_environment_is_a_target_whatever_the_form(
    template, turn, between, micro_model_dir, monkeypatch
):
    monkeypatch.setattr(transformers_engine, "DialogueDecoder", Scripted)
    monkeypatch.setattr(Scripted, "turns_of", [[turn + END, "<think>so</think>3" + END]] * 2)
    policy, tools = micro_policy(micro_model_dir), Tools([add])
    policy.tokenizer.chat_template = template
    prompt = make_prompt(ROW, policy.tokenizer, "t:0", tools.chat_template_kwargs)
    sampling = SamplingParams(num_generations=2, max_completion_length=400)
    ((completion, _),) = TransformersEngine(environments=tools).generate(policy, [prompt], sampling, 0).completions
    first, said, second = (
        policy.tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (turn + END, between, "<think>so</think>3" + END)
    )
    assert completion.token_ids.tolist() == [*first, *said, *second]
    assert completion.dialogue.trained.tolist() == [True] * len(first) + [False] * len(said) + [True] * len(second)
    assert completion.dialogue.tool_counts == ToolCounts(1, 0) and completion.num_trained == len(first + second)
