"""What a lesson is written with: predict(), claim(), table(), check() with todo(), build(), plug_in(), break_it() ...

A lesson is one plain Python file, `lessons/NN_name.py`; lessons/STYLE.md states its form.
`python lessons/05_block_table.py` runs it. `paged-ref lesson 5` shows its prose and its code, and runs it part
by part. Both do the same: without a runner, these functions make a session for the script.
"""

from .building import build
from .calls import break_it, check, claim, plug_in, predict, show, table, todo
from .kernel_bugs import plant

__all__ = ["break_it", "build", "check", "claim", "plant", "plug_in", "predict", "show", "table", "todo"]
