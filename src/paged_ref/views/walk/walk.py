"""`paged-ref walk`: the teaching kernels, access by access: which thread reads which slot, and why.

The kernels run in the tracer, here, without a GPU. What is shown is the record of that run.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from rich.text import Text

from ..common import options
from ..common.console import Console
from ..common.loop import play
from ..common.printing import Size, is_terminal, parse_size, print_frames, write_svg
from ..common.viewer import Viewer
from .call import KERNELS, Walk, walk
from .frames import GLOSSARY, KEYS, MARKS, SMALLEST, VIEWS, WIDE, Look, frame
from .own_kernel import own_walk
from .sizes import Sizes
from .walk_page import write_page

STEPS = ("access", "line", "thread", "round", "block")
_TOY = Sizes()


class Walker(Viewer):
    """Where the viewer is in the walk, and what each key does."""

    thing = "accesses"
    help = ({"keys": KEYS, "marks": MARKS}, {"words": GLOSSARY})

    def __init__(self, walk: Walk, look: Look | None = None, position: int = 0) -> None:
        super().__init__(speed=4)
        self.walk, self.look = walk, look or Look()
        self._wide = False  # as last drawn
        self.go(position)

    @property
    def num_positions(self) -> int:
        return len(self.walk)

    def draw(self, width: int, height: int) -> Text:
        self._wide = width >= WIDE
        if self.helping:
            return self.draw_help(width, height)
        return frame(self.walk, self.position, width, height, replace(self.look, playing=self.playing))

    def press(self, key: str) -> bool:
        if self.playing and key not in "+-=":  # any other key only stops
            self.playing = False
            return True
        return super().press(key)

    def move(self, kind: str, step: int) -> None:
        """To the next (step 1) or the previous (step -1) access, line, thread, round or CUDA block."""
        self.go(self.walk.runs["paged"].move(self.position, kind, step))

    def _kernel(self) -> None:
        if len(self.walk.runs) < len(KERNELS):
            return
        names = ("both", *KERNELS) if self._wide else KERNELS
        now = self.look.kernel if self.look.kernel in names else "paged"  # too narrow for both: paged is shown
        self.look = replace(self.look, kernel=names[(names.index(now) + 1) % len(names)])

    def _view(self, number: int) -> None:
        self.look = replace(self.look, view=VIEWS[number])

    actions = Viewer.actions | {
        "down": lambda self: self.move("line", 1),
        "up": lambda self: self.move("line", -1),
        "t": lambda self: self.move("thread", 1),
        "T": lambda self: self.move("thread", -1),
        "n": lambda self: self.move("round", 1),
        "p": lambda self: self.move("round", -1),
        "b": lambda self: self.move("block", 1),
        "B": lambda self: self.move("block", -1),
        "k": _kernel,
        "tab": _kernel,
        "1": lambda self: self._view(0),
        "2": lambda self: self._view(1),
        "3": lambda self: self._view(2),
    }


# ---- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "\n".join([parser.epilog or "", "", "words:", *(f"  {word}: {said}" for word, said in GLOSSARY)])
    show = parser.add_argument_group("what to show")
    show.add_argument("--kernel", default="both", choices=(*KERNELS, "both"), help=f"both: from {WIDE} columns on")
    show.add_argument("--mine", type=Path, metavar="FILE", help="your own kernel, of lessons 8 and 9: my_kernel.py")
    show.add_argument("--view", default="walk", choices=VIEWS, help="all, the threads' counters, or the cache layouts")
    show.add_argument(
        "--at",
        metavar="N",
        help="begin at access N, or at the first access to an array (block_tables ...; default keys)",
    )
    show.add_argument(
        "--every", metavar="STEP", help=f"without a terminal: {', '.join(STEPS)}, or a number of accesses"
    )
    options.printed(show)
    options.svg_output(show, "write the frame at --at (default: keys) as a picture")
    options.output(show, "--html", "write every access of both kernels as one page for a browser, which opens at --at")
    call = parser.add_argument_group("the attention call, one query token for each sequence")
    options.integer(call, "--tokens", list(_TOY.tokens), "keys of each sequence", least=None, nargs="+")
    options.integer(call, "--block-size", _TOY.block_size, "tokens in a block", least=None)
    options.integer(call, "--heads", _TOY.num_heads, "query heads", least=None)
    options.integer(call, "--kv-heads", _TOY.num_kv_heads, "KV heads", least=None)
    options.integer(call, "--head-size", _TOY.head_size, "elements of a head", least=None)
    options.integer(call, "--threads", _TOY.num_threads, "of a CUDA block", least=None)
    call.add_argument("--dtype", default=_TOY.dtype, choices=("float32", "float16"), help="of K, V and the query")
    options.seed(call, _TOY.seed, "which blocks are taken")


def main(args: argparse.Namespace) -> int:
    sizes = Sizes(
        tuple(args.tokens), args.block_size, args.heads, args.kv_heads, args.head_size, args.threads, args.dtype,
        args.seed,
    )  # fmt: skip
    size = parse_size(args.size, SMALLEST) if args.size else None
    every = _every(args.every) if args.every else None
    if args.mine:
        args.kernel = "paged"
    made = own_walk(args.mine, sizes) if args.mine else walk(sizes)
    at = _position(args.at, made) if args.at else None
    look = Look(args.kernel, args.view)
    if args.html:
        with Console(stderr=True).status(f"drawing {2 * len(made):,} accesses ..."):
            write_page(args.html, made, _position("keys", made) if at is None else at, look, size)
    if args.svg:
        position, size = _position("keys", made) if at is None else at, size or (100, 30)
        write_svg(args.svg, frame(made, position, *size, replace(look, keys=False)), size, "paged-ref walk")
    elif args.html:
        pass
    elif is_terminal() and not (args.print or every or size):
        play(Walker(made, look, _position("keys", made) if at is None else at))
    else:
        _print(made, at, every, size, look)
    return 0


def _every(text: str) -> str:
    if text in STEPS or (text.isdigit() and int(text) >= 1):
        return text
    raise ValueError(f"--every is {text!r}; {', '.join(STEPS)} or a number from 1 on is needed")


def _position(text: str, walk: Walk) -> int:
    """The access that `--at` names: by its number, from 1, or by the array that it is the first to touch."""
    for run in reversed(walk.runs.values()):  # paged first
        for position in run.tour():
            if run.info(position).name == text:
                return position
    if text.isdigit() and 1 <= int(text) <= len(walk):
        return int(text) - 1
    names = ", ".join(run.info(position).name for run in [walk.runs["paged"]] for position in run.tour())
    raise ValueError(f"--at is {text!r}; 1 to {len(walk)} is needed, or one of {names}")


def _print(walk: Walk, at: int | None, every: str | None, size: Size | None, look: Look) -> None:
    """Frames one after another, for pipes: the first access to each array, or those that `at` and `every` name."""
    run = walk.runs["paged"]
    if every is not None:
        positions = range(0, len(walk), int(every)) if every.isdigit() else run.starts[every].tolist()
        positions = [position for position in positions if position >= (at or 0)]
    else:
        positions = run.tour() if at is None else [at]
    still = replace(look, keys=False)
    print_frames(lambda position, width, height: frame(walk, position, width, height, still), positions, size, SMALLEST)
