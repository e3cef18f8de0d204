"""The kernel walk: its numbers are the trace's, each access is visited once, and the frames are as recorded.

Golden frames lie in golden/. `pytest --update-golden tests/views/walk` writes them again;
read the diff before you commit it.
"""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

pytest.importorskip("greenlet", reason="the tracer runs CUDA threads on greenlets")

from support.traces import per_thread

from paged_ref.cli import main
from paged_ref.kernels import paged_attention, slot_of
from paged_ref.views.walk.call import KERNELS, Walk, walk
from paged_ref.views.walk.captions import caption, sentence
from paged_ref.views.walk.frames import VIEWS, WIDE, Look, frame
from paged_ref.views.walk.kernel_run import KernelRun
from paged_ref.views.walk.layout_costs import layout_costs
from paged_ref.views.walk.sizes import Sizes
from paged_ref.views.walk.walk import STEPS, Walker

GOLDEN = Path(__file__).parent / "golden"
OTHERS = {
    "tiles": Sizes((19, 9), block_size=4, head_size=4, num_threads=8),  # three tiles of 8 keys
    "more dimensions than threads": Sizes((5,), num_heads=4, num_kv_heads=2, head_size=8, num_threads=4),
    "one thread": Sizes((3,), num_heads=1, head_size=4, num_threads=1),
    "two warps": Sizes((40,), block_size=16, num_heads=1, head_size=4, num_threads=64),
    "float16": Sizes((6, 3), head_size=8, dtype="float16"),
}


@pytest.fixture(scope="module")
def toy() -> Walk:
    return walk()


@pytest.fixture(scope="module")
def others() -> dict[str, Walk]:
    return {name: walk(sizes) for name, sizes in OTHERS.items()}


@pytest.fixture(params=["toy", *OTHERS])
def each(request: pytest.FixtureRequest, toy: Walk, others: dict[str, Walk]) -> Walk:
    return toy if request.param == "toy" else others[request.param]


def text_of(walk: Walk, position: int, width: int, height: int, look: Look | None = None) -> str:
    console = Console(width=width, height=height, force_terminal=False, no_color=True)
    with console.capture() as capture:
        console.print(frame(walk, position, width, height, look), no_wrap=True, crop=True)
    return capture.get()


def first(run: KernelRun, array: str) -> int:
    return next(p for p in run.tour() if run.info(p).name == array)


# ---- the run


def test_both_kernels_go_in_step(each: Walk) -> None:
    naive, paged = (each.runs[name].trace for name in KERNELS)
    for column in ("block", "round", "thread", "write"):
        assert (getattr(naive, column) == getattr(paged, column)).all()
    names = [{info.name: n for n, info in enumerate(t.arrays)} for t in (naive, paged)]
    assert names[0].keys() ^ names[1].keys() == {"starts", "block_tables"}


def test_two_lines_tell_the_kernels_apart(toy: Walk) -> None:
    for name, other in (("naive", "paged"), ("paged", "naive")):
        code = toy.runs[name].code
        assert len(code.different) == 2
        theirs = [text for _, text in toy.runs[other].code.lines]
        for number, text in code.different.items():
            assert code.text(number) not in theirs
            assert text in theirs
    assert any("slot_of(" in text for text in toy.runs["naive"].code.different.values())


def test_slots_belong_to_whom_the_picture_says(each: Walk) -> None:
    """The owner that is drawn and the slot that was read agree on each access to the cache."""
    for run in each.runs.values():
        for position in range(len(run)):
            slot = run.slot(position)
            if slot is None:
                continue
            token = run.access(position).block[0]
            seq, held = run.owner[slot]
            assert seq == token
            assert held is not None
            table = run.tables[seq]
            assert slot == (slot_of(table, held, run.sizes.block_size) if run.name == "paged" else table[0] + held)


def test_the_key_that_a_sentence_names_is_the_thread_s_own(each: Walk) -> None:
    for run in each.runs.values():
        for position in range(len(run)):
            known = caption(run, position)
            if run.info(position).name == "keys":
                assert known["position"] == known["key"]
            if run.info(position).name == "block_tables":
                assert known["last"] == known["key"] // run.sizes.block_size


def test_only_the_paged_kernel_reads_from_blocks(toy: Walk) -> None:
    for name, says in (("naive", False), ("paged", True)):
        run = toy.runs[name]
        for array in ("keys", "values"):
            text = sentence(run, first(run, array))
            assert ("block" in text, "offset" in text) == (says, says), text


def test_a_narrow_title_keeps_the_number_of_the_access(toy: Walk) -> None:
    assert text_of(toy, 67, 60, 20).splitlines()[0].rstrip().endswith("… 68/1488")


# ---- walking


@pytest.mark.parametrize("kind", STEPS)
def test_each_run_is_visited_once_and_back_is_the_start(each: Walk, kind: str) -> None:
    run = each.runs["paged"]
    visited = [0]
    while (following := run.move(visited[-1], kind, 1)) != visited[-1]:
        visited.append(following)
    assert visited == run.starts[kind].tolist()
    back = [visited[-1]]
    while (previous := run.move(back[-1], kind, -1)) != back[-1]:
        back.append(previous)
    assert back == visited[::-1]
    if kind == "access":
        assert visited == list(range(len(run)))


def test_there_and_back_shows_the_same(toy: Walk) -> None:
    walker = Walker(toy)
    start = walker.draw(80, 24)
    for key in ("right", "down", "t", "n", "b", "down", "end"):
        assert walker.press(key)
    assert walker.position == len(toy) - 1
    for _ in range(len(toy)):
        walker.press("left")
    assert walker.draw(80, 24) == start
    walker.press("right")
    walker.press("home")
    assert walker.draw(80, 24) == start


def test_keys_change_the_look(toy: Walk) -> None:
    walker = Walker(toy, position=100)
    walker.draw(WIDE, 40)
    kernels = []
    for _ in range(3):
        walker.press("k")
        kernels.append(walker.look.kernel)
    assert kernels == ["naive", "paged", "both"]
    for key, view in zip("123", VIEWS, strict=True):
        walker.press(key)
        assert walker.look.view == view
    walker.press("?")
    assert "this help" in walker.draw(80, 24).plain
    walker.press("x")
    assert "this help" not in walker.draw(80, 24).plain
    walker.press(" ")
    walker.tick()
    assert (walker.playing, walker.position) == (True, 101)
    walker.press("right")  # stops, and does nothing else
    assert (walker.playing, walker.position) == (False, 101)
    assert not walker.press("q")


# ---- the numbers are the trace's


@pytest.mark.parametrize("name", KERNELS)
def test_the_counters_are_the_trace_s(each: Walk, name: str) -> None:
    run = each.runs[name]
    ends = [*(run.starts["block"][1:] - 1).tolist(), len(run) - 1]
    for block, end in enumerate(ends):
        counts = run.counts(end)
        for number, info in enumerate(run.trace.arrays):
            for write in (False, True):
                assert (counts[number, :, int(write)] == per_thread(run.trace, info.name, write=write)[block]).all()


def test_the_counters_are_shown(toy: Walk) -> None:
    run = toy.runs["paged"]
    end = int(run.starts["block"][1]) - 1
    lines = text_of(toy, end, 100, 24, Look(view="threads")).splitlines()
    shown = next(line for line in lines if line.strip().startswith("keys")).split()[1:]
    expected = per_thread(run.trace, "keys")[0].tolist()
    assert shown == [str(n) if n else "." for n in expected] + [str(sum(expected))]


def test_the_sectors_are_the_trace_s(each: Walk) -> None:
    """Each load of the walk is one of the tracer's, and ours among the layouts costs what the tracer counted."""
    for run in each.runs.values():
        counted = run.trace.warp_accesses()
        seen = set()
        loads = []
        for position in range(len(run)):
            if run.info(position).space == "global" and position not in seen:
                load = run.load(position)
                seen |= set(load.rows.tolist())
                loads.append((position, load))
        assert [(len(load.threads), load.bytes, load.sectors) for _, load in loads] == [
            (access.lanes, access.bytes, access.sectors) for access in counted
        ]
        for position, load in loads[:: max(1, len(loads) // 50)]:
            if run.slot(position) is not None:
                ours = layout_costs(run, position)[0]
                assert (ours.layout, ours.sectors) == ("ours", load.sectors)
                block = int(run.trace.block[position])
                accesses = run.trace.select(run.info(position).name, block=block).warp_accesses()
                assert ours.block_sectors == sum(access.sectors for access in accesses)


def test_packing_k_halves_the_sectors_of_a_load(toy: Walk) -> None:
    run = toy.runs["paged"]
    costs = {cost.layout: cost for cost in layout_costs(run, first(run, "keys"))}
    # 6 lanes, 4 bytes each. Ours: a row of 32 bytes a key. Packed: 16 bytes of a key beside those of the next.
    assert (costs["ours"].sectors, costs["vLLM packed"].sectors) == (6, 3)
    assert (costs["ours"].wide_sectors, costs["vLLM packed"].wide_sectors) == (6, 3)
    assert costs["vLLM packed"].wide_used == 1.0
    assert sorted(costs["vLLM packed"].groups) == [(0, 1), (2, 3), (4, 5)]
    values = {cost.layout: cost for cost in layout_costs(run, first(run, "values"))}
    assert (values["ours"].sectors, values["vLLM packed"].sectors) == (1, 4)


def test_what_was_read_so_far(toy: Walk) -> None:
    run = toy.runs["paged"]
    end = int(run.starts["block"][1]) - 1
    own = {slot for slot, (seq, held) in run.owner.items() if seq == 0 and held is not None}
    for array in ("keys", "values"):
        assert set(np.flatnonzero(run.read_so_far(end, array)).tolist()) == own
        assert not run.read_so_far(end + 1, array).any()  # the next CUDA block begins with nothing


# ---- words and frames


def test_each_line_has_a_sentence(each: Walk) -> None:
    for run in each.runs.values():
        for position in run.starts["line"].tolist():
            for row in range(position, min(position + 3, len(run))):  # a line may touch several arrays
                words = sentence(run, row)
                assert words.endswith(".")
                assert len(words) < 240


@pytest.mark.parametrize("size", [(80, 24), (100, 30), (160, 50), (60, 20), (120, 40), (200, 24), (20, 5), (1, 1)])
@pytest.mark.parametrize("view", VIEWS)
def test_a_frame_fills_the_screen_and_no_more(toy: Walk, size: tuple[int, int], view: str) -> None:
    width, height = size
    for position in toy.runs["paged"].tour():
        lines = text_of(toy, position, width, height, Look(view=view)).rstrip("\n").split("\n")
        assert len(lines) <= height
        assert max(map(len, lines)) <= width


def test_large_calls_are_drawn_too(others: dict[str, Walk]) -> None:
    for made in others.values():
        for position in made.runs["paged"].tour():
            for width, height in ((80, 24), (100, 30), (160, 50)):
                assert "why" in text_of(made, position, width, height)


@pytest.mark.parametrize("size", [(80, 24), (100, 30), (160, 50)])
@pytest.mark.parametrize("array", ["block_tables", "keys", "values"])
def test_golden(toy: Walk, size: tuple[int, int], array: str, request: pytest.FixtureRequest) -> None:
    width, height = size
    run = toy.runs["paged"]
    # A little past the first access, so that something has been read before.
    text = text_of(toy, run.move(run.move(first(run, array), "thread", 1), "access", 1), width, height)
    if array == "keys":
        text = text_of(toy, run.move(first(run, array), "thread", 1) + 7, width, height)
    text = re.sub(r"[ ]+$", "", text, flags=re.MULTILINE)
    file = GOLDEN / f"walk_{array}_{width}x{height}.txt"
    if request.config.getoption("--update-golden"):
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


def test_the_moment_is_marked_without_colour(toy: Walk) -> None:
    run = toy.runs["paged"]
    text = text_of(toy, first(run, "keys"), 80, 24)
    assert re.search(r"^▶  84 .*score", text, flags=re.MULTILINE)
    assert "[A0]k" in text
    assert "(A5)" in text
    assert "≠" in text


# ---- the command


def test_without_a_terminal_frames_follow_one_another(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["walk", "--at", "keys"]) == 0
    one = capfd.readouterr().out
    assert len(one.splitlines()) == 24
    assert main(["walk", "--every", "block", "--size", "100x30"]) == 0
    assert capfd.readouterr().out.count("CUDA block") == 4
    assert main(["walk", "--every", "500"]) == 0
    assert capfd.readouterr().out.count(" 1/1488") == 1
    assert main(["walk"]) == 0
    assert capfd.readouterr().out.count("CUDA block") == 13  # the first access to each array


def test_a_picture_of_a_frame(tmp_path: Path) -> None:
    file = tmp_path / "walk.svg"
    assert main(["walk", "--svg", str(file), "--size", "160x50"]) == 0
    svg = file.read_text(encoding="utf-8")
    assert svg.startswith("<svg")
    assert "block_tables" in svg


def test_the_numbers_do_not_depend_on_what_is_drawn(toy: Walk) -> None:
    """The traced answer is the reference's: what is walked through is the real computation."""
    run = toy.runs["paged"]
    assert run.trace.totals()["out"] == (0, 2 * 2 * 8)
    rng = np.random.default_rng(0)
    query = rng.standard_normal((2, 2, 8)).astype(np.float32)
    k, v = rng.standard_normal((2, 4, 4, 1, 8)).astype(np.float32)
    tables, lens = np.array([[2, 0], [1, 0]], dtype=np.int32), np.array([6, 3], dtype=np.int32)
    traced, expected = (paged_attention(query, k, v, tables, lens, backend=name) for name in ("trace", "reference"))
    np.testing.assert_allclose(traced, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--head-size", "0"], "--head-size is 0; 1 to 256 is needed"),
        (["--head-size", "257"], "--head-size is 257; 1 to 256 is needed"),
        (["--block-size", "0"], "--block-size is 0; 1 to 64 is needed"),
        (["--heads", "3", "--kv-heads", "2"], "--heads is 3; a multiple of --kv-heads 2"),
        (["--kv-heads", "0"], "--kv-heads is 0"),
        (["--threads", "6"], "--threads is 6; a power of two from 1 to 128"),
        (["--threads", "256"], "--threads is 256"),
        (["--tokens", "0"], "--tokens has 0; at least 1"),
        (["--tokens", "6", "1000000"], "accesses; at most"),
        (["--tokens", *["1"] * 27], "--tokens names 27 sequences"),
        (["--seed", "-1"], "--seed is -1"),
        (["--at", "0"], "--at is '0'; 1 to 1488 is needed, or one of"),
        (["--at", "9999"], "--at is '9999'"),
        (["--every", "0"], "--every is '0'; access, line"),
        (["--size", "8x8"], "--size is 8x8; at least"),
        (["--size", "wide"], "--size is 'wide'; columns x rows"),
        (["--svg", "no/such/place/walk.svg"], "no/such/place/walk.svg cannot be written"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["walk", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("paged-ref: error: ")
    assert error.count("\n") == 1


# ---- the real program on a pseudo-terminal


class Session:
    """`paged-ref walk` on a terminal of 80x24, and the screen that it draws."""

    def __init__(self) -> None:
        import fcntl
        import termios

        import pyte

        self.screen = pyte.Screen(80, 24)
        self.stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self.main, side = pty.openpty()
        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.before = termios.tcgetattr(side)
        self.side = side
        environment = {**os.environ, "TERM": "xterm-256color", "NO_COLOR": "1", "PAGED_REF_DEVICE": "cpu"}
        environment.pop("COLUMNS", None)
        environment.pop("LINES", None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "paged_ref", "walk"], stdin=side, stdout=side, stderr=side, env=environment,
            start_new_session=True,
        )  # fmt: skip

    def read_until(self, text: str, seconds: float = 300) -> str:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if select.select([self.main], [], [], 0.1)[0]:
                data = os.read(self.main, 65536)
                self.raw += data
                self.stream.feed(data)
            elif text in self.shown():  # and nothing more comes: the whole screen is drawn
                return self.shown()
        raise AssertionError(f"{text!r} never came; the screen is\n{self.shown()}")

    def shown(self) -> str:
        return "\n".join(self.screen.display)

    def press(self, keys: bytes) -> None:
        os.write(self.main, keys)

    def end(self) -> int:
        status = self.process.wait(timeout=120)
        while select.select([self.main], [], [], 0.1)[0]:
            self.raw += os.read(self.main, 65536)
        return status

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.side)
        os.close(self.main)


@pytest.fixture
def session() -> Any:
    pytest.importorskip("pyte")
    made = Session()
    yield made
    made.close()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_on_a_terminal(session: Session) -> None:
    import termios

    assert "thread 0 reads keys[8, 0, 0]" in session.read_until(" 68/1488")  # the first read of K
    session.press(b"\x1b[H")
    start = session.read_until(" 1/1488")
    session.press(b"\x1b[C\x1b[C\x1b[C")  # right, three times
    session.read_until(" 4/1488")
    session.press(b"n")
    assert "round 2/12" in session.read_until("65/1488")
    session.press(b"b")
    assert "sequence B" in session.read_until("block 2/4")
    session.press(b"\x1b[F")
    session.read_until("1488/1488")
    session.press(b"\x1b[H")
    assert session.read_until(" 1/1488") == start
    session.press(b"?")
    session.read_until("this help")
    session.press(b"?")
    assert "32 threads of a CUDA block" in session.read_until("the least that a load moves")
    session.press(b"xq")
    assert session.end() == 0
    assert b"\x1b[?1049l" in session.raw  # the screen of before is back
    assert b"\x1b[?25h" in session.raw  # and the cursor
    assert termios.tcgetattr(session.side) == session.before
    colours = re.findall(rb"\x1b\[(?:\d+;)*(?:3[0-7]|9[0-7]|38)[;m]", session.raw)
    assert not colours, "NO_COLOR is set"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_ctrl_c_gives_the_terminal_back(session: Session) -> None:
    import termios

    session.read_until(" 68/1488")
    session.process.send_signal(signal.SIGINT)
    assert session.end() == 130
    assert b"\x1b[?1049l" in session.raw
    assert termios.tcgetattr(session.side) == session.before
