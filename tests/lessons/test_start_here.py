"""The way to pages: each step is small, and gives the tokens of the LLM, or of the model as it was before."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paged_ref import LLM, SamplingParams

START_HERE = Path(__file__).resolve().parents[2] / "lessons" / "start_here"
STEPS = sorted(path.stem for path in START_HERE.glob("step*.py"))
MAX_TOKENS = 40  # a block of 16 slots fills up, and a second


@pytest.fixture(scope="module")
def run() -> Iterator[Any]:
    """The runner, as a module; what is in its folder can be imported."""
    sys.path.insert(0, str(START_HERE))
    yield importlib.import_module("run")
    sys.path.remove(str(START_HERE))


@pytest.fixture(scope="module")
def expected() -> dict[str, tuple[list[list[int]], list[list[int]]]]:
    """By directory: prompts, and what the package's own LLM makes of them."""
    return {}


def ids_of_llm(directory: str, texts: tuple[str, ...]) -> tuple[list[list[int]], list[list[int]]]:
    llm = LLM(directory)
    prompts = [llm.tokenizer.encode(text) for text in texts]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True))
    return prompts, [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("model", ["tiny", "stories260K"])
@pytest.mark.parametrize("step", range(6))
def test_a_step_gives_the_tokens_of_the_llm(
    run: Any, expected: dict[str, Any], request: pytest.FixtureRequest, model: str, step: int
) -> None:
    directory = model if model == "tiny" else str(request.getfixturevalue("stories260k"))
    if model not in expected:
        expected[model] = ids_of_llm(directory, run.PROMPTS)
    prompts, ids = expected[model]
    assert run.token_ids(step, directory, prompts, MAX_TOKENS) == ids


def test_each_step_is_small(run: Any) -> None:
    assert [name[:5] for name in run.FILES] == [f"step{i}" for i in range(7)]
    sizes = [sum(run.count_changes(run.diff(step))) for step in range(1, 7)]
    assert all(0 < size <= 30 for size in sizes[:3])
    assert all(0 < size <= 75 for size in sizes[3:5])
    assert run.count_changes(run.diff(6))[1] <= 20  # of step 5 nearly all goes


def test_step_5_holds_just_the_blocks_that_its_tokens_need(run: Any) -> None:
    step5 = importlib.import_module("step5_pool")
    model = importlib.import_module("decoder").Decoder()
    cache = step5.Cache(model.config)
    seqs = [step5.Sequence(list(range(1, 1 + count))) for count in (1, 16, 17)]
    for seq in seqs:
        seq.grow(cache.pool)
    step5.forward(model, seqs, cache)
    assert [len(seq.block_table) for seq in seqs] == [1, 1, 2]
    assert cache.pool.num_free == step5.NUM_BLOCKS - 4
    assert np.isfinite(cache.keys[:, cache.pool.ref_count.index(1)]).any()


def test_the_runner_shows_all_steps_and_one_diff(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--max-tokens", "3"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("the same") >= 6
    assert "DIFFER" not in shown
    assert run.main(["3"]) == 0
    assert "+from paged_ref.kernels import slot_of, write_kv" in capsys.readouterr().out


def piped(*arguments: str) -> bytes:
    """What the runner writes into a pipe, in a narrow terminal that asks for colours."""
    environment = {**os.environ, "COLUMNS": "40", "FORCE_COLOR": "1", "PAGED_REF_DEVICE": "cpu"}
    command = [sys.executable, str(START_HERE / "run.py"), *arguments]
    return subprocess.run(command, capture_output=True, check=True, env=environment, timeout=120).stdout


def test_a_pipe_gets_whole_lines_without_colours() -> None:
    shown = piped("--max-tokens", "2").decode()
    lines = shown.splitlines()
    assert "\x1b" not in shown
    for step in range(7):
        headline = (START_HERE / f"{STEPS[step]}.py").read_text(encoding="utf-8").splitlines()[0].strip('"')
        assert lines[1 + step].endswith(headline.removeprefix(f"Step {step}: ")), "the whole headline"
    if "not run" in shown:
        assert lines[-1].endswith(f"-m pip install -e '{START_HERE.parents[1]}[compare]'")


@pytest.mark.slow
def test_a_reader_that_ends_ends_the_runner_quietly() -> None:
    command = [sys.executable, str(START_HERE / "run.py"), "3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as runner:
        assert runner.stdout is not None
        assert runner.stderr is not None
        runner.stdout.close()
        assert runner.stderr.read() == b""


@pytest.mark.skipif(not shutil.which("patch"), reason="the program patch is not installed")
@pytest.mark.parametrize("step", range(1, 7))
def test_a_diff_in_a_file_is_a_patch(tmp_path: Path, step: int) -> None:
    before, after = (START_HERE / f"{STEPS[i]}.py" for i in (step - 1, step))
    (tmp_path / "saved.diff").write_bytes(piped(str(step)))
    subprocess.run(["patch", "-o", "mine.py", before, "saved.diff"], cwd=tmp_path, check=True, timeout=60)
    assert (tmp_path / "mine.py").read_bytes() == after.read_bytes()
    # Beside all the other steps, where the name in the diff alone must say which file is meant.
    for path in START_HERE.glob("step*.py"):
        shutil.copy(path, tmp_path)
    subprocess.run(["patch", "-p0", "-i", "saved.diff"], cwd=tmp_path, check=True, timeout=60)
    changed = [
        path.name for path in START_HERE.glob("step*.py") if path.read_bytes() != (tmp_path / path.name).read_bytes()
    ]
    assert changed == [before.name]
    assert (tmp_path / before.name).read_bytes() == after.read_bytes()


def test_the_readmes_count_the_lines_that_a_reader_starts_with() -> None:
    counts = {
        name: len((START_HERE / name).read_text("utf-8").splitlines()) for name in ("decoder.py", "step5_pool.py")
    }
    text = (START_HERE / "README.md").read_text("utf-8")
    for name, count in counts.items():
        assert f"[{name}]({name}) ({count} lines)" in text
    for readme in (START_HERE, START_HERE.parent, START_HERE.parents[1]):
        said = re.findall(r"(\d+) lines", (readme / "README.md").read_text("utf-8"))
        assert str(sum(counts.values())) in said, readme


def test_the_runner_tells_a_step_that_changes_a_token(
    run: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step3 = importlib.import_module("step3_table")
    monkeypatch.setattr(step3, "slot_of", lambda table, position, size: table[position // size] * size)
    assert run.main(["--max-tokens", "12"]) == 1
    assert capsys.readouterr().out.count("DIFFER") == 1


@pytest.mark.parametrize(
    "bad", [["0"], ["7"], ["--max-tokens", "0"], ["--max-tokens", "100000"], ["--model", "nowhere"]]
)
def test_the_runner_refuses_in_one_sentence(run: Any, capsys: pytest.CaptureFixture[str], bad: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run.main(bad)
    assert ended.value.code == 2
    assert bad[-1] in capsys.readouterr().err.splitlines()[-1]


# --- Hugging Face ------------------------------------------------------------------------------------------


def hugging_face_model(kind: str, request: pytest.FixtureRequest) -> Any:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.set_num_threads(1)  # so small a model gains nothing by more, and they wait for a core by spinning
    if kind == "stories260K":
        directory = request.getfixturevalue("stories260k")
        return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="float32").eval()
    sizes = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "mistral":
        config = transformers.MistralConfig(**sizes, sliding_window=8)
        return transformers.MistralForCausalLM(config).eval()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()


@pytest.mark.compare
@pytest.mark.parametrize("kind", ["llama", "mistral", "stories260K"])
def test_a_hugging_face_model_keeps_its_tokens(run: Any, request: pytest.FixtureRequest, kind: str) -> None:
    model = hugging_face_model(kind, request)
    import torch

    prompts = [[1, 5, 9, 33, 2], [1, *range(20, 50)], [1, 7]]
    before = []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=MAX_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        before.append(out[0, len(prompt) :].tolist())
    assert len({token for ids in before for token in ids}) > 10  # a model that says something
    assert importlib.import_module("step6_huggingface").generate(model, prompts, MAX_TOKENS) == before
