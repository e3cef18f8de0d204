"""The project on the stand-in: each capability once, and whole programs. What runs there has a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from paged_ref.lesson import lesson_script
from strict_gpu import flows, mutants

ROOT = Path(__file__).resolve().parents[2]
FLOWS = flows.QUICK | flows.SLOW
# Left out are lessons 6, 8, 9 and 10, which ask nothing of the GPU (numbers of blocks, and NumPy arrays in the tracer),
# and lesson 17, which simulates: what its engine does is in the flow `every_manager`.
ELSEWHERE = ("06", "08", "09", "10", "17")
LESSONS = [path.stem for path in lesson_script.find(ROOT / "lessons") if path.stem[:2] not in ELSEWHERE]
GPU_TESTS = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "tests").rglob("test_*.py")
    if re.search(r"mark\.gpu|of_models", path.read_text(encoding="utf-8")) and path.parent.name != "strict_gpu"
)


def run(*argv: str, **environment: str) -> str:
    """What a Python program prints; its errors where it fails."""
    paths = os.pathsep.join((str(ROOT / "src"), str(ROOT / "tests")))
    child = {**os.environ, "PYTHONPATH": paths, "PAGED_REF_DEVICE": "auto", "OPENBLAS_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, *argv], cwd=ROOT, env=child, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


@cache
def on_the_stand_in(*names: str) -> dict[str, Any]:
    """The results of these flows, by name, from one process."""
    lines = run("-m", "strict_gpu", "tests/strict_gpu/flows.py", *names).splitlines()
    return {said["flow"]: said["result"] for said in map(json.loads, lines)}


@pytest.mark.parametrize("name", [*flows.QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in flows.SLOW)])
def test_a_flow_gives_the_same_on_the_stand_in(name: str) -> None:
    found = on_the_stand_in(*(flows.QUICK if name in flows.QUICK else [name]))
    assert found[name] == json.loads(json.dumps(FLOWS[name]()))


@pytest.mark.compare
def test_models_of_transformers_run_on_the_stand_in() -> None:
    pytest.importorskip("torch", reason="the extra `compare` (torch, transformers) is not installed")
    *_, line = run("-m", "strict_gpu", "tests/strict_gpu/hugging_face.py").splitlines()
    said = json.loads(line)
    assert said["arrays"] == ["strict_gpu"]
    assert len(said["same"]) == 5
    assert all(said["same"].values()), said


def test_an_ordering_that_is_missing_is_seen() -> None:
    """Each mutant takes one away, and the stand-in says so."""
    said: dict[str, Any] = json.loads(run("-m", "strict_gpu", "tests/strict_gpu/mutants.py"))
    assert list(said) == list(mutants.MUTANTS)
    for name, words in said.items():
        assert "nothing orders it after" in words, f"not seen: {name}"
        assert words.startswith("the host at ") == name.startswith("the host "), words


def test_the_command_line() -> None:
    prompt = ("--prompt", "Four score and seven years ago our", "--max-tokens", "3")
    assert "fathers brought forth" in run("-m", "strict_gpu", "-m", "paged_ref", "generate", *prompt)


@pytest.mark.slow
def test_the_demo() -> None:
    out = run("-m", "strict_gpu", "-m", "paged_ref", "demo")
    assert "identical (844 new tokens)" in out
    assert "Stand-in for an H200" in out


@pytest.mark.slow
@pytest.mark.parametrize("lesson", LESSONS)
def test_a_lesson(lesson: str) -> None:
    """Its run with the solutions: every check passes, and every planted bug is caught."""
    test = "tests/lessons/test_lessons.py::test_with_solutions_every_check_passes"
    out = run("-m", "pytest", "-p", "no:cacheprovider", "-p", "strict_gpu.plugin", f"{test}[{lesson}]")
    assert "1 passed" in out


@pytest.mark.slow
@pytest.mark.parametrize("file", GPU_TESTS)
def test_the_tests_for_a_gpu(file: str) -> None:
    out = run("-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "strict_gpu.plugin", "-m", "gpu", file)
    assert " passed" in out or " skipped" in out


@pytest.mark.slow
@pytest.mark.parametrize("test", ["a_nan_in_a_visible_slot", "nothing_but_out_is_written", "oracle and default"])
def test_attention_by_the_kernels_own_code(test: str) -> None:
    """In the tracer, not by their meaning."""
    argv = ("-p", "no:cacheprovider", "-p", "strict_gpu.plugin", "-m", "gpu", "-k", test)
    out = run("-m", "pytest", *argv, "tests/properties/test_attention.py", STRICT_GPU_KERNELS="trace")
    assert "2 passed" in out


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_model_by_the_kernels_own_code(dtype: str) -> None:
    code = (
        "import strict_gpu; strict_gpu.install()\n"
        "from paged_ref import LLM, SamplingParams\n"
        f"llm = LLM('tiny', dtype='{dtype}', backend='cuda', block_size=4, kv_cache_tokens=64)\n"
        "print(llm.generate('Four score and seven', SamplingParams(max_tokens=1))[0].outputs[0].text)"
    )
    assert run("-c", code, STRICT_GPU_KERNELS="trace").strip() == "years"
