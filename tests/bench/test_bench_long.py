"""What `paged-ref bench long` counts; its timings are no test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paged_ref.bench.long import SMALL, grow
from paged_ref.cli import main


def test_the_device_stays_constant_and_the_bytes_are_those_on_paper() -> None:
    growth = grow([1024, 4096, 16384], device_blocks=32, rounds=1)
    assert len({row.device_bytes for row in growth}) == 1
    _, kv_heads, head_size = SMALL
    page = 2 * 16 * head_size * 4
    for row in growth:
        blocks = row.tokens // 16 + 1  # the new token opens one
        assert row.bytes_in == row.on_paper == (blocks - 32) * kv_heads * page


def test_the_tables_and_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "long.json"
    argv = ["bench", "long", "--contexts", "512", "2048", "--tokens", "1024", "--rounds", "1", "--json", str(file)]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "2,048" in out
    results = json.loads(file.read_text(encoding="utf-8"))
    assert [row["tokens"] for row in results["growth"]] == [512, 2048]
    assert {row["name"].partition(":")[0] for row in results["ratios"]} >= {"Llama 3 8B, 1 new", "embedded, 1 new"}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--contexts", "64", "32"], "--contexts is [64, 32]; numbers from 1 on are needed, from small to large"),
        (["--tokens", "10"], "--tokens is 10; at least 1024"),
        (["--rounds", "0"], "--rounds is 0; at least 1"),
        (["--device-blocks", "1"], "--device-blocks is 1; at least 2"),
    ],
)
def test_bad_input_gets_one_sentence(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "long", *argv]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
