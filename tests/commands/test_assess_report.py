"""`paged-ref assess` as its user meets it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from paged_ref.cli import main
from paged_ref.core.device import on_gpu
from paged_ref.planner import sweep
from paged_ref.planner.models import MODELS

GPU = ["--gpu", "A100-40GB"]


@pytest.mark.parametrize("columns", [60, 80, 160])
def test_the_report_fits_the_window(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["assess", "--model", "opt-13b", *GPU, "--context", "500", "--prompt", "250"]) == 0
    printed = capsys.readouterr().out
    commands = ("   vllm serve", "   python -m sglang", "   echo 'kv_cache_config", "   ContinuousBatchingConfig")
    assert all(len(line) <= columns for line in printed.splitlines() if not line.startswith(commands))
    assert all(command in printed for command in commands)
    words = " ".join(printed.split())
    for expected in (
        "2 (K and V) x 40 layers x 40 KV heads x 128 x 2 bytes = 819,200 bytes",
        "12,853,473,280 x 16 bits = 23.9 GiB",
        "standard max",
        "The next request waits for the memory for K and V",
        "of which the longer counts, reading",
        "there the curve bends",
        "To compute a sequence of 374 tokens again takes",
        "bandwidth_share",
    ):
        assert expected in words, expected


@pytest.mark.parametrize(
    ("model", "gpu", "context"),
    [("Llama-3-8B", "A100-80GB", "2048"), pytest.param("Llama-3.1-8B", "B200", "16384", marks=pytest.mark.slow)],
)
def test_a_narrow_window_cuts_no_number(
    model: str, gpu: str, context: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", "60")
    file = tmp_path / "assess.json"
    assert main(["assess", "--model", model, "--gpu", gpu, "--context", context, "--json", str(file)]) == 0
    plans = json.loads(file.read_text(encoding="utf-8"))["plans"]
    printed = capsys.readouterr().out
    assert "\N{HORIZONTAL ELLIPSIS}" not in printed
    rows = [line.split() for line in printed.splitlines()]
    for plan in plans:
        if not plan["sustained_rate"]:
            continue
        expected = [
            f"{plan['slots_each']:,.0f}",
            f"{plan['measured']['tokens_of_used']:.1%}",
            f"{plan['running']:,.1f}",
        ]
        assert any(expected == row[i : i + 3] for row in rows for i in range(len(row))), plan["name"]


def test_lengths_from_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "two.csv"
    trace.write_text("100,10\n200,30\n2000,49\n", encoding="utf-8")
    assert main(["assess", "--model", "OPT-13B", *GPU, "--trace", str(trace)]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "two.csv: 3 requests, mean 766.7 tokens in, 29.7 out, no times." in words
    assert "Cut at the context of 2,048: 1 output." in words
    assert main(["assess", "--model", "OPT-13B", *GPU, "--trace", "sharegpt", "--json", "-"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["requests"].startswith("sharegpt: 1,000 requests, ")
    assert "drawn: geometric lengths" in numbers["requests"]
    # The paper's Fig. 13 batches 7.00 with Orca (Max), 30.42 with vLLM; lengths that are drawn hold about as many.
    sequences = {plan["name"]: plan["running"] for plan in numbers["plans"]}
    assert sequences["standard max"] == pytest.approx(7)
    assert 27 <= sequences["paged 16"] <= 34


def test_json_alone_or_beside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["assess", "--model", "OPT-13B", *GPU, "--json", "-"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["model"]["kv_bytes_per_token"] == 819_200
    assert [plan["name"] for plan in numbers["plans"]][:3] == ["standard max", "standard pow2", "standard exact"]
    assert numbers["settings"]["vLLM"]["options"]["--max-model-len"] == "2048"
    file = tmp_path / "assess.json"
    assert main(["assess", "--model", "OPT-13B", *GPU, "--json", str(file)]) == 0
    assert json.loads(file.read_text()) == numbers
    assert "What limits it" in capsys.readouterr().out


def test_limits_bound_the_advice_and_give_goodput(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "LEAST_REQUESTS", 200)
    table = tmp_path / "a.csv"
    argv = ["assess", "--model", "OPT-13B", *GPU, "--trace", "sharegpt", "--requests", "100", "--tpot", "0.05"]
    assert main([*argv, "--json", "-", "--csv", str(table)]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert all(0 < plan["goodput"] <= plan["sustained_rate"] <= plan["roofline"] for plan in numbers["plans"])
    assert numbers["advised_tpot"] <= 0.05
    assert numbers["settings"]["vLLM"]["options"]["--max-num-seqs"] == str(numbers["advised"])
    assert table.read_text(encoding="utf-8").count("\n") == 5


@pytest.mark.parametrize(
    ("model", "slots"), [("tiny", ("512", "512", "256")), ("OPT-13B", ("2,048", "2,048", "1,024"))]
)
def test_the_default_lengths_show_what_each_reservation_rounds_up(
    model: str, slots: tuple[str, str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = "T4" if model == "tiny" else "A100-40GB"
    assert main(["assess", "--model", model, "--gpu", gpu, "--max-batch-seqs", "4"]) == 0
    shown = capsys.readouterr().out
    rows = {line[:15].strip(): line.split() for line in shown.splitlines() if line.startswith(" standard ")}
    assert tuple(rows[f"standard {reserve}"][2] for reserve in ("max", "pow2", "exact")) == slots
    advised = re.search(r"How many sequences: ([\d,]+)", shown)
    assert advised
    assert re.search(rf"^ {advised[1]} .*%", shown, re.MULTILINE)  # in the table, too


def test_what_holds_none_is_null_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "assess.json"
    argv = ["assess", "--model", "Llama-3.1-8B", "--gpu", "rtx 4090", "--max-model-len", "131072"]
    assert main([*argv, "--json", str(file)]) == 0
    assert json.loads(file.read_text(encoding="utf-8"))["gain"]["standard max"] is None
    assert "standard max holds none" in capsys.readouterr().out


@pytest.mark.slow
def test_the_embedded_model_and_quantization(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["assess", "--model", "tiny", *GPU, "--prompt", "10"]) == 0
    assert "x 32 bits =" in capsys.readouterr().out
    assert (
        main(["assess", "--model", "Llama-3-70B", *GPU, "--num-gpus", "2", "--weight-bits", "4", "--kv-bits", "8"]) == 0
    )
    printed = capsys.readouterr().out
    assert "x 1 byte =" in printed
    assert "2 GPUs share each layer; their sums travel at 300 GB/s" in " ".join(printed.split())


def test_the_lists_name_all(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["assess", "--list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in MODELS)
    assert "MI300X" in printed
    assert "\N{HORIZONTAL ELLIPSIS}" not in printed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "nowhere"], "model is 'nowhere'; a Hugging Face directory or one of tiny, OPT-13B"),
        (["--gpu", "A100"], "gpu is 'A100'; known are auto, A100-40GB"),
        (["--context", "9000"], "--context is 9000; 2 to Llama-3-8B's context of 8192"),
        (["--context", "200", "--max-model-len", "100"], "--context is 200; 2 to --max-model-len of 100"),
        (["--max-model-len", "9000"], "--max-model-len is 9000; 2 to the 8192"),
        (["--prompt", "2048"], "--prompt is 2048; 1 to 999 tokens of a context of 1000"),
        (["--prompt", "0"], "--prompt is 0; 1 to 999"),
        (["--num-gpus", "3"], "--num-gpus is 3; a divisor of the 32 heads"),
        (["--num-gpus", "0"], "--num-gpus is 0; a divisor"),
        (["--kv-bits", "8", "--kv-bytes-per-token", "9"], "--kv-bits is 8; --kv-bytes-per-token 9 says the size"),
        (["--model", ""], "model is ''; a Hugging Face directory or one of tiny, OPT-13B"),
        (["--model", "Llama-3-70B"], "131.4 GiB of weights; A100-80GB has 72.0 GiB for them"),
        (["--trace", "nowhere.csv"], "trace nowhere.csv cannot be read: No such file"),
        (["--trace", "sharegpt", "--context", "5"], "--context is 5; --trace sharegpt says the lengths"),
        (["--json", "no/such/place.json"], "--json no/such/place.json cannot be written"),
    ],
)
def test_bad_input_is_one_sentence(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["assess", "--gpu", "A100-80GB", *argv]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


@pytest.mark.skipif(on_gpu, reason="a GPU is in use")
def test_without_a_gpu_one_is_assumed_and_auto_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["assess"]) == 0
    assert "on A100-80GB" in capsys.readouterr().out
    assert main(["assess", "--gpu", "auto"]) == 2
    assert "gpu is 'auto'" in capsys.readouterr().err
