"""Host memory: exactly what was asked for, or a clear error."""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path

import numpy as np
import pytest

from kvswitch.errors import ConfigError
from kvswitch.transfer import HostArena, Layout, Region, arena, layout_of


def rss() -> int:
    fields = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert fields is not None
    return int(fields[1]) << 10


@pytest.fixture
def layout() -> Layout:
    return layout_of([np.zeros((7, 100), np.uint8), np.zeros((7, 3, 20), np.float32)])


@pytest.mark.parametrize("nbytes", [1, 4096, 1_000_001, 100 << 20])
def test_arena_has_exactly_the_size_asked_for(nbytes: int) -> None:
    host = HostArena(nbytes)
    view = host.view()
    assert host.nbytes == view.nbytes == nbytes
    assert not view[:: max(1, nbytes // 1000)].any()
    view[-1] = 1
    del view
    host.close()


def test_all_of_it_is_there_from_the_start() -> None:
    before = rss()
    host = HostArena(100 << 20)
    assert rss() - before > 95 << 20
    host.close()
    assert rss() - before < 20 << 20


def test_older_kernels_are_populated_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "_POPULATE_WRITE", 9999)  # no such advice
    before = rss()
    host = HostArena(100 << 20)
    assert rss() - before > 95 << 20
    host.close()


def test_memory_that_cannot_be_populated_is_refused_and_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("errno.EINVAL", -1)
    monkeypatch.setattr(arena, "_POPULATE_WRITE", 9999)
    before = rss()
    with pytest.raises(ConfigError, match="refuses"):
        HostArena(100 << 20)
    gc.collect()
    assert rss() - before < 20 << 20


def test_blocks_of_a_region_adjoin_and_regions_follow_each_other(layout: Layout) -> None:
    host = HostArena(340 * 11 + 5)  # a block takes 340 bytes; what is left over holds none
    mirror = host.layout(layout)
    start = host.view().ctypes.data
    assert mirror.num_blocks == 11
    assert mirror.regions == (Region(start, 100, 100), Region(start + 1100, 240, 240))
    assert mirror.dense
    assert mirror.mirrors(layout)
    host.close()


def test_a_layout_with_gaps_is_mirrored_without(layout: Layout) -> None:
    woven = np.zeros((7, 2, 50), np.uint8)
    host = HostArena(100 * 9)
    assert host.layout(layout_of([woven[:, 0], woven[:, 1]])).dense
    host.close()


def test_an_arena_that_holds_no_block_is_refused(layout: Layout) -> None:
    host = HostArena(339)
    with pytest.raises(ConfigError, match="339 bytes cannot hold one block"):
        host.layout(layout)
    host.close()


@pytest.mark.parametrize("nbytes", [0, -5])
def test_no_memory_is_refused(nbytes: int) -> None:
    with pytest.raises(ConfigError, match="at least one block"):
        HostArena(nbytes)


def test_closing_twice_is_closing_once(layout: Layout) -> None:
    host = HostArena(10_000)
    host.close()
    host.close()
    with pytest.raises(ConfigError, match="closed"):
        host.layout(layout)


def test_views_survive_closing() -> None:
    host = HostArena(10_000)
    view = host.view()
    view[:] = 5
    host.close()
    assert (view == 5).all()
    ctypes.memset(view.ctypes.data, 6, 10_000)
    assert (view == 6).all()
    del view
    host.close()


def test_more_than_the_machine_has_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"1024\.00 TiB|1048576\.00 GiB.*free memory.*ask for less"
    ):
        HostArena(1 << 50)


def test_a_refusal_by_the_system_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("mmap.mmap", refuse)
    with pytest.raises(ConfigError, match=r"Cannot allocate memory.*ulimit"):
        HostArena(10_000)


# Limits, read from files as Linux writes them


def write(root: Path, files: dict[str, str]) -> tuple[Path, Path]:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root / "proc", root / "cgroup"


def free(root: Path, files: dict[str, str]) -> dict[str, int]:
    limits = arena._limits(*write(root, files))
    return {limit.name.replace(str(root), ""): limit.free for limit in limits}


def test_free_memory_is_what_the_machine_says_is_available(tmp_path: Path) -> None:
    meminfo = "MemTotal:  9999 kB\nMemFree:  10 kB\nMemAvailable:   2000 kB\n"
    assert free(tmp_path, {"proc/meminfo": meminfo}) == {"the machine's free memory": 2000 << 10}


def test_control_groups_version_2_and_their_ancestors_are_obeyed(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/a/b\n",
        "cgroup/a/b/memory.max": "max\n",
        "cgroup/a/b/memory.current": "100\n",
        "cgroup/a/b/memory.stat": "anon 60\ninactive_file 40\n",
        "cgroup/a/memory.max": "1000\n",
        "cgroup/a/memory.current": "700\n",
        "cgroup/a/memory.stat": "anon 1\ninactive_file 50\n",
    }
    assert free(tmp_path, files) == {"memory.max of the control group /cgroup/a": 350}


def test_control_groups_version_1_are_obeyed(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/x\n",
        "cgroup/memory/x/memory.limit_in_bytes": "500\n",
        "cgroup/memory/x/memory.usage_in_bytes": "600\n",
        "cgroup/memory/x/memory.stat": "total_inactive_file 20\n",
    }
    assert free(tmp_path, files) == {
        "memory.limit_in_bytes of the control group /cgroup/memory/x": 0
    }


def test_a_container_sees_its_own_group_at_the_root(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/system.slice/docker-1234.scope\n",
        "cgroup/memory.max": "1000\n",
        "cgroup/memory.current": "300\n",
        "cgroup/memory.stat": "inactive_file 0\n",
    }
    assert free(tmp_path, files) == {"memory.max of the control group /cgroup": 700}


def test_no_limits_are_found_where_there_are_none(tmp_path: Path) -> None:
    assert free(tmp_path, {}) == {}


def test_a_limit_too_low_is_named_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "proc/self/cgroup": "0::/pod\n",
        "cgroup/pod/memory.max": f"{3 << 30}\n",
        "cgroup/pod/memory.current": f"{1 << 30}\n",
        "cgroup/pod/memory.stat": "inactive_file 0\n",
    }
    limits = list(arena._limits(*write(tmp_path, files)))
    monkeypatch.setattr(arena, "_limits", lambda *_: limits)
    with pytest.raises(ConfigError, match=r"4\.00 GiB does not fit: memory.max .*leaves 2\.00 GiB"):
        HostArena(4 << 30)
