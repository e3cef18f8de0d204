"""paged_ref in Jupyter: what objects show, the command of a cell, and the notebook of the lessons, executed."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from paged_ref import LLM, SamplingParams, notebook
from paged_ref.core.memory.block_pool import BlockPool
from paged_ref.core.memory.paged import PagedManager

NOTEBOOK = Path(__file__).resolve().parents[1] / "lessons" / "first_fifteen_minutes.ipynb"
PROMPT = "Four score and seven years ago our"


def test_a_run_and_an_llm_show_themselves() -> None:
    events: list[Any] = []
    llm = LLM("tiny", block_size=4, kv_cache_tokens=64, log=events.append)
    (output,) = llm.generate(PROMPT, SamplingParams(max_tokens=3))
    output.prompt = "<script>\x1b[2J"
    shown = notebook.output_html(output)
    assert "&lt;script&gt;" in shown
    assert "<script>" not in shown
    assert "\x1b" not in shown
    assert "fathers brought forth</td><td" in shown
    llm.add_request(PROMPT, SamplingParams(max_tokens=3))
    llm.step()
    assert "0 waiting, 1 running" in notebook.llm_html(llm)
    assert "0→0&ensp; 1→1" in notebook.llm_html(llm)
    page = notebook.show(events, at=2)._repr_html_()
    assert "show(events, at=2, frame=1)" in page
    assert page.startswith('<iframe title="paged_ref"')
    with pytest.raises(ValueError, match=r"at is 0; 1 to \d+ is needed"):
        notebook.show(events, at=0)
    with pytest.raises(ValueError, match="events has no run"):
        notebook.show([])


def test_a_block_table_shows_what_is_shared() -> None:
    manager = PagedManager(BlockPool(8, [7, 1, 3, 0, 2, 4, 5, 6]), block_size=4)
    manager.admit(0, list(range(6)), 16)
    manager.append([(0, 6)])
    manager.fork(0, 1)
    shown = notebook.manager_html(manager)
    assert "2 of 8 blocks in use" in shown
    assert shown.count("0→7 <b>×2</b>&ensp; 1→1 <b>×2</b>") == 2


def test_a_shell_is_told_of_types_by_name_and_of_the_command() -> None:
    known: dict[tuple[str, str], object] = {}
    magics: dict[str, object] = {}
    html = SimpleNamespace(for_type_by_name=lambda module, name, shows: known.update({(module, name): shows}))
    shell = SimpleNamespace(
        display_formatter=SimpleNamespace(formatters={"text/html": html}),
        register_magic_function=lambda function, kind, name: magics.update({name: function}),
    )
    notebook.register(shell)
    assert magics == {"paged_ref": notebook.command}
    for module, name in known:
        assert hasattr(sys.modules[module], name)


def test_a_command_that_fails_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"--frame is '9'; known are"):
        notebook.command("viz --frame 9")
    assert notebook.command("--version") is None
    assert capsys.readouterr().out.startswith("paged_ref ")


def test_a_page_of_a_command_names_no_place_of_this_machine() -> None:
    page = notebook.command("assess --model Llama-3-8B --gpu A100-80GB")  # of the commands with a page, the quickest
    assert page is not None
    assert "paged-ref assess --model Llama-3-8B --gpu A100-80GB --html page.html" in page.text
    assert tempfile.gettempdir() not in page.text


def test_the_import_alone_starts_no_notebook_code() -> None:
    code = "import sys, paged_ref; assert 'paged_ref.notebook' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.slow
def test_the_notebook_runs() -> None:
    nbclient = pytest.importorskip("nbclient", reason="needs the extra notebook")
    nbformat = pytest.importorskip("nbformat", reason="needs the extra notebook")
    pytest.importorskip("ipykernel", reason="needs the extra notebook")
    read = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in read.cells), "the notebook is kept without output"
    done = nbclient.NotebookClient(read, timeout=300, kernel_name="python3").execute()
    shown = ["".join(str(output) for output in cell.get("outputs", ())) for cell in done.cells]
    text = "\n".join(shown)
    assert "fathers brought forth" in text
    assert "<b>×2</b>" in shown[5], "samples that share the blocks of their prompt"
    assert "<iframe" in text
    assert "identical" in text
    assert "'10'" in text
    assert "'True'" in text
