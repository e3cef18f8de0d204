"""Your model, moved to pages in five small steps; a sixth does the same to a Hugging Face model.

    python lessons/refactor/run.py        # run all steps: how many lines each changes, and whether tokens change
    python lessons/refactor/run.py 3      # the diff that leads to step 3

Each step is a whole file that runs. Only what the diff shows has changed.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.util
import sys
from pathlib import Path

from decoder import Decoder
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from paged_ref import LLM, SamplingParams

HERE = Path(__file__).parent
FILES = sorted(path.stem for path in HERE.glob("step*.py"))
PROMPTS = ("Four score and seven years ago our", "Once upon a time", "Lily")


def diff(step: int) -> list[str]:
    """The unified diff of the files of `step - 1` and `step`, with all that stays around it."""
    old, new = FILES[step - 1], FILES[step]
    before, after = ((HERE / f"{name}.py").read_text(encoding="utf-8").splitlines() for name in (old, new))
    return list(difflib.unified_diff(before, after, f"{old}.py", f"{new}.py", lineterm="", n=99))


def count_changes(lines: list[str]) -> tuple[int, int]:
    """Lines that go and lines that come, the two header lines left out."""
    return (
        sum(line.startswith("-") for line in lines[2:]),
        sum(line.startswith("+") for line in lines[2:]),
    )


def token_ids(step: int, directory: str, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """What the code of `step` generates."""
    module = importlib.import_module(FILES[step])
    if step < 5:  # one sequence at a time
        model = Decoder(directory)
        return [module.generate(model, prompt, max_tokens) for prompt in prompts]
    if step == 5:
        return module.generate(Decoder(directory), prompts, max_tokens)
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from paged_ref.core.model.loading import TINY

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(TINY if directory == "tiny" else directory, dtype="float32")
    return module.generate(model.eval(), prompts, max_tokens)


def headline(step: int) -> str:
    """The first line of the file's docstring, without the number."""
    line = (HERE / f"{FILES[step]}.py").read_text(encoding="utf-8").splitlines()[0].strip('"')
    return line.removeprefix(f"Step {step}: ")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    last = len(FILES) - 1
    parser.add_argument("step", nargs="?", type=int, help=f"show the diff that leads to this step (1 to {last})")
    parser.add_argument("--model", default="tiny", metavar="DIR", help="a Hugging Face directory of a Llama")
    parser.add_argument("--max-tokens", type=int, default=40, metavar="N", help="new tokens for each prompt")
    args = parser.parse_args(arguments)
    console = Console()
    if args.step is not None and not 1 <= args.step <= last:
        parser.error(f"step is {args.step}; 1 to {last} can be had")
    if args.max_tokens < 1:
        parser.error(f"--max-tokens is {args.max_tokens}; at least 1 is needed")
    if args.step is not None:
        console.print(Syntax("\n".join(diff(args.step)), "diff", theme="ansi_dark", word_wrap=True))
        return 0

    try:
        llm = LLM(args.model)
        Decoder(args.model)
        prompts = [llm.tokenizer.encode(text) for text in PROMPTS]
        room = llm.max_model_len - max(map(len, prompts))
        if args.max_tokens > room:
            raise ValueError(f"--max-tokens is {args.max_tokens}; the model's context has room for {room}")
        outputs = llm.generate(prompts, SamplingParams(max_tokens=args.max_tokens, ignore_eos=True))
    except ValueError as error:
        parser.error(str(error))
    expected = [output.outputs[0].token_ids for output in outputs]
    table = Table("step", "lines", "tokens", "what it is", box=None, pad_edge=False, header_style="bold")
    wrong = 0
    for step in range(len(FILES)):
        gone, come = count_changes(diff(step)) if step else (0, 0)
        lines = f"-{gone} +{come}" if step else ""
        if step == 6 and not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
            table.add_row(str(step), lines, "not run", f"{headline(step)} (pip install -e '.[compare]')")
            continue
        same = token_ids(step, args.model, prompts, args.max_tokens) == expected
        wrong += not same
        table.add_row(str(step), lines, "the same" if same else "DIFFER", headline(step))
    console.print(table)
    console.print(f"{len(prompts)} prompts, {args.max_tokens} tokens each, compared with paged_ref's own LLM.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
