"""`paged-ref viz` without a terminal: pipes, files, pictures, and one sentence for bad input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from paged_ref.cli import main
from paged_ref.timeline.history import read_histories


def viz(capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    assert main(["viz", *argv]) == 0
    return capsys.readouterr().out.splitlines()


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["viz", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("paged-ref: error: ")
    assert error.count("\n") == 1
    return error


def test_a_pipe_gets_a_frame_for_each_step(log_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = viz(capsys, str(log_file), "--size", "80x24")
    steps = len(read_histories(log_file)[0].steps)
    assert len(lines) == 25 * steps - 1  # an empty line between two
    assert sum("[1 tables]" in line for line in lines) == steps
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in "".join(lines)


def test_every_and_frame(log_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = viz(capsys, str(log_file), "--every", "50", "--frame", "timeline")
    assert [line.split("event ")[1].split(" ")[0] for line in lines if " event " in line and "paged_ref " in line] == [
        "1", "51", "101", "151", "201",
    ]  # fmt: skip
    assert sum("[6 timeline]" in line for line in lines) == 5
    (copy,) = (
        line for line in viz(capsys, str(log_file), "--at", "C", "--frame", "2") if "PagedManager.append" in line
    )
    assert "memory/paged.py:" in copy


def test_columns_and_lines(log_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("LINES", "40")
    lines = viz(capsys, str(log_file), "--at", "7")
    assert len(lines) == 40
    assert max(map(len, lines)) == 120


def test_a_run_of_ones_own_is_recorded_and_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "run.jsonl")
    asked = [
        "--prompt",
        "Once upon a time",
        "--prompt",
        "The cat",
        "--n",
        "2",
        "--block-size",
        "8",
        "--max-tokens",
        "9",
    ]
    live = viz(capsys, *asked, "--blocks", "6", "--host-blocks", "4", "--seed", "3", "--record", file, "--every", "40")
    again = viz(capsys, file, "--every", "40")
    assert live == again
    runs = read_histories(Path(file))
    assert [run.moment(0).state.memory.manager for run in runs] == ["paged", "standard", "swapping"]
    assert [run.moment(0).state.memory.num_blocks for run in runs] == [6, 48, 48]
    assert {tuple(run.names.values()) for run in runs} == {("A1", "A2", "B1", "B2")}
    ends = [run.moment(len(run)).state.sequences for run in runs]
    assert len({tuple(tuple(view.tokens) for view in end.values()) for end in ends}) == 1


def test_one_manager(capsys: pytest.CaptureFixture[str]) -> None:
    lines = viz(capsys, "--manager", "swapping", "--at", "30", "--frame", "swap")
    assert "swapping manager" in lines[0]
    assert "run 1/" not in lines[0]


def test_a_log_that_was_cut_off_is_shown_up_to_there(
    log_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = log_file.read_bytes()
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(whole[:12_345])
    lines = viz(capsys, str(cut), "--at", "9")
    assert "  log cut off, paged manager" in lines[0]
    cut.write_bytes(whole[: whole.rindex(b"\n", 0, 12_345) + 1])
    between_lines = viz(capsys, str(cut), "--at", "9")
    assert "cut off" not in between_lines[0]
    assert between_lines[1:] == lines[1:]
    cut.write_bytes(whole[:20])
    assert main(["viz", str(cut)]) == 2
    assert "has no whole line; a log of events as JSON lines is needed" in capsys.readouterr().err


def test_the_demo_and_generate_can_be_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "demo.jsonl")
    assert main(["demo", "--record", file]) == 0
    assert main(["generate", "--prompt", "The cat", "--max-tokens", "5", "--record", str(tmp_path / "one.jsonl")]) == 0
    capsys.readouterr()
    runs = read_histories(Path(file))
    assert [run.moment(0).state.memory.manager for run in runs] == ["standard", "paged"]
    lines = viz(capsys, file, str(tmp_path / "one.jsonl"), "--at", "2000", "--frame", "memory", "--size", "100x30")
    assert "run 1/3" in lines[0]
    assert sum(" slots, step" in line or "at its end" in line for line in lines) == 3


def test_a_picture(log_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = tmp_path / "one.svg", tmp_path / "two.svg"
    for file in (one, two):
        assert (
            viz(capsys, str(log_file), "--svg", str(file), "--at", "C", "--frame", "sharing", "--size", "90x28") == []
        )
    text = one.read_text(encoding="utf-8")
    assert text == two.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    assert root.attrib["{http://www.w3.org/XML/1998/namespace}space"] == "preserve"  # librsvg drops blanks otherwise
    assert root.tag.endswith("svg")
    assert "url(http" not in text  # it fetches nothing
    assert "font-face" not in text
    assert "Copy" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--frame", "7"], "--frame is '7'; known are 1 tables, 2 sharing"),
        (["--size", "10x10"], "--size is 10x10; at least 60x16 is needed"),
        (["--size", "wide"], "columns x rows are needed"),
        (["--every", "0"], "--every is 0; at least 1"),
        (["--at", "0"], "--at is '0'; this run has the events 1 to "),
        (["--at", "9999"], "--at is '9999'; this run has"),
        (["--at", "-3"], "--at is '-3'"),
        (["--at", "X"], "--at is X, preempted by recompute; there is none"),
        (["--n", "2"], "--n is for a new run"),
        (["--record", "x.jsonl"], "--record is for a new run"),
        (["--svg", "no/such/place.svg"], "--svg no/such/place.svg cannot be written"),
    ],
)
def test_bad_input_for_a_log(log_file: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    assert message in refused(capsys, str(log_file), *[argv[0], *argv[1:]])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere.jsonl"], "nowhere.jsonl cannot be read: No such file"),
        (["--block-size", "0"], "--block-size is 0; at least 1"),
        (["--blocks", "0"], "--blocks is 0; at least 1"),
        (["--blocks", "-2", "--prompt", "a"], "at least"),
        (["--blocks", "2"], "slots"),
        (["--host-blocks", "-1"], "--host-blocks is -1; at least 0"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "a", "--n", "0"], "n is 0"),
        (["--prompt", "a", "--max-tokens", "0"], "--max-tokens is 0"),
        (["--model", "nowhere"], "nowhere is not a directory"),
        (["--record", "no/such/place.jsonl"], "--record no/such/place.jsonl cannot be written"),
    ],
)
def test_bad_input_for_a_run(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    assert message in refused(capsys, *argv)


def test_a_reader_that_leaves_is_no_error(log_file: Path) -> None:
    command = f"{sys.executable} -m paged_ref viz {log_file} | head -n 2"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert (done.stdout.count("\n"), done.stderr) == (2, "")
