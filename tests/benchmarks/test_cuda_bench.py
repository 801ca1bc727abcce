"""`make gpu-bench` above the fake driver: that it runs and judges; its figures mean nothing."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest


def load(name: str) -> Any:
    """A script beside this file, as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_section_runs_and_every_aim_is_judged(
    fake_cuda: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("matplotlib")
    fake_cuda.reset(pause_us=20)
    monkeypatch.setattr(sys, "argv", ["cuda_bench.py"])
    monkeypatch.setitem(sys.modules, "cuda_plots", load("cuda_plots"))
    bench = load("cuda_bench")
    output = tmp_path / "cuda.json"
    found = bench.main(["--quick", "--memory", "64", "--output", str(output)])
    assert json.loads(output.read_text()) == found
    assert found["provenance"]["gpu"] == "Fake GPU 0"
    for section in ("pinning", "limits_GB/s", "sizes", "both_ways_GB/s", "layers", "submitting",
                    "probes", "busy_main_thread", "timeline", "aims"):  # fmt: skip
        assert found[section], section
    assert "decode" not in found  # there is nothing to compute on
    verdicts = {aim["aim"]: aim["met"] for aim in found["aims"]}
    assert len(verdicts) == 17
    assert [aim for aim, met in verdicts.items() if met is None] == [
        "decode graph slows beside the copy engines by"
    ]
    assert "GPU to host" not in capsys.readouterr().err
    assert {p.name for p in tmp_path.glob("*.svg")} == {
        "cuda-sizes.svg", "cuda-probes.svg", "cuda-timeline.svg",
    }  # fmt: skip
