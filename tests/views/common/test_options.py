"""What command lines share: bounds that name option and value, files refused at the command line, lazy subcommands."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from paged_ref.cli import main
from paged_ref.views.common import options


def parsed(make: object, *argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    make(parser)  # type: ignore[operator]
    return parser.parse_args(argv)


@pytest.mark.parametrize(
    ("make", "argv", "message"),
    [
        (lambda p: options.integer(p, "--rounds"), ["--rounds", "0"], "--rounds is 0; at least 1 is needed"),
        (lambda p: options.integer(p, "--rounds"), ["--rou", "-3"], "--rounds is -3; at least 1 is needed"),
        (lambda p: options.integer(p, "--sizes", nargs="+"), ["--sizes", "4", "0"],
         "--sizes holds 0; at least 1 is needed"),
        (lambda p: options.positive(p, "--minutes"), ["--minutes", "nan"], "--minutes is nan; a positive number is"),
        (lambda p: options.positive(p, "--minutes"), ["--minutes", "inf"], "--minutes is inf; a positive number is"),
        (lambda p: options.share(p, "--held-out"), ["--held-out", "1"], "--held-out is 1.0; a share between 0 and 1"),
        (options.json_output, ["--json", "no/such/place.json"], "--json no/such/place.json cannot be written: there"),
        (options.record_output, ["--record", "/"], "--record / cannot be written: it is a directory"),
    ],
)  # fmt: skip
def test_what_is_out_of_bounds_is_one_sentence(make: object, argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        parsed(make, *argv)


def test_values_within_bounds_and_defaults_are_stored(tmp_path: Path) -> None:
    def make(parser: argparse.ArgumentParser) -> None:
        options.integer(parser, "--rounds", 5, least=2)
        options.integer(parser, "--sizes", [8, 16], nargs="+")
        options.size(parser, "--budget")
        options.json_output(parser, stdout=True)

    assert vars(parsed(make)) == {"rounds": 5, "sizes": [8, 16], "budget": None, "json": None}
    given = parsed(make, "--rounds", "2", "--sizes", "1", "--budget", "1.5KiB", "--json", str(tmp_path / "a"))
    assert vars(given) == {"rounds": 2, "sizes": [1], "budget": 1536, "json": tmp_path / "a"}
    assert parsed(make, "--json", "-").json == Path("-")


def test_no_number_at_all_is_argparses_own_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(lambda parser: options.integer(parser, "--rounds"), "--rounds", "many")
    assert "argument --rounds: invalid int value: 'many'" in capsys.readouterr().err


def test_defaults_are_in_the_help() -> None:
    parser = argparse.ArgumentParser()
    options.integer(parser, "--batch", 8, "sequences in a batch")
    options.integer(parser, "--length", 32)
    options.integer(parser, "--sizes", [8, 16], nargs="+", help="of a block")
    options.integer(parser, "--blocks", help="default: what is needed")
    words = " ".join(parser.format_help().split())
    for line in (
        "sequences in a batch (default 8)",
        "default 32",
        "of a block (default 8 16)",
        "default: what is needed",
    ):
        assert line in words


def test_the_first_option_given_is_named_as_the_user_wrote_it() -> None:
    args = argparse.Namespace(attend=None, full_layers=0, record="x")
    assert options.first_given(args, "attend", "full_layers", "record") == "--full-layers"
    assert options.first_given(args, "attend") is None


def test_an_argument_of_the_library_is_named_as_the_option_that_was_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    typed = {"length_penalty": "--length-penalty", "layers": "--layers", "kv_tokens": "--kv-tokens", "n": "--n",
             "bad_words": "--bad-word", "block_size": "--block-size", "lessons": "--lessons"}  # fmt: skip
    args = argparse.Namespace(spelled=typed, logs=[Path("run.jsonl")], length_penalty=1.0)
    Path("run.jsonl").touch()
    for said, as_typed in (
        ("length_penalty is nan; a finite number is needed", "--length-penalty is nan; a finite number is needed"),
        ("num_layers is 0", "--layers is 0"),
        ("bad_words holds ''", "--bad-word holds ''"),
        ("n is 0", "--n is 0"),
        ("no room: give kv_cache_tokens", "no room: give --kv-tokens"),
        ("--n is 2; at most length_penalty = 1", "--n is 2; at most --length-penalty = 1"),
        ("the n is 1, and max_batch_seqs is 2", "the n is 1, and max_batch_seqs is 2"),
        ("x.block_size, a/block_size and my_block_size", "x.block_size, a/block_size and my_block_size"),
        ("run.jsonl, line 1: block_size is 0", "run.jsonl, line 1: block_size is 0"),
        ("lesson is 99", "lesson is 99"),
    ):
        assert options.as_typed(ValueError(said), args) == as_typed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["generate", "--prompt", "a", "--length-penalty", "inf"],
            "--length-penalty is inf; a finite number is needed",
        ),
        (["generate", "--prompt", "a", "--beam-width", "2", "--bad-word", "x"], "--bad-word is ('x',); beam search"),
        (["lesson", "99"], "lesson is 99; known are 1 to 21"),
        (["bench", "memory", "--steps", "0"], "--steps is 0; at least 1 is needed"),
    ],
)
def test_commands_name_their_options(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert f"paged-ref: error: {message}" in capsys.readouterr().err


def test_every_file_is_refused_before_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["demo", "--record"], ["bench", "memory", "--json"], ["bench", "model", "--json"]):
        assert main([*argv, "no/such/place"]) == 2
        error = capsys.readouterr().err
        assert error == f"paged-ref: error: {argv[-1]} no/such/place cannot be written: there is no directory no/such\n"
