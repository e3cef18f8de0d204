"""The README tells the truth: its Python runs, its commands exist, and its pasted output comes out again."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from paged_ref.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"), ids=["engine", "kernels"])
def test_its_python_runs_and_prints_what_it_says(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for said in re.findall(r'print\(.*\)\s+# "(.*)"', code):
        assert done.stdout == f"{said}\n"


def test_its_demo_output_comes_out_again() -> None:
    (pasted,) = [block for block in blocks("") if "Token ids of the two runs" in block]
    command = [sys.executable, "-m", "paged_ref", "demo"]
    environment = {**os.environ, "COLUMNS": "80", "PAGED_REF_DEVICE": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    printed = {line.rstrip() for line in done.stdout.splitlines()}
    for line in pasted.splitlines():
        timing = "tokens per second" in line or "time to first token" in line or not line.strip(" ─")
        # The table is as wide as its timings, so only the words of a line count, not the space between them.
        assert timing or line.split() in [other.split() for other in printed], line


def test_its_commands_exist() -> None:
    named = set(re.findall(r"^paged-ref (\w+)", "\n".join(blocks("")), re.MULTILINE))
    assert named
    assert named <= set(COMMANDS)


def test_its_debugger_stops_in_each_step() -> None:
    (printed,) = [block for block in blocks("") if "pdb" in block]
    program, *arguments = shlex.split(printed.replace("\\\n", ""))
    assert program == ".venv/bin/python"  # made by `make demo`
    environment = {**os.environ, "PAGED_REF_DEVICE": "cpu"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, input="c\nc\nc\nq\n", capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert len(re.findall(r"core/engine/engine\.py\(\d+\)step\(\)", done.stdout)) == 3, done.stdout + done.stderr
    assert " years ago our\n" in done.stdout


def test_it_is_short() -> None:
    assert len(README.splitlines()) < 150
