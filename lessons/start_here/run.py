"""A decoder moved to pages in five small steps; a sixth step does the same to a Hugging Face model.

    python lessons/start_here/run.py        # run all steps: how many lines each changes, and whether tokens change
    python lessons/start_here/run.py 3      # the diff that leads to step 3; in a file it is a patch

Each step is a whole file that runs. Only what the diff shows has changed.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.util
import signal
import sys
from pathlib import Path

from decoder import Decoder
from rich.console import Console
from rich.syntax import Syntax

from paged_ref import LLM, SamplingParams

HERE = Path(__file__).resolve().parent
FILES = sorted(path.stem for path in HERE.glob("step*.py"))
PROMPTS = ("Four score and seven years ago our", "Once upon a time", "Lily")


def diff(step: int) -> list[str]:
    """The unified diff of the files of `step - 1` and `step`, with all the lines that stay.

    Both head lines name the file of `step - 1`, so that `patch` changes that file although both lie in this folder.
    """
    old, new = (f"{name}.py" for name in FILES[step - 1 : step + 1])
    before, after = ((HERE / name).read_text(encoding="utf-8").splitlines() for name in (old, new))
    return list(difflib.unified_diff(before, after, old, old, "before", f"becomes {new}", n=99, lineterm=""))


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


def show_diff(step: int) -> None:
    """With colours on a terminal; elsewhere as it is, so that `patch` can read it."""
    text = "\n".join(diff(step))
    if sys.stdout.isatty():
        Console().print(Syntax(text, "diff", theme="ansi_dark", word_wrap=True))
    else:
        print(text)


def expected_ids(directory: str, max_tokens: int) -> tuple[list[list[int]], list[list[int]]]:
    """The prompts, and what paged_ref's own LLM makes of them. ValueError for a model or a length that it refuses."""
    llm = LLM(directory)
    Decoder(directory)
    prompts = [llm.tokenizer.encode(text) for text in PROMPTS]
    most = llm.max_model_len - max(map(len, prompts))
    if max_tokens > most:
        raise ValueError(f"--max-tokens is {max_tokens}; the model's context has room for {most}")
    outputs = llm.generate(prompts, SamplingParams(max_tokens=max_tokens, ignore_eos=True))
    return prompts, [output.outputs[0].token_ids for output in outputs]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    last = len(FILES) - 1
    parser.add_argument("step", nargs="?", type=int, help=f"show the diff that leads to this step (1 to {last})")
    parser.add_argument("--model", default="tiny", metavar="DIR", help="a Hugging Face directory of a Llama")
    parser.add_argument("--max-tokens", type=int, default=40, metavar="N", help="new tokens for each prompt")
    args = parser.parse_args(arguments)
    if args.step is not None and not 1 <= args.step <= last:
        parser.error(f"step is {args.step}; 1 to {last} is allowed")
    if args.max_tokens < 1:
        parser.error(f"--max-tokens is {args.max_tokens}; at least 1 is needed")
    if args.step is not None:
        show_diff(args.step)
        return 0

    try:
        prompts, expected = expected_ids(args.model, args.max_tokens)
    except ValueError as error:
        parser.error(str(error))
    print(f"{'step':<6}{'lines':<9}{'tokens':<10}what it is")
    wrong = 0
    for step in range(len(FILES)):
        lines = "-{} +{}".format(*count_changes(diff(step))) if step else ""
        if step == 6 and not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
            tokens = "not run"
        else:
            same = token_ids(step, args.model, prompts, args.max_tokens) == expected
            wrong += not same
            tokens = "the same" if same else "DIFFER"
        print(f"{step:<6}{lines:<9}{tokens:<10}{headline(step)}")
    print(f"{len(prompts)} prompts, {args.max_tokens} tokens each, compared with paged_ref's own LLM.")
    if tokens == "not run":
        print(f"Step 6 needs PyTorch and transformers: {sys.executable} -m pip install -e '{HERE.parents[1]}[compare]'")
    return 1 if wrong else 0


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # where the reader of a pipe ends, as `| head` does, this program ends, too
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
