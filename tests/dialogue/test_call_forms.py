"""How the families of models write calls of tools: which form a template has, and what each reads of exact texts."""

from __future__ import annotations

import copy
import functools

import pytest
from tokenizers import AddedToken

from gspo_lightning.data.templating import make_prompt
from gspo_lightning.dialogue import Tools
from gspo_lightning.dialogue.calls import CallError, mistral_id
from gspo_lightning.dialogue.forms import FORMS, form_of
from gspo_lightning.errors import UserError
from gspo_lightning.policy.bundled import resolve_model
from gspo_lightning.policy.reading import load_tokenizer
from tests.dialogue import form_support as families
from tests.dialogue.tool_support import Shop, add, divide, heard

ROW = {"prompt": [{"role": "user", "content": "Go on."}], "stock": {}}
SPECIAL = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "<|observation|>")  # fmt: skip
TOOLS = [add, divide, Shop]


@functools.cache
def loaded():
    own = load_tokenizer(resolve_model("bundled:smollm2-135m-instruct"))
    own.add_tokens([AddedToken(token, special=True) for token in (*SPECIAL, "</s>")], special_tokens=True)
    return own


def tokenizer(template):
    other = copy.copy(loaded())
    other.chat_template = template
    return other


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (families.HERMES, "json"),
        (families.LLAMA, "json"),
        (families.QWEN_CODER, "xml"),
        (families.SEED, "xml"),
        (families.GLM, "glm"),
        (families.MISTRAL_LIST, "mistral"),
        (families.MISTRAL_ARGS, "mistral"),
        (families.writes("<tool_call>\n{{ '{\"name\": \"' + c.function.name + '\", \"arguments\": ' + c.function.arguments }}}"), "json"),
        ("{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}" + families.GLM, "glm"),
        (families.SILENT.replace("system\n", "system\nWrite <tool_call>{}</tool_call>."), "json"),
        (families.SILENT.replace("system\n", "system\nWrite <tool_call>name<arg_key>."), "glm"),
    ],
)  # fmt: skip
def test_the_form_is_the_one_in_which_the_template_writes_calls(template, name):
    assert form_of(tokenizer(template), Tools(TOOLS).chat_template_kwargs) is FORMS[name]


@pytest.mark.parametrize("template", ["FUNCTION_GEMMA", "GRANITE", "DEEPSEEK", "PYTHONIC"])
def test_a_template_that_writes_calls_in_another_form_is_refused_in_one_line(template):
    own = tokenizer(getattr(families, template))
    with pytest.raises(UserError) as caught:
        Tools([add]).check(own)
    line = str(caught.value)
    assert line.startswith("environment.call_form: the model's chat template writes a call as ") and "\n" not in line
    assert "name_of_a_tool" in line and line.endswith("your prompts ask for: mistral, glm, xml, json")
    Tools([add], call_form="json").check(own)


def test_a_template_that_does_not_say_how_calls_are_written_is_refused():
    with pytest.raises(
        UserError, match=r"^environment.call_form: the model's chat template does not say how calls are wr"
    ):
        Tools([add]).check(tokenizer(families.SILENT))
    with pytest.raises(
        UserError, match=r"^environment.call_form='harmony' must be null or one of mistral, glm, xml, json$"
    ):
        Tools([add], call_form="harmony")


SCHEMAS = Tools(TOOLS)
READ = [
    ("xml", "x<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n-2\n</parameter>\n</function>\n</tool_call>",
     [("add", {"a": 1, "b": -2})]),
    ("xml", "<seed:think>no <function=divide></seed:think><seed:tool_call>\n<function=add>\n<parameter=a>1</parameter>\n</function>\n</seed:tool_call>",
     [("add", {"a": 1})]),
    ("xml", "<function=buy><parameter=item>\n\ntea < \"x\"\n\n</parameter><parameter=sizes>[1, 2]</parameter>",
     [("buy", {"item": '\ntea < "x"\n', "sizes": [1, 2]})]),
    ("xml", "<function=buy><parameter=item>7</parameter><parameter=sizes>None</parameter></function><function=stock></function>",
     [("buy", {"item": "7", "sizes": None}), ("stock", {})]),
    ("xml", "<function=add><parameter=a>one</parameter><parameter=c>2</parameter></function>", [("add", {"a": "one", "c": "2"})]),
    ("xml", "<think><function=add></think>No.", []),
    ("xml", "<function=add", ["a call must be <function=name><parameter=name>value</parameter></function>"]),
    ("xml", "<function=add>\n<parameter=a>1\n</function>", ["a parameter of add must be <parameter=...</parameter>"]),
    ("xml", "<function=add>\n1</parameter></function>", ["a parameter of add must be <parameter=...</parameter>"]),
    ("xml", "<function=add><parameter=a</parameter></function>", ["a parameter of add must be <parameter=name>value</parameter>"]),
    ("glm", "<think>\nhm</think>\n<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n<arg_key>b</arg_key>\n<arg_value>2</arg_value>\n</tool_call>",
     [("add", {"a": 1, "b": 2})]),
    ("glm", "<tool_call>buy<arg_key>item</arg_key><arg_value>\ntea</arg_value></tool_call><tool_call>stock</tool_call>",
     [("buy", {"item": "\ntea"}), ("stock", {})]),
    ("glm", "<tool_call>add <arg_key>a</arg_key>", ["an argument of add must be <arg_key>...</arg_value>"]),
    ("glm", "<tool_call>add<arg_key>a<arg_value>1</arg_value></tool_call>", ["an argument of add must be <arg_key>...</arg_key><arg_value>...</arg_value>"]),
    ("glm", "<tool_call></tool_call>", ["a call must be name<arg_key>...</arg_key><arg_value>...</arg_value>"]),
    ("mistral", ' [TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}, "id": "Ab3dE6gH9"}, {"name": "stock", "arguments": {}}]',
     [("add", {"a": 1}), ("stock", {})]),
    ("mistral", '[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]stock[CALL_ID]Ab3dE6gH9[ARGS]{}', [("add", {"a": 1}), ("stock", {})]),
    ("mistral", '[THINK][TOOL_CALLS]stock[ARGS]{}[/THINK]No.', []),
    ("mistral", "[TOOL_CALLS] [", ["the call is not valid JSON (Expecting value: line 1 column 3 (char 2))"]),
    ("mistral", "[TOOL_CALLS] []", ['a call must be {"name": ..., "arguments": {...}}']),
    ("mistral", "[TOOL_CALLS]add[ARGS]", ["the call is not valid JSON (Expecting value: line 1 column 1 (char 0))"]),
    ("mistral", "[TOOL_CALLS]add[ARGS][1]", ["the arguments of add must be a JSON object"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "turn", "calls"), READ)
def test_exact_texts_are_read_or_what_is_wrong_with_them_is_told(name, turn, calls):
    form, schemas = FORMS[name], {t["function"]["name"]: t for t in SCHEMAS.chat_template_kwargs["tools"]}
    read = []
    for call in form.calls(turn):
        try:
            read.append(form.read(call, schemas))
        except CallError as error:
            read.append(str(error))
    assert read == calls


@pytest.mark.parametrize("name", FORMS)
def test_ten_thousand_openings_are_read_at_once(name):
    form = FORMS[name]
    opening = {"xml": "<function=a><parameter=", "glm": "<tool_call>a<arg_key>"}.get(name, form.mark)
    for turn in (opening * 10_000, opening + "<parameter=<arg_key>" * 10_000):
        for call in form.calls(turn):
            with pytest.raises(CallError):
                form.read(call, {})


@pytest.mark.parametrize(
    ("call", "given"),
    [
        ('{"name": "add", "id": "Ab3dE6gH9"}', "Ab3dE6gH9"),
        ("add[CALL_ID]Ab3dE6gH9[ARGS]{}", "Ab3dE6gH9"),
        ('{"name": "add", "id": "Ab3dE6gH"}', None),
        ('{"name": "add", "id": 123456789}', None),
        ("add[ARGS]{}", None),
        ("[1", None),
        ("3", None),
    ],
)
def test_only_ids_that_mistrals_templates_take_are_given_back(call, given):
    assert mistral_id(call) == given


def played(template, turn, end):
    """What stands between a turn, written with the special tokens of its family, and the next one."""
    own = tokenizer(template)
    tools = Tools(TOOLS)
    dialogue = tools.begin(make_prompt(ROW, own, "t:0", tools.chat_template_kwargs), 0, own)
    ids = own(turn + end, add_special_tokens=False)["input_ids"]
    between = heard(dialogue, dialogue.decode(ids), (own.convert_tokens_to_ids(end),))
    return between and own.decode(between), dialogue


BETWEEN = [
    (families.QWEN_CODER, "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>", "<|im_end|>",
     "\n<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant\n"),
    (families.GLM, "\n<think></think>\n<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>", "<|observation|>",
     "\n<tool_response>\n2\n</tool_response><|assistant|>"),
    (families.MISTRAL_LIST, '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}, "id": "Ab3dE6gH9"}, {"name": "stock", "arguments": {}}]', "</s>",
     '[TOOL_RESULTS] {"content": 2, "call_id": "Ab3dE6gH9"}[/TOOL_RESULTS][TOOL_RESULTS] {"content": {}, "call_id": "000000001"}[/TOOL_RESULTS]'),
    (families.MISTRAL_ARGS, '[TOOL_CALLS]add[ARGS]{"a": 1}', "</s>",
     '[TOOL_RESULTS] {"content": 2, "call_id": "000000000"}[/TOOL_RESULTS]'),
]  # fmt: skip


@pytest.mark.parametrize(("template", "turn", "end", "between"), BETWEEN)
def test_a_call_with_the_special_tokens_of_its_family_is_answered(template, turn, end, between):
    said, dialogue = played(template, turn, end)
    assert said == between and dialogue.messages[0] == {"role": "assistant", "content": turn}
    assert dialogue.tool_counts.failures == 0
    assert heard(dialogue, "An answer.", ()) is None


def test_a_value_of_another_type_is_told_to_the_model():
    _, dialogue = played(families.QWEN_CODER, "<function=add><parameter=a>one</parameter></function>", "<|im_end|>")
    assert dialogue.messages[1]["content"] == "error: the argument a must be of type integer"


def test_the_form_of_a_tokenizer_is_looked_for_once_and_not_in_every_dialogue(monkeypatch):
    asked = []
    monkeypatch.setattr("gspo_lightning.dialogue.tools.form_of", lambda *given: asked.append(given) or form_of(*given))
    tools, first, second = Tools([add, divide]), tokenizer(families.GLM), tokenizer(families.SEED)
    for own in (first, first, second, second):
        prompt = make_prompt(ROW, own, "t:0", tools.chat_template_kwargs)
        form = tools.begin(prompt, 0, own).environment.form
        assert form is FORMS["glm" if own is first else "xml"]
    assert [given[0] for given in asked] == [first, second]
