"""report.html: drawn from the files alone, self-contained, and safe against what a model writes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from gspo_lightning.errors import UserError
from gspo_lightning.report import render_report, write_summary
from gspo_lightning.report.__main__ import main
from gspo_lightning.report.files import read_metrics

ATTACK = "</pre></title><script>alert(1)</script><img src=x onerror='alert(2)'>\"&amp;"
CONFIG = """
model: {path: "<b>micro</b>"}
optimizer: {lr: 1.0e-05}
objective: {loss_type: grpo, epsilon: 0.0003}
seed: 7
"""


def write_run(folder, rollouts=5, text="fine", prompts=10):
    columns = ("reward/mean", "clip_frac_low", "kl/ref", "entropy", "grad_norm", "completion/mean_tokens",
               "perf/rollout_tokens_per_s", "time/rollout_s", "time/update_s", "time/step_s")  # fmt: skip
    rows = [f"step,val/accuracy,{','.join(columns)}", "0,0.1" + "," * len(columns)]
    rows += [f"{n},,{','.join(str(n / 8) for _ in columns)}" for n in range(1, rollouts + 1)]
    (folder / "metrics.csv").write_text("\n".join([*rows, ""]))
    for when, accuracy in (("before", 0.1), ("after", 0.9)):
        samples = [
            {
                "prompt": f"question {n} {text}",
                "completion": f"{when} {n} {text}",
                "reward": float(when == "after"),
                "answer": text,
            }
            for n in range(prompts)
        ]
        metrics = {"val/accuracy": accuracy, "val/sampled_accuracy": accuracy / 2}
        (folder / f"validation_{when}.json").write_text(json.dumps({"step": 0, "metrics": metrics, "samples": samples}))
    (folder / "config.yaml").write_text(CONFIG)
    write_summary(
        folder,
        {
            "model": f"micro {text}",
            "seed": 7,
            "steps": rollouts,
            "wall_s": 83.4,
            "threads": 3,
            "tokens_per_s": 1234.5,
            "peak_rss_gb": 1.5,
            "precision": "32-true",
        },
    )


class Tags(HTMLParser):
    """Collects tags with their attributes, and checks that they close in order."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def page_of(folder):
    return render_report(folder).read_text(encoding="utf-8")


def body_of(page):
    return ElementTree.fromstring(re.search(r"<main>.*</main>", page, re.DOTALL)[0].replace("&ensp;", " "))


def text_of(page):
    return " ".join("".join(body_of(page).itertext()).split())


def test_nothing_that_a_model_a_dataset_or_a_user_wrote_becomes_markup(tmp_path):
    write_run(tmp_path, text=ATTACK)
    (tmp_path / "config.yaml").write_text(f"model: {{path: {json.dumps(ATTACK)}}}\n")
    page = page_of(tmp_path)
    tags = Tags(page).tags
    assert not {"script", "img"} & {tag for tag, _ in tags}
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
    assert (
        text_of(page).count("<script>alert(1)</script>") >= 10 * 4
    )  # prompt, answer, before, after: all there, as text


@pytest.mark.parametrize("on_gpu", [40.25, None])
def test_the_memory_of_a_gpu_stands_beside_that_of_the_process(on_gpu, tmp_path):
    write_run(tmp_path)
    if on_gpu:
        (tmp_path / "metrics.csv").write_text(f"step,perf/peak_gpu_gb\n1,{on_gpu}\n")
        write_summary(tmp_path, json.loads((tmp_path / "summary.json").read_text()))
    cards = [
        " ".join(card.itertext()) for card in body_of(page_of(tmp_path)).iter("div") if card.get("class") == "card"
    ]
    assert "peak memory of the process, GiB 1.50" in cards
    assert [card for card in cards if "GPU" in card] == (["peak GPU memory, GiB 40.25"] if on_gpu else [])


def test_the_page_needs_nothing_from_outside(tmp_path):
    write_run(tmp_path)
    page = page_of(tmp_path)
    tags = Tags(page).tags
    assert not {"link", "script", "iframe", "object"} & {tag for tag, _ in tags}
    assert not [1 for _, attributes in tags if {"src", "href"} & attributes.keys()]
    assert "url(" not in page and "@import" not in page and "://" not in page
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    assert tags[3] == ("meta", {"http-equiv": "Content-Security-Policy", "content": policy})  # before anything loads


def test_an_image_is_within_the_page_or_not_on_it(tmp_path):
    write_run(tmp_path)
    inside = "data:image/png;base64,AAAA"
    images = ["http://127.0.0.1:9/x.png", "//host/x.png", "x.png", "javascript:alert(1)", "data:text/html,x", inside, 7]
    sample = {"prompt": "?", "completion": "!", "reward": 1.0, "images": images}
    (tmp_path / "validation_after.json").write_text(json.dumps({"samples": [sample]}))
    tags = Tags(page_of(tmp_path)).tags
    assert [attributes["src"] for tag, attributes in tags if tag == "img"] == [inside]


def test_the_page_is_made_for_phones_and_for_dark_and_light(tmp_path):
    write_run(tmp_path)
    page = page_of(tmp_path)
    assert '<meta name="viewport" content="width=device-width,initial-scale=1">' in page
    assert "prefers-color-scheme: dark" in page and "@media (max-width: 600px)" in page
    assert '<html lang="en">' in page


def test_the_promised_curves_are_there_and_those_without_data_are_not(tmp_path):
    write_run(tmp_path)
    titles = {caption.text.strip() for caption in body_of(page_of(tmp_path)).iter("figcaption")}
    assert titles == {
        "Reward",
        "Held-out accuracy",
        "Completion length",
        "Clipped",
        "Divergence",
        "Throughput",
        "Entropy",
        "Gradient norm",
    }


def test_what_validation_found_right_is_marked_whatever_its_reward(tmp_path):
    found = [(0.25, True), (1.0, False), (None, True), (2.0, None)]
    samples = [{"prompt": "?", "completion": "!", "reward": reward, "right": right} for reward, right in found]
    (tmp_path / "validation_after.json").write_text(json.dumps({"samples": samples}))
    tags = [div.text for div in body_of(page_of(tmp_path)).iter("div") if div.get("class") == "tag right"]
    assert tags == ["after, reward 0.25", "after, reward ?"]


def test_ten_completions_before_and_after_stand_side_by_side(tmp_path):
    write_run(tmp_path)
    pairs = [div for div in body_of(page_of(tmp_path)).iter("div") if div.get("class") == "pair"]
    assert len(pairs) == 10
    words = ["".join(pair.itertext()) for pair in pairs]
    assert all(
        f"question {n} fine" in w and f"before {n} fine" in w and f"after {n} fine" in w for n, w in enumerate(words)
    )
    assert "before, reward 0" in words[0] and "after, reward 1" in words[0]


def test_completions_of_different_prompts_are_never_paired(tmp_path):
    write_run(tmp_path, prompts=1)
    after = json.loads((tmp_path / "validation_after.json").read_text())
    after["samples"][0]["prompt"] = "another question"
    (tmp_path / "validation_after.json").write_text(json.dumps(after))
    pairs = ["".join(d.itertext()) for d in body_of(page_of(tmp_path)).iter("div") if d.get("class") == "pair"]
    assert len(pairs) == 2
    assert not [pair for pair in pairs if "before 0 fine" in pair and "another question" in pair]


def test_results_settings_and_machine_are_told(tmp_path):
    write_run(tmp_path)
    text = text_of(page_of(tmp_path))
    assert "0.100 → 0.900" in text and "0.050 → 0.450" in text and "1 min 23 s" in text
    assert "learning rate1e-05" in text and "clip below0.0003" in text
    assert "threads3" in text and "torch" in text


def test_a_loss_of_ones_own_is_named_by_its_path(tmp_path):
    loss = "{_target_: hydra.utils.get_method, path: mine.loss}"
    (tmp_path / "config.yaml").write_text(f"objective: {{loss_type: {loss}, epsilon: 0.2}}\n")
    assert "lossmine.lossclip below0.2" in text_of(page_of(tmp_path))


def test_the_time_by_phase_adds_up(tmp_path):
    write_run(tmp_path)
    rows = ["step,time/step_s,time/rollout_s,time/update_s", "1,4.0,1.0,2.0", "2,6.0,1.5,3.5", ""]
    (tmp_path / "metrics.csv").write_text("\n".join(rows))
    assert "update5.5 s, 55%rollout2.5 s, 25%other2.0 s, 20%" in text_of(page_of(tmp_path))


def test_a_rollout_generated_ahead_is_no_part_of_the_time_of_a_step(tmp_path):
    write_run(tmp_path)
    rows = ["step,time/step_s,time/rollout_s,time/update_s,time/rollout_ahead_s", "1,4.0,1.0,2.0,", "2,6.0,1.5,3.5,9.0"]
    (tmp_path / "metrics.csv").write_text("\n".join([*rows, ""]))
    text = text_of(page_of(tmp_path))
    assert "update5.5 s, 55%rollout2.5 s, 25%other2.0 s, 20%" in text and "ahead" not in text


def test_a_run_that_has_not_finished_has_a_page_too(tmp_path):
    write_run(tmp_path)
    for name in ("summary.json", "config.yaml", "validation_before.json", "validation_after.json"):
        (tmp_path / name).unlink()
    page = page_of(tmp_path)
    assert "has not finished" in page and "<svg" in page


def test_a_long_run_stays_a_small_page(tmp_path):
    write_run(tmp_path, rollouts=5000)
    assert len(page_of(tmp_path)) < 600_000


def test_values_that_are_not_finite_are_left_out_of_the_curves(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,a,b\n1,nan,0.5\n2,inf,\n3,0.25,-inf\n")
    assert read_metrics(tmp_path) == {"a": [(3.0, 0.25)], "b": [(1.0, 0.5)]}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("summary.json", "{", "summary.json: is not JSON"),
        ("validation_after.json", "[]", "validation_after.json: holds no JSON object"),
        ("metrics.csv", "step,a\n1,x\n", "metrics.csv:2: column a is 'x', not a number"),
        ("summary.json", '{"wall_s": "12"}', "summary.json: wall_s='12' is neither a number nor null; correct it"),
        (
            "summary.json",
            '{"val_sampled_after": NaN}',
            "summary.json: val_sampled_after=nan is neither a number nor null",
        ),
        (
            "validation_after.json",
            '{"samples": null}',
            "validation_after.json: its samples are not those of a validation",
        ),
        (
            "validation_before.json",
            '{"samples": [{"prompt": "p", "reward": 1}]}',
            "validation_before.json: its samples are",
        ),
    ],
)
def test_a_damaged_file_is_named_in_one_line(name, content, words, tmp_path, capsys):
    write_run(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(words)):
        render_report(tmp_path)
    assert main([str(tmp_path)]) == 2
    assert words in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_named_in_one_line(tmp_path, capsys):
    write_run(tmp_path)
    (tmp_path / "report.html").mkdir()
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/report.html: cannot write there (Is a directory)\n"


def test_the_line_about_a_damaged_file_is_masked_and_fit_for_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdef")
    write_run(tmp_path)
    (tmp_path / "metrics.csv").write_text("step,hf_abcdef\n1,\x1b]0;pwned\x07\n")
    assert main([str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert "hf_abcdef" not in shown and "\x1b" not in shown
    assert shown.startswith("error: ") and "column *** is '" in shown and shown.count("\n") == 1


def test_the_module_draws_the_report_of_a_folder_anew_and_refuses_another(tmp_path):
    write_run(tmp_path)
    command = [sys.executable, "-m", "gspo_lightning.report"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "report.html"), done.stderr
    assert "<svg" in (tmp_path / "report.html").read_text()
    assert main([str(tmp_path / "nowhere")]) == 2 and main([]) == 2
