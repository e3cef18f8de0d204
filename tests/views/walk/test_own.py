"""`walk --mine`: a kernel that a reader wrote."""

from __future__ import annotations

import base64
import gzip
import re
from pathlib import Path

import pytest

from paged_ref.cli import main
from paged_ref.views.walk.frames import Look, frame
from paged_ref.views.walk.own_kernel import own_walk
from paged_ref.views.walk.sizes import Sizes

LESSONS = Path(__file__).resolve().parents[3] / "lessons"
SOLUTION = LESSONS / "solutions" / "my_kernel.py"


def test_each_access_has_its_sentence_and_every_frame_fills_the_screen() -> None:
    made = own_walk(SOLUTION, Sizes())
    run, look = made.runs["paged"], Look("paged")
    said = {run.info(at).name: frame(made, at, 100, 30, look).plain for at in run.tour()}
    assert "reads entry 0 of A's block table: block 2, slots 8 to 11" in said["block_tables"]
    assert "reads element 0 of keys in slot 8: token 0 of A (block 2, offset 0)" in said["keys"]
    assert "writes scores[0] in shared memory" in said["scores"]
    for width, height in ((60, 20), (80, 24), (150, 40)):
        for view in ("walk", "threads", "layouts"):
            for at in (0, len(made) // 2, len(made) - 1):
                rows = frame(made, at, width, height, Look("paged", view)).plain.split("\n")
                assert len(rows) == height
                assert max(map(len, rows)) <= width


@pytest.mark.parametrize(
    ("change", "options", "sentence"),
    [
        (("cuda.syncthreads()  # the next tile overwrites both arrays", "pass"), ["--tokens", "20"], "no barrier"),
        (("key // block_size]", "key]"), [], "block_tables[0, 2] is outside the shape [2, 2]"),
        (("def my_paged_attention", "def another"), [], "it defines no my_paged_attention"),
        (("block_tables, block_size", "tables, block_size"), [], "takes out, query, keys, values, tables, block_size"),
        (("import math", "import nothing_such"), [], "py, `import nothing_such`: ModuleNotFoundError: No module named"),
        (("import math", "import math ("), [], "my_kernel.py, `import math (`: SyntaxError: invalid syntax\n"),
        (("", ""), ["--threads", "4"], "--threads is 4; with --mine as many as --head-size 8 are needed"),
    ],
)
def test_a_mistake_is_one_sentence(
    change: tuple[str, str], options: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "my_kernel.py"
    source = SOLUTION.read_text(encoding="utf-8")
    path.write_text(source.replace(*change), encoding="utf-8")
    assert main(["walk", "--mine", str(path), *options]) == 2
    assert sentence in capsys.readouterr().err


def test_a_kernel_that_is_not_written_yet_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    template = SOLUTION.parents[1] / "templates" / "my_kernel.py"
    assert main(["walk", "--mine", str(template)]) == 2
    assert "its my_paged_attention, which is shown here, is still to be written" in capsys.readouterr().err


def test_the_page_of_a_readers_kernel_has_one_run(tmp_path: Path) -> None:
    page = tmp_path / "mine.html"
    assert main(["walk", "--mine", str(SOLUTION), "--tokens", "1", "--html", str(page)]) == 0
    assert (
        "first access to block_tables"
        in gzip.decompress(
            base64.b64decode(re.findall(r'id="data">([^<]+)<', page.read_text(encoding="utf-8"))[0])
        ).decode()
    )
