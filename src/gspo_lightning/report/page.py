"""`report.html`: one self-contained page about a run, drawn from its files alone."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from gspo_lightning.report.files import Series, read_json, read_metrics
from gspo_lightning.report.svg import line_chart

# (title, unit, {name of line: column of metrics.csv})
CHARTS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Reward", "mean of the rollout", {"reward": "reward/mean"}),
    ("Held-out accuracy", "share", {"greedy": "val/accuracy", "sampled": "val/sampled_accuracy"}),
    ("Completion length", "tokens", {"length": "completion/mean_tokens"}),
    ("Clipped", "share", {"below": "clip_frac_low", "above": "clip_frac_high"}),
    ("Divergence", "nats per token", {"from the sampling weights": "kl/old", "from the reference": "kl/ref"}),
    ("Throughput", "tokens per second", {"rollout": "perf/rollout_tokens_per_s", "update": "perf/train_tokens_per_s"}),
    ("Groups without signal", "share", {"groups": "frac_zero_std_groups"}),
    ("Gradient norm", "before clipping", {"norm": "grad_norm"}),
    ("Entropy", "nats per token", {"entropy": "entropy"}),
    ("Sampler against trainer", "nats per token", {"mean difference": "sampler_mismatch/abs_mean"}),
)

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1a1c20;--soft:#666c78;--line:#e3e6ea;--card:#f7f8fa;--a:#2563eb;--b:#d97706}
@media(prefers-color-scheme:dark){:root{--bg:#14161a;--fg:#e8eaee;--soft:#9aa1ad;--line:#2c3038;--card:#1c1f25;--a:#7aa2ff;--b:#f5b455}}
*{box-sizing:border-box}body{margin:0 auto;max-width:960px;padding:24px 16px 64px;background:var(--bg);color:var(--fg);
font:16px/1.5 system-ui,sans-serif}h1{font-size:1.6rem;margin:0}h2{font-size:1.15rem;margin:2.2rem 0 .8rem}
.soft,small,.tick{color:var(--soft);fill:var(--soft)}.tick{font-size:11px}.grid{stroke:var(--line)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin-top:20px}
.card,figure{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px}
.card b{display:block;font-size:1.25rem}.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:14px}
figure{margin:0}figcaption{font-weight:600}svg{width:100%;height:auto;display:block}
polyline{fill:none;stroke-width:2}polyline.s0{stroke:var(--a)}polyline.s1{stroke:var(--b)}circle.s0{fill:var(--a)}circle.s1{fill:var(--b)}
.keys{margin:4px 0 0;font-size:.85rem}.key{margin-right:14px}.key::before{content:"";display:inline-block;width:10px;height:10px;
border-radius:50%;margin-right:6px;background:var(--a)}.key.s1::before{background:var(--b)}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.92rem}td,th{border-bottom:1px solid var(--line);
padding:8px;text-align:left;vertical-align:top;white-space:pre-wrap;overflow-wrap:anywhere;min-width:110px}
.right{color:#15803d}.wrong{color:#b91c1c}@media(prefers-color-scheme:dark){.right{color:#4ade80}.wrong{color:#f87171}}
pre{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px;overflow:auto;font-size:.82rem}
"""


def render_report(run_dir: Path) -> Path:
    """Writes ``report.html`` from ``metrics.csv``, ``summary.json``, ``config.yaml`` and the two validation files.

    Everything that a model or a dataset wrote is escaped: a completion with a script tag stays text.
    """
    metrics, summary = read_metrics(run_dir), read_json(run_dir / "summary.json")
    before, after = (read_json(run_dir / f"validation_{when}.json") for when in ("before", "after"))
    config = run_dir / "config.yaml"
    body = "".join(
        [
            _head(summary),
            '<h2>Curves</h2><div class="charts">',
            *(line_chart(title, _lines(metrics, lines), unit) for title, unit, lines in CHARTS),
            "</div>",
            _completions(before.get("samples", []), after.get("samples", [])),
            f"<h2>Configuration</h2><pre>{escape(config.read_text())}</pre>" if config.exists() else "",
        ]
    )
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(str(summary.get('model', 'run')))}</title><style>{STYLE}</style><body>{body}</body></html>"
    )
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8", errors="backslashreplace")
    return path


def _lines(metrics: dict[str, Series], lines: dict[str, str]) -> dict[str, Series]:
    return {name: metrics.get(column, []) for name, column in lines.items()}


def _head(summary: dict[str, Any]) -> str:
    def change(key: str) -> str:
        values = [summary.get(f"{key}_{when}") for when in ("before", "after")]
        return " → ".join("?" if value is None else f"{value:.3f}" for value in values)

    cards = {
        "held-out accuracy, greedy": change("val_accuracy"),
        "held-out accuracy, sampled": change("val_sampled"),
        "training time": f"{summary.get('wall_s', 0.0) / 60:.1f} min",
        "rollouts": str(summary.get("steps", "?")),
        "tokens per second": f"{summary.get('tokens_per_s', 0.0):.0f}",
        "peak memory": f"{summary.get('peak_rss_gb', 0.0):.2f} GiB",
    }
    rows = "".join(f'<div class="card"><span class="soft">{escape(k)}</span><b>{escape(v)}</b></div>' for k, v in cards.items())
    facts = f"seed {summary.get('seed')}, {summary.get('precision')}, {summary.get('threads')} threads"
    return f'<h1>{escape(str(summary.get("model", "run")))}</h1><p class="soft">{escape(facts)}</p><div class="cards">{rows}</div>'


def _completions(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> str:
    if not before and not after:
        return ""
    old = {sample["prompt"]: sample for sample in before}
    rows = "".join(
        f"<tr><td>{escape(str(new['prompt']))}</td>{_cell(old.get(new['prompt']))}{_cell(new)}<td>{escape(str(new['answer']))}</td></tr>"
        for new in (after or before)
    )
    return (
        "<h2>Held-out prompts, greedy, before and after</h2><div class=scroll><table><tr><th>prompt<th>before<th>after<th>answer</tr>"
        f"{rows}</table></div>"
    )


def _cell(sample: dict[str, Any] | None) -> str:
    if sample is None:
        return "<td></td>"
    mark = "right" if sample["reward"] >= 1 else "wrong"
    return f'<td class="{mark}">{escape(sample["completion"])}</td>'
