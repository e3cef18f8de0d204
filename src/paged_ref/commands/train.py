"""`paged-ref train`: a tokenizer and a small Llama from a text file, in Hugging Face form."""

from __future__ import annotations

import argparse
import hashlib
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..core.checks import plural
from ..core.model.config import ModelConfig
from ..core.model.tokenizer import Tokenizer
from ..extras.memory_limit import require_memory
from ..interop.architectures import num_weights
from ..interop.checkpoints import load
from ..interop.hf_config import LAYER_BYTES
from ..interop.hf_tokenizer import read_tokenizer
from ..training.activations import MEMORY, PAGE_SIZE, activations_for
from ..training.checkpoint import STATE, State, alone_in, load_state, put, save_model, save_state
from ..training.corpus import encode, hold_out, read_stories, train_tokenizer
from ..training.parameters import Parameters
from ..training.trainer import Settings, Trainer, TrainingStep, bits_per_byte
from ..views.common import options
from ..views.common.console import Console
from ..views.common.interrupts import STATUS, Interrupts
from ..views.common.plots import curve

REPEATS = 8  # times that a text to memorize is read in each epoch
CURVE_ROWS = 10
DEFAULTS = Settings(num_steps=1)
TOKEN_BYTES = 8  # of a batch that waits: the token ids, and the arrays of short stories that hold them
SIZES = ("vocab-size", "hidden-size", "intermediate-size", "layers")
# What a run keeps, and goes on with: all options but the places.
OPTIONS = (
    "text", "steps", "held_out", "memorize", "words", "memory", "budget", "page_size", "vocab_size", "context",
    "hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "head_size", "dtype", "batch_tokens",
    "micro_tokens", "optimizer", "learning_rate", "warmup", "weight_decay", "dropout", "seed", "save_every",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE",
                        help="what to learn from, plain or .gz, stories parted by <|endoftext|>")  # fmt: skip
    options.folder(parser, "--out", "where the model goes, in Hugging Face form")
    options.integer(parser, "--steps", 1000, least=None)
    parser.add_argument("--resume", type=Path, metavar="DIR",
                        help="continue the run that stopped there, with its options; --steps may be more")  # fmt: skip
    parser.add_argument("--measure", metavar="DIR",
                        help="train nothing: the bits per byte of that model on the stories held out")  # fmt: skip
    text = parser.add_argument_group("text")
    options.share(text, "--held-out", 0.05, "of the stories, the last ones: measured, never learned")
    text.add_argument("--memorize", "--by-heart", type=Path, metavar="FILE",
                      help=f"a text to learn by heart: read {REPEATS} times in each epoch")  # fmt: skip
    text.add_argument("--words", default="", metavar="TEXT", help="each word of this becomes one token")
    _add_sizes(parser.add_argument_group("sizes"))
    _add_steps(parser.add_argument_group("steps"))
    memory = parser.add_argument_group("memory of what the layers save for backward")
    memory.add_argument("--memory", choices=MEMORY, default="keep",
                        help="keep all (default), move whole layers or pages to the host, recompute")  # fmt: skip
    options.size(memory, "--budget", help="on the device, for swap and page: as in 48MiB")
    options.size(memory, "--page-size", PAGE_SIZE, f"default {PAGE_SIZE // 1024}KiB")
    # What the command line leaves out is None, so that --resume can tell it from a default.
    defaults = {name: parser.get_default(name) for name in OPTIONS}
    parser.set_defaults(defaults=defaults, **dict.fromkeys(OPTIONS))


def _add_sizes(sizes: options.Options) -> None:
    defaults = {"--hidden-size": 128, "--intermediate-size": 320, "--layers": 6, "--heads": 4, "--kv-heads": 2}
    options.integer(sizes, "--vocab-size", 1024, "tokens", least=None)
    options.integer(sizes, "--context", 512, "positions")
    for option, default in defaults.items():
        options.integer(sizes, option, default, least=None)
    options.integer(sizes, "--head-size", help="default hidden size / heads", least=None)
    sizes.add_argument("--dtype", choices=("float16", "float32"), default="float32", help="of the file")


def _add_steps(steps: options.Options) -> None:
    options.integer(steps, "--batch-tokens", DEFAULTS.batch_tokens, "tokens in a step", least=None)
    options.integer(steps, "--micro-tokens", DEFAULTS.micro_tokens, "of these, computed at a time", least=None)
    steps.add_argument("--optimizer", choices=("adamw", "muon"), default=DEFAULTS.optimizer,
                       help="of the layers' matrices (default adamw); the rest is always AdamW's")  # fmt: skip
    options.number(steps, "--learning-rate", DEFAULTS.learning_rate, "at its highest", metavar="R")
    options.integer(steps, "--warmup", DEFAULTS.warmup, "steps until then", least=None)
    options.number(steps, "--weight-decay", DEFAULTS.weight_decay, metavar="R")
    options.number(steps, "--dropout", DEFAULTS.dropout, metavar="P")
    options.seed(steps)
    options.integer(steps, "--save-every", 200, "steps between checkpoints, each with a measurement")


def main(args: argparse.Namespace) -> int:
    options.check_text("--words", [args.words or ""])
    directory = args.resume or args.out
    if directory is None and args.measure is None:
        raise ValueError("--out is missing; it names the directory that the model goes to")
    if args.resume is not None and not args.resume.is_dir():
        raise ValueError(f"--resume is {args.resume}, which is not a directory; there is no run to continue")
    with alone_in(directory) if directory else nullcontext():
        state = load_state(args.resume) if args.resume else None
        given = _complete(args, state)
        if args.text is None:
            raise ValueError("--text is missing; it names the files to learn from")
        config = _config(args)
        stories = [story for path in args.text for story in read_stories(path)]
        learned, held = hold_out(stories, args.held_out)
        if args.measure is not None:
            return _measure(args.measure, held)
        if state is None and (args.out / STATE).exists():
            raise ValueError(f"--out {args.out} holds a run already; --resume {args.out} continues it")
        return _train(args, *_prepare(args, config, state, given, learned, held), held)


def _complete(args: argparse.Namespace, state: State | None) -> list[str]:
    """Fill in the options that the command line left out: from the run that goes on, else their defaults.

    Returns what is not a default, as a command line: the run keeps it. Raises ValueError for options that do not go
    together."""
    before = argparse.Namespace(**dict.fromkeys(OPTIONS))
    if state is not None:
        if args.out or args.measure:
            raise ValueError(f"--{'out' if args.out else 'measure'} is given with --resume {args.resume}, where the "
                             "run has its directory")  # fmt: skip
        kept = state.run.get("options")
        if not isinstance(kept, list) or not all(isinstance(each, str) for each in kept):
            raise ValueError(f"{args.resume / STATE} is not a run's state: it keeps no options")
        parser = argparse.ArgumentParser(prog=str(args.resume / STATE))
        add_arguments(parser)
        before, args.out = parser.parse_args(kept), args.resume
    given: list[str] = []
    for name, default in args.defaults.items():
        here, kept_value = getattr(args, name), getattr(before, name)
        value = kept_value if here is None else here
        setattr(args, name, default if value is None else value)
        if value is not None:
            values = value if isinstance(value, list) else [value]
            words = [str(each.resolve()) if isinstance(each, Path) else str(each) for each in values]
            option = f"--{name.replace('_', '-')}"
            given += [option, *words] if isinstance(value, list) else [f"{option}={words[0]}"]
    return given


def _measure(directory: str, held: list[str]) -> int:
    checkpoint = load(directory)
    weights = Parameters(checkpoint.config)
    weights.fill(checkpoint.weights)
    num_bytes = sum(len(story.encode()) for story in held)
    _say(f"{directory}: {bits_per_byte(weights, checkpoint.tokenizer, held):.4f} bits per byte "
         f"on {plural(len(held), 'story')} held out, {num_bytes} bytes")  # fmt: skip
    return 0


def _say(sentence: str, *, stderr: bool = False) -> None:
    """A sentence in lines of whole words on a terminal, in one line elsewhere."""
    console = Console(highlight=False, stderr=stderr)
    console.print(sentence, soft_wrap=not console.is_terminal)


def _prepare(
    args: argparse.Namespace, config: ModelConfig, state: State | None, given: list[str], learned: list[str],
    held: list[str],
) -> tuple[Trainer, Tokenizer, dict[str, Any]]:  # fmt: skip
    """A new run, or the one that `state` is of: its trainer at the step where the run goes on, the tokenizer, and what
    the weights follow from, for the checkpoints. Raises ValueError."""
    names = ("batch_tokens", "micro_tokens", "optimizer", "learning_rate", "warmup", "weight_decay", "dropout", "seed")
    settings = Settings(num_steps=args.steps, **{name: getattr(args, name) for name in names})
    _require_memory(args, config)
    # A batch is full with the sequence that reaches its number of tokens.
    most_tokens = max(min(args.micro_tokens, args.batch_tokens + args.context), args.context)
    activations = activations_for(args.memory, config, most_tokens, args.budget, args.page_size)
    memorized = read_stories(args.memorize) * REPEATS if args.memorize else []
    digest = hashlib.sha256("\0".join([*learned, *held, *memorized]).encode()).hexdigest()
    run = {**asdict(config), **asdict(settings), "words": args.words, "dtype": args.dtype, "text": digest}
    path = args.out / "tokenizer.json"
    if state is not None:
        _refuse_other_run(state.run, run)
        tokenizer = read_tokenizer(path)
        if _digest(tokenizer) != state.run.get("tokenizer"):
            raise ValueError(f"{path} is another tokenizer than the one that this run began with")
    else:
        tokenizer = train_tokenizer(learned, config.vocab_size, args.words)
        put(path, tokenizer.inner.to_str().encode())  # refuses a place that cannot be written
    trainer = Trainer(config, settings, encode(tokenizer, learned + memorized), activations)
    if state is not None:
        trainer.restore(state)
    return trainer, tokenizer, {**run, "tokenizer": _digest(tokenizer), "options": given}


def _digest(tokenizer: Tokenizer) -> str:
    return hashlib.sha256(tokenizer.inner.to_str().encode()).hexdigest()


def _require_memory(args: argparse.Namespace, config: ModelConfig) -> None:
    """Raise ValueError for a model or a batch that this machine has no memory for."""
    sizes = ", ".join(f"--{name} {getattr(args, name.replace('-', '_'))}" for name in SIZES)
    # weights, their gradient, and two numbers of the optimizer for each, in float32
    require_memory(f"training with {sizes}", 16 * num_weights(config), device=True)
    require_memory(f"--batch-tokens is {args.batch_tokens}: a batch of this size", TOKEN_BYTES * args.batch_tokens)


def _train(
    args: argparse.Namespace, trainer: Trainer, tokenizer: Tokenizer, run: dict[str, Any], held: list[str]
) -> int:
    """Train to the end, or to Ctrl-C. `held`: the stories that are measured."""

    def measure() -> float:
        return bits_per_byte(trainer.weights, tokenizer, held)

    def save() -> None:
        save_state(args.out, trainer.state(run))
        save_model(args.out, trainer.weights, tokenizer, args.dtype)

    display, interrupts = Display(trainer), Interrupts()
    try:
        with interrupts, display.progress:
            while not trainer.done:
                display.show(trainer.step(interrupts.whole))
                if len(trainer.losses) % args.save_every == 0 and not trainer.done:
                    bits = measure()  # refuses weights that are no numbers, before they are written
                    with interrupts.whole():
                        save()
                    display.measured(bits)
    except KeyboardInterrupt:
        save()
        _say(f"stopped after step {len(trainer.losses)} of {args.steps}; --resume {args.out} continues", stderr=True)
        return STATUS
    bits = measure()
    save()
    for line in curve(trainer.losses, min(display.console.width, 100), CURVE_ROWS, "loss"):
        print(line)
    _say(f"{args.out}: {trainer.weights.flat.size} weights, {plural(args.steps, 'step')}, {bits:.4f} bits per byte "
         f"on {plural(len(held), 'story')} held out")  # fmt: skip
    return 0


def _config(args: argparse.Namespace) -> ModelConfig:
    require_memory(f"--layers is {args.layers}, which", LAYER_BYTES * args.layers)
    if args.head_size is None and args.hidden_size % max(1, args.heads):
        raise ValueError(f"--hidden-size is {args.hidden_size}; without --head-size a multiple of --heads "
                         f"{args.heads} is needed")  # fmt: skip
    return ModelConfig(
        vocab_size=args.vocab_size, hidden_size=args.hidden_size, intermediate_size=args.intermediate_size,
        num_layers=args.layers, num_heads=args.heads, num_kv_heads=args.kv_heads,
        head_size=args.head_size or args.hidden_size // max(1, args.heads), max_position_embeddings=args.context,
        rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=0, eos_token_ids=(0,),
    )  # fmt: skip


def _refuse_other_run(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Only the number of steps may differ: the learning rate then falls to its end over the steps that remain."""
    now = {name: list(value) if isinstance(value, tuple) else value for name, value in now.items()}  # as JSON has it
    for name, value in now.items():
        if name != "num_steps" and before.get(name) != value:
            raise ValueError(f"--resume continues a run whose {name} is {before.get(name)!r}; now it is {value!r}")


class Display:
    """A bar with loss and tokens per second on a terminal; elsewhere a line at each measurement."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.console = Console()
        self.progress = Progress(
            BarColumn(bar_width=10),
            TextColumn("step {task.completed}/{task.total}  loss {task.fields[loss]:.3f}"),
            TextColumn("{task.fields[speed]:.0f} tokens/s  {task.fields[bits]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        total, made = trainer.settings.num_steps, len(trainer.losses)
        self._task = self.progress.add_task("", total=total, completed=made, loss=float("nan"), speed=0.0, bits="")
        self._loss, self._tokens, self._seconds = 0.0, 0, 0.0

    def show(self, step: TrainingStep) -> None:
        self._loss = step.loss if not self._tokens else 0.95 * self._loss + 0.05 * step.loss
        self._tokens += step.num_tokens
        self._seconds += step.seconds
        self.progress.update(self._task, completed=step.number, loss=self._loss, speed=self._tokens / self._seconds)

    def measured(self, bits: float) -> None:
        self.progress.update(self._task, bits=f"{bits:.3f} bits/byte")
        if not self.console.is_terminal:
            at = f"step {len(self.trainer.losses)}/{self.trainer.settings.num_steps}"
            speed = f"{self._tokens / self._seconds:.0f} tokens/s"
            print(f"{at}  loss {self._loss:.3f}  {bits:.4f} bits per byte held out  {speed}", flush=True)
