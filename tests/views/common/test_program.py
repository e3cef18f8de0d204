"""The program's name in printed advice: what the reader can type here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from paged_ref.views.common.program import program


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with .venv/bin/paged-ref, in which the reader is."""
    script = tmp_path / ".venv" / "bin" / "paged-ref"
    script.parent.mkdir(parents=True)
    script.touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "executable", str(script.with_name("python")))
    monkeypatch.setattr(sys, "argv", [".venv/bin/paged-ref", "demo"])
    return script


@pytest.mark.usefixtures("script")
def test_a_script_off_the_path_is_named_from_here() -> None:
    assert program() == ".venv/bin/paged-ref"


def test_a_script_on_the_path_is_named_alone(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(script.parent))
    assert program() == "paged-ref"


def test_another_installation_on_the_path_is_not_meant(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = script.parents[2] / "other" / "paged-ref"
    other.parent.mkdir()
    other.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(other.parent))
    assert program() == ".venv/bin/paged-ref"


def test_from_elsewhere_the_whole_path_is_named(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), "demo"])
    monkeypatch.chdir("/usr")
    assert program() == str(script)


def test_beside_the_script_its_name_says_that_it_is_here(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(script.parent)
    monkeypatch.setattr(sys, "argv", ["./paged-ref", "demo"])
    assert program() == "./paged-ref"


@pytest.mark.usefixtures("script")
def test_a_module_is_started_as_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/paged_ref/__main__.py", "demo"])
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-m", "paged_ref", "demo"])
    assert program() == "python3 -m paged_ref"


def test_without_a_script_the_module_is_started(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script.unlink()
    monkeypatch.setattr(sys, "argv", ["lessons/05_block_table.py"])
    monkeypatch.setattr(sys, "orig_argv", [str(script.with_name("python")), "lessons/05_block_table.py"])
    assert program() == ".venv/bin/python -m paged_ref"
