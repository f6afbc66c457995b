"""Numbers of the documentation that a file in the repository holds, and the file that says how to cite it."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def pace(seconds, first, last):
    """Seconds per rollout, between the beginnings of two rollouts."""
    return (seconds[last] - seconds[first]) / (last - first)


def test_the_factor_over_trl_is_that_of_the_file_at_the_beginning_at_the_end_and_as_a_whole():
    curves = json.loads((ROOT / "benchmarks/quality.json").read_text())["curves"]
    page = (ROOT / "docs/performance.md").read_text().replace("\n", " ")

    def factors(first, last):
        pairs = ((curves[side][seed]["seconds"] for side in ("trl", "ours")) for seed in ("0", "1", "2"))
        return [pace(trl, first, last) / pace(ours, first, last) for trl, ours in pairs]

    whole, early, late = factors(2, 23), factors(0, 6), factors(15, 23)
    assert "Time per rollout, TRL ÷ ours: {:.1f}, {:.1f} and {:.1f} (seeds".format(*whole) in page
    assert f"TRL takes {min(early):.1f} to {max(early):.1f} times as long over the first six rollouts" in page
    assert f"and {min(late):.0f} to {max(late):.0f} times as long over the last eight" in page
    assert f"take TRL {min(whole):.1f} to {max(whole):.1f} times as long" in page
    warm_up_too = factors(0, 23)
    assert "with those two: {:.1f}, {:.1f} and {:.1f}".format(*warm_up_too) in page
    assert f"({min(warm_up_too):.1f} to {max(warm_up_too):.1f} with the first two rollouts" in " ".join(page.split())


def test_the_citation_has_the_version_and_license_of_the_package_and_papers_that_the_pages_name():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys() and citation["title"] == "gspo_lightning"
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert citation["abstract"].rstrip(".") == project["description"]
    objectives = "".join(path.read_text() for path in (ROOT / "docs/objectives").glob("*.md"))
    assert len(citation["references"]) == 4
    assert all(paper["url"] in objectives for paper in citation["references"])
