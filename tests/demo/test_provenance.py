"""What a report says about when, how and where."""

from __future__ import annotations

import re

from kvswitch_demo.report.provenance import Provenance


def test_provenance_describes_this_process() -> None:
    here = Provenance.here(command="kvswitch demo", seed=5, workload={"seed": 5})
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", here.date)
    assert here.machine.cores >= 1
    assert here.machine.memory > 2**20
    assert all((here.machine.cpu, here.machine.os, *here.versions.values()))
    assert list(here.versions) == ["kvswitch", "python", "numpy", "torch"]
