"""The reader's editor, at the line."""

from __future__ import annotations

from pathlib import Path

import pytest

from paged_ref.lesson.editor import edit, editor_command, line_of

FILE = Path("my_cache.py")


@pytest.mark.parametrize(
    ("setting", "command"),
    [
        ("vi", ["vi", "+7", "my_cache.py"]),
        ("/usr/bin/nano -w", ["/usr/bin/nano", "-w", "+7", "my_cache.py"]),
        ("emacs", ["emacs", "+7", "my_cache.py"]),
        ("code --wait", ["code", "--wait", "--goto", "my_cache.py:7"]),
        ("'my editor'", ["my editor", "my_cache.py"]),
    ],
)
def test_the_editor_opens_at_the_line(monkeypatch: pytest.MonkeyPatch, setting: str, command: list[str]) -> None:
    monkeypatch.setenv("EDITOR", setting)
    monkeypatch.setenv("VISUAL", "")
    assert editor_command(FILE, 7) == command
    monkeypatch.setenv("VISUAL", "kak")
    assert editor_command(FILE, 7) == ["kak", "+7", "my_cache.py"]


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("", "no editor is set: export EDITOR=nano"),
        ("'vi", 'the editor is "\'vi", which is no command'),
        ("/absent/vi", "the editor /absent/vi cannot be started: No such file or directory"),
        ("false", "the editor false ended with status 1"),
    ],
)
def test_an_editor_that_cannot_be_used_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, setting: str, sentence: str
) -> None:
    monkeypatch.setenv("EDITOR", setting)
    monkeypatch.delenv("VISUAL", raising=False)
    with pytest.raises(ValueError, match=sentence):
        edit(FILE, 7)


def test_the_line_of_a_definition(tmp_path: Path) -> None:
    path = tmp_path / "my_cache.py"
    assert line_of(path, "MyCache") == 1
    path.write_text("import os\n\n\nclass MyCache(object):\n    pass\n\n\ndef my_f(x):\n    pass\n")
    assert (line_of(path, "MyCache"), line_of(path, "my_f"), line_of(path, "my_g")) == (4, 8, 1)
