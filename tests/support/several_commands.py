"""Several commands in one process: to start Python and to import the package takes longer than most commands do."""

from __future__ import annotations

import json
from collections.abc import Sequence

ENDED = "~~ ended: "  # and the exit status: a line after each command's output
CODE = f"""
import json, sys
from paged_ref.cli import main
for argv in json.loads(sys.argv[1]):
    try:
        status = main(argv)
    except SystemExit as ended:
        status = ended.code
    print("\\n{ENDED}" + str(status), flush=True)
"""


def program(commands: Sequence[Sequence[str]]) -> list[str]:
    """What Python runs: `python` and these words."""
    return ["-c", CODE, json.dumps(commands)]


def printed_by_each(text: str, commands: Sequence[Sequence[str]]) -> list[tuple[str, str]]:
    """Of each of the commands, in order: what it printed, and its exit status."""
    parts = text.replace("\r\n", "\n").split(f"\n{ENDED}")
    outputs, statuses = [parts[0]], []
    for part in parts[1:]:
        status, _, output = part.partition("\n")
        statuses.append(status)
        outputs.append(output)
    assert len(statuses) == len(commands), f"it ended in command {len(statuses)}: {outputs[-1][-2000:]}"
    return list(zip(outputs, statuses, strict=False))
