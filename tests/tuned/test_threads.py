"""How many threads compute: what the caller names, and never more than the process may use; BLAS has one in a step."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import pytest
from threadpoolctl import ThreadpoolController

from paged_ref import LLM, SamplingParams
from paged_ref.tuned import threads


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A process that may use eight cores, whose caller names no number; the folder of its control group, empty."""
    for name in threads.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(threads, "CGROUP", tmp_path)
    threads.num_threads.cache_clear()
    yield tmp_path
    threads.num_threads.cache_clear()


def test_without_a_setting_there_is_a_thread_for_each_core(eight_cores: Path) -> None:
    assert threads.num_threads() == 8


@pytest.mark.parametrize(("named", "processes", "number"), [(None, 3, 2), (None, 16, 1), ("5", 3, 5)])
def test_processes_share_the_cores_unless_the_caller_names_a_number(
    eight_cores: Path, monkeypatch: pytest.MonkeyPatch, named: str | None, processes: int, number: int
) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ, **({} if named is None else {"OMP_NUM_THREADS": named})})
    threads.share_cores(processes)
    assert threads.num_threads() == number


@pytest.mark.parametrize("name", threads.SETTINGS)
@pytest.mark.parametrize(("value", "number"), [("3", 3), ("64", 8), ("", 8), ("many", 8), ("0", 1)])
def test_the_callers_number_counts_up_to_the_cores(
    eight_cores: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, number: int
) -> None:
    monkeypatch.setenv(name, value)
    assert threads.num_threads() == number


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "200000 100000"}, 2),
        ({"cpu.max": "150000 100000"}, 2),  # one and a half
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "1600000 100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({"cpu.max": "no numbers here"}, 8),
    ],
)
def test_the_quota_of_the_control_group_bounds_the_cores(eight_cores: Path, files: dict[str, str], cores: int) -> None:
    for name, text in files.items():
        (eight_cores / name).parent.mkdir(exist_ok=True)
        (eight_cores / name).write_text(text)
    assert threads.cores() == cores


def test_the_parts_cover_everything_once(eight_cores: Path) -> None:
    for size in (0, 1, 7, 8, 100, 1000):
        seen: list[int] = []
        threads.in_parts(lambda first, end, seen=seen: seen.extend(range(first, end)), size)
        assert sorted(seen) == list(range(size))


def test_turns_cover_everything_once_and_a_late_thread_holds_up_no_other(eight_cores: Path) -> None:
    for size in (0, 1, 7, 8, 100, 1000):
        seen: list[tuple[int, int]] = []
        threads.in_turns(lambda first, end, seen=seen: seen.append((first, end)), size, 8)
        assert sorted(seen) == [(first, min(first + 8, size)) for first in range(0, size, 8)]
    done: list[int] = []
    all_others = Event()

    def late(first: int, end: int) -> None:
        if first == 0:  # its thread comes back when all other parts are done
            assert all_others.wait(60)
        done.append(first)
        if len(done) == 99:
            all_others.set()

    threads.in_turns(late, 100, 1)
    assert done[-1] == 0
    assert sorted(done) == list(range(100))


def test_an_error_in_a_part_arrives(eight_cores: Path) -> None:
    def fail(first: int, end: int) -> None:
        if end == 800:
            raise ValueError("the last part")

    with pytest.raises(ValueError, match="the last part"):
        threads.in_parts(fail, 800)


@pytest.mark.parametrize("manager", ["paged", "standard"])
def test_a_step_gives_blas_one_thread(manager: str) -> None:
    blas = ThreadpoolController().select(user_api="blas")

    def numbers() -> set[int]:
        return {library.get_num_threads() for library in blas.lib_controllers}

    seen: set[int] = set()

    def hook(tokens: object, logits: object) -> object:
        seen.update(numbers())
        return logits

    with blas.limit(limits=2):
        LLM(manager=manager).generate("Once", SamplingParams(max_tokens=2, logits_hook=hook))  # type: ignore[arg-type]
        assert numbers() == {2}
    assert seen == {1}
