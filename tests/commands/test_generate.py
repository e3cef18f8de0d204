"""`paged-ref generate`: `--json`, `--replicas`, and what it says where ranks cannot start."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from paged_ref import LLM, SamplingParams, cli
from paged_ref.commands import generate, rank_guard, ranks
from paged_ref.commands.rank_guard import GUARDED

ROOT = Path(__file__).resolve().parents[2]
BASE = ["generate", "--max-tokens", "6", "--backend", "reference"]
PROMPTS = ["Once upon a time", "The little dog", "A girl"]


def started(*arguments: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "paged_ref", *arguments]
    pipe = subprocess.PIPE
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True)


def prompt_options() -> list[str]:
    return [word for prompt in PROMPTS for word in ("--prompt", prompt)]


def test_json_has_what_generate_returns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = LLM("tiny", backend="reference").generate(PROMPTS, SamplingParams(max_tokens=6))
    assert cli.main([*BASE, *prompt_options(), "--json", str(tmp_path / "out.json")]) == 0
    assert "Once upon a time" in capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())
    assert cli.main([*BASE, *prompt_options(), "--json", "-"]) == 0
    printed = json.loads(capsys.readouterr().out)  # nothing else is printed
    for run in (found, printed):
        assert run["ranks"] == 1
        assert run["model"] == "tiny"
        assert len(run["steps"]) == 6
        for got, output in zip(run["outputs"], expected, strict=True):
            assert got["prompt"] == output.prompt
            assert got["prompt_token_ids"] == output.prompt_token_ids
            assert got["samples"][0]["token_ids"] == output.outputs[0].token_ids
            assert got["samples"][0]["text"] == output.outputs[0].text
            assert got["samples"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--replicas", "1", "--tensor-parallel", "2"], "--replicas is 1; --tensor-parallel does not go with it"),
        (["--replicas", "1", "--record", "/dev/null"], "--replicas is 1; --record does not go with it"),
        (["--replicas", "1", "--chat"], "--replicas is 1; --chat does not go with it"),
        (["--replicas", "1", "--logprobs", "0"], "--replicas is 1; --logprobs does not go with it"),
        (["--replicas", "1000"], "--replicas is 1000; each needs a prompt, and there are 1"),
        (["--replicas", "0"], "--replicas is 0; at least 1 is needed"),
        (["--tensor-parallel", "0"], "--tensor-parallel is 0; at least 1 is needed"),
        (["--tensor-parallel", "1000"], "1000 ranks cannot share 4 heads and 2 KV heads; 1, 2, 4 can"),
    ],
)
def test_what_is_refused_before_a_process_starts(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "start", None)
    monkeypatch.setattr(generate, "run_replicas", None)
    assert cli.main([*BASE, "--prompt", "a", *arguments]) == 2
    assert capsys.readouterr().err == f"paged-ref: error: {said}\n"


def test_without_the_launcher(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ranks, "LAUNCHER", "no-launcher")
    assert cli.main([*BASE, "--prompt", "a", "--tensor-parallel", "2"]) == 2
    said = "no-launcher was not found, which starts ranks; the extra `distributed` brings it"
    assert capsys.readouterr().err == f"paged-ref: error: {said}\n"


def test_where_standard_output_fails_the_ranks_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    error = OSError(28, "No space left on device")

    class Full:
        def write(self, text: str) -> int:
            raise error

    ours, guards = socket.socketpair()
    failed: list[OSError] = []
    words = [sys.executable, "-S", "-c", "print('a')"]
    monkeypatch.setattr(sys, "stdout", Full())
    with ours, guards, subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        ranks._show(process, [ours], failed)
        assert guards.recv(9) == rank_guard.KILL
    assert failed == [error]


def test_without_mpi4py(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setenv(GUARDED, "1")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.delitem(sys.modules, "paged_ref.distributed.mpi", raising=False)
    assert cli.main([*BASE, "--prompt", "a"]) == 2
    said = "paged-ref: error: ranks need the extra `distributed`, which brings mpi4py and mpich: "
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.slow
def test_replicas_share_the_queue_and_give_the_same_outputs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*BASE, *prompt_options(), "--json", "-"]) == 0
    alone = json.loads(capsys.readouterr().out)
    out, error = started(*BASE, *prompt_options(), "--replicas", "2", "--json", "-").communicate(timeout=120)
    assert not error
    found: dict[str, Any] = json.loads(out)
    assert found["outputs"] == alone["outputs"]
    assert sum(found["replicas"]) == len(PROMPTS)
    assert min(found["replicas"]) >= 1


@pytest.mark.slow
def test_an_error_of_a_replica_is_one_sentence() -> None:
    run = started(*BASE, "--prompt", "a", "--prompt", "b", "--model", "/nowhere", "--replicas", "2")
    _, error = run.communicate(timeout=120)
    assert run.returncode == 2
    assert error == "paged-ref: error: /nowhere is not a directory; a checkpoint in Hugging Face form is needed\n"


def test_what_replicas_generated_is_shown_with_its_log_probabilities(capsys: pytest.CaptureFixture[str]) -> None:
    llm = LLM("tiny", backend="reference")
    generate._show(llm.generate("The cat", SamplingParams(max_tokens=1, logprobs=1)))
    text, token = capsys.readouterr().out.splitlines()
    assert text == "The cat was"
    assert token.startswith("·was -1.142 ")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the replicas in /proc")
@pytest.mark.parametrize("whom", ["replica", "Ctrl-C"])
def test_a_replica_that_is_killed_ends_the_run(whom: str) -> None:
    words = ["--max-tokens", "490", "--ignore-eos", "--n", "8", "--temperature", "1"]
    run = started("generate", *prompt_options(), *words, "--backend", "reference", "--replicas", "2")
    while len(found := replicas_of(run.pid)) < 2:
        time.sleep(0.05)
    time.sleep(1)
    if whom == "replica":
        os.kill(found[0], signal.SIGKILL)
    else:
        run.send_signal(signal.SIGINT)
    _, error = run.communicate(timeout=300)
    sentence = "a replica has ended in the middle of the run" if whom == "replica" else "interrupted"
    assert error == f"paged-ref: {sentence}\n"
    assert run.returncode == (1 if whom == "replica" else 130)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in found) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in found)


def replicas_of(pid: int) -> list[int]:
    """Its children that spawn has made."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and b"spawn_main" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except OSError:
            continue
    return found
