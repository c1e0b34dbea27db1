"""The measurements of speed run from end to end at toy size, on the CPU."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("cache_dit")

from benchmarks import gpu, speed, speed_page


def test_every_part_of_the_gpu_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    output = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu", "--toy", "--output", str(output)])
    gpu.main()
    results = json.loads(output.read_text())
    for part in gpu.PARTS:
        assert results[part]["device"] == "CPU"
        if part.endswith("calibration"):
            assert results[part]["seconds"]["cost_tensor"] > 0
            continue
        rows = {row["way"]: row for row in results[part]["table"]}
        assert rows["full"]["block_runs"] == gpu.TOY_STEPS
        for k in (4, 3):
            for boundary in ("blocks", "output"):
                row = rows[f"dpcache {boundary}, K = {k}"]
                assert row["block_runs"] == k and row["ideal"] == gpu.TOY_STEPS / k
                assert 0 < row["skipped_step"] < results[part]["full_step"]
    printed = capsys.readouterr().out
    assert all(part in printed for part in gpu.PARTS)


def test_the_parts_of_the_speed_script_and_its_page(tmp_path: Path) -> None:
    target = tmp_path / "benchmarks" / "results" / "speed.json"
    parts = [part for part in speed.PARTS if part != "startup"]  # imports torch many times over
    speed.measure(parts, rounds=1, size="toy", target=target)
    results = json.loads(target.read_text())
    assert results["profile"]["after"]["x_embedder"] < 1
    assert results["paper_cost"]["difference"] < 1e-5
    speed.measure(["loops"], rounds=2, size="toy", target=target, resume=True)
    assert len(json.loads(target.read_text())["loops"]["rounds"]) == 2

    (tmp_path / "docs").mkdir()
    page = speed_page.write(tmp_path).read_text()
    assert all(row["way"] in page for row in results["loops"]["table"])
    assert "not been measured on a GPU" in page
