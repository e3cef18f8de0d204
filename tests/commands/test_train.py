"""`paged-ref train`, as a person runs it: the files, the words, what it refuses, Ctrl-C and going on."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paged_ref import LLM
from paged_ref.cli import main
from paged_ref.commands.train import OPTIONS
from paged_ref.extras import memory_limit
from paged_ref.interop.checkpoints import load
from paged_ref.training.checkpoint import STATE, alone_in, load_state, save_state
from paged_ref.views.common.plots import curve

STORIES = "\n<|endoftext|>\n".join(
    f"The {animal} saw a {thing}. It was happy, and so the {animal} ran home." for animal in
    ("cat", "dog", "bird", "fish", "fox") for thing in ("tree", "ball", "house", "river")
)  # fmt: skip
SMALL = ["--vocab-size", "300", "--context", "32", "--hidden-size", "16", "--intermediate-size", "24", "--layers", "2",
         "--heads", "2", "--kv-heads", "1", "--batch-tokens", "64", "--warmup", "2"]  # fmt: skip


@pytest.fixture(autouse=True)
def memory_of_16_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_limit, "machine_memory", lambda: 16_000_000_000)
    monkeypatch.setattr(memory_limit, "gpu_memory", lambda: 16_000_000_000)


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


def test_the_last_line_breaks_between_words(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["train", "--text", str(text), "--out", "out", "--steps", "1", *SMALL]
    monkeypatch.chdir(tmp_path)
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm"), ("COLUMNS", "60")):  # Rich then sees a terminal
        monkeypatch.setenv(name, value)
    assert main(arguments) == 0
    first, second = [line.rstrip() for line in capsys.readouterr().out.splitlines()[-2:]]
    assert re.fullmatch(r"out: \d+ weights, 1 step, \d.\d{4} bits per byte on 1 story held out", f"{first} {second}")
    assert 45 < len(first) <= 60


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
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    made = load_state(out).step
    assert 20 <= made < 400
    assert errors == f"stopped after step {made} of 400; --resume {out} continues\n"
    assert LLM(out).generate("The cat")[0].outputs[0].token_ids
    for arguments in (["train", "--resume", str(out)], command(whole)):
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
        (["--heads", "0"], "--heads is 0; at least 1 is needed"),
        (["--steps", "0"], "--steps is 0; at least 1 is needed"),
        (["--save-every", "0"], "--save-every is 0; at least 1 is needed"),
        (["--resume", "nowhere"], "--resume is nowhere, which is not a directory; there is no run to continue"),
        (["--resume", "."], "training_state.safetensors is missing; there is no run to continue"),
        (["--layers", "99999999"], "--layers is 99999999, which needs 6,553.6 GB; this machine has 16.0 GB"),
        (["--hidden-size", "99999984"], "--hidden-size 99999984, --intermediate-size 24, --layers 2 needs "),
        (["--vocab-size", "99999999999"], "training with --vocab-size 99999999999, --hidden-size 16, --intermediate"),
        (
            ["--batch-tokens", "10000000000"],
            "--batch-tokens is 10000000000: a batch of this size needs 80.0 GB; this machine has 16.0 GB",
        ),
        (
            ["--batch-tokens", "1000000000", "--micro-tokens", "10000000000"],
            "--micro-tokens is 1000000032: what the layers save for backward needs ",
        ),
        (
            ["--memory", "page", "--budget", "999999GiB", "--page-size", "999999GiB"],
            "the page size is 1073740750258176: a pool of such pages needs ",
        ),
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
    assert f"holds a run already; --resume {tmp_path / 'out'} continues it" in capsys.readouterr().err
    out = str(tmp_path / "out")
    assert main(["train", "--resume", out, "--seed", "5"]) == 2
    assert "--resume continues a run whose seed is 0; now it is 5" in capsys.readouterr().err
    assert main([*command, "--resume", out]) == 2
    assert f"--out is given with --resume {out}" in capsys.readouterr().err
    assert main(["train", "--resume", out, "--steps", "4"]) == 0
    assert load_state(tmp_path / "out").step == 4


def test_a_run_goes_on_with_its_own_options_and_none_is_asked_for_again(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each option is given once, and not as its default; the run goes on in another directory of the shell."""
    known = tmp_path / "known.txt"
    known.write_text("The cat ran home.", encoding="utf-8")
    own = {
        "--steps": "2", "--held-out": "0.2", "--memorize": str(known), "--memory": "page",
        "--budget": "8KiB", "--page-size": "512", "--dtype": "float16", "--head-size": "6", "--micro-tokens": "40",
        "--optimizer": "muon", "--learning-rate": "0.01", "--weight-decay": "0.2", "--dropout": "0.3", "--seed": "7",
        "--save-every": "1",
    }  # fmt: skip
    chosen = [*(word for pair in own.items() for word in pair), "--words=-"]
    monkeypatch.chdir(tmp_path)
    sizes = {name.removeprefix("--").replace("-", "_") for name in (*SMALL[::2], *own, "--words")}
    assert {*sizes, "text"} == set(OPTIONS), "an option that the run does not keep, or that this test leaves out"
    assert main(["train", "--text", text.name, "--out", "out", *SMALL, *chosen]) == 0
    assert main(["train", "--text", text.name, "--out", "whole", *SMALL, *chosen, "--steps", "5"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["train", "--resume", "../out", "--steps", "5"]) == 0
    kept = load_state(tmp_path / "out").run["options"]
    assert kept == load_state(tmp_path / "whole").run["options"]
    expected = {"--text", str(text), f"--memorize={known}", "--steps=5", "--dropout=0.3", "--words=-"}
    assert expected <= set(kept)


def test_a_second_training_into_one_directory_is_refused_before_it_starts(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["train", "--text", str(text), "--out", str(out), *SMALL, "--steps", "1"]
    with alone_in(out):
        assert main(command) == 2
        assert f"{out} is in use: another training writes to it" in capsys.readouterr().err
        assert list(out.iterdir()) == []
    assert not out.exists()
    assert main(command) == 0
    (out / STATE).write_bytes(b"the other training is writing here")
    with alone_in(out):
        assert main(["train", "--resume", str(out)]) == 2
    assert f"{out} is in use: another training writes to it" in capsys.readouterr().err


def test_a_text_in_latin_1_is_refused_and_loses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(STORIES.replace("happy", "caf\u00e9").encode("latin-1"))
    assert main(["train", "--text", str(path), "--out", str(tmp_path / "out"), *SMALL]) == 2
    place = STORIES.index("happy") + 3
    assert (
        f"{path} is not text in UTF-8: byte {place} is 0xe9; a text in Latin-1 must be converted"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: replace(state, arrays={**state.arrays, "weights": state.arrays["weights"][:1]}),
         "the state after step 2 has weights in float32 and of shape [1]; float32 and ["),
        (lambda state: replace(state, arrays={**state.arrays, "weights": state.arrays["weights"].astype(np.float64)}),
         "the state after step 2 has weights in float64 and of shape ["),
        (lambda state: replace(state, step=3), "the state after step 3 has losses in float64 and of shape [2]"),
        (lambda state: replace(state, arrays={k: v for k, v in state.arrays.items() if k != "optimizer.1"}),
         "optimizer.1 is one too many, or missing"),
        (lambda state: replace(state, arrays={**state.arrays, "extra": np.zeros(2)}), "extra is one too many"),
        (lambda state: replace(state, run={**state.run, "options": 5}), "is not a run's state: it keeps no options"),
        (lambda state: replace(state, run={"options": [5]}), "is not a run's state: it keeps no options"),
    ],
    ids=["shape", "dtype", "step", "missing", "extra", "no options", "no texts"],
)  # fmt: skip
def test_a_state_of_another_run_is_refused(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, message: str
) -> None:
    out = tmp_path / "out"
    assert main(["train", "--text", str(text), "--out", str(out), *SMALL, "--steps", "2"]) == 0
    save_state(out, change(load_state(out)))
    before = (out / STATE).read_bytes()
    assert main(["train", "--resume", str(out), "--steps", "4"]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
    assert (out / STATE).read_bytes() == before


def test_another_texts_tokenizer_is_refused(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.txt"
    other.write_text(STORIES.replace("happy", "tired").replace("home", "away"), encoding="utf-8")
    for path, out in ((text, "out"), (other, "else")):
        assert main(["train", "--text", str(path), "--out", str(tmp_path / out), *SMALL, "--steps", "2"]) == 0
    shutil.copy(tmp_path / "else" / "tokenizer.json", tmp_path / "out" / "tokenizer.json")
    assert main(["train", "--resume", str(tmp_path / "out"), "--steps", "4"]) == 2
    assert "tokenizer.json is another tokenizer than the one that this run began with" in capsys.readouterr().err


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
        ("inf", "--learning-rate is inf; a finite number above 0 is needed"),
        ("nan", "--learning-rate is nan; a finite number above 0 is needed"),
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
