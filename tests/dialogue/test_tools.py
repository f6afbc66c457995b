"""Functions as tools: what the model is shown, how its calls are read and answered, and what is refused at the start."""

from __future__ import annotations

import copy
import functools
import json
import warnings
from datetime import date
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import AddedToken
from transformers.utils import get_json_schema

from gspo_lightning.data.templating import check_template_kwargs, make_prompt
from gspo_lightning.dialogue import Environments, Reply, Tools
from gspo_lightning.dialogue.calls import json_calls
from gspo_lightning.dialogue.template import continuation
from gspo_lightning.errors import UserError
from gspo_lightning.policy.bundled import resolve_model
from gspo_lightning.policy.reading import load_tokenizer
from gspo_lightning.types import ToolCounts
from gspo_lightning.users_code import call_tool
from tests.dialogue import tool_support
from tests.dialogue.tool_support import TEMPLATE, Shop, add, call, divide, heard

HERE = "tests.dialogue.tool_support"
CHAT = [{"role": "user", "content": "Go on."}]
ROW = {"prompt": CHAT, "stock": {"tea": 3}, "stock_is_counted": True}


def loaded():
    fresh = load_tokenizer(resolve_model("bundled:smollm2-135m-instruct"))
    fresh.chat_template = TEMPLATE
    return fresh


tokenizer = functools.cache(loaded)


def tokenizer_with(template):
    """With another template; the vocabulary is shared, as loading it takes most of a second."""
    other = copy.copy(tokenizer())
    other.chat_template = template
    return other


def begun(functions, row=ROW, **settings):
    tools = Tools(functions, **settings)
    prompt = make_prompt(row, tokenizer(), "t:3", tools.chat_template_kwargs)
    return tools.begin(prompt, 0, tokenizer())


def answers(dialogue, turn):
    """The messages that follow a turn; None if it ends the dialogue."""
    count = len(dialogue.messages)
    between = heard(dialogue, turn, (tokenizer().eos_token_id,))
    return None if between is None else [message["content"] for message in dialogue.messages[count + 1 :]]


def test_the_prompt_shows_the_schemas_that_transformers_makes():
    tools = Tools([add, f"{HERE}.divide"])
    prompt = make_prompt(ROW, tokenizer(), "t:3", tools.chat_template_kwargs)
    shown = [json.loads(line) for line in tokenizer().decode(prompt.input_ids).splitlines() if line.startswith("{")]
    assert shown == [get_json_schema(add), get_json_schema(divide)] == tools.chat_template_kwargs["tools"]


def test_several_calls_of_a_turn_are_answered_together_each_by_a_message_of_its_own():
    dialogue = begun([add, divide])
    turn = "\n".join(["Both.", call("add", '{"a": 2, "b": 3}'), call("divide", '{"a": 3, "b": 2}')])
    between = tokenizer().decode(heard(dialogue, turn, (tokenizer().eos_token_id,)))
    assert between == (
        "\n<|im_start|>user\n<tool_response>\n5\n</tool_response>\n<tool_response>\n1.5\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert dialogue.messages == [
        {"role": "assistant", "content": turn}, {"role": "tool", "content": "5"}, {"role": "tool", "content": "1.5"},
    ]  # fmt: skip
    assert heard(dialogue, "It is 5.", (tokenizer().eos_token_id,)) is None
    assert dialogue.tool_counts == ToolCounts(2, 0) and dialogue.result() == (0.0, ())


def test_what_follows_a_turn_equals_the_templates_own_rendering_of_the_whole_conversation():
    dialogue = begun([add])
    turn, kwargs = call("add", '{"a": 2}') * 2, dialogue.settings.chat_template_kwargs
    between = heard(dialogue, turn, (tokenizer().eos_token_id,))
    whole = tokenizer().apply_chat_template(
        [*CHAT, *dialogue.messages], add_generation_prompt=True, return_dict=False, **kwargs
    )
    own = tokenizer()(turn, add_special_tokens=False)["input_ids"]
    assert whole == [*dialogue.prompt.input_ids.tolist(), *own, tokenizer().eos_token_id, *between]


def test_added_tokens_that_are_not_special_stay_in_the_decoded_turn():
    """As ``<tool_call>`` (id 151657, ``special: false``) in the vocabularies of Qwen2.5 and Qwen3."""
    own = loaded()
    own.add_tokens([AddedToken(mark, special=False) for mark in ("<tool_call>", "</tool_call>")])
    ids = own(call("add", '{"a": 1}') + "<|im_end|>")["input_ids"]
    assert ids[0] == own.convert_tokens_to_ids("<tool_call>") and ids[-1] == own.eos_token_id
    assert own.decode(ids, skip_special_tokens=True) == call("add", '{"a": 1}')


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("no call", []),
        ("<tool_call>x</tool_call>", ["x"]),
        ("a<tool_call>x</tool_call>b<tool_call>\ny\n</tool_call>c", ["x", "\ny\n"]),
        ("<tool_call>x", ["x"]),
        ("<tool_call>x<tool_call>y</tool_call>", ["x", "y"]),
        ("</tool_call>x", []),
        ('{"name": "add", "parameters": {"a": 1}}', ['{"name": "add", "parameters": {"a": 1}}']),
        (' {"name": "add", "arguments": {"a"\n', ['{"name": "add", "arguments": {"a"']),
        ('I say {"name": "add", "parameters": {}}', []),
        ('{"name": "Ann", "age": 3}', []),
        ("<think>\nperhaps <tool_call>x</tool_call>\n</think>\n\n<tool_call>y</tool_call>", ["y"]),
        ("perhaps <tool_call>x</tool_call>\n</think>\n\nNo.", []),
        ("<think>perhaps <tool_call>x</tool_call>", []),
    ],
)
def test_calls_are_read_in_the_forms_of_hermes_and_of_llama(text, calls):
    assert json_calls(text) == calls


def test_a_million_openings_take_no_time():
    assert len(json_calls("<tool_call>" * 1_000_000)) == 1_000_000


def test_a_call_of_llama_is_answered():
    dialogue = begun([add])
    assert answers(dialogue, '{"name": "add", "parameters": {"a": 4}}') == ["5"]


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ("<tool_call>add(1, 2)</tool_call>", "error: the call is not valid JSON (Expecting value: line 1 column 1 (char 0))"),
        (f"<tool_call>{DEEP}</tool_call>", "error: the call is not valid JSON (maximum recursion depth exceeded"),
        (call("add", '{"a": NaN}'), "error: the call is not valid JSON (NaN is no number)"),
        ("<tool_call>[1]</tool_call>", 'error: a call must be {"name": ..., "arguments": {...}}'),
        ('<tool_call>{"name": 3, "arguments": {}}</tool_call>', 'error: a call must be {"name": ..., "arguments": {...}}'),
        (call("add", '"a"'), "error: the arguments of add must be a JSON object"),
        (call("subtract", "{}"), "error: there is no tool subtract; the tools are add, divide, buy, stock"),
        (call("reset", "{}"), "error: there is no tool reset; the tools are add, divide, buy, stock"),
        (call("add", '{"b": 2}'), "error: the argument a is missing"),
        (call("add", '{"a": 1, "c": 2}'), "error: there is no argument c; the arguments are a, b"),
        (call("stock", '{"c": 2}'), "error: there is no argument c; the arguments are none"),
        (call("add", '{"a": "1"}'), "error: the argument a must be of type integer"),
        (call("add", '{"a": true}'), "error: the argument a must be of type integer"),
        (call("buy", '{"item": "gold"}'), 'error: the argument item must be of the choices ["tea", "milk"]'),
        (call("buy", '{"item": "tea", "sizes": 3}'), "error: the argument sizes must be of type array"),
        (call("divide", '{"a": 1, "b": 0}'), "error: ZeroDivisionError: division by zero"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_call_is_told_to_the_model_and_counted(turn, said):
    dialogue = begun([add, divide, Shop])
    (text,) = answers(dialogue, turn)
    assert text.startswith(said) and (text == said or turn[11:].startswith(DEEP))
    assert dialogue.tool_counts == ToolCounts(1, 1)
    assert answers(dialogue, call("add", '{"a": 1}')) == ["2"] and dialogue.tool_counts == ToolCounts(2, 1)


def test_arguments_may_be_null_where_the_hint_allows_it_and_whole_numbers_are_numbers():
    dialogue = begun([divide, Shop])
    assert answers(dialogue, call("buy", '{"item": "tea", "sizes": null}')) == ['["tea"]']
    assert answers(dialogue, call("divide", '{"a": 1, "b": 2}')) == ["0.5"]


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ("as it is", "as it is"), ([1, {"a": None}], '[1, {"a": null}]'), (np.int64(3), "3"), (np.float32(1.5), "1.5"),
        ({"x": torch.tensor(True)}, '{"x": true}'), (np.arange(2000), json.dumps(list(range(2000)))),
        (Decimal("1.5"), '"1.5"'), (date(2020, 1, 2), '"2020-01-02"'), (np.complex64(1), '"(1+0j)"'),
    ],
)  # fmt: skip
def test_a_result_is_said_as_json_numbers_of_numpy_and_long_arrays_too(result, said):
    assert call_tool(lambda: result, {}) == ("said", said)


def test_a_class_is_made_for_every_dialogue_with_the_row_and_gives_the_reward():
    first, second = begun([Shop]), begun([Shop])
    assert answers(first, call("buy", '{"item": "tea"}')) == ['["tea"]']
    assert answers(first, call("buy", '{"item": "milk"}')) == ['["tea", "milk"]']
    assert answers(second, call("stock", "{}")) == ['{"tea": 3}']
    assert (first.result()[0], second.result()[0]) == (2.0, 0.0)
    assert ROW["stock_is_counted"] and Tools([Shop]).rewards and not Tools([add]).rewards


def test_what_one_class_takes_from_the_row_is_there_for_the_next():
    class Looks:
        def reset(self, row, seed):
            self.row = row

        def look(self) -> list[str]:
            """Looks at the row."""
            return list(self.row)

    assert answers(begun([Shop, Looks]), call("look", "{}")) == ['["prompt", "stock", "stock_is_counted"]']


def test_the_turn_limit_ends_a_dialogue_that_goes_on_calling():
    dialogue = begun([add], max_turns=2)
    assert answers(dialogue, call("add", '{"a": 1}')) == ["2"]
    assert answers(dialogue, call("add", '{"a": 1}')) is None and len(dialogue.messages) == 3


@pytest.mark.parametrize(
    ("functions", "line"),
    [
        ([], "environment.functions=[] must be a list of functions, or of their names such as my_tools.add"),
        (add, "environment.functions=<function add"),
        (["os.system"], "environment.functions=os.system is not on the list of what a config may call; if you trust it"),
        ([f"{HERE}.json"], f"environment.functions={HERE}.json (it is defined in json) is not on the list"),
        ([f"{HERE}.absent"], f"environment.functions: cannot import {HERE}.absent ("),
        ([f"{HERE}.TEMPLATE"], f"environment.functions: {HERE}.TEMPLATE is of type str; name a function or a class"),
        ([SimpleNamespace()], "environment.functions: namespace() is of type SimpleNamespace; name a function or a class"),
        ([add, add], "environment.functions: two tools are named add; rename one"),
        ([tool_support.waits], "environment.functions: waits is async, but nothing awaits it; make it a plain function"),
        ([tool_support.AsyncReset], "environment.functions: AsyncReset.reset is async, but nothing awaits it; make it"),
        ([tool_support.undocumented], "environment.functions: undocumented needs type hints and a docstring with Args: ("),
        ([tool_support.unhinted], "environment.functions: unhinted needs type hints and a docstring with Args: ("),
        ([tool_support.half_documented], "environment.functions: half_documented needs type hints and a docstring with A"),
        ([tool_support.listed], "environment.functions: listed takes numbers without a name, but models give each argum"),
        ([tool_support.Wants], "environment.functions: Wants is made for every dialogue without arguments (missing a req"),
        ([tool_support.Empty], "environment.functions: there is no public method in Empty"),
    ],
)  # fmt: skip
def test_what_is_no_tool_is_refused_at_the_start_in_one_line(functions, line, monkeypatch):
    monkeypatch.setattr(tool_support, "json", json, raising=False)
    with pytest.raises(UserError) as caught:
        Tools(functions)
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


def test_a_tool_that_only_turns_out_to_be_async_ends_the_run_in_one_line():
    def hides(a: int) -> int:
        """Waits.

        Args:
            a: how long
        """
        return tool_support.waits(a)

    with warnings.catch_warnings(), pytest.raises(UserError) as caught:
        warnings.simplefilter("error")  # a coroutine that nobody awaited warns
        answers(begun([hides]), call("hides", '{"a": 1}'))
    assert str(caught.value) == (
        "environment ToolDialogue.step: tool hides returned something to await, but nothing awaits it; make it a plain "
        "function (row t:3)"
    )


def test_prompts_that_show_other_tools_or_none_are_refused():
    with pytest.raises(
        UserError, match=r"^environment.chat_template_kwargs.tools are others than environment.functions"
    ):
        Tools([add, divide], chat_template_kwargs={"tools": [add]})
    same = Tools([add, Shop], chat_template_kwargs={"tools": [f"{HERE}.add", f"{HERE}.Shop"], "thinks": True})
    assert same.chat_template_kwargs == {**Tools([add, Shop]).chat_template_kwargs, "thinks": True}
    silent = make_prompt(ROW, tokenizer(), "t:3", {})
    with pytest.raises(
        UserError, match=r"^environment.functions: the prompt does not name the tool add; .* \(row t:3\)$"
    ):
        Tools([add]).begin(silent, 0, tokenizer())


def test_a_model_whose_calls_are_in_harmony_is_refused():
    own = loaded()
    own.add_tokens(["<|call|>"], special_tokens=True)
    tools = Tools([add])
    with pytest.raises(UserError, match="calls in the harmony format are not read; use another model$"):
        tools.begin(make_prompt(ROW, own, "t:3", tools.chat_template_kwargs), 0, own)


IGNORES = TEMPLATE.replace("{% if tools %}", "{% if tools and false %}")


@pytest.mark.parametrize(
    ("template", "line"),
    [
        (IGNORES, "data.chat_template_kwargs.tools: the model's chat template shows no tools; use a model whose template does, "),
        (None, "data.chat_template_kwargs.tools: the tokenizer has no chat template to show the tools; use a model that "),
    ],
)  # fmt: skip
def test_a_template_that_ignores_tools_is_refused_in_one_line(template, line):
    with pytest.raises(UserError) as caught:
        check_template_kwargs(tokenizer_with(template), Tools([add]).chat_template_kwargs)
    assert str(caught.value).startswith(line)
    check_template_kwargs(tokenizer(), Tools([add]).chat_template_kwargs)
    wants_system = "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}"
    check_template_kwargs(tokenizer_with(wants_system + TEMPLATE), Tools([add]).chat_template_kwargs)
    with pytest.raises(UserError, match="shows no tools"):
        check_template_kwargs(tokenizer_with(wants_system + IGNORES), Tools([add]).chat_template_kwargs)
    beside_system = TEMPLATE.replace("{% if tools %}", "{% if tools and messages[0].role == 'system' %}")
    check_template_kwargs(tokenizer_with(beside_system), Tools([add]).chat_template_kwargs)


def test_a_template_that_writes_one_of_two_messages_is_refused():
    own = tokenizer_with(TEMPLATE.replace("m.role == 'tool' %}", "m.role == 'tool' and not loop.last %}{% elif m.role == 'tool' %}"))  # fmt: skip
    messages = [{"role": "tool", "content": "5"}] * 2
    with pytest.raises(UserError, match="the chat template leaves out what a message of role tool says"):
        continuation(own, messages, {}, True, (own.eos_token_id,))


@pytest.mark.parametrize("reply", [("a", "user", None, ["b"]), ("a", "user", None, (1,)), (None, "user", None, ("b",))])
def test_further_messages_of_a_reply_are_strings_after_a_text(reply):
    with pytest.raises(UserError, match=r"^Reply: more=.* must be a tuple of strings, after a text$"):
        Reply(*reply)


def test_without_a_template_the_texts_follow_each_other():
    class Two:
        def reset(self, row, seed): ...

        def step(self, text):
            return Reply("1", more=("2", "3"))

        def reward(self):
            return 0.0

    prompt = make_prompt({"prompt": "plain"}, tokenizer(), "t:3")
    dialogue = Environments(Two).begin(prompt, 0, tokenizer())
    assert tokenizer().decode(heard(dialogue, "a", (2,))) == "123" and dialogue.tool_counts is None
