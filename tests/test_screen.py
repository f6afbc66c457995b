"""What others wrote reaches no terminal as something it obeys."""

from __future__ import annotations

import http.client
import io
import os
import socket
import sys

import pytest
import torch
from rich.console import Console

from gspo_lightning.data.preview import _panel
from gspo_lightning.program import ending
from gspo_lightning.program.redact import masked, masked_stderr
from gspo_lightning.report import print_evaluation
from gspo_lightning.report.__main__ import main as report
from gspo_lightning.report.compare import main as compare
from gspo_lightning.report.config_tree import config_tree
from gspo_lightning.rollout.http_client import Server, ServerError
from gspo_lightning.rollout.server_pool import _say
from gspo_lightning.screen import counted, say, visible
from gspo_lightning.types import Prompt

TITLE = "\x1b]0;pwned\x07"
CLEAR = "\x9b2J"


def shown(what):
    console = Console(file=io.StringIO(), width=200)
    console.print(what) if not callable(what) else what(console)
    return console.file.getvalue()


def assert_harmless(text):
    assert "␛]0;pwned␇" in text
    assert {char for char in text if ord(char) < 32 or 127 <= ord(char) < 160} <= {"\n"}


def test_every_control_character_has_a_sign_but_ends_of_lines_and_tabs():
    text = "".join(map(chr, range(0x180)))
    seen = visible(text)
    assert [char for char in seen if ord(char) < 32 or 127 <= ord(char) < 160] == ["\t", "\n"]
    assert seen[0] == "␀" and seen[13] == "␍" and seen[27] == "␛" and visible("\x7f\x80\x9b") == "␡\\x80\\x9b"
    assert visible("héllo → 你好 🙂\t\n") == "héllo → 你好 🙂\t\n"


@pytest.mark.parametrize(("count", "line"), [(0, "0 boxes"), (1, "1 box"), (2, "2 boxes")])
def test_counts_in_words(count, line):
    assert counted(count, "box", "boxes") == line
    assert counted(count, "row") == f"{count} row{'' if count == 1 else 's'}"


def test_error_lines():
    assert masked(f"row {TITLE}: no{CLEAR}") == "row ␛]0;pwned␇: no\\x9b2J"


def test_progress_on_the_error_stream_keeps_its_own_sequences(capsys):
    with masked_stderr():
        print("\r\x1b[32m50 %\x1b[0m", file=sys.stderr, end="")
    assert capsys.readouterr().err == "\r\x1b[32m50 %\x1b[0m"


def test_the_preview():
    class Tokenizer:
        def decode(self, ids):
            return f"a{TITLE}{CLEAR}b"

    row = {"prompt": "p", "note": TITLE + CLEAR}
    text = shown(_panel(Prompt(f"x{TITLE}:0", "p", torch.tensor([1, 2]), row), Tokenizer()))
    assert_harmless(text)
    assert text.count("␛]0;pwned␇") == 3 and text.count("\\x9b2J") == 2


def test_the_tables_at_the_end():
    sample = {"prompt": TITLE, "completion": TITLE + CLEAR, "answer": TITLE, "reward": 0.5, "right": True}
    text = shown(lambda console: print_evaluation(console, f"model{TITLE}", {"val/accuracy": 0.5}, [sample]))
    assert_harmless(text)
    assert text.count("␛]0;pwned␇") == 4


def test_the_tree_of_a_config():
    text = shown(config_tree({f"a{TITLE}": TITLE, "b": {f"c{TITLE}": CLEAR, "_target_": TITLE}}))
    assert_harmless(text)
    assert text.count("␛]0;pwned␇") == 4


def test_the_answer_of_a_server():
    with pytest.raises(ServerError) as error:
        Server("http://127.0.0.1:1")._decode("/v1", 500, TITLE.encode(), True)
    assert str(error.value) == "http://127.0.0.1:1/v1 answered 500: ␛]0;pwned␇"


def test_what_is_no_http_at_all(monkeypatch):
    def send(*_):
        raise http.client.BadStatusLine(TITLE + CLEAR)

    monkeypatch.setattr(http.client.HTTPConnection, "connect", lambda c: setattr(c, "sock", socket.socket()))
    monkeypatch.setattr(Server, "_send", send)
    with pytest.raises(ServerError) as error:
        Server("http://127.0.0.1:1").post("/v1", {}, 5.0)
    assert str(error.value) == "http://127.0.0.1:1/v1: BadStatusLine: ␛]0;pwned␇\\x9b2J"


def test_the_lines_about_servers(capsys):
    _say(f"failed: {TITLE}\n {CLEAR}")
    assert capsys.readouterr().err == "failed: ␛]0;pwned␇ \\x9b2J\n"


@pytest.mark.parametrize(
    ("encoding", "errors", "text", "printed"),
    [
        ("ascii", "strict", "é", b"\\xe9\n"),
        ("latin-1", "strict", "é数", b"\xe9\\u6570\n"),
        ("utf-8", "strict", "\ud800é", "\\ud800é\n".encode()),
        ("utf-8", "surrogateescape", "\ud800é", "\\ud800é\n".encode()),
        ("ascii", "replace", "é", b"?\n"),
    ],
)
def test_what_a_screen_cannot_show_is_escaped_and_ends_no_program(encoding, errors, text, printed, monkeypatch):
    screen = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors, newline="\n")
    monkeypatch.setattr(sys, "stdout", screen)
    ending.run(lambda: print(text, flush=True), of_hydra=False)
    assert screen.buffer.getvalue() == printed


def test_a_comparison_and_a_report_are_told_on_any_screen(tmp_path, monkeypatch):
    for name in ("é", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("seed: 0\n")
        (tmp_path / name / "metrics.csv").write_text("step,reward/mean\n1,0.5\n")
        (tmp_path / name / "summary.json").write_text('{"wall_s": 2.0}')
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="\n")
    monkeypatch.setattr(sys, "stdout", screen)
    assert compare([str(tmp_path)]) == report([str(tmp_path / "é")]) == 0
    screen.flush()
    text = screen.buffer.getvalue().decode("ascii")
    assert "Mean \\xb1 half-width" in text and f"{tmp_path}/\\xe9/report.html" in text


def test_a_signal_in_the_middle_of_a_print_is_told_past_it(monkeypatch):
    """As where the warning of a launcher comes while a rollout is reported."""
    read, write = os.pipe()

    class Interrupted(io.RawIOBase):
        def writable(self):
            return True

        def fileno(self):
            return write

        def write(self, data):
            say("SIGUSR1: finishing")  # its handler, which Python calls within the print
            return os.write(write, data)

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(Interrupted())))
    print("rollout 3/8", flush=True)
    monkeypatch.undo()
    os.close(write)
    with os.fdopen(read) as written:
        assert written.read() == "SIGUSR1: finishing\nrollout 3/8\n"
