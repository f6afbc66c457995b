"""Conversations: the same prompt from any kind of file, text in parts for any template, one line for what is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer

from gspo_lightning.data import PromptDataModule, RowsTask, make_prompt
from gspo_lightning.data.columns import checked_messages
from gspo_lightning.data.templating import encode_prompt
from gspo_lightning.data.vision import image_parts, last_text
from gspo_lightning.errors import UserError

PARTS = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
TALK: Any = [{"role": "user", "content": PARTS}]
STRINGS = "{% for m in messages %}{{ '<' + m['content'] + '>' }}{% endfor %}"
PRINTED = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
BOTH = (
    "{% for m in messages %}{% if m['content'] is string %}<{{ m['content'] }}>{% else %}"
    "<{% for p in m['content'] %}{{ p['text'] }}{% if not loop.last %}|{% endif %}{% endfor %}>{% endif %}{% endfor %}"
)
LINES = (
    "{% for m in messages %}{% if m['content'] is string %}<{{ m['content'] }}>{% else %}"
    "<{% for p in m['content'] %}{{ p['text'] | trim }}\n{% endfor %}>{% endif %}{% endfor %}"
)
FIRST = "{% for m in messages %}<{{ m['content'] if m['content'] is string else m['content'][0]['text'] }}>{% endfor %}"
DUMPED = "{% for m in messages %}<{{ m['content'] | tojson }}>{% endfor %}"
PARTS_ALONE = (
    "{% for m in messages %}<{% for p in m['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ p['text'] }}|{% endfor %}>{% endfor %}"
)


@pytest.fixture
def tokenizer(tokenizer_dir: str) -> Any:
    return AutoTokenizer.from_pretrained(tokenizer_dir)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (STRINGS, "<hi>"),
        (PRINTED, "<hi>"),
        (DUMPED, '<"hi">'),
        (FIRST, "<hi>"),
        (BOTH, "<h|i>"),
        (LINES, "<h\ni\n>"),
        (PARTS_ALONE, "<h|i|>"),
    ],
    ids=["strings", "printed", "dumped", "first part alone", "both", "lines", "parts alone"],
)
def test_text_in_parts_is_joined_unless_the_template_reads_parts(tokenizer: Any, template: str, text: str) -> None:
    tokenizer.chat_template = template
    assert tokenizer.decode(encode_prompt(TALK, tokenizer)) == text
    assert TALK == [{"role": "user", "content": PARTS}]


def test_whether_parts_are_read_is_tried_with_the_conversation_and_the_options(tokenizer: Any) -> None:
    system = {"role": "system", "content": "s"}
    tokenizer.chat_template = (
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('first') }}{% endif %}{{ place + ':' }}" + BOTH
    )
    assert tokenizer.decode(encode_prompt([system, *TALK], tokenizer, {"place": "Oslo"})) == "Oslo:<s><h|i>"


def test_what_a_template_stumbles_over_is_one_line(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages[0]['name'] + 1 }}"
    with pytest.raises(UserError, match=r"row x: the model's chat template rejects the prompt: can only concatenate"):
        encode_prompt([{"role": "user", "content": "hi", "name": "a"}], tokenizer, where="row x")


def test_parquet_and_json_make_the_same_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    calls = [
        {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}
        for name, arguments in (("a", {"city": "Oslo"}), ("b", {"x": [3]}))
    ]
    talk = [{"role": "user", "content": "go"}, *calls, {"role": "user", "content": "on"}]
    parts = [{"type": "image", "image": b"\x89"}, {"type": "text", "text": "what?"}]
    for name, talks in (("calls", [talk] * 2), ("parts", [[{"role": "user", "content": parts}]] * 2)):
        rows = [{"prompt": prompt} for prompt in talks]
        path = str(tmp_path / f"{name}.parquet")
        datasets.Dataset.from_list(rows).to_parquet(path)
        task = RowsTask(path, num_validation=0)
        assert [task.train_row(i)["prompt"] for i in range(2)] == talks


def test_a_null_is_left_out_of_a_message_at_any_depth_and_stays_in_a_list() -> None:
    call = {"name": None, "arguments": {"x": None, "y": {"z": None}, "w": [1, None]}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "ok"}]
    assert checked_messages(messages, "row x") == [
        {"role": "assistant", "tool_calls": [{"arguments": {"y": {}, "w": [1, None]}}]},
        {"role": "tool", "content": "ok"},
    ]
    assert json.dumps(call) == '{"name": null, "arguments": {"x": null, "y": {"z": null}, "w": [1, null]}}'


READING: Any = {"temp": 5, "wind": None, "days": [{"rain": None}]}
GO: Any = {"role": "user", "content": "go"}


@pytest.mark.parametrize("role", ["tool", "ipython", "function"])
@pytest.mark.parametrize("content", [READING, [READING], [{"text": "hi"}], ["a", None], 5], ids=str)
def test_what_a_tool_returned_is_data_and_keeps_its_nulls(tokenizer: Any, role: str, content: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | tojson }};{% endfor %}"
    message = {"role": role, "name": None, "content": content}
    prompt = make_prompt({"prompt": [GO, message]}, tokenizer, "x")
    assert prompt.prompt == [GO, {"role": role, "content": content}]
    assert tokenizer.decode(prompt.input_ids) == f'"go";{json.dumps(content)};'


def test_a_part_of_what_a_tool_returned_is_a_part(tokenizer: Any) -> None:
    parts: Any = [{"type": "image", "image": {"bytes": b"\x89", "path": None}, "text": None}, {"size": None}]
    prompt = checked_messages([GO, {"role": "tool", "content": parts}], "row x")
    assert prompt[1]["content"] == [{"type": "image", "image": {"bytes": b"\x89"}}, {"size": None}]
    assert image_parts(prompt) == [{"type": "image", "image": {"bytes": b"\x89"}}]
    assert last_text([GO, {"role": "tool", "content": {"temp": 5}}]) == "{'temp': 5}"


def test_what_a_tool_returned_is_refused_by_the_template_in_one_line(tokenizer: Any) -> None:
    tokenizer.chat_template = STRINGS
    for content in (READING, [READING]):
        with pytest.raises(UserError, match="row x: the model's chat template rejects the prompt: can only conc"):
            make_prompt({"prompt": [GO, {"role": "tool", "content": content}]}, tokenizer, "x")


def test_images_of_columns_stand_beside_data_of_a_tool() -> None:
    row = {"prompt": [{"role": "tool", "content": [READING, "a"]}, GO], "image": "a.png"}
    prompt = RowsTask([row], num_validation=0, image_columns=["image"]).train_row(0)["prompt"]
    image = {"type": "image", "image": "a.png"}
    assert prompt == [row["prompt"][0], {"role": "user", "content": [image, {"type": "text", "text": "go"}]}]


def test_images_of_columns_go_into_a_conversation_with_a_message_without_content() -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
    row = {"prompt": [{"role": "user", "content": "q"}, call, {"role": "tool", "content": "ok"}], "image": "a.png"}
    prompt = RowsTask([row], num_validation=0, image_columns=["image"]).train_row(0)["prompt"]
    image, text = {"type": "image", "image": "a.png"}, {"type": "text", "text": "ok"}
    assert prompt == [{"role": "user", "content": "q"}, call, {"role": "tool", "content": [image, text]}]


def test_images_under_the_keys_of_transformers_are_those_of_the_part() -> None:
    given = [
        {"type": "image", "path": "a.png", "url": None, "image": None},
        {"type": "image", "url": "a.png"},
        {"type": "image", "base64": "QUJD"},
        {"type": "video", "path": "a.mp4"},
        {"type": "image", "path": "a.png", "url": "b.png"},
        {"type": "image", "image": "a.png"},
    ]
    (message,) = checked_messages([{"role": "user", "content": given}], "row x")
    assert message["content"] == [
        *[{"type": "image", "image": "a.png"}] * 2,
        {"type": "image", "image": "data:image;base64,QUJD"},
        {"type": "video", "video": "a.mp4"},
        *given[4:],
    ]


@pytest.mark.parametrize("kind", ["image", "video"])
def test_an_image_within_a_part_of_text_is_not_lost(kind: str) -> None:
    part = {"type": "text", "text": "look", kind: "a.png"}
    with pytest.raises(UserError) as error:
        checked_messages([{"role": "user", "content": [part]}], "row x")
    assert str(error.value) == (
        f"row x, message 0: a part of type text has the key {kind!r}, which would be lost; make it a part of its own, "
        f"{{'type': {kind!r}, {kind!r}: ...}}"
    )
    (message,) = checked_messages([{"role": "user", "content": [{**part, kind: None}]}], "row x")
    assert message["content"] == [{"type": "text", "text": "look"}]


class Own:
    """A task of one's own, whose rows nobody has looked at."""

    name, num_train_rows = "own", None

    def __init__(self, row: Any) -> None:
        self.row = row

    def train_row(self, index: int) -> Any:
        return self.row

    def validation_rows(self) -> list[Any]:
        return []


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


NO_MESSAGES = "the prompt must be a string or a list of messages with role and content"
NO_CONTENT = r"message 0: the content must be text, or a list of parts such as \{'type': 'text', 'text': \.\.\.\}"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        *((prompt, NO_MESSAGES) for prompt in (None, 5, b"abc", {"role": "user", "content": "x"}, [], ["x"])),
        *(
            ([message], NO_MESSAGES)
            for message in ({"content": "x"}, {"role": ["user"], "content": "x"}, {"role": " "})
        ),
        *((user(content), NO_CONTENT) for content in (5, {"text": "x"}, ["x"], [{"text": "x"}], [{"type": "text"}])),
        *((user([{"type": kind, kind: "x"}]), NO_CONTENT) for kind in ("image_url", "audio", 5)),
        *(
            (prompt, "the prompt is empty")
            for prompt in ("", " \n", user(" "), user(None), user([]), [{"role": "user"}])
        ),
        (user([{"type": "text", "text": " "}]), "the prompt is empty"),
        ([*user("q"), {"role": "assistant", "content": "a"}], "the last message is the assistant's"),
    ],
)
def test_a_prompt_that_is_none_is_one_line_in_tasks_and_loaders_of_ones_own(
    tokenizer_dir: str, tokenizer: Any, prompt: Any, message: str
) -> None:
    data = PromptDataModule(Own({"prompt": prompt}), tokenizer_dir, prompts_per_rollout=1, max_prompt_length=99)
    for attempt in (data.check, lambda: make_prompt({"prompt": prompt}, tokenizer, "own:train:0")):
        with pytest.raises(UserError, match=f"row own:train:0[:,] {message}") as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_a_row_that_is_none_is_one_line(tokenizer_dir: str) -> None:
    data = PromptDataModule(Own("hello"), tokenizer_dir, prompts_per_rollout=1, max_prompt_length=99)
    with pytest.raises(UserError, match="row own:train:0: expected a row with columns, found str"):
        data.check()


def test_a_conversation_in_a_tuple_is_a_prompt(tokenizer_dir: str) -> None:
    data = PromptDataModule(Own({"prompt": tuple(TALK)}), tokenizer_dir, prompts_per_rollout=1, max_prompt_length=99)
    (prompt,) = data.batch_at(0).prompts
    assert prompt.prompt == TALK
    assert data.tokenizer.decode(prompt.input_ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
