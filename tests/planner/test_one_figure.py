"""One question has one answer: paged against max, OPT-13B on an A100 of 40 GB, requests with ShareGPT's means."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from paged_ref.cli import main

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_readme_lessons_assess_compare_and_paper_give_the_same_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "numbers.json"

    def ratio(rates: dict[str, float], paged: str, other: str) -> float:
        return rates[paged] / rates[other]

    figures = {}
    assert main(["compare", "--block-sizes", "16", "--json", str(file)]) == 0
    rows = {row["label"]: row["sustained_rate"] for row in json.loads(file.read_text(encoding="utf-8"))["rows"]}
    figures["compare"] = ratio(rows, "paged 16", "standard max")
    capsys.readouterr()
    assert main(["assess", "--model", "OPT-13B", "--gpu", "A100-40GB", "--trace", "sharegpt", "--json", "-"]) == 0
    plans = {plan["name"]: plan["sustained_rate"] for plan in json.loads(capsys.readouterr().out)["plans"]}
    figures["assess"] = ratio(plans, "paged 16", "standard max")
    assert main(["paper", "12", "--json", str(file)]) == 0
    findings = {each["what"]: each["ours"] for each in json.loads(file.read_text(encoding="utf-8"))}
    figures["paper"] = findings["sharegpt: against Orca max"]
    figures["paper's rates"] = ratio(findings, "sharegpt: paged", "sharegpt: Orca max")
    for number, pattern in (("17", r"It is ([\d.]+) times"), ("18", r"\[([\d.]+), [\d.]+, ([\d.]+)\] requests/s")):
        capsys.readouterr()
        main(["lesson", number])
        found = re.search(pattern, " ".join(capsys.readouterr().out.split()))
        assert found, number
        figures[f"lesson {number}"] = float(found[1]) if number == "17" else float(found[2]) / float(found[1])
    table = (ROOT / "lessons" / "README.md").read_text(encoding="utf-8")
    said = re.search(
        r"paged against reserving the maximum, OPT-13B on a 40 GB A100 \(forecast\) \| ([\d.]+) times", table
    )
    assert said
    figures["lessons/README.md"] = float(said[1])
    # A quotient of two printed rates: the smaller one, 0.82, is rounded by up to 0.6 %, the larger one by 0.2 %.
    assert figures == {name: pytest.approx(figures["compare"], rel=0.009) for name in figures}
