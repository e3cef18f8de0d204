"""A lesson that runs as a script, without a runner."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_a_script_that_is_interrupted_or_claims_too_much_shows_no_traceback(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path)}
    for code, words in (("raise KeyboardInterrupt", "Interrupted"), ("claim('two', 1, 2)", "does not hold: two")):
        path = tmp_path / "01_x.py"
        path.write_text(f"from paged_ref.lesson import claim\nclaim('it is so', True)\n{code}\n")
        done = subprocess.run([sys.executable, path], capture_output=True, text=True, env=environment, timeout=60)
        assert done.returncode != 0
        assert words in done.stderr
        assert "Traceback" not in done.stderr
