"""The figures in the book's page on the article are those of the recorded runs of the commands beside them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMAND = re.compile(r"`paged-ref (compare|paper|bench \w+)")
FIGURE = re.compile(r"\d+\.\d+|\d+ KiB|\d+ to \d+ %|\d{2,}(?= %)|\d{3}")


def test_every_figure_of_the_article_page_was_recorded() -> None:
    table = re.findall(
        r"^\| (.*) \| (.*) \| (.*) \|$", (ROOT / "book" / "article.md").read_text(encoding="utf-8"), re.M
    )
    found = 0
    for _, verdict, commands in table:
        names = [name.replace(" ", "_") for name in COMMAND.findall(commands)]
        recorded = "".join(
            (ROOT / "lessons" / "recorded" / f"{name}.txt").read_text(encoding="utf-8") for name in names
        )
        for figure in FIGURE.findall(verdict):
            assert figure in recorded, (figure, names)
            found += 1
    assert found >= 18
