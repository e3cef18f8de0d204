"""`paged-ref compare` as a user meets it: tables, plots, JSON, SVG, bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from paged_ref.cli import main
from paged_ref.commands import compare
from paged_ref.commands.compare_report import MeasuredCost
from paged_ref.commands.report_text import rate_words
from paged_ref.planner import sweep
from paged_ref.views.common.plots import Bar, Line, bars_text, lines_text, round_up, svg

COMPARE = ["compare", "--trace", "alpaca", "--requests", "24", "--kv-tokens", "4096", "--block-sizes", "16"]
ROWS = [
    "standard max",
    "standard pow2",
    "standard exact",
    "exact, first fit",
    "swapping",
    "paged 16",
    "paged 16 + prefix",
]


@pytest.fixture
def narrow_and_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A narrow window, and runs of a tenth of the requests."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sweep, "LEAST_REQUESTS", 100)


@pytest.mark.usefixtures("narrow_and_short")
def test_compare_prints_plots_and_tables_and_writes_json_and_svg(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {kind: tmp_path / f"c.{kind}" for kind in ("json", "svg", "csv")}
    outputs = [word for kind, file in files.items() for word in (f"--{kind}", str(file))]
    assert main([*COMPARE, "--run", "--jobs", "1", *outputs]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown
    for heading in (
        "Utilization",
        "Scalability",
        "Latency, at 80%",
        "Complexity",
        "The article's table",
        "The embedded model, for real",
    ):
        assert heading in shown
    numbers = json.loads(files["json"].read_text(encoding="utf-8"))
    assert [row["label"] for row in numbers["rows"]] == ROWS
    for row in numbers["rows"]:
        assert 0 < row["sustained_rate"] <= row["roofline"]
        assert row["goodput"] is None
        assert row["num_refused"] == 0
        line = next(line for line in shown.splitlines() if re.match(rf" {re.escape(row['label'])} .*%", line))
        assert f"{row['measured']['tokens_of_used']:.1%}" in line
    assert all(each["same"] and each["steps"] > 0 for each in numbers["run"])
    assert numbers["kv_bytes_per_token"] == 819_200
    assert any("drawn: geometric lengths" in note for note in numbers["notes"])
    for name, value in numbers["constants"].items():
        assert re.search(rf"{name} +{value:g}", shown)
    lines = files["csv"].read_text(encoding="utf-8").splitlines()
    columns = lines[0].split(",")
    assert {"label", "sustained_rate", "half_width", "goodput", "measured.first_token.p99"} <= set(columns)
    assert [line.split(",")[0].strip('"') for line in lines[1:]][:3] == ROWS[:3]
    picture = ElementTree.fromstring(files["svg"].read_text(encoding="utf-8"))
    texts = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert set(ROWS) <= set(texts)
    assert len(list(picture.iter("{http://www.w3.org/2000/svg}polyline"))) == len(ROWS)


@pytest.mark.usefixtures("narrow_and_short")
def test_compare_reads_a_file_and_counts_what_it_refuses_and_cuts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "lengths.csv"
    monkeypatch.setattr(
        compare, "_cost", lambda done: MeasuredCost(1, dict.fromkeys(("standard", "swapping", "paged"), 1.0), 1.0)
    )
    trace.write_text("prompt,output\n" + "30,20\n40,5000\n9000,3\n" * 4, encoding="utf-8")
    argv = ["compare", "--trace", str(trace), "--block-sizes", "32", "--kv-tokens", "4096", "--jobs", "1"]
    argv += ["--max-model-len", "256"]
    limits = ["--latency", "0.5", "--ttft", "5", "--share", "90"]
    assert main([*argv, "--scale", "0.9", *limits, "--price-per-hour", "2.5"]) == 0
    shown = capsys.readouterr().out
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown  # with the columns of goodput and price
    words = " ".join(shown.split())
    assert "lengths x 0.9" in words
    assert "Refused, since they could never fit: 4 requests; the first: the prompt has 8100 tokens" in words
    assert "Cut at the context of 256: 4 outputs." in words
    assert "first token within 5 s, mean of a token 0.5 s, for 90 % of the requests" in words


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["compare", "--trace", "nowhere.csv"], "trace nowhere.csv cannot be read"),
        (["compare", "--requests", "-1"], "--requests is -1"),
        (["compare", "--latency", "0"], "--latency is 0.0"),
        (["compare", "--latency", "nan"], "--latency is nan"),
        (["compare", "--ttft", "-1"], "--ttft is -1.0"),
        (["compare", "--share", "101"], "--share is 101.0; at most 100 percent"),
        (["compare", "--num-gpus", "3"], "--num-gpus is 3; a divisor of the 40 heads"),
        (["compare", "--csv", "no/such/place.csv"], "--csv no/such/place.csv cannot be written"),
        (["compare", "--scale", "0"], "scale is 0.0"),
        (["compare", "--jobs", "0"], "jobs is 0"),
        (["compare", "--jobs", "99999999999"], "--jobs is 99999999999; 1 to "),
        (["compare", "--block-sizes", "0"], "--block-sizes holds 0"),
        (["compare", "--kv-tokens", "100"], "at least one block of 128"),
        (["compare", "--kv-tokens", "1"], "--kv-tokens is 1"),
        (["compare", "--max-model-len", "4096"], "2 to the 2048 of OPT-13B's context is allowed"),
        (["compare", "--model", "OPT-175B"], "OPT-175B has"),
        (["compare", "--model", "GPT-9"], "model is 'GPT-9'"),
        (["compare", "--gpu", "Z80"], "gpu is 'Z80'"),
        (["compare", "--max-batch-seqs", "0"], "--max-batch-seqs is 0"),
        (["compare", "--json", "no/such/place.json"], "--json no/such/place.json cannot be written"),
        (["compare", "--svg", "no/such/place.svg"], "--svg no/such/place.svg cannot be written"),
        (["compare", "--html", "-"], "--html is -; a file is needed, this cannot go to standard output"),
        (["paper", "--csv", "-"], "--csv is -; a file is needed"),
        (["paper", "--json", "a.out", "--csv", "./a.out"], "--csv a.out is the file of --json, too"),
        (["assess", "--trace", __file__, "--csv", __file__], "test_compare.py is the file of --trace, too"),
        (["demo", "--record", __file__, "--record", "-"], "--record is -"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("paged-ref: error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_rates_have_as_many_digits_as_they_need() -> None:
    assert [rate_words(rate) for rate in (0.0, 0.0123, 1.234, 99.5, 791.66, 1351.2)] == [
        "0.00", "0.0123", "1.23", "99.50", "792", "1,351",
    ]  # fmt: skip
    assert [rate_words(0.1234, of) for of in (0.05, 0.5, 500.0)] == ["0.12", "0.12", "0"]


def test_devices_may_be_named_twice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["assess", "--list", "--csv", "/dev/null", "--svg", "/dev/null"]) == 0


def test_json_alone_on_standard_output(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "_measure", lambda *given: ([], {}, []))
    monkeypatch.setattr(compare, "results", lambda *given: ["a paragraph"])
    monkeypatch.setattr(compare, "as_json", lambda *given: {"rows": []})
    assert main([*COMPARE, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == {"rows": [], "left_out": []}


# --- plots ---------------------------------------------------------------------------------------------


def test_a_bar_is_as_long_as_its_shares() -> None:
    text = bars_text([Bar("a", {"tokens": 0.5, "reserved": 0.25, "free": 0.25}), Bar("bb", {"tokens": 1.0})], 46)
    first, second, legend = str(text).splitlines()
    assert first.count("█") == 2 * first.count("▓") == 2 * first.count("·") == 20
    assert second.count("█") == first.count("█") + first.count("▓") + first.count("·")
    assert "tokens" in legend


def test_lines_rise_to_the_right_and_end_at_the_top() -> None:
    rising = Line("up", [(1.0, 0.0), (2.0, 1.0)])
    flat = Line("low", [(0.0, 0.25), (2.0, 0.25)])
    rows = str(lines_text([rising, flat], 60, 9, 1.0, "x", "y", 0.5)).splitlines()
    grid = [row.split("│")[1] for row in rows if "│" in row]
    assert [row.index("A") for row in grid] == sorted((row.index("A") for row in grid), reverse=True)
    assert {number for number, row in enumerate(grid) if "B" in row} == {6}
    assert grid[4].count("·") > 20
    assert any(row.strip() == "A up" for row in rows)


def test_axes_end_at_round_numbers() -> None:
    for value, end in ((0.0234, 0.04), (0.8, 0.8), (1.0, 1.0), (3.08, 4.0), (8.6, 10.0), (61.0, 80.0), (0.0, 1.0)):
        assert round_up(value) == end
    text = svg("t", [], [Line("a", [(0.3, 0.01), (2.63, 0.03)])], round_up(0.03), "x", "y", None)
    ticks = [element.text for element in ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}text")]
    assert {"0", "1", "2", "3", "4", "0.01", "0.02", "0.04"} <= set(ticks)


def test_what_is_above_the_plot_is_left_out() -> None:
    text = str(lines_text([Line("a", [(0.0, 5.0), (1.0, 9.0)])], 60, 5, 1.0, "x", "y", 0.5))
    assert "A" not in text.replace("A a", "")


def test_svg_escapes_words() -> None:
    ElementTree.fromstring(
        svg("a < b & c", [Bar("x & y", {"tokens": 1.0})], [Line("<l>", [(0, 0), (1, 1)])], 1, "x", "y", 1)
    )
