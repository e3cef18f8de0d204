"""The command line as a user meets it: what is printed, the exit status, one sentence for bad input."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.manager_state import replay

from paged_ref import __version__
from paged_ref.bench import BENCHMARKS
from paged_ref.cli import COMMANDS, _parser, main
from paged_ref.core.model.loading import TINY
from paged_ref.timeline.events import from_json
from paged_ref.tuned import threads
from paged_ref.views.common.program import short_path

PAPER = "Four score and seven years ago our"


def run(*argv: str, columns: int = 80, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": str(columns), "PAGED_REF_DEVICE": "cpu"}
    command = [sys.executable, "-m", "paged_ref", *argv]
    return subprocess.run(command, capture_output=True, text=True, env=environment, input=stdin, timeout=120)


def test_generate_streams_the_text(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompt", PAPER, "--max-tokens", "3"]) == 0
    assert capfd.readouterr().out == f"{PAPER} fathers brought forth\n"


def test_the_number_of_threads_is_the_callers(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NUMBA_NUM_THREADS", "7")
    monkeypatch.setattr(threads, "cores", lambda: 8)
    threads.num_threads.cache_clear()
    try:
        assert main(["--threads", "3", "info"]) == 0
        assert threads.num_threads() == 3
    finally:
        threads.num_threads.cache_clear()


def test_generate_takes_several_prompts_and_samples(capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", "--prompt", PAPER, "--prompt", "The cat", "--max-tokens", "4", "--n", "2"]
    assert main([*argv, "--temperature", "0.8", "--seed", "1", "--manager", "standard"]) == 0
    printed = capfd.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("---")] == [
        f"--- prompt {prompt}, sample {sample}" for prompt in (1, 2) for sample in (1, 2)
    ]
    assert printed.count("The cat") == printed.count(PAPER) == 2


def test_generate_searches_with_beams_and_records(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "run.jsonl"
    argv = ["generate", "--prompt", PAPER, "--max-tokens", "4", "--beam-width", "2", "--record", str(record)]
    assert main([*argv, "--prefix-cache", "--sanitize", "--preemption", "swap"]) == 0
    printed = capfd.readouterr().out.splitlines()
    assert printed[0] == "--- prompt 1, sample 1"
    assert printed[1].startswith(f"{PAPER} fathers brought forth")
    with record.open(encoding="utf-8") as file:
        assert replay(map(from_json, file)).sequences == {}


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_generate_reads_a_prompt_from_standard_input(ending: str) -> None:
    done = run("generate", "--prompt", "-", "--max-tokens", "3", stdin=PAPER + ending)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{PAPER} fathers brought forth\n", "")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the prompt is empty"),
        (b"Once \xff", "--prompt - is no text: byte 5 of standard input is not UTF-8"),
        (b"a" * ((1 << 24) + 1), "--prompt - has more than 16,777,216 bytes"),
    ],
    ids=["empty", "bytes", "long"],
)
def test_a_standard_input_that_is_no_prompt_is_one_sentence(data: bytes, message: str) -> None:
    command = [sys.executable, "-m", "paged_ref", "generate", "--prompt", "-"]
    done = subprocess.run(command, input=data, capture_output=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (2, b"", 1)
    assert message in done.stderr.decode()


@pytest.mark.parametrize(
    "argv", ["generate --prompt BAD", "viz --prompt BAD", "generate --prompt a --stop BAD", "train --out x --words BAD"]
)
def test_half_characters_are_one_sentence(argv: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([os.fsdecode(b"\xff\xfe") if word == "BAD" else word for word in argv.split()]) == 2
    option = argv.split()[-2]
    assert capsys.readouterr().err == (
        f"paged-ref: error: {option} holds '\\udcff' at place 0, which is no character\n"
    )


def test_equal_samples_are_named(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompt", PAPER, "--max-tokens", "3", "--n", "3"]) == 0
    printed = capfd.readouterr()
    assert printed.err == "--n is 3, and at --temperature 0 all samples are the same\n"
    assert printed.out.count(f"{PAPER} fathers brought forth\n") == 3


def test_generate_prints_log_probabilities_and_takes_penalties(capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", "--prompt", PAPER, "--max-tokens", "2", "--logprobs", "1", "--kv-dtype", "fp8"]
    assert main([*argv, "--bad-word", "brought", "--repetition-penalty", "1.1", "--min-tokens", "1"]) == 0
    text, first, second = capfd.readouterr().out.splitlines()
    assert text.startswith(f"{PAPER} fathers")
    assert "brought" not in text
    assert re.fullmatch(r"·fathers -0\.01\d +rank 1", first)
    assert re.fullmatch(r"\S+ -\d+\.\d{3} +rank \d+   1\. ·brought -0\.\d{3}", second)


def test_generate_chats(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).symlink_to(TINY / name)
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}our")
    argv = ["generate", "--model", str(tmp_path), "--chat", "--system", "Four score and", "--max-tokens", "3"]
    assert main([*argv, "--prompt", "seven years ago"]) == 0
    assert capfd.readouterr().out == "seven years ago\n fathers brought forth\n"
    argv[2:3] = ["tiny", "--chat-template", str(tmp_path / "chat_template.jinja")]
    assert main([*argv, "--prompt", "seven years ago"]) == 0
    assert capfd.readouterr().out == "seven years ago\n fathers brought forth\n"


@pytest.mark.parametrize("columns", [50, *(pytest.param(wide, marks=pytest.mark.slow) for wide in (80, 160))])
def test_the_demo_compares_two_identical_runs(columns: int) -> None:
    done = run("demo", columns=columns)
    assert done.returncode == 0, done.stderr
    words = " ".join(done.stdout.split())
    for expected in (
        "Token ids of the two runs: identical",
        "·fathers",
        "running sequences, peak",
        "memory holding tokens",
        "preemptions",
        f"Next: {short_path(Path(sys.executable))} -m paged_ref viz --tour",
    ):
        assert expected in words
    assert max(map(len, done.stdout.splitlines())) <= columns


def test_the_demo_runs_on_another_checkpoint(stories260k: Path) -> None:
    done = run("demo", "--model", str(stories260k), "--block-size", "8", "--backend", "reference")
    assert done.returncode == 0, done.stderr
    assert "identical" in done.stdout
    assert "(block size 8)" in done.stdout


def test_info_names_device_backends_and_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for expected in ("Device:", "reference", "cpu", "cuda", "numpy", "numba"):
        assert expected in printed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "--prompt", ""], "the prompt is empty"),
        (["generate", "--prompt", "a", "--max-tokens", "0"], "--max-tokens is 0; at least 1"),
        (["generate", "--prompt", "a", "--block-size", "0"], "--block-size is 0; at least 1"),
        (["generate", "--prompt", "a", "--block-size", "-1"], "--block-size is -1; at least 1"),
        (["generate", "--prompt", "a " * 600], "context of 512"),
        (["generate", "--prompt", "a " * 80, "--kv-tokens", "64"], "the KV cache holds 64 tokens"),
        (["generate", "--prompt", "a", "--model", "nowhere"], "nowhere is not a directory"),
        (["generate", "--prompt", "a", "--backend", "magic"], "backend is 'magic'; known are"),
        (["generate", "--prompt", "a", "--top-p", "2"], "--top-p is 2.0"),
        (["generate", "--prompt", "a", "--min-p", "2"], "--min-p is 2.0; 0 to 1 is needed"),
        (["generate", "--prompt", "a", "--presence-penalty", "3"], "--presence-penalty is 3.0; -2 to 2 is needed"),
        (["generate", "--prompt", "a", "--logprobs", "9999"], "logprobs is 9999; the vocabulary has 2048 tokens"),
        (["generate", "--prompt", "a", "--min-tokens", "101"], "--min-tokens is 101; at most --max-tokens = 100"),
        (
            ["generate", "--prompt", "a", "--kv-dtype", "int4"],
            "--kv-dtype is 'int4'; known are float32, bfloat16",
        ),
        (
            ["generate", "--prompt", "a", "--kv-dtype", "int8", "--backend", "cpu"],
            "--kv-dtype is 'int8', and backend 'cpu'",
        ),
        (["generate", "--prompt", "a", "--system", "x"], "--system is 'x' without --chat"),
        (["generate", "--prompt", "a", "--chat-template", "x"], "--chat-template is 'x' without --chat"),
        (["generate", "--prompt", "a", "--chat", "--replicas", "1"], "--chat does not go with it"),
        (["generate", "--prompt", "a", "--chat"], "tiny has no chat template"),
        (["generate", "--prompt", "a", "--stop", "x<|endoftext|>"], "which contains the special token"),
        (["generate", "--prompt", "a", "--beam-width", "2", "--manager", "standard"], "only the paged manager"),
        (["generate", "--prompt", "a", "--beam-width", "2", "--temperature", "1"], "beam search takes no temperature"),
        (["generate", "--prompt", "a", "--preemption", "swap", "--manager", "standard"], "cannot swap"),
        (["generate", "--prompt", "a", "--host-kv-tokens", "-1"], "-1"),
        (
            ["generate", "--prompt", "a", "--record", "no/such/place/run.jsonl"],
            "no/such/place/run.jsonl cannot be written",
        ),
        (["bench", "kernels", "--rounds", "0"], "--rounds is 0; at least 1"),
        (["bench", "kernels", "--shape", "zzz"], "--shape is 'zzz'; known are: decode"),
        (["--threads", "0", "demo"], "--threads is 0; at least 1"),
        (["demo", "--kv-tokens", "0"], "at least"),
        (["demo", "--kv-tokens", "100"], "100"),
        (["demo", "--block-size", "0"], "--block-size is 0"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    argv: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    printed = capfd.readouterr().err
    assert message in printed
    assert printed.startswith("paged-ref: error: ")
    assert printed.count("\n") == 1
    assert "Traceback" not in printed


@pytest.mark.parametrize("argv", [["generate"], ["nothing"], [], ["demo", "--kv-tokens", "many"]])
def test_a_wrong_command_line_is_status_2(argv: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        main(argv)
    assert "usage: paged-ref" in capfd.readouterr().err


def test_an_unknown_device_is_refused() -> None:
    environment = {**os.environ, "PAGED_REF_DEVICE": "gpu"}
    command = [sys.executable, "-m", "paged_ref", "info"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stderr) == (
        2,
        "paged-ref: error: PAGED_REF_DEVICE is 'gpu'; known are 'auto' and 'cpu'\n",
    )


def test_a_broken_checkpoint_from_the_command_line(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(TINY / name, tmp_path)
    whole = (TINY / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    done = run("generate", "--prompt", "a", "--model", str(tmp_path))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "model.safetensors" in done.stderr


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m paged_ref generate --prompt Once --max-tokens 200 | head -c 3"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("Onc", "")


def test_a_file_that_cannot_be_written_is_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(args: object) -> int:
        Path("/nowhere/results.json").write_text("{}", encoding="utf-8")
        return 0

    monkeypatch.setattr("paged_ref.commands.info.main", write)
    assert main(["info"]) == 2
    assert capsys.readouterr().err == "paged-ref: error: /nowhere/results.json: No such file or directory\n"


@pytest.mark.parametrize("command", [["demo"], ["bench", "memory"]])
def test_the_usage_of_a_command_begins_with_what_is_typed(
    command: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    assert capfd.readouterr().out.startswith(f"usage: paged-ref {' '.join(command)} [-h]")


def test_the_whole_help_is_one_screen_with_every_command(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) <= 34
    assert max(map(len, lines)) <= 86
    assert set(COMMANDS) <= {line.split()[0] for line in lines if line.startswith("  ")}


def test_the_version_is_that_of_the_package(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capfd.readouterr().out == f"paged_ref {__version__}\n"


@pytest.mark.parametrize(
    "example",
    [example for commands in (COMMANDS, BENCHMARKS) for command in commands.values() for example in command[2]],
)
def test_each_example_of_the_help_is_accepted(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if example.endswith("--help"):
        with pytest.raises(SystemExit, match=r"^0$"):
            _parser().parse_args(shlex.split(example))
    else:
        assert _parser().parse_args(shlex.split(example)).command == example.split()[0]


def test_each_command_and_benchmark_has_an_example() -> None:
    assert [name for name, command in {**COMMANDS, **BENCHMARKS}.items() if not command[2]] == []


@pytest.mark.parametrize(
    ("typed", "completed"),
    [("ge", "generate"), ("generate --ma", "--manager"), ("generate --manager p", "paged"), ("bench ker", "kernels")],
)
def test_a_shell_completes(typed: str, completed: str, tmp_path: Path) -> None:
    pytest.importorskip("argcomplete", reason="needs the extra completion")
    line = f"paged-ref {typed}"
    environment = {
        **os.environ, "_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "COMP_LINE": line, "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9", "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "completions"),
    }  # fmt: skip
    subprocess.run([sys.executable, "-c", "from paged_ref.cli import main; main()"], env=environment, timeout=60)
    assert completed in (tmp_path / "completions").read_text().split()
