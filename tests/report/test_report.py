"""The report shows what the files hold, and what a model wrote stays text."""

from __future__ import annotations

import html.parser
import json

import pytest

from gspo_lightning.report import render_report, write_summary
from gspo_lightning.report.svg import line_chart, nice_ticks

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>"


def write_run(folder, evil):
    """A run whose model, rows and config all say ``evil``."""
    (folder / "metrics.csv").write_text("step,reward/mean,val/accuracy\n0,,0.25\n1,0.5,\n2,0.75,0.875\n")
    (folder / "config.yaml").write_text(f"note: {evil}\n")
    for when, text, reward in (("before", evil, 0.0), ("after", "42 & more", 1.0)):
        sample = {"prompt": f"ask {evil}", "completion": text, "reward": reward, "answer": "42"}
        content = {"metrics": {"val/accuracy": reward, "val/sampled_accuracy": reward / 2}, "samples": [sample]}
        (folder / f"validation_{when}.json").write_text(json.dumps(content))
    write_summary(
        folder, {"seed": 3, "steps": 2, "wall_s": 90.0, "peak_rss_gb": 1.5, "tokens_per_s": 10.0, "model": evil}
    )
    return folder


@pytest.fixture()
def run_dir(tmp_path):
    return write_run(tmp_path, EVIL)


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


def parse(path):
    parser = Tags()
    parser.feed(path.read_text())
    return parser


def test_whatever_a_model_a_row_or_a_config_says_stays_text(run_dir):
    page = parse(render_report(run_dir))
    assert "script" not in page.tags and "img" not in page.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert any(EVIL in text for text in page.text)


def test_the_page_needs_nothing_from_elsewhere(run_dir):
    page = parse(render_report(run_dir))
    assert not {"link", "iframe", "object"} & set(page.tags)
    assert not any(name in ("src", "href") for name, _ in page.attributes)


def test_the_summary_has_the_accuracies_before_and_after_as_flat_keys(run_dir):
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["val_accuracy_before"], summary["val_accuracy_after"]) == (0.0, 1.0)
    assert (summary["val_sampled_before"], summary["val_sampled_after"]) == (0.0, 0.5)
    assert "0.000 → 1.000" in (render_report(run_dir)).read_text()


def test_curves_pass_through_the_values(run_dir):
    page = render_report(run_dir).read_text()
    assert "reward, rollout 1: 0.5" in page and "reward, rollout 2: 0.75" in page
    assert "greedy, rollout 0: 0.25" in page and "greedy, rollout 2: 0.875" in page


def test_points_lie_where_the_axes_say():
    chart = line_chart("t", {"a": [(0.0, 0.0), (10.0, 1.0)]})
    assert 'points="48.0,190.0 408.0,14.0"' in chart
    assert line_chart("t", {"a": []}) == ""


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1.0]),
        (0, 30, [0, 10, 20, 30]),
        (3, 3, None),
        (-0.02, 0.05, [-0.02, 0.0, 0.02, 0.04, 0.06]),
    ],
)
def test_ticks_are_round_and_cover_the_range(low, high, expected):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high
    if expected is not None:
        assert ticks == pytest.approx(expected)
