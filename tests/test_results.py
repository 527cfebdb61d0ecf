"""What stands in benchmarks/results and in README as a figure is rendered from the measurements beside it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def render(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import render

    return render


def test_tables_are_those_of_their_measurements(render):
    stale = [path.name for path, text in render.tables() if path.read_text(encoding="utf-8") != text]
    assert stale == [], "python benchmarks/render.py"


def test_figures_in_documents_are_those_of_the_measurements(render):
    stale = [path.name for path, text in render.documents() if path.read_text(encoding="utf-8") != text]
    assert stale == [], "python benchmarks/render.py"


def test_every_mark_in_documents_is_rendered(render):
    for path, blocks in render.BLOCKS.items():
        marks = re.findall(r"<!-- (\w+) -->", path.read_text(encoding="utf-8"))
        assert [*marks] == [*blocks], path


def test_parts_of_full_finetuning_compare_the_same_seeds(render):
    cells = [
        {"encoder": "e", "task": "sst2", "arm": arm, "seed": seed, "metric_value": value}
        for arm, seed, value in (("full", 0, 0.8), ("full", 1, 0.4), ("4x", 0, 0.8), ("8x", 2, 0.4))
    ]
    assert render.paper._part(cells, "e", "sst2", "4x") == 1.0
    assert render.paper._part(cells, "e", "sst2", "8x") is None
    more = [{**cells[2], "seed": 1, "metric_value": 0.2}, *cells]
    assert render.paper._part(more, "e", "sst2", "4x") == pytest.approx(0.5 / 0.6)
    assert render.paper._paired(more, "e", "sst2", "4x") == pytest.approx((1 + 0.5) / 2)
    assert render.paper._paired(cells, "e", "sst2", "8x") is None


def test_gates_are_ahead_where_they_are(render):
    pruned = render.pruning_baselines
    place = {"encoder": "e", "task": "sst2", "seed": 0, "asked_kept": 0.25}
    ours = [{**place, "method": pruned.GATES, "metric_value": 0.8}]
    others = [{**place, "method": "magnitude", "metric_value": 0.7}, {**place, "method": "taylor", "metric_value": 0.8}]
    told = pruned.won(others, ours)
    assert "of `magnitude` in 1 of 1 cells" in told
    assert "of `taylor` in 0 of 1 cells; level on e sst2 at 25.0% (0.8000 to 0.8000, 1 seed)" in told
    again = [{**one, "seed": 1, "metric_value": value} for one, value in zip(others, (0.7, 0.9), strict=True)]
    told = pruned.won([*others, *again], [*ours, {**ours[0], "seed": 1, "metric_value": 0.7}])
    assert "of `magnitude` in 1 of 1 cells." in told  # by the mean, though level with this seed
    assert "of `taylor` in 0 of 1 cells; behind on e sst2 at 25.0% (0.7500 to 0.8500, 2 seeds)" in told
    told = pruned.won([{**others[0], "metric_value": 0.797}], ours)
    assert "of `magnitude` in 1 of 1 cells; by less than 0.005 on e sst2 at 25.0% (0.8000 to 0.7970, 1 seed)." in told
