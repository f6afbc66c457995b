"""Token ids of a prompt are those of the model's own template, and options it would ignore are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from gspo_lightning.data.templating import check_template_kwargs, encode_prompt
from gspo_lightning.data.written_marks import WrittenMarks
from gspo_lightning.errors import UserError
from gspo_lightning.types import Prompt

TALK = [{"role": "user", "content": "hi"}]


@pytest.fixture
def tokenizer(tokenizer_dir: str) -> Any:
    return AutoTokenizer.from_pretrained(tokenizer_dir)


def test_messages_end_where_the_assistant_begins(tokenizer: Any) -> None:
    ids = encode_prompt(TALK, tokenizer)
    assert tokenizer.decode(ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    # <|im_start|> u s e r \n h i <|im_end|> \n <|im_start|> and the ten of "assistant\n".
    assert ids.tolist()[8] == tokenizer.eos_token_id and len(ids) == 11 + 10


def test_a_plain_string_is_itself(tokenizer: Any) -> None:
    assert tokenizer.decode(encode_prompt("3a:", tokenizer)) == "3a:"
    assert len(encode_prompt("3a:", tokenizer)) == 3


def test_a_plain_string_has_no_end_token_that_the_tokenizer_puts_after_every_text(tokenizer: Any) -> None:
    alone = tokenizer("3a:")["input_ids"]
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    assert tokenizer("3a:")["input_ids"] == [*alone, tokenizer.eos_token_id]
    assert encode_prompt("3a:", tokenizer).tolist() == alone


def test_options_reach_the_template(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% if enable_thinking %}think {% endif %}{{ messages[0]['content'] }}"
    assert tokenizer.decode(encode_prompt(TALK, tokenizer, {"enable_thinking": True})) == "think hi"
    assert tokenizer.decode(encode_prompt(TALK, tokenizer)) == "hi"
    check_template_kwargs(tokenizer, {"enable_thinking": False})


def test_an_option_the_template_never_reads_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"data\.chat_template_kwargs\.enable_thinking has no effect"):
        check_template_kwargs(tokenizer, {"enable_thinking": True})
    with pytest.raises(UserError, match=r"data\.chat_template_kwargs\.tokenize is set by the program"):
        check_template_kwargs(tokenizer, {"tokenize": False})


def test_what_the_template_refuses_is_said_with_the_row(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(UserError, match=r"row x:train:3: the model's chat template rejects the prompt: no system role"):
        encode_prompt(TALK, tokenizer, where="row x:train:3")
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"row y: the prompt is a conversation, but the tokenizer has no chat template"):
        encode_prompt(TALK, tokenizer, where="row y")


def test_half_a_character_is_refused_with_the_row(tokenizer: Any) -> None:
    parts = [{"type": "image", "image": b"\xff"}, {"type": "text", "text": "q\udcff"}]
    for prompt, half in [
        ("q\ud800", r"\ud800"),
        ([{"role": "user", "content": "\ud83d!"}], r"\ud83d"),
        ([{"role": "user", "content": parts}], r"\udcff"),
    ]:
        with pytest.raises(UserError) as caught:
            encode_prompt(prompt, tokenizer, where="row x")
        assert str(caught.value).startswith(f"row x: the prompt has '{half}', an unpaired surrogate")
    assert tokenizer.decode(encode_prompt("\U0001f600a", tokenizer)).endswith("a")


def test_the_default_system_prompt_of_smollm2_stays(smollm2_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    text = tokenizer.decode(encode_prompt(TALK, tokenizer))
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("text", ["hi", "<|endoftext|>hi"])
def test_a_plain_prompt_has_one_bos_whoever_writes_it(smollm2_dir: Path, text: str) -> None:
    own = AutoTokenizer.from_pretrained(smollm2_dir)
    own.bos_token = "<|endoftext|>"
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", pair="<|endoftext|> $A $B", special_tokens=[("<|endoftext|>", 0)]
    )
    assert own.convert_ids_to_tokens(encode_prompt(text, own)) == ["<|endoftext|>", "hi"]


def test_conversations_with_special_tokens_in_their_text_are_counted_in_one_line(tokenizer: Any) -> None:
    talks: list[Any] = [
        "<|im_start|>plain",
        [{"role": "user", "content": "<think> a < b"}],
        [{"role": "user", "content": "a <|im_end|>\n<|im_start|>"}, {"role": "tool", "content": {"a": 1}}],
        [{"role": "user", "content": [{"type": "text", "text": "<|im_start|>"}]}],
    ]
    marks = WrittenMarks(tokenizer)
    for number, talk in enumerate(talks[:2]):
        marks.look_at(Prompt(f"r:{number}", talk, torch.ones(1), {}))
    assert marks.line() is None
    for number, talk in enumerate(talks):
        marks.look_at(Prompt(f"r:{number}", talk, torch.ones(1), {}))
    assert marks.line() == (
        "2 of the prompts that were checked have special tokens in their text, the first <|im_end|> (row r:2); the model "
        "sees the tokens, not the text: take them out, or set data.task.conversational=false if the rows of a file are "
        "written in a chat template already"
    )
