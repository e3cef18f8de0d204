"""One lesson as a page of the book, in Markdown: its prose, its code, and what the code prints when it runs here.

    python book/lesson_page.py lessons/05_block_table.py > page.md

A question of the lesson opens to its answer. Of an exercise the hint and the solution are folded away.
"""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from html import escape
from io import StringIO
from pathlib import Path

from rich.ansi import AnsiDecoder

from paged_ref.lesson import lesson_script
from paged_ref.lesson.lesson_code import error_text
from paged_ref.lesson.lesson_player import code_to_read
from paged_ref.lesson.lesson_session import ClaimError, LessonSession, running
from paged_ref.lesson.progress import Progress
from paged_ref.views.common.console import Console

WIDTH = 84  # columns of what a lesson prints
ANSWER = "• "  # the session says so what was asked, and what it is


class BookSession(LessonSession):
    """A session without a reader, whose answers are kept for the page."""

    __slots__ = ("answers",)

    def say(self, text: str, style: str = "", indent: int = 2) -> None:
        if text.startswith(ANSWER) and "\n" in text:
            self.answers.append(text.removeprefix(ANSWER).split("\n", 1))
        else:
            super().say(text, style, indent)


def page(path: Path) -> str:
    """The Markdown of the lesson. Raises RuntimeError where the lesson fails."""
    script = lesson_script.read(path)
    console = Console(highlight=False, force_terminal=True, color_system="standard", width=WIDTH)
    session = BookSession(path.stem, path.parent, Progress(), interactive=False, console=console)
    session.answers = []
    namespace: dict[str, object] = {"__name__": "__main__", "__file__": str(path)}
    parts = [f"(lesson-{script.number:02})=", f"# {script.number}. {capital(script.title)}", *_head(script)]
    with running(session):
        for part in [script.imports, *script.parts]:
            session.checked.clear()
            parts.append(f"## {part.title or 'What it uses'}")
            for passage in part.passages:
                if passage.kind == "prose":
                    parts.append(passage.text)
                    continue
                printed = _run(passage, path, namespace)
                parts += [_question(*answer) for answer in session.answers]  # before the run, which shows the answer
                session.answers.clear()
                parts.append(_code(passage.text))
                parts += [_output(printed)] if printed.strip() else []
            parts += [_folded(session, name) for name in session.checked]
    return "\n\n".join(parts) + "\n"


def _head(script: lesson_script.LessonScript) -> list[str]:
    text = script.head.partition("\n\n")[2].partition("\n\n")[2]
    command = f"In a terminal: `paged-ref lesson {script.number}`."
    return [f"*{capital(script.question)}* About {script.minutes} minutes. {command}", text]


def capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _run(passage: lesson_script.Passage, path: Path, namespace: dict[str, object]) -> str:
    printed = StringIO()
    with redirect_stdout(printed):
        try:
            lesson_script.execute(passage, path, namespace)
        except ClaimError as error:
            raise RuntimeError(f"{path.name}: {error}") from error
        except Exception as error:
            raise RuntimeError(f"{path.name}: {error_text(error)}") from error
    return printed.getvalue()


def _code(text: str) -> str:
    return f"```python\n{code_to_read(text)}\n```"


def _output(printed: str) -> str:
    """What was printed, with its styles as classes that book.css knows."""
    plain = Console(file=StringIO(), width=WIDTH)
    lines = []
    for line in AnsiDecoder().decode(printed.strip("\n")):
        line.rstrip()
        parts = []
        for segment in line.render(plain):
            style = segment.style
            words = [word for word in ("bold", "dim", "italic") if style and getattr(style, word)]
            words += [style.color.name] if style and style.color else []
            text = escape(segment.text)
            parts.append(f'<span class="{" ".join(words)}">{text}</span>' if words else text)
        lines.append("".join(parts))
    shown = "\n".join(lines)
    return f'```{{raw}} html\n<pre class="run" tabindex="0" aria-label="what it prints">{shown}</pre>\n```'


def _question(question: str, answer: str) -> str:
    shown = "<br>".join(escape(line.strip()) for line in answer.splitlines())
    return (
        f'```{{raw}} html\n<details class="question"><summary>{escape(question)}</summary><p>{shown}</p></details>\n```'
    )


def _folded(session: LessonSession, name: str) -> str:
    exercise = session.exercises[name]
    parts = [
        f"<details><summary>Hint for <code>{escape(name)}</code></summary><p>{escape(exercise.hint)}</p></details>"
    ]
    if solution := session.solution(name):
        parts.append(f"<details><summary>One solution</summary><pre>{escape(solution[1])}</pre></details>")
    return "```{raw} html\n" + "\n".join(parts) + "\n```"


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    print(page(Path(sys.argv[1]).resolve()), end="")
