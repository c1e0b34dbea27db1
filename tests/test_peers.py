"""The comparison with peers, at toy size: settings land on their budget, and nothing stays behind."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")

from benchmarks import peers, peers_page
from benchmarks.peer_methods import _mag_calls, _mag_threshold


def test_quick_comparison_writes_figures_page_and_plot(tmp_path: Path) -> None:
    peers.measure("tiny-flux", tmp_path / "peers_tiny-flux.json", **peers.QUICK)

    result = json.loads((tmp_path / "peers_tiny-flux.json").read_text())
    full, *rows = result["rows"]
    assert full["full_calls"] == full["k"] == 10
    assert {row["method"] for row in rows} == {method.name for method in peers.QUICK["methods"]}
    for row in rows:
        assert row["full_calls"] == 5
        assert 15 < row["psnr_mean"] < 80 and 0 < row["ssim_mean"] <= 1
        assert "left_behind" not in row

    page = peers_page.write(tmp_path, ["tiny-flux"]).read_text()
    assert all(row["method"] in page for row in rows)
    assert (tmp_path / "peers_tiny-flux.svg").stat().st_size > 1000


def test_threshold_of_magcache_takes_as_many_calls_as_asked_for() -> None:
    ratios = list(np.linspace(1.05, 0.9, 50))
    threshold = _mag_threshold(ratios, 20, longest=5, retention=0.1)
    assert abs(_mag_calls(ratios, threshold, longest=5, retention=0.1) - 20) <= 1
    assert _mag_calls(ratios, 0.0, longest=5, retention=0.1) == 50
    assert _mag_calls(ratios, 1e9, longest=3, retention=0.1) == 5 + 11
