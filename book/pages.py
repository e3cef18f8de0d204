"""The extension that makes pages of the book from runs of the project, when Sphinx begins.

It runs the lessons and the two steppers, and reads the core and the recorded measurements. What it writes lies in the
build folder, beside the pages that are written by hand. After that it links names in prose to their entries.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes

from paged_ref.lesson import lesson_script

ROOT = Path(os.environ["PAGED_REF_ROOT"])
CORE = ROOT / "src" / "paged_ref" / "core"
LESSONS = sorted((ROOT / "lessons").glob("[0-9][0-9]_*.py"))
STEPPER = re.compile(r"`paged-ref (viz|walk)((?: --(?:at|frame|kernel|step) \S+)+)`")
FRAME_HEIGHT = 620  # pixels


def setup(app: Any) -> dict[str, bool]:
    app.connect("builder-inited", make_pages)
    app.connect("doctree-resolved", link_names)
    app.connect("html-page-context", level_of_captions, priority=900)  # after the theme has made its navigation
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def make_pages(app: Any) -> None:
    source = Path(app.srcdir)
    for folder in ("lessons", "core", "extra/steppers"):
        (source / folder).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as together, tempfile.TemporaryDirectory() as state:
        steppers = [
            together.submit(
                run, "-m", "paged_ref", name, "--html", f"{name}.html", folder=source / "extra" / "steppers"
            )
            for name in ("viz", "walk")
        ]
        made = {path: together.submit(run, str(source / "lesson_page.py"), str(path), state=state) for path in LESSONS}
        for path, page in made.items():
            (source / "lessons" / f"{path.stem}.md").write_text(with_steppers(page.result(), path), encoding="utf-8")
        for stepper in steppers:
            stepper.result()
    index = (source / "lessons_index.md").read_text(encoding="utf-8")
    (source / "lessons_index.md").unlink()
    (source / "lessons" / "index.md").write_text(index + lesson_list(), encoding="utf-8")
    (source / "core.md").write_text(core_page(source / "core"), encoding="utf-8")
    (source / "side_by_side.md").write_text(side_by_side(), encoding="utf-8")
    (source / "numbers.md").write_text(numbers_page(), encoding="utf-8")


def run(*argv: str, folder: Path = ROOT, state: str | None = None) -> str:
    """What Python prints in this folder. Raises RuntimeError, with its words, where it fails.

    `state`: where lessons keep the progress of a reader.
    """
    environment = {**os.environ, "PAGED_REF_DEVICE": "cpu", "OPENBLAS_NUM_THREADS": "1", "COLUMNS": "88"}
    environment |= {"XDG_STATE_HOME": state} if state else {}
    done = subprocess.run(
        [sys.executable, *argv], cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr}")
    return done.stdout


# --- lessons --------------------------------------------------------------------------------------------------


def with_steppers(page: str, path: Path) -> str:
    """The page with the files of the core that the lesson uses, and with a stepper where its prose names a moment."""
    used = [name for name in core_files() if name in core_imports(path)]
    links = ", ".join(f"[`core/{name}.py`](#{target(name)})" for name in used)
    about = f"\n\nIn the core: {links}." if links else ""
    title, _, rest = page.partition("\n\n## ")
    paragraphs = []
    for paragraph in f"{title}{about}\n\n## {rest}".split("\n\n"):
        paragraphs.append(paragraph)
        if not paragraph.startswith("```"):
            paragraphs += [stepper(name, options, "..") for name, options in STEPPER.findall(paragraph)]
    return "\n\n".join(paragraphs)


def lesson_list() -> str:
    """The lessons in order, with their time and question."""
    read = [lesson_script.read(path) for path in LESSONS]
    rows = [
        f"| [{each.number}. {each.title}](#lesson-{each.number:02}) | {each.minutes} | {each.question} |"
        for each in read
    ]
    table = "\n".join(["| lesson | minutes | its question |", "|---|---:|---|", *rows])
    order = "\n".join(path.stem for path in LESSONS)
    return f"\n{table}\n\n```{{toctree}}\n:hidden:\n\n{order}\n```\n"


def stepper(name: str, options: str, up: str) -> str:
    """A page of `viz` or `walk` at the moment that the options name, inside another page."""
    words = {"kernel": "run"}  # of an option, where the page's is another
    moment = "&".join(f"{words.get(key, key)}={value}" for key, value in re.findall(r"--(\w+) (\S+)", options))
    page = f"{up}/steppers/{name}.html#{moment}"
    return (
        f'```{{raw}} html\n<iframe class="stepper" src="{page}&embed" title="paged-ref {name}{options}" '
        f'height="{FRAME_HEIGHT}" loading="lazy"></iframe>\n<p><a href="{page}">Open this moment alone</a></p>\n```'
    )


# --- the core -------------------------------------------------------------------------------------------------


def core_files() -> dict[str, str]:
    """The files of the reading path, in the README's order: name below core/, without .py -> what it is."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^\| \d+\. \[`(\S+)\.py`\]\S+ \| \d+ \| (.*) \|$", readme, re.MULTILINE))


def core_imports(path: Path) -> set[str]:
    """The files of the core that a file imports from, as `core_files` names them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("paged_ref.core"):
            for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                found.add(name.removeprefix("paged_ref.core.").replace(".", "/"))
    return found


def target(name: str) -> str:
    return f"core-{name.replace('/', '-').replace('_', '-')}"


def core_page(folder: Path) -> str:
    """The reading path, and a page for each of its files."""
    rows, entries = [], []
    for number, (name, what) in enumerate(core_files().items(), start=1):
        path = CORE / f"{name}.py"
        source = path.read_text(encoding="utf-8")
        head = (ast.get_docstring(ast.parse(source)) or "").split("\n\n")[0].replace("\n", " ")
        lessons = [lesson for lesson in LESSONS if name in core_imports(lesson)]
        taught = ", ".join(f"[lesson {int(lesson.stem[:2])}](#lesson-{lesson.stem[:2]})" for lesson in lessons)
        page = [
            f"({target(name)})=", f"# {number}. `{name}.py`", f"{head}", f"{len(source.splitlines())} lines.",
            f"Used in: {taught}." if taught else "", f"```{{code-block}} python\n:linenos:\n\n{source}```",
        ]  # fmt: skip
        (folder / f"{target(name)}.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")
        rows.append(f"| {number}. [`{name}.py`](#{target(name)}) | {len(source.splitlines())} | {what} |")
        entries.append(f"core/{target(name)}")
    total = sum(len((CORE / f"{name}.py").read_text(encoding="utf-8").splitlines()) for name in core_files())
    return f"""# Read the core

`src/paged_ref/core/` imports nothing else of the package. These {total:,} lines are the idea, in the order in which
they are best read.

| file | lines | what it is |
|---|---:|---|
{chr(10).join(rows)}

```{{toctree}}
:hidden:

{chr(10).join(entries)}
```
"""


def side_by_side() -> str:
    """Both teaching kernels, line beside line. A line leads to the first moment in which it reads or writes memory."""
    from paged_ref.views.walk.call import KERNELS, walk

    made = walk()
    columns = []
    for name in KERNELS:
        kernel = made.runs[name]
        first = {int(line): position for position, line in reversed(list(enumerate(kernel.line)))}
        cells = []
        for number, text in kernel.code.lines:
            indent, shown = text[: len(text) - len(text.lstrip())], escape(text.lstrip())
            if number in first:
                link = f"steppers/walk.html#run={name}&access={first[number] + 1}"
                shown = f'<a href="{link}">{shown}</a>'
            cells.append((number, f"{indent}{shown}", number in kernel.code.different))
        columns.append(cells)
    rows = []
    for (left, naive, differs), (right, paged, _) in zip(*columns, strict=True):
        mark = "≠" if differs else ""
        kind = ' class="differs"' if differs else ""
        cell = "<td><code>{}</code></td>".format
        rows.append(f"<tr{kind}><td>{left}</td>{cell(naive)}<td>{mark}</td><td>{right}</td>{cell(paged)}</tr>")
    different = sum(differs for _, _, differs in columns[0])
    head = '<th></th><th scope="col">naive.py</th><th></th><th></th><th scope="col">paged.py</th>'
    return f"""# Side by side

The naive kernel reads K and V that lie in one piece; the paged kernel reads them through a block table. {different}
lines differ, marked with ≠: everything else is the same. A line that reads or writes memory is a link to the first
moment in which it does, in a call that the tracer ran: which thread, which slot, what it costs. In a terminal:
`paged-ref walk`.

```{{raw}} html
<div class="wide" tabindex="0"><table class="beside"><thead><tr>{head}</tr></thead><tbody>
{"".join(rows)}
</tbody></table></div>
```

{stepper("walk", "", ".")}
"""


def numbers_page() -> str:
    """Every measurement that is kept with the lessons: the command, the date, the machine, and what was printed."""
    parts = [
        "# Numbers",
        "Each of these is the output of one command, kept as it was printed. Times are of one machine and one day, and "
        "only their ratios within one run mean something elsewhere. The command above each prints it again on yours.",
    ]
    for path in sorted((ROOT / "lessons" / "recorded").glob("*.txt")):
        command, date, machine, *printed = path.read_text(encoding="utf-8").splitlines()
        command = command.rpartition("; ")[2]
        if "Python" not in machine:  # counted, not timed
            machine, printed = "No timing", [machine, *printed]
        parts += [f"## `{command}`", f"{date}. {machine}.", "```text\n" + "\n".join(printed).strip("\n") + "\n```"]
    return "\n\n".join(parts) + "\n"


def level_of_captions(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Sphinx gives the captions of the navigation the role of a heading, without the level that a reader needs."""
    for name in ("furo_navigation_tree", "toc"):
        if name in context:
            context[name] = context[name].replace('role="heading"', 'role="heading" aria-level="2"')


# --- names in prose -------------------------------------------------------------------------------------------


def link_names(app: Any, doctree: nodes.document, page: str) -> None:
    """A name between backticks in prose becomes a link to its entry in the reference, if there is one."""
    entries = {}
    for full, (_, kind, entry) in _objects(app):
        if kind in ("class", "function", "method", "data"):
            entries.setdefault(full.rpartition(".")[2], (full, entry))
    for literal in list(doctree.findall(nodes.literal)):
        words = literal.astext().removesuffix("()")
        inside = (nodes.reference, nodes.title, nodes.term)
        if words not in entries or any(isinstance(parent, inside) for parent in _parents(literal)):
            continue
        full, entry = entries[words]
        link = nodes.reference("", "", internal=True, refuri=f"{app.builder.get_relative_uri(page, entry)}#{full}")
        literal.replace_self(link)
        link += literal


def _objects(app: Any) -> Iterable[tuple[str, tuple[str, str, str]]]:
    for full, item in app.env.domaindata["py"]["objects"].items():
        yield full, (full, item.objtype, item.docname)


def _parents(node: nodes.Node) -> Iterable[nodes.Node]:
    while node.parent is not None:
        node = node.parent
        yield node
