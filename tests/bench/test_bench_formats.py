"""`paged-ref bench formats`: its figures, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paged_ref.bench.formats import STORIES, score
from paged_ref.cli import main
from paged_ref.training.corpus import read_stories


@pytest.mark.slow
def test_fewer_bits_save_blocks_and_cost_little(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "formats.json"
    assert main(["bench", "formats", "--memory-mib", "1", "--json", str(path)]) == 0
    results = {result["kv_dtype"]: result for result in json.loads(path.read_text())["results"]}
    base = results["float32"]
    assert [r["blocks"] for r in results.values()] == [25, 51, 102, 102]
    assert len({r["tokens"] for r in results.values()}) == 1
    for kv_dtype, most in (("bfloat16", 1e-3), ("int8", 5e-3), ("float8", 1e-2)):
        changed = results[kv_dtype]["perplexity"] / base["perplexity"] - 1
        assert 0 < abs(changed) < most
    printed = capsys.readouterr().out
    assert f"4 stories, {base['tokens']} tokens, model tiny" in printed
    assert f"{base['perplexity']:.4f}" in printed


def test_a_text_of_the_users_and_a_story_longer_than_the_context(tmp_path: Path) -> None:
    long = [" ".join(read_stories(STORIES)), "a"]
    assert score("tiny", "float32", long, 1 << 20)["tokens"] == 510
    path = tmp_path / "one.txt"
    path.write_text("A short text.")
    assert main(["bench", "formats", "--text", str(path)]) == 2
