"""`paged-ref train`, as a person runs it: the files, the words, what it refuses, Ctrl-C and going on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from paged_ref import LLM
from paged_ref.cli import main
from paged_ref.interop.checkpoints import load
from paged_ref.training.checkpoint import STATE, load_state
from paged_ref.views.common.plots import curve

STORIES = "\n<|endoftext|>\n".join(
    f"The {animal} saw a {thing}. It was happy, and so the {animal} ran home." for animal in
    ("cat", "dog", "bird", "fish", "fox") for thing in ("tree", "ball", "house", "river")
)  # fmt: skip
SMALL = ["--vocab-size", "300", "--context", "32", "--hidden-size", "16", "--intermediate-size", "24", "--layers", "2",
         "--heads", "2", "--kv-heads", "1", "--batch-tokens", "64", "--warmup", "2"]  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "stories.txt"
    path.write_text(STORIES, encoding="utf-8")
    return path


def weights(directory: Path) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in load(directory).weights.items()}


@pytest.mark.parametrize(
    "memory", [[], ["--memory", "swap", "--budget", "8KiB"], ["--memory", "page", "--budget", "8KiB", "--page-size",
               "512"], ["--memory", "recompute"]], ids=["keep", "swap", "page", "recompute"])  # fmt: skip
def test_it_makes_a_model_that_the_engine_loads(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], memory: list[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["train", "--text", str(text), "--out", str(out), "--steps", "6", "--save-every", "3", *SMALL]
    assert main([*arguments, "--dtype", "float16", *memory]) == 0
    shown = capsys.readouterr().out
    assert "step 3/6  loss 5." in shown
    assert "bits per byte held out" in shown
    assert " ┤" in shown
    assert "6 steps, " in shown.splitlines()[-1]
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json", STATE]  # fmt: skip
    assert LLM(out).generate("The cat")[0].outputs[0].token_ids
    assert main(["train", "--text", str(text), "--measure", str(out)]) == 0
    measured = float(capsys.readouterr().out.split(": ")[1].split()[0])
    assert measured == pytest.approx(float(shown.split("6 steps, ")[1].split()[0]), abs=2e-3)  # float16
    if memory:
        assert main([*arguments[:4], str(tmp_path / "keep"), *arguments[5:], "--dtype", "float16"]) == 0
        assert (tmp_path / "keep" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_ctrl_c_leaves_a_checkpoint_that_goes_on_to_the_same_weights(text: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"

    def command(directory: Path) -> list[str]:
        return ["train", "--text", str(text), "--out", str(directory), "--steps", "400", "--save-every", "20", *SMALL]

    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "paged_ref", *command(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    assert "step 20/400" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    made = load_state(out).step
    assert 20 <= made < 400
    assert errors == f"stopped after step {made} of 400; --resume continues\n"
    assert LLM(out).generate("The cat")[0].outputs[0].token_ids
    for arguments in ([*command(out), "--resume"], command(whole)):
        subprocess.run(
            [sys.executable, "-m", "paged_ref", *arguments], check=True, capture_output=True, env=environment
        )
    found, wanted = weights(out), weights(whole)
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--held-out", "1"], "--held-out is 1.0; a share between 0 and 1 is needed"),
        (["--vocab-size", "9999"], "--vocab-size is 9999; the text has pieces for "),
        (["--context", "5000"], "the text is too short: "),
        (["--memory", "page"], "the budget is missing; page needs one"),
        (["--memory", "page", "--budget", "1KiB"], "the budget is 1024 bytes; at least one page of 65536 bytes"),
        (["--budget", "1KiB"], "a budget is given to keep, which has no use for it; swap and page have"),
        (["--heads", "3"], "--hidden-size is 16; without --head-size a multiple of --heads 3 is needed"),
        (["--heads", "0"], "num_heads is 0; at least 1 is needed"),
        (["--steps", "0"], "num_steps is 0; at least 1 is needed"),
        (["--save-every", "0"], "--save-every is 0; at least 1 is needed"),
        (["--resume"], "there is no run to continue"),
        (["--memorize", "nowhere.txt"], "nowhere.txt cannot be read: No such file or directory"),
    ],
)
def test_bad_input_is_one_sentence(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    assert main(["train", "--text", str(text), "--out", str(tmp_path / "out"), *SMALL, *arguments]) == 2
    errors = capsys.readouterr().err
    assert reason in errors
    assert errors.count("\n") == 1


def test_a_run_is_not_overwritten_and_no_other_is_continued(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--text", str(text), "--out", str(tmp_path / "out"), *SMALL]
    assert main([*command, "--steps", "2"]) == 0
    assert main([*command, "--steps", "2"]) == 2
    assert "holds a run already; --resume continues it" in capsys.readouterr().err
    assert main([*command, "--steps", "2", "--resume", "--seed", "5"]) == 2
    assert "--resume continues a run whose seed is 0; now it is 5" in capsys.readouterr().err
    assert main([*command, "--steps", "4", "--resume"]) == 0
    assert load_state(tmp_path / "out").step == 4


def test_a_size_that_is_none_is_refused(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--text", str(text), "--memory", "page", "--budget", "much"])
    assert "'much' is no size; bytes are needed, as in 65536, 64KiB or 1.5MiB" in capsys.readouterr().err


def test_the_curve_falls_from_upper_left_to_lower_right() -> None:
    lines = curve([5.0, 4.0, 3.0, 2.0, 1.0], 29, 6, "loss")
    assert [len(line) for line in lines] == [29] * 6
    assert lines[0].startswith("  5.000 ┤⠉")
    assert lines[4].startswith("  1.000 ┤")
    assert lines[4].endswith("⣀")
    assert lines[5] == "   loss └" + "─" * 20
    assert curve([], 40, 6) == []
    assert len(curve([2.0], 40, 6)) == 6
    assert len(curve(list(np.linspace(9, 1, 10_000)), 40, 6)[0]) == 40


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        ("1e30", "step 2 has a loss of "),
        ("inf", "learning_rate is inf; a finite number above 0 is needed"),
        ("nan", "learning_rate is nan; a finite number above 0 is needed"),
    ],
)
def test_a_loss_that_is_no_number_keeps_the_checkpoint(
    text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], rate: str, message: str
) -> None:
    out = tmp_path / "out"
    arguments = ["train", "--text", str(text), "--out", str(out), *SMALL, "--save-every", "1", "--warmup", "0"]
    assert main([*arguments, "--steps", "4", "--learning-rate", rate]) == 2
    shown = capfd.readouterr()
    assert message in shown.err
    assert "Warning" not in shown.err
    if rate == "1e30":
        assert load_state(out).step == 1  # the last step whose numbers are numbers
        assert all(np.isfinite(array).all() for array in weights(out).values())


def test_a_rate_of_100_ends_in_a_sentence_and_keeps_the_checkpoint(
    text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["train", "--text", str(text), "--out", str(out), *SMALL, "--save-every", "1", "--warmup", "0"]
    assert main([*arguments, "--steps", "30", "--learning-rate", "100"]) == 2
    assert (
        "the stories have a loss of nan: the weights of the model hold NaN, or are too large" in capfd.readouterr().err
    )
    assert all(np.isfinite(array).all() for array in weights(out).values())
