"""Where simulations run: processes that end with Ctrl-C, and a Dask cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from math import sqrt
from pathlib import Path

import pytest

from paged_ref.planner import workers
from paged_ref.planner.paper import ORCA, PAGED
from paged_ref.planner.steady import steady_state
from paged_ref.planner.traces import generated
from paged_ref.planner.workers import Workers


def test_calls_come_back_in_their_order() -> None:
    done: list[int] = []
    assert Workers(1).run([(sqrt, float(n * n)) for n in range(5)], lambda: done.append(1)) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert len(done) == 5
    assert Workers(2).run([(pow, 2, n) for n in range(5)]) == [1, 2, 4, 8, 16]
    assert Workers(1).run([]) == []


def test_what_a_call_raises_comes_through() -> None:
    with pytest.raises(ValueError, match=r"math domain error|nonnegative"):
        Workers(1).run([(sqrt, -1.0)])


def alive(group: int) -> list[int]:
    """The processes of the group that are not only waiting to be counted by their parent."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            state, _, process_group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if int(process_group) == group and state != "Z":
            found.append(int(folder.name))
    return found


def test_an_interrupt_while_workers_start_is_not_lost() -> None:
    reached: list[int] = []

    def start() -> None:
        with workers._interrupts_held():
            os.kill(os.getpid(), signal.SIGINT)
            reached.append(1)

    with pytest.raises(KeyboardInterrupt):
        start()
    assert reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="processes are counted in /proc")
@pytest.mark.parametrize("command", [["compare", "--requests", "0"], ["paper", "12"]], ids=lambda command: command[0])
def test_ctrl_c_ends_command_and_workers_with_one_line(command: list[str], tmp_path: Path) -> None:
    """As a terminal sends it: to all processes of the group, while the workers start or simulate."""
    trace = tmp_path / "long.csv"
    trace.write_text("prompt,output\n" + "500,2000\n" * 20_000, encoding="utf-8")
    more = ["--trace", str(trace)] if command[0] == "compare" else []
    process = subprocess.Popen(
        [sys.executable, "-m", "paged_ref", *command, *more, "--jobs", "2"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while len(alive(process.pid)) < 3:  # the command and two workers
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1.0)
    os.killpg(process.pid, signal.SIGINT)
    try:
        _, said = process.communicate(timeout=120)  # a busy machine is slow to end processes; a hang is for good
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert said.strip().splitlines()[-1] == "paged-ref: interrupted"
    assert "Traceback" not in said
    while alive(process.pid):  # the process that watches over shared memory ends a moment later
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_dask_cluster_gives_the_same_numbers() -> None:
    distributed = pytest.importorskip("distributed", reason="needs the extra cluster")
    calls = [(steady_state, setup, generated("alpaca", 50)) for setup in (PAGED, ORCA["max"], ORCA["exact"])]
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        done: list[int] = []
        found = Workers(cluster=cluster.scheduler_address).run(calls, lambda: done.append(1))
    assert found == Workers(1).run(calls)
    assert len(done) == 3


def test_no_scheduler_is_one_sentence() -> None:
    pytest.importorskip("distributed", reason="needs the extra cluster")
    with pytest.raises(ValueError, match=r"--cluster nonsense://x: no Dask scheduler answers there"):
        Workers(cluster="nonsense://x").run([(sqrt, 4.0)])
