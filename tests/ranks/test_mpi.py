"""Ranks that are processes: `paged-ref generate --tensor-parallel`, and what happens when one of them ends."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from paged_ref import LLM, SamplingParams
from paged_ref.commands import ranks as starting
from paged_ref.commands.rank_guard import GUARDED
from paged_ref.commands.ranks import LAUNCHER
from paged_ref.distributed.plan import plan_bytes

FOUND = Path(sys.executable).with_name(LAUNCHER).is_file() or shutil.which(LAUNCHER) is not None
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None or not FOUND, reason="the extra `distributed` is not installed"
)
ROOT = Path(__file__).resolve().parents[2]
BASE = ["generate", "--prompt", "Once upon a time", "--prompt", "The little girl", "--ignore-eos", "--max-tokens", "12"]
SETTINGS = {
    "paged": [],
    "standard": ["--manager", "standard", "--kv-tokens", "96"],
    "swapping": ["--manager", "swapping", "--kv-tokens", "24"],
    "swap": ["--block-size", "4", "--kv-tokens", "32", "--preemption", "swap"],
    "prefix cache": ["--prefix-cache", "--block-size", "4", "--prompt", "Once upon a time there was"],
    "fork": ["--n", "3", "--temperature", "0.9", "--seed", "3", "--block-size", "4"],
    "beams": ["--beam-width", "3", "--block-size", "4"],
    "sanitize": ["--sanitize", "--block-size", "4"],
}


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OPENBLAS_NUM_THREADS": "1"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "paged_ref", *arguments]


def printed(*arguments: str, before: tuple[str, ...] = ()) -> dict[str, Any]:
    """What `generate --json -` prints."""
    words = [*before, *command(*arguments, "--json", "-", "--backend", "reference")]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def started(*arguments: str, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """A run of many tokens on ranks, after its first word. It gets no Ctrl-C but its own."""
    words = ["generate", "--prompt", "Once", "--max-tokens", "480", "--ignore-eos", "--backend", "reference"]
    pipe = subprocess.PIPE
    run = subprocess.Popen(
        [*before, *command(*words, *arguments)], stdout=pipe, stderr=pipe, text=True, env=environment(),
        start_new_session=True,
    )  # fmt: skip
    assert run.stdout is not None
    assert run.stdout.read(5)
    return run


def ranks_of(run: subprocess.Popen[str]) -> dict[int, int]:
    """The processes that this run has started, by rank: rank -> process."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, todo = {}, [run.pid]
    while todo:
        pid = todo.pop()
        todo += children.get(pid, [])
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        for variable in variables:
            if variable.startswith(b"PMI_RANK="):
                found[int(variable[9:])] = pid
    return found


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_two_ranks_give_the_tokens_of_one_process_and_say_what_they_sent() -> None:
    found = printed(*BASE, "--tensor-parallel", "2")
    llm = LLM("tiny", backend="reference")
    expected = llm.generate(["Once upon a time", "The little girl"], SamplingParams(max_tokens=12, ignore_eos=True))
    assert [o["samples"][0]["token_ids"] for o in found["outputs"]] == [o.outputs[0].token_ids for o in expected]
    assert [o["samples"][0]["text"] for o in found["outputs"]] == [o.outputs[0].text for o in expected]
    lengths = [len(output.prompt_token_ids) for output in expected]
    plans = [(sum(lengths) if step == 0 else 2, -(-(max(lengths) + step) // 16)) for step in range(12)]
    num_tokens = sum(tokens for tokens, _ in plans)
    assert found["ranks"] == 2
    assert found["bytes_said"] == {
        "broadcast": sum(plan_bytes(tokens, 2, 2, columns, 0) for tokens, columns in plans),
        "reduced": 2 * llm.config.num_layers * num_tokens * llm.config.hidden_size * 4,
        "gathered": 12 * 2 * llm.config.vocab_size * 4,
    }
    assert 0 < found["seconds_in_communication"] < sum(found["steps"])


def test_ranks_that_are_silent_at_first_are_explained_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(starting, "TO_WONDER", 0.01)
    words = "import time; print('Once', end='', flush=True); time.sleep(0.06); print(' upon')"
    with subprocess.Popen([sys.executable, "-ISc", words], stdout=subprocess.PIPE) as run:
        starting._show(run, [], [])
    shown = capsys.readouterr()
    assert shown.out == "Once upon\n"
    assert shown.err == "\npaged-ref: the ranks compile, as they do in their first run, or load the model\n"


@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")
@pytest.mark.parametrize("killed", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_rank_that_is_killed_ends_the_run_with_a_sentence_on_every_other_rank(killed: int) -> None:
    run = started("--tensor-parallel", "4" if killed == 0 else "2")
    ranks = ranks_of(run)
    os.kill(ranks[killed], signal.SIGKILL)
    _, said = run.communicate(timeout=120)
    assert run.returncode == 1
    sentence = f"rank {killed} has ended in the middle of the run"
    assert sorted(said.split("\n")[:-1]) == [f"paged-ref: rank {r}: {sentence}" for r in sorted(ranks) if r != killed]
    gone(ranks)


def is_guarded(pid: int) -> bool:
    """A rank that its guard has started, and not the guard."""
    return f"{GUARDED}=1".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")
def test_a_rank_that_is_killed_before_the_run_begins() -> None:
    run = subprocess.Popen(
        command(*BASE, "--tensor-parallel", "2"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(), start_new_session=True,
    )  # fmt: skip
    while len(ranks := ranks_of(run)) < 2 or not all(map(is_guarded, ranks.values())):
        time.sleep(0.01)
    os.kill(ranks[1], signal.SIGKILL)
    out, said = run.communicate(timeout=120)
    assert run.returncode == 1
    assert out == ""
    assert said == "paged-ref: a rank has ended, and 1 that did not notice were ended\n"
    gone(ranks)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")
def test_no_rank_outlives_the_process_that_waits() -> None:
    run = started("--tensor-parallel", "2")
    ranks = ranks_of(run)
    run.kill()
    run.communicate(timeout=120)
    gone(ranks)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")
def test_a_guard_that_is_killed_ends_the_run_with_a_sentence() -> None:
    run = started("--tensor-parallel", "2")
    ranks = ranks_of(run)
    guard = int(Path(f"/proc/{ranks[1]}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(guard, signal.SIGKILL)
    _, said = run.communicate(timeout=120)
    assert run.returncode == 1
    assert said.startswith("paged-ref: ")  # a rank, or where none has noticed, the process that waits
    assert said.endswith(" has ended in the middle of the run\n")
    gone(ranks)


def gone(ranks: dict[int, int]) -> None:
    """No rank is left, a moment later."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and any(map(is_there, ranks.values())):
        time.sleep(0.02)
    assert not any(map(is_there, ranks.values()))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")
def test_ctrl_c_ends_all_ranks() -> None:
    run = started("--tensor-parallel", "4")
    ranks = ranks_of(run)
    run.send_signal(signal.SIGINT)
    out, said = run.communicate(timeout=120)
    assert "mpiexec" not in out
    assert run.returncode == 130
    assert said.count("interrupted") == 5, said
    gone(ranks)


@pytest.mark.slow
def test_three_ranks_for_four_heads_are_refused() -> None:
    done = subprocess.run(command(*BASE, "--tensor-parallel", "3"), capture_output=True, text=True, env=environment())
    assert done.returncode == 2
    said = "paged-ref: error: 3 ranks cannot share 4 heads and 2 KV heads; 1, 2, 4 can\n"
    assert done.stderr == said
    assert done.stdout == ""


@pytest.mark.slow
def test_a_rank_of_the_users_own_mpiexec() -> None:
    launcher = str(Path(sys.executable).with_name(LAUNCHER))
    alone, found = printed(*BASE), printed(*BASE, before=(launcher, "-n", "2"))
    assert found["outputs"] == alone["outputs"]
    words = [launcher, "-n", "2", *command(*BASE, "--tensor-parallel", "4")]
    done = subprocess.run(words, capture_output=True, text=True, env=environment())
    assert done.returncode == 2
    assert "error: --tensor-parallel is 4; mpiexec has started 2 ranks" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")
def test_a_killed_rank_of_the_users_own_mpiexec() -> None:
    run = started(before=(str(Path(sys.executable).with_name(LAUNCHER)), "-n", "4"))
    ranks = ranks_of(run)
    os.kill(ranks[2], signal.SIGKILL)
    _, said = run.communicate(timeout=120)
    assert run.returncode != 0  # what the launcher makes of a rank that ended badly
    for rank in (0, 1, 3):
        assert f"paged-ref: rank {rank}: rank 2 has ended in the middle of the run\n" in said
    gone(ranks)


@pytest.mark.slow
def test_a_prompt_of_standard_input_reaches_rank_0() -> None:
    words = command("generate", "--prompt", "-", "--prompt", ":", "--max-tokens", "3", "--tensor-parallel", "2")
    done = subprocess.run(words, input="Once upon", capture_output=True, text=True, env=environment())
    assert done.stdout.startswith("--- prompt 1\nOnce upon a time"), done.stderr
    assert "\n--- prompt 2\n:" in done.stdout  # a colon alone is for the launcher the end of a command


@pytest.mark.slow
@pytest.mark.parametrize(
    ("output", "status", "said"),
    [("| head -c 1", 0, ""), ("> /dev/full", 2, "paged-ref: error: standard output: No space left on device\n")],
)
def test_an_output_that_fails_is_that_of_one_process(output: str, status: int, said: str) -> None:
    words = f"set -o pipefail; {shlex.join(command(*BASE, '--tensor-parallel', '2'))} {output}"
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, env=environment())
    assert done.returncode == status
    assert done.stderr == said


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("model", ["tiny", "stories260k"])
def test_ranks_give_the_tokens_of_one_process(name: str, model: str, request: pytest.FixtureRequest) -> None:
    directory = model if model == "tiny" else str(request.getfixturevalue("stories260k"))
    arguments = [*BASE, *SETTINGS[name], "--model", directory]
    alone = printed(*arguments)["outputs"]
    scores = scores_taken_from(alone)
    for size in ("2", "4"):
        found = printed(*arguments, "--tensor-parallel", size)["outputs"]
        found_scores = scores_taken_from(found)
        if name == "beams":
            assert found_scores == pytest.approx(scores, abs=1e-4)  # sums are split
        assert found == alone, size


def scores_taken_from(outputs: list[dict[str, Any]]) -> list[float]:
    return [sample.pop("score") for output in outputs for sample in output["samples"]]
