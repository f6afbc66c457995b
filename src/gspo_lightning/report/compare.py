"""Several runs side by side: a table on the screen and ``comparison.html``.

`python -m gspo_lightning.report.compare multirun/<day>/<time>`; runs that differ only in their seed become one line
with a mean and a 95 % confidence band.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

from rich.console import Console
from rich.markup import escape as plain
from rich.table import Table

from gspo_lightning.errors import UserError
from gspo_lightning.program.redact import masked
from gspo_lightning.report.page import html_page
from gspo_lightning.report.runs import RunGroup, find_runs, group_runs, mean_and_halfwidth, without_repeats
from gspo_lightning.report.sections import CHARTS
from gspo_lightning.report.svg import Band, format_number, line_chart
from gspo_lightning.screen import escape_what_no_screen_shows, visible

COLUMNS = {
    "sampled, before": "val_sampled_before",
    "sampled, after": "val_sampled_after",
    "greedy, after": "val_accuracy_after",
    "time, s": "wall_s",
    "tokens/s": "tokens_per_s",
}
"""Heading -> key of ``summary.json``; accuracies are on held-out prompts. Peak memory is left out: a later job of a
sweep in the same process reports the peak of an earlier one, if that needed more."""
_THE_SAME = "the settings, the seed and all numbers are the same"


def main(arguments: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Prints the table and the path of the page; returns 2, after a line on stderr, if there is nothing to compare."""
    parser = argparse.ArgumentParser(prog="compare", description="Runs side by side, as a table and as a page.")
    parser.add_argument("folders", nargs="+", type=Path, help="a sweep's folder, or folders of runs")
    parser.add_argument("--output", type=Path, help="where to write (default: comparison.html in the first folder)")
    options = parser.parse_args(arguments)
    escape_what_no_screen_shows()
    console = console or Console()
    try:
        runs, without = find_runs(options.folders)
        runs, repeats = without_repeats(runs)
        groups = group_runs(runs)
        beside = [
            *(f"{run.folder}: not counted, repeats {other.folder}: {_THE_SAME}" for run, other in repeats),
            *(f"{folder}: recorded nothing; the job failed or was not run" for folder in without),
        ]
        page = write_comparison(groups, options.output or options.folders[0] / "comparison.html", beside)
    except UserError as error:
        print(f"error: {masked(str(error))}", file=sys.stderr)
        return 2
    for number, group in enumerate(groups, start=1):
        settings = ", ".join(f"{key}={value}" for key, value in group.settings.items()) or "all settings are the same"
        console.print(visible(f"{number}: {settings}"), highlight=False, markup=False, soft_wrap=True)
    console.print(comparison_table(groups))
    for line in beside:
        console.print(visible(line), highlight=False, markup=False, soft_wrap=True)
    console.print(visible(str(page)), highlight=False, markup=False, soft_wrap=True)
    return 0


def comparison_table(groups: Sequence[RunGroup]) -> Table:
    """A numbered row per setting: number of runs, and means with intervals over the finished ones."""
    table = Table(title="Mean ± half-width of the 95 % confidence interval", title_justify="left")
    for heading in ("", *_headings(groups)[len(groups[0].settings) :]):
        table.add_column(heading, justify="right", overflow="fold")
    for number, group in enumerate(groups, start=1):
        table.add_row(str(number), *map(plain, _cells(group)[len(group.settings) :]))
    return table


def write_comparison(groups: Sequence[RunGroup], path: Path, beside: Sequence[str] = ()) -> Path:
    """Writes the page: settings that differ, the table, and every chart of the report with one line per setting.
    Returns its path.

    Raises:
        UserError: ``path`` cannot be written to.
    """
    headings = "".join(f"<th>{escape(heading)}</th>" for heading in ["", *_headings(groups)])
    lines = ([str(number), *_cells(group)] for number, group in enumerate(groups, start=1))
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    table = f'<div class="wide"><table><thead><tr>{headings}</tr></thead><tbody>{rows}</tbody></table></div>'
    charts = "".join(_charts(groups))
    count = sum(len(group.runs) for group in groups)
    intro = (
        f'<h1>{count} runs, {len(groups)} settings</h1><p class="soft">Values are means over the runs of a setting '
        "that finished (2 of 3: one has not), ± half the width of the 95 % confidence interval (Student's t). Bands "
        "are that interval, at the rollouts that all runs of the setting reached, finished or not; a setting with a "
        "single run has none.</p>"
    )
    missing = "".join(f'<p class="soft">{escape(line)}</p>' for line in beside)
    body = f'{intro}{missing}<h2>Settings that differ</h2>{table}<h2>Curves</h2><div class="charts">{charts}</div>'
    try:
        path.write_text(html_page("Comparison of runs", body), encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"--output {path}: cannot write there ({error.strerror}); name a file") from error
    return path


def _headings(groups: Sequence[RunGroup]) -> list[str]:
    return [*groups[0].settings, "runs", "rollouts", *COLUMNS]


def _cells(group: RunGroup) -> list[str]:
    settings = [str(value) for value in group.settings.values()]
    rollouts = sorted({int(max((s[-1][0] for s in run.metrics.values()), default=0)) for run in group.runs})
    spread = str(rollouts[0]) if len(rollouts) == 1 else f"{rollouts[0]}–{rollouts[-1]}"
    finished, every = sum(bool(run.summary) for run in group.runs), len(group.runs)
    runs = str(every) if finished == every else f"{finished} of {every}"
    return [*settings, runs, spread, *(_with_interval(group.values(key)) for key in COLUMNS.values())]


def _with_interval(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean, half = mean_and_halfwidth(values)
    return _short(mean) if math.isnan(half) else f"{_short(mean)} ± {_short(half)}"


def _short(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else format_number(round(value, 1))


def _charts(groups: Sequence[RunGroup]) -> list[str]:
    """One figure per metric, in which the settings share an axis."""
    drawn = []
    for chart in CHARTS:
        for name, column in chart.lines.items():
            lines, bands = {}, {}
            for number, group in enumerate(groups):
                label = f"{number + 1}: {group.label}"
                points = [(step, mean_and_halfwidth(values)) for step, values in group.curve(column)]
                lines[label] = [(step, mean) for step, (mean, _) in points]
                # Intervals are cut to the possible values: a share is never above 1, a count never below 0.
                least = 0.0 if 0.0 in chart.reach else -math.inf
                most = 1.0 if 1.0 in chart.reach else math.inf
                edges = [(s, max(m - h, least), min(m + h, most)) for s, (m, h) in points if not math.isnan(h)]
                bands[label] = Band(edges)
            title = chart.title if len(chart.lines) == 1 else f"{chart.title}, {name}"
            drawn.append(line_chart(title, lines, chart.unit, reach=chart.reach, bands=bands))
    return drawn


if __name__ == "__main__":
    sys.exit(main())
