"""What a lesson is written with: predict(), claim(), table(), show(), check() with todo(), plug_in(), break_it().

A lesson is one plain Python file, `lessons/NN_name.py`; lessons/STYLE.md says exactly how it is written.
`python lessons/05_block_table.py` runs it. `paged-ref lesson 5` shows its prose and its code, and runs it part
by part. The two do the same: whoever calls these functions without a runner gets a session made for the script.
"""

from .calls import break_it, check, claim, plug_in, predict, show, table, todo

__all__ = ["break_it", "check", "claim", "plug_in", "predict", "show", "table", "todo"]
