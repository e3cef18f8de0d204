"""What readers build in files of their own: templates start open, solutions are right, wrong answers are named."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path

import pytest

from paged_ref import LLM, SamplingParams
from paged_ref.extras.step_records import StepRecord
from paged_ref.lesson.building import FILES, build_named, grade_build, load
from paged_ref.lesson.grading import Verdict

LESSONS = Path(__file__).resolve().parents[2] / "lessons"
NAMES = [(file, name) for file, (_, names) in FILES.items() for name in names]
each_build = pytest.mark.parametrize(("file", "name"), NAMES, ids=[name for _, name in NAMES])


def verdict_of(path: Path, name: str) -> Verdict:
    return grade_build(build_named(name), path)[0]


def said(verdict: Verdict) -> str:
    """All that a reader is told."""
    return f"{verdict.case} {verdict.yours} {verdict.spec} {verdict.difference} {verdict.error}"


@each_build
def test_it_starts_open_and_the_solution_is_right(file: str, name: str) -> None:
    assert verdict_of(LESSONS / "templates" / file, name).state == "pending"
    assert verdict_of(LESSONS / "solutions" / file, name).state == "right"


def test_any_free_block_is_as_good_as_another(tmp_path: Path) -> None:
    """A cache that hands out other blocks than the package's is right, too."""
    source = (LESSONS / "solutions" / "my_cache.py").read_text(encoding="utf-8")
    for text, instead in (
        ("self.free_blocks.append(block)", "self.free_blocks.insert(0, block)"),
        ("for block in reversed(self.tables.pop(seq_id))", "for block in self.tables.pop(seq_id)"),
        ("list(range(self.num_blocks))[::-1]", "list(range(self.num_blocks))"),
    ):
        assert source.count(text) == 1
        path = tmp_path / "my_cache.py"
        path.write_text(source.replace(text, instead), encoding="utf-8")
        assert verdict_of(path, "MyCache").state == "right", instead


def test_the_cache_serves_the_engine_as_a_user_writes_it() -> None:
    """Also with samples that fork, too few blocks for all, and every read watched."""
    cache = load(LESSONS / "solutions" / "my_cache.py")["MyCache"]
    params = SamplingParams(max_tokens=12, n=3, temperature=1.0, seed=3, ignore_eos=True)
    prompts = ["Four score and seven years ago our", "The cat", "Once upon a time"]
    usual = LLM(backend="reference").generate(prompts, params)
    records: list[StepRecord] = []
    llm = LLM(manager=cache(14, 4), backend="reference", sanitize=True, on_step=records.append)
    found = llm.generate(prompts, params)
    assert [[one.token_ids for one in o.outputs] for o in found] == [
        [one.token_ids for one in o.outputs] for o in usual
    ]
    assert any(transfer.kind == "copy" for record in records for transfer in record.transfers)
    assert sum(output.num_preemptions for output in found) > 0
    llm.engine.manager.check_integrity()


@each_build
def test_wrong_answers_are_refused_with_what_differs(file: str, name: str, tmp_path: Path) -> None:
    source = (LESSONS / "solutions" / file).read_text(encoding="utf-8")
    (node,) = (node for node in ast.parse(source).body if getattr(node, "name", "") == name)
    segment = ast.get_source_segment(source, node)
    assert segment is not None
    wrong = runpy.run_path(str(LESSONS / "solutions" / "wrong" / file))["WRONG"][name]
    assert len(wrong) >= 5
    problems = []
    for what, text, instead, named in wrong:
        assert segment.count(text) == 1, what
        path = tmp_path / file
        path.write_text(source.replace(segment, segment.replace(text, instead)), encoding="utf-8")
        verdict = verdict_of(path, name)
        if verdict.state != "wrong" or named not in said(verdict):
            problems.append(f"{what}: {verdict.state}, {said(verdict)}")
    assert not problems, "\n".join(problems)
