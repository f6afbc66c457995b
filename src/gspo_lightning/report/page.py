"""`report.html`: one self-contained page about a run, drawn from its files alone."""

from __future__ import annotations

from html import escape
from pathlib import Path

from gspo_lightning.report import sections
from gspo_lightning.report.files import read_metrics, read_samples, read_summary
from gspo_lightning.report.style import STYLE


def render_report(run_dir: Path) -> Path:
    """Writes ``report.html`` from metrics, summary, config and the two validations in ``run_dir``; returns its path.

    The part of a missing file is left out of the page. Everything that a model or a dataset wrote is
    escaped: a completion with a script tag stays text.

    Raises:
        UserError: a file is damaged; names it.
    """
    metrics, summary, config = read_metrics(run_dir), read_summary(run_dir), run_dir / "config.yaml"
    body = "".join(
        [
            sections.head(summary),
            sections.curves(metrics),
            sections.completions(
                read_samples(run_dir / "validation_before.json"),
                read_samples(run_dir / "validation_after.json"),
            ),
            sections.phases(metrics),
            sections.settings(config, summary),
        ]
    )
    page = html_page(str(summary.get("model", "A run")), body)
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8", errors="backslashreplace")
    return path


_NOTHING_ELSE = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""Content security policy with which a browser loads and runs nothing, whatever gets into the page."""


def html_page(title: str, body: str) -> str:
    """A self-contained HTML page; ``title`` is escaped here, ``body`` is already HTML."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_NOTHING_ELSE}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>{body}</main></body></html>\n"
    )
