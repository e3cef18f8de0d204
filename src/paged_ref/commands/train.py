"""`paged-ref train`: a tokenizer and a small Llama from a text file, in Hugging Face form."""

from __future__ import annotations

import argparse
import hashlib
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ..core.model.config import ModelConfig
from ..core.model.loading import load
from ..core.model.tokenizer import Tokenizer
from ..training.activations import MEMORY, PAGE_SIZE, activations_for
from ..training.checkpoint import STATE, load_state, put, save_model, save_state
from ..training.corpus import encode, hold_out, read_stories, train_tokenizer
from ..training.parameters import Parameters
from ..training.trainer import Settings, Trainer, TrainingStep, bits_per_byte
from ..views.common.curve import curve

HEARD = 8  # times that a text to be learnt by heart is read in each epoch
CURVE_ROWS = 10
DEFAULTS = Settings(num_steps=1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE",
                        help="what to learn from, plain or .gz, stories parted by <|endoftext|>")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the model goes, in Hugging Face form")
    parser.add_argument("--steps", type=int, default=1000, metavar="N", help="default 1000")
    parser.add_argument("--resume", action="store_true", help="continue the run that stopped in --out")
    parser.add_argument("--measure", metavar="DIR",
                        help="train nothing: the bits per byte of that model on the stories held out")  # fmt: skip
    text = parser.add_argument_group("text")
    text.add_argument("--held-out", type=float, default=0.05, metavar="SHARE",
                      help="of the stories, the last ones: measured, never learned (default 0.05)")  # fmt: skip
    text.add_argument("--by-heart", type=Path, metavar="FILE",
                      help=f"a text to learn by heart: read {HEARD} times in each epoch")  # fmt: skip
    text.add_argument("--words", default="", metavar="TEXT", help="each word of this becomes one token")
    sizes = parser.add_argument_group("sizes")
    sizes.add_argument("--vocab-size", type=int, default=1024, metavar="N", help="tokens (default 1024)")
    sizes.add_argument("--context", type=int, default=512, metavar="N", help="positions (default 512)")
    sizes.add_argument("--hidden-size", type=int, default=128, metavar="N", help="default 128")
    sizes.add_argument("--intermediate-size", type=int, default=320, metavar="N", help="default 320")
    sizes.add_argument("--layers", type=int, default=6, metavar="N", help="default 6")
    sizes.add_argument("--heads", type=int, default=4, metavar="N", help="default 4")
    sizes.add_argument("--kv-heads", type=int, default=2, metavar="N", help="default 2")
    sizes.add_argument("--head-size", type=int, metavar="N", help="default hidden size / heads")
    sizes.add_argument("--dtype", choices=("float16", "float32"), default="float32", help="of the file")
    steps = parser.add_argument_group("steps")
    steps.add_argument("--batch-tokens", type=int, default=DEFAULTS.batch_tokens, metavar="N",
                       help=f"tokens in a step (default {DEFAULTS.batch_tokens})")  # fmt: skip
    steps.add_argument("--micro-tokens", type=int, default=DEFAULTS.micro_tokens, metavar="N",
                       help=f"of these, computed at a time (default {DEFAULTS.micro_tokens})")  # fmt: skip
    steps.add_argument("--optimizer", choices=("adamw", "muon"), default=DEFAULTS.optimizer,
                       help="of the layers' matrices (default adamw); the rest is always AdamW's")  # fmt: skip
    steps.add_argument("--learning-rate", type=float, default=DEFAULTS.learning_rate, metavar="R",
                       help=f"at its highest (default {DEFAULTS.learning_rate})")  # fmt: skip
    steps.add_argument("--warmup", type=int, default=DEFAULTS.warmup, metavar="N",
                       help=f"steps until then (default {DEFAULTS.warmup})")  # fmt: skip
    steps.add_argument("--weight-decay", type=float, default=DEFAULTS.weight_decay, metavar="R",
                       help=f"default {DEFAULTS.weight_decay}")  # fmt: skip
    steps.add_argument("--dropout", type=float, default=DEFAULTS.dropout, metavar="P",
                       help=f"default {DEFAULTS.dropout}")  # fmt: skip
    steps.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    steps.add_argument("--save-every", type=int, default=200, metavar="N",
                       help="steps between checkpoints, each with a measurement (default 200)")  # fmt: skip
    memory = parser.add_argument_group("memory of what the layers save for backward")
    memory.add_argument("--memory", choices=MEMORY, default="keep",
                        help="keep all (default), move whole layers or pages to the host, recompute")  # fmt: skip
    memory.add_argument("--budget", type=_bytes, metavar="BYTES",
                        help="on the device, for swap and page: as in 48MiB")  # fmt: skip
    memory.add_argument("--page-size", type=_bytes, default=PAGE_SIZE, metavar="BYTES",
                        help=f"default {PAGE_SIZE // 1024}KiB")  # fmt: skip


def _bytes(text: str) -> int:
    """4096, 64KiB, 1.5MiB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB)?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; bytes are needed, as in 65536, 64KiB or 1.5MiB")
    return int(float(found[1]) * 1024 ** ("B", "KiB", "MiB", "GiB").index(found[2] or "B"))


def main(args: argparse.Namespace) -> int:
    if not 0 < args.held_out < 1:
        raise ValueError(f"--held-out is {args.held_out}; a share between 0 and 1 is needed")
    stories = [story for path in args.text for story in read_stories(path)]
    learned, held = hold_out(stories, args.held_out)
    if args.measure is not None:
        return _measure(args.measure, held)
    if args.out is None:
        raise ValueError("--out is missing; it names the directory that the model goes to")
    if args.save_every < 1:
        raise ValueError(f"--save-every is {args.save_every}; at least 1 is needed")
    if not args.resume and (args.out / STATE).exists():
        raise ValueError(f"--out {args.out} holds a run already; --resume continues it")
    return _train(args, learned, held)


def _measure(directory: str, held: list[str]) -> int:
    checkpoint = load(directory)
    weights = Parameters(checkpoint.config)
    weights.fill(checkpoint.weights)
    num_bytes = sum(len(story.encode()) for story in held)
    print(f"{directory}: {bits_per_byte(weights, checkpoint.tokenizer, held):.4f} bits per byte "
          f"on {len(held)} stories held out, {num_bytes} bytes")  # fmt: skip
    return 0


def _train(args: argparse.Namespace, learned: list[str], held: list[str]) -> int:
    settings = Settings(
        num_steps=args.steps,
        batch_tokens=args.batch_tokens,
        micro_tokens=args.micro_tokens,
        optimizer=args.optimizer,
        learning_rate=args.learning_rate,
        warmup=args.warmup,
        weight_decay=args.weight_decay,
        dropout=args.dropout,
        seed=args.seed,
    )
    config = _config(args)
    most_tokens = max(settings.micro_tokens, config.max_position_embeddings)
    activations = activations_for(args.memory, config, most_tokens, args.budget, args.page_size)
    state = load_state(args.out) if args.resume else None
    by_heart = read_stories(args.by_heart) * HEARD if args.by_heart else []
    digest = hashlib.sha256("\0".join([*learned, *held, *by_heart]).encode()).hexdigest()
    run = {**asdict(config), **asdict(settings), "words": args.words, "dtype": args.dtype, "text": digest}
    if state is not None:
        _refuse_other_run(state.run, run)
        tokenizer = Tokenizer.from_file(args.out / "tokenizer.json")
    else:
        tokenizer = train_tokenizer(learned, config.vocab_size, args.words)
        put(args.out / "tokenizer.json", tokenizer.inner.to_str().encode())  # a place that cannot be written shows now
    trainer = Trainer(config, settings, encode(tokenizer, learned + by_heart), activations)
    if state is not None:
        trainer.restore(state)

    def save(measure: bool = True) -> float | None:
        save_state(args.out, trainer.state(run))
        save_model(args.out, trainer.weights, tokenizer, args.dtype)
        return bits_per_byte(trainer.weights, tokenizer, held) if measure else None

    display = Display(trainer)
    with _stop_on_interrupt() as stopping, display:
        while not trainer.done and not stopping:
            display.show(trainer.step())
            if len(trainer.losses) % args.save_every == 0 and not trainer.done:
                display.measured(save())
    if stopping and not trainer.done:
        save(measure=False)
        _print_curve(trainer, display)
        print(f"stopped after step {len(trainer.losses)} of {settings.num_steps}; --resume continues", file=sys.stderr)
        return 130
    found = save()
    _print_curve(trainer, display)
    print(f"{args.out}: {trainer.weights.flat.size} weights, {settings.num_steps} steps, {found:.4f} bits per byte "
          f"on {len(held)} stories held out")  # fmt: skip
    return 0


def _print_curve(trainer: Trainer, display: Display) -> None:
    for line in curve(trainer.losses, min(display.console.width, 100), CURVE_ROWS, "loss"):
        print(line)


def _config(args: argparse.Namespace) -> ModelConfig:
    if args.head_size is None and args.hidden_size % max(1, args.heads):
        raise ValueError(f"--hidden-size is {args.hidden_size}; without --head-size a multiple of --heads "
                         f"{args.heads} is needed")  # fmt: skip
    return ModelConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_layers=args.layers,
        num_heads=args.heads,
        num_kv_heads=args.kv_heads,
        head_size=args.head_size or args.hidden_size // max(1, args.heads),
        max_position_embeddings=args.context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_ids=(0,),
    )


def _refuse_other_run(before: dict[str, Any], now: dict[str, Any]) -> None:
    """The number of steps may be another: the learning rate then goes the rest of its way to that end."""
    now = {name: list(value) if isinstance(value, tuple) else value for name, value in now.items()}  # as JSON has it
    for name, value in now.items():
        if name != "num_steps" and before.get(name) != value:
            raise ValueError(f"--resume continues a run whose {name} is {before.get(name)!r}; now it is {value!r}")


@contextmanager
def _stop_on_interrupt() -> Iterator[list[int]]:
    """Ctrl-C is remembered, so that the step under way ends; a second one interrupts at once."""
    caught: list[int] = []

    def remember(number: int, _frame: object) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, before)


class Display:
    """A bar with loss and tokens per second on a terminal; elsewhere a line at each measurement."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.console = Console(stderr=False)
        self._progress = Progress(
            BarColumn(bar_width=10),
            TextColumn("step {task.completed}/{task.total}  loss {task.fields[loss]:.3f}"),
            TextColumn("{task.fields[speed]:.0f} tokens/s  {task.fields[bits]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = TaskID(0)
        self._loss, self._tokens, self._seconds = 0.0, 0, 0.0

    def __enter__(self) -> Display:
        self._progress.start()
        total, made = self.trainer.settings.num_steps, len(self.trainer.losses)
        self._task = self._progress.add_task("", total=total, completed=made, loss=float("nan"), speed=0.0, bits="")
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, step: TrainingStep) -> None:
        self._loss = step.loss if not self._tokens else 0.95 * self._loss + 0.05 * step.loss
        self._tokens += step.num_tokens
        self._seconds += step.seconds
        self._progress.update(self._task, completed=step.number, loss=self._loss, speed=self._tokens / self._seconds)

    def measured(self, bits: float | None) -> None:
        if bits is None:
            return
        self._progress.update(self._task, bits=f"{bits:.3f} bits/byte")
        if not self.console.is_terminal:
            at = f"step {len(self.trainer.losses)}/{self.trainer.settings.num_steps}"
            speed = f"{self._tokens / self._seconds:.0f} tokens/s"
            print(f"{at}  loss {self._loss:.3f}  {bits:.4f} bits per byte held out  {speed}", flush=True)
