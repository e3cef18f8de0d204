"""The wheel: what is in it, and that it works where the checkout is not."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_wheel_works_without_the_checkout(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    built = subprocess.run(build, capture_output=True, text=True, timeout=300)
    if "No matching distribution found for hatchling" in built.stderr:
        pytest.skip("pip cannot get hatchling, which builds the wheel")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("paged_ref-*.whl")
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    source = ROOT / "src" / "paged_ref"
    files = {
        path.relative_to(source) for path in source.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    assert {path for path in files if not (installed / "paged_ref" / path).exists()} == set()

    def run(*argv: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(installed), "PAGED_REF_DEVICE": "cpu"}
        command = [sys.executable, "-m", "paged_ref", *argv]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("generate", "--prompt", "Four score", "--max-tokens", "3") == "Four score and seven years\n"
    assert "To edit them:" in run("lesson")
    assert "paged manager, tiny" in run("viz", "--print", "--size", "100x30")
    run("lesson", "--copy", "lessons")
    assert "To edit them:" not in run("lesson")
    assert "Lesson 5: the block table" in run("lesson", "5", "--solutions")
