"""The suite where little is installed: what a file needs and is not there is named, and nothing else stops."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Missing())
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""
TESTS = Path(__file__).resolve().parent


def run(names: set[str], *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT.format(names=names), "-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
    return subprocess.run([*command, "-rs", *args], capture_output=True, text=True, cwd=TESTS.parent)


def test_a_file_that_needs_a_missing_package_is_skipped_with_the_reason() -> None:
    files = [str(TESTS / "extras" / "test_formats.py"), str(TESTS / "core" / "memory" / "test_block_pool.py")]
    done = run({"hypothesis", "_hypothesis_pytestplugin", "msgspec"}, *files)
    assert done.returncode == 0, done.stdout
    assert "test_formats.py:0: it needs the package hypothesis" in done.stdout
    assert "passed" in done.stdout


def test_a_package_that_every_machine_has_is_an_error() -> None:
    done = run({"safetensors"}, str(TESTS / "core" / "model" / "test_loading.py"))
    assert done.returncode == 2
    assert "No module named 'safetensors'" in done.stdout


def test_each_test_is_a_line_as_soon_as_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "tests.jsonl"
    done = run(set(), "--lines", str(path), str(TESTS / "core" / "attention" / "test_addressing.py"))
    assert done.returncode == 0, done.stdout
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines
    assert {line["outcome"] for line in lines} == {"passed"}
    assert lines[0]["test"].startswith("tests/core/attention/test_addressing.py::")


def test_the_model_runs_without_what_only_the_terminal_and_the_logs_need() -> None:
    names = {"greenlet", "hypothesis", "msgspec", "prometheus_client", "prompt_toolkit", "pyte", "threadpoolctl"}
    code = WITHOUT.format(names=names).rsplit("import pytest", 1)[0] + (
        "from paged_ref import LLM, SamplingParams\n"
        "for options in {}, {'device_blocks': 40, 'host_blocks': 8}:\n"
        "    (output,) = LLM('tiny', **options).generate('Four score and seven', SamplingParams(max_tokens=2))\n"
        "    print(output.outputs[0].text)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == " years ago\n" * 2, done.stderr
