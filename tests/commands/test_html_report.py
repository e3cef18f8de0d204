"""The report on one page, prices, shared prefixes and models by hand, as the user of the commands meets them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from paged_ref.cli import main
from paged_ref.commands import html_report
from paged_ref.commands.report_text import Code
from paged_ref.planner.paper import PAGED

ASSESS = ["assess", "--gpu", "A100-40GB", "--model", "OPT-13B"]


def test_the_page_of_assess_needs_no_other_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page, picture = tmp_path / "a.html", tmp_path / "a.svg"
    argv = [*ASSESS, "--context", "400", "--html", str(page), "--svg", str(picture)]
    monkeypatch.setattr(sys, "argv", ["paged-ref", *argv])
    assert main(argv) == 0
    capsys.readouterr()
    text = page.read_text(encoding="utf-8")
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "<script" not in text
    assert "src=" not in text
    assert text.count("<svg") == 2  # the curve with the bars, and the memory over time
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids)) == 2  # of one id, the second picture was cut where the first one ends
    assert set(ids) == set(re.findall(r"url\(#([^)]+)\)", text))
    assert f"paged-ref assess --gpu A100-40GB --model OPT-13B --context 400 --html {page}" in text
    assert "NVIDIA A100 datasheet, 2021: NVLink 600 GB/s, 2026-11-29" in text
    assert "40 layers x 40 KV heads x 128 x 2 bytes = 819,200 bytes" in text
    assert "assumed: of the memory&#x27;s bandwidth" in text
    assert "vllm serve facebook/opt-13b" in text
    assert picture.read_text(encoding="utf-8").startswith("<svg")


def test_the_price_of_tokens_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["assess", "--gpu", "A100-40GB", "--model", "OPT-13B", "--num-gpus", "2", "--price-per-hour", "1.5"]
    assert main([*argv, "--context", "400", "--prompt", "200", "--json", "-"]) == 0
    for plan in json.loads(capsys.readouterr().out)["plans"]:
        tokens_per_hour = 3600 * 200 * plan["sustained_rate"]
        assert plan["price_of_million_tokens"] == pytest.approx(2 * 1.5 / tokens_per_hour * 1e6)


def test_shared_prefixes_are_found_by_the_cache(capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*ASSESS, "--context", "700", "--prompt", "600", "--prefix-tokens", "512", "--json", "-"]
    assert main(argv) == 0
    *_, paged, cached = json.loads(capsys.readouterr().out)["plans"]
    assert cached["name"] == f"{paged['name']} + prefix"
    assert cached["sustained_rate"] > 1.3 * paged["sustained_rate"]
    assert cached["measured"]["hit_rate"] == pytest.approx(512 / 600, rel=0.1)
    assert main([*ASSESS, "--prefix-tokens", "2000"]) == 2
    assert "--prefix-tokens is 2000; the longest prompt has 666 tokens" in capsys.readouterr().err
    assert main([*ASSESS, "--prefix-groups", "2"]) == 2
    assert "--prefix-groups is 2; --prefix-tokens says how much is shared" in capsys.readouterr().err


def test_a_model_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    by_hand = ["--kv-bytes-per-token", "819200", "--weights", "12.85e9", "--layers", "40"]
    assert main(["assess", "--gpu", "A100-40GB", *by_hand, "--context", "400", "--json", "-"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["model"]["kv_bytes_per_token"] == 819_200
    assert numbers["settings"]["vLLM"]["command"].startswith("vllm serve MODEL ")
    assert main(["assess", "--gpu", "A100-40GB", "--layers", "40"]) == 2
    assert "a model by hand needs --kv-bytes-per-token and --weights too" in capsys.readouterr().err
    assert main(["assess", *by_hand[:-1], "999999999999"]) == 2
    assert "--layers is 1e+12; 1 to 10,000 is possible" in capsys.readouterr().err
    assert main(["assess", *by_hand, "--weights", "1e30"]) == 2
    assert "--weights is 1e+30; 1 to 1,000,000,000,000,000 is possible" in capsys.readouterr().err


@pytest.mark.slow
def test_the_page_of_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "c.html"
    argv = ["compare", "--requests", "40", "--kv-tokens", "4096", "--scale", "0.2", "--jobs", "1"]
    assert main([*argv, "--price-per-hour", "2", "--html", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg") == 2
    assert "price 10^6" in text
    assert "price of an hour" in text
    assert "Price: of 10^6 output tokens" in capsys.readouterr().out


def test_words_of_a_page_cannot_turn_or_hide_what_follows() -> None:
    shown = html_report.page("a\u202eb", PAGED, ["c\x1b[2Jd<b>", Code("e\u200bf")])
    assert "a\N{REPLACEMENT CHARACTER}b" in shown
    assert "c\N{SYMBOL FOR ESCAPE}[2Jd&lt;b&gt;" in shown
    assert "e\N{REPLACEMENT CHARACTER}f" in shown


@pytest.mark.parametrize("command", [["assess"], ["compare"]])
def test_a_page_that_cannot_be_written_is_refused_first(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--html", "no/such/a.html"]) == 2
    assert "--html no/such/a.html cannot be written" in capsys.readouterr().err
