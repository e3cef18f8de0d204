"""A lesson's file, taken apart."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from paged_ref.lesson import lesson_script


def test_prose_is_a_paragraph_of_comments_and_all_else_is_code(tmp_path: Path) -> None:
    path = tmp_path / "01_x.py"
    path.write_text(
        '"""Lesson 1: x\n\nQuestion: a\nlong one?\nTime: 15 minutes.\n"""\n\nimport os\n\n'
        "# ## First\n#\n# Prose\n# here.\n\n# more\n\n# touches the code\nx = 1\n\n\ndef f():\n\n    # inside\n\n"
        "    return 2\n\n# ## Second\n\n# tail\n"
    )
    lesson = lesson_script.read(path)
    assert (lesson.number, lesson.title, lesson.question, lesson.minutes) == (1, "x", "a long one?", 15)
    assert [part.title for part in lesson.parts] == ["First", "Second"]
    assert lesson.imports.passages[0].text == "import os"
    first = [(passage.kind, passage.text) for passage in lesson.parts[0].passages]
    assert first == [
        ("prose", "Prose\nhere.\n\nmore"),
        ("code", "# touches the code\nx = 1\n\n\ndef f():\n\n    # inside\n\n    return 2"),
    ]
    namespace: dict[str, Any] = {}
    for part in lesson.parts:
        for passage in part.passages:
            if passage.kind == "code":
                lesson_script.execute(passage, path, namespace)
    assert namespace["f"]() == 2
    assert namespace["f"].__code__.co_firstlineno == 21


def test_long_code_is_cut_between_statements(tmp_path: Path) -> None:
    path = tmp_path / "01_x.py"
    statements = "\n\n".join(f"x{i} = (\n    {i}\n)" for i in range(12))
    path.write_text(f'"""Lesson 1: x\n\nQuestion: a?\nTime: 15 minutes.\n"""\n\n# ## Run\n\n{statements}\n')
    passages = [passage for part in lesson_script.read(path).parts for passage in part.passages]
    assert len(passages) == 3
    assert sum(len(ast.parse(passage.text).body) for passage in passages) == 12
    assert all(passage.text.count("\n") < 20 for passage in passages)
