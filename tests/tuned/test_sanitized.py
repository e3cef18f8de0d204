"""What `make gpu` runs under compute-sanitizer is a right program: it runs here, too."""

from __future__ import annotations

import pytest
from support import sanitized

from paged_ref.core.device import on_gpu


@pytest.mark.skipif(on_gpu, reason="a GPU is in use: make gpu runs it")
def test_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert sanitized.main() == 0
    assert capsys.readouterr().out == "{'cpu-simd': 120} attention calls; the model says fathers brought forth\n"
