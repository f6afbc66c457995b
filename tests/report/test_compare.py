"""The comparison page and table, drawn from runs whose numbers are known."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from gspo_lightning.report.compare import main
from tests.report.test_runs import write_run


@pytest.fixture
def sweep(tmp_path):
    for seed in (1, 2):
        for number, lr in enumerate((0.1, 0.2)):
            folder = write_run(tmp_path / f"{seed}{number}", [0.0, lr * seed], seed, lr, note="<script>")
            (folder / "summary.json").write_text(json.dumps({"val_sampled_after": lr * seed, "wall_s": 10.0}))
    return tmp_path


def compare(*arguments):
    out = io.StringIO()
    code = main([*map(str, arguments)], Console(file=out, width=140))
    return code, out.getvalue()


def test_the_table_holds_means_with_their_intervals(sweep):
    code, text = compare(sweep)
    assert code == 0
    # 0.1 and 0.2: mean 0.15, standard deviation 0.0707, half-width 12.706 * 0.05 = 0.635.
    assert "optimizer.lr=0.1" in text and "0.150 ± 0.635" in text
    assert "optimizer.lr=0.2" in text and "0.300 ± 1.271" in text
    assert "10.0 ± 0.000" in text or "10 ± 0.000" in text
    assert str(sweep / "comparison.html") in text.replace("\n", "")


def test_runs_that_have_not_finished_are_not_counted_beside_a_mean_without_them(sweep):
    write_run(sweep / "30", [0.0, 0.5], 3, 0.1, note="<script>")  # the third seed of the first setting
    code, text = compare(sweep)
    assert code == 0
    assert re.search(r"│ +1 │ 2 of 3 │ +2 │", text) and re.search(r"│ +2 │ +2 │ +2 │", text)
    assert "0.150 ± 0.635" in text
    page = (sweep / "comparison.html").read_text()
    assert page.count("<td>2 of 3</td>") == 1 and "that finished (2 of 3: one has not)" in page


def test_a_run_that_repeats_another_is_named_and_not_counted(sweep):
    repeated = write_run(sweep / "30", [0.0, 0.1], 1, 0.1, note="<script>")
    code, text = compare(sweep)
    line = f"{repeated}: not counted, repeats {sweep / '10'}: the settings, the seed and all numbers are the same"
    assert code == 0 and line in text.splitlines() and "0.150 ± 0.635" in text
    page = (sweep / "comparison.html").read_text()
    assert line in page and "<h1>4 runs, 2 settings</h1>" in page


def test_the_page_is_well_formed_needs_nothing_else_and_draws_a_line_and_a_band_per_setting(sweep):
    compare(sweep)
    page = (sweep / "comparison.html").read_text()
    assert not re.search(r"(src|href)=|<script|@import|url\(", page)
    figure = page.split("<figcaption>Reward")[1].split("</figure>")[0]
    assert [figure.count(f'<polyline class="s{n}"') for n in range(3)] == [1, 1, 0]
    assert [figure.count(f'<polygon class="s{n}"') for n in range(3)] == [1, 1, 0]
    assert "rollout 2: 0.15" in figure and "rollout 2: 0.3" in figure
    assert "1: lr=0.1" in figure and "2: lr=0.2" in figure
    open_tags = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag not in ("meta",):
                open_tags.append(tag)

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

        def handle_startendtag(self, tag, attributes):
            pass

    Checker().feed(page)
    assert not open_tags


def test_values_of_settings_are_escaped(tmp_path):
    for number, note in enumerate(("<script>alert(1)</script>", "[bold]b")):
        write_run(tmp_path / str(number), [1.0], note=note)
    code, text = compare(tmp_path)
    assert code == 0 and "[bold]b" in text
    page = (tmp_path / "comparison.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;alert(1)" in page


def test_values_of_settings_reach_no_terminal_as_something_it_obeys(tmp_path):
    for number, note in enumerate(("\x1b]0;pwned\x07", "\x9b2J")):
        write_run(tmp_path / str(number), [1.0], note=note)
    code, text = compare(tmp_path)
    assert (code, text.splitlines()[:2]) == (0, ["1: note=␛]0;pwned␇", "2: note=\\x9b2J"])
    assert {char for char in text if ord(char) < 32 or 127 <= ord(char) < 160} == {"\n"}


def test_nothing_to_compare_is_one_line_and_code_2(tmp_path, capsys):
    assert compare(tmp_path)[0] == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "contains no run" in error


def test_the_page_goes_where_it_is_told(sweep, tmp_path):
    code, _ = compare(sweep, "--output", tmp_path / "page.html")
    assert code == 0 and (tmp_path / "page.html").exists()


def test_brackets_in_its_path_are_shown(sweep):
    folder = sweep / "reward=[math,brief]" / "[/x]"
    folder.mkdir(parents=True)
    code, text = compare(sweep, "--output", folder / "page.html")
    assert code == 0 and str(folder / "page.html") in text.replace("\n", "")


def test_the_band_of_a_share_ends_where_shares_end(tmp_path):
    for seed, value in ((1, 0.0), (2, 1.0)):
        folder = write_run(tmp_path / str(seed), [1.0], seed)
        (folder / "metrics.csv").write_text(f"step,val/accuracy\n1,{value}\n2,{value}\n")
    compare(tmp_path)
    figure = (tmp_path / "comparison.html").read_text().split("<figcaption>Held-out accuracy, greedy")[1]
    # Mean 0.5, half-width 12.7 * 0.5 = 6.4; the band must be [0, 1], so the axis has no tick outside it.
    ticks = re.findall(r'text-anchor="end">([^<]+)<', figure.split("</figure>")[0])
    assert [float(tick) for tick in ticks] == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(("place", "why"), [("missing/x.html", "No such file or directory"), (".", "Is a directory")])
def test_a_place_that_cannot_be_written_to_is_named_in_one_line(place, why, sweep, capsys):
    code, text = compare(sweep, "--output", sweep / place)
    assert (code, text) == (2, "")
    assert capsys.readouterr().err == f"error: --output {sweep / place}: cannot write there ({why}); name a file\n"
