"""Sizes that this machine has no memory for: one sentence with the number and the bound, before any memory is taken."""

from __future__ import annotations

import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from paged_ref import LLM, SamplingParams
from paged_ref.cli import main
from paged_ref.extras import memory_limit
from paged_ref.extras.managers import make_manager

HERE = "this machine has 16.0 GB"
KV = "a KV cache of this size, with the weights, needs"
LIMIT = 16 << 20  # bytes that a refusal may take: a model's description, modules that are imported


@pytest.fixture(autouse=True)
def memory_of_16_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_limit, "machine_memory", lambda: 16_000_000_000)
    monkeypatch.setattr(memory_limit, "gpu_memory", lambda: 16_000_000_000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_tokens": 9999999999}, f"kv_cache_tokens is 9999999999: {KV} 25,600.0 GB; {HERE}"),
        ({"kv_cache_tokens": 10000000}, f"kv_cache_tokens is 10000000: {KV} 25.6 GB; {HERE}"),
        ({"kv_cache_bytes": 10**11}, f"kv_cache_bytes is 100000000000: a KV cache of this size needs 100.0 GB; {HERE}"),
        ({"kv_cache_tokens": 10**11, "kv_dtype": "int8"}, f"kv_cache_tokens is 100000000000: {KV} 64,000.0 GB"),
        ({"kv_cache_tokens": 10**11, "manager": "standard"}, f"kv_cache_tokens is 100000000000: {KV}"),
        ({"kv_cache_tokens": 10**11, "manager": "swapping"}, f"kv_cache_tokens is 100000000000: {KV}"),
        (
            {"kv_cache_tokens": 4 * 10**6, "manager": "swapping"},
            "host_kv_tokens is 4000000: a pool of this size on the host, with all the rest, needs 20.5 GB",
        ),
        (
            {"host_kv_tokens": 9999999999},
            "host_kv_tokens is 9999999999: a pool of this size on the host, with all the rest, needs 25,600.0 GB",
        ),
        ({"device_blocks": 99999999999}, f"device_blocks is 99999999999, in blocks of 16 tokens: {KV} 4,096,000.0 GB"),
        ({"device_blocks": 9, "host_blocks": 10**11}, "host_blocks is 100000000000, in blocks of 16 tokens: a pool of"),
    ],
)
def test_the_llm_refuses(options: dict[str, Any], message: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=re.escape(message)):
            LLM("tiny", **options)
        assert tracemalloc.get_traced_memory()[1] < LIMIT
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("manager", ["paged", "standard"])
def test_a_request_of_too_many_samples_is_refused(manager: Any) -> None:
    llm = LLM("tiny", manager=manager, backend="reference")
    paged = "a request of 10000000 sequences; at most max_batch_seqs = 256 can run"
    message = paged if manager == "paged" else f"a request of 10000000 sequences needs 163.8 GB; {HERE}"
    with pytest.raises(ValueError, match=f"^{message}$"):
        llm.generate("Once", SamplingParams(n=10000000, temperature=1.0))
    if manager == "paged":
        with pytest.raises(ValueError, match=f"^{paged}$"):
            llm.generate("Once", SamplingParams(beam_width=10000000))
    assert not llm.has_unfinished


def test_a_manager_alone_is_refused_too() -> None:
    with pytest.raises(ValueError, match=f"in blocks of 1: its list needs 6,400.0 GB; {HERE}"):
        make_manager("paged", 10**11, max_model_len=512, block_size=1)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "--prompt", "a", "--n", "10000000"], "a request of 10000000 sequences; at most max_batch_seqs ="),
        (["generate", "--prompt", "a", "--kv-tokens", "9999999999"], f"--kv-tokens is 9999999999: {KV} 25,600.0"),
        (
            ["generate", "--prompt", "a", "--kv-tokens", "10000000"],
            f"--kv-tokens is 10000000: {KV} 25.6 GB; {HERE}",
        ),
        (["generate", "--prompt", "a", "--kv-tokens", "99999999999999"], f"--kv-tokens is 99999999999999: {KV}"),
        (["generate", "--prompt", "a", "--host-kv-tokens", "9999999999"], "--host-kv-tokens is 9999999999: a pool of"),
        (["demo", "--kv-tokens", "99999999999999"], f"--kv-tokens is 99999999999999: {KV}"),
        (["viz", "--blocks", "99999999999"], f"blocks is 99999999999, in blocks of 4 tokens: {KV} 1,024,000.0 GB"),
        (["viz", "--max-tokens", "99999999999999999"], f"--max-tokens is 99999999999999999: {KV} 256,000,000,000.0 GB"),
        (["viz", "--n", "99999999999"], f"n is 99999999999: {KV} 256,000.0 GB"),
        (
            ["viz", "--host-blocks", "99999999999"],
            "--host-blocks is 99999999999, in blocks of 4 tokens: a pool of this",
        ),
        (["long", "--tokens", "99999999999"], f"--tokens is 99999999999: {KV} 256,000.0 GB; {HERE}"),
        (["long", "--new-tokens", "99999999999"], f"--new-tokens is 99999999999: {KV} 256,000.0 GB; {HERE}"),
        (["long", "--device-blocks", "99999999999"], f"--device-blocks is 99999999999, in blocks of 16 tokens: {KV}"),
        (["long", "--host-blocks", "99999999999"], "--host-blocks is 99999999999, in blocks of 16 tokens: a pool of"),
        (
            ["compare", "--trace", "sharegpt", "--requests", "99999999999"],
            "requests is 99999999999: a trace",
        ),
        (
            ["compare", "--kv-tokens", "99999999999", "--trace", "sharegpt", "--requests", "9"],
            "of 8: its list",
        ),
        (
            ["bench", "engine", "--batch", "99999999999"],
            "--batch is 99999999999 and --prompt-tokens 32: a batch",
        ),
        (
            ["bench", "training", "--length", "99999999999"],
            "--sequences is 4 and --length 99999999999: what",
        ),
        (["bench", "memory", "--prompt-tokens", "99999999999"], "--prompt-tokens holds 99999999999: a list"),
        (
            ["bench", "memory", "--pools", "99999999999"],
            "--pools holds 99999999999: a list of so many needs 6,400.0 GB",
        ),
        (
            ["bench", "long", "--tokens", "99999999999"],
            "--tokens is 99999999999: a layer's keys",
        ),
        (
            ["bench", "simulate", "--requests", "99999999999"],
            "requests is 99999999999: a trace of so many ",
        ),
    ],
)
def test_the_commands_refuse(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("paged-ref: error: ")
    assert error.count("\n") == 1
