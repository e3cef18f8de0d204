"""tokenizer.json from elsewhere: what it may ask for, and what would end the process."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models

from paged_ref.interop.hf_tokenizer import HFTokenizer, read_tokenizer

VOCABULARY = {**{f"w{i}": i for i in range(30)}, "w": 30}
PLAIN: dict[str, Any] = json.loads(tokenizers.Tokenizer(models.WordLevel(VOCABULARY, unk_token="w0")).to_str())
SPACES = {"pre_tokenizer": {"type": "WhitespaceSplit"}}
TRUNCATION = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
PADDING = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "w0"}
TEXT = " ".join(f"w{i}" for i in range(18))


def write(directory: Path, **keys: Any) -> Path:
    path = directory / "tokenizer.json"
    path.write_text(json.dumps({**PLAIN, **SPACES, **keys}), encoding="utf-8")
    return path


def assert_refused(path: Path, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_tokenizer(path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "keys",
    [{"truncation": TRUNCATION}, {"padding": {**PADDING, "strategy": {"Fixed": 40}}},
     {"truncation": {**TRUNCATION, "stride": 10}},
     # would fill the memory
     {"padding": {**PADDING, "strategy": {"Fixed": 10**10}}},
     {"padding": {**PADDING, "strategy": "BatchLongest", "pad_to_multiple_of": 10**10}}],
)  # fmt: skip
def test_truncation_and_padding_are_ignored(tmp_path: Path, keys: dict[str, Any]) -> None:
    path = write(tmp_path, **keys)
    assert read_tokenizer(path).encode(TEXT) == list(range(18))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "chunk size must be non-zero"),
        ({"decoder": {"type": "Strip", "content": "w", "start": 5, "stop": 5}}, "index out of bounds"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "Cannot parse precompiled_charsmap"),
        (
            {
                "post_processor": {
                    "type": "TemplateProcessing", "pair": [], "special_tokens": {},
                    "single": [{"SpecialToken": {"id": "X", "type_id": 0}}],
                }
            },
            "no entry found for key",
        ),
    ],
    ids=["encode", "decode", "load", "template"],
)  # fmt: skip
def test_a_file_that_makes_the_library_panic_is_refused(
    tmp_path: Path, keys: dict[str, Any], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, **keys)
    assert_refused(path, "tokenizer.json is not a tokenizer: ", capfd)
    assert_refused(path, message, capfd)


def test_what_the_library_cannot_do_later_is_an_error_that_says_so(tmp_path: Path) -> None:
    path = write(tmp_path, model={**PLAIN["model"], "unk_token": "nothing"})  # only texts of w0 ... have tokens
    tokenizer = read_tokenizer(path)
    assert tokenizer.encode("w1 w2") == [1, 2]
    with pytest.raises(ValueError, match="the tokenizer cannot encode 'Once upon': "):
        tokenizer.encode("Once upon")
    inner = tokenizers.Tokenizer.from_str(
        json.dumps({**PLAIN, "decoder": {"type": "Strip", "content": "w", "start": 5, "stop": 5}})
    )
    with pytest.raises(ValueError, match=r"the tokenizer cannot decode \[30\]: index out of bounds"):
        HFTokenizer(inner, path, {}, {}).decode([30])


def test_a_tokenizer_that_is_missing_or_broken_is_one_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tokenizer.json"
    assert_refused(path, "tokenizer.json is missing; a tokenizer.json of Hugging Face tokenizers is needed", capfd)
    for text in ("{}", '{"version": "1.0"}', "[" * 1000 + "]" * 1000, "{"):
        path.write_text(text)
        assert_refused(path, "tokenizer.json is not a tokenizer: ", capfd)


def test_ctrl_c_is_no_failure_of_the_library(tmp_path: Path) -> None:
    class Interrupted:
        def encode(self, text: str, **options: Any) -> None:
            raise KeyboardInterrupt

    tokenizer = read_tokenizer(write(tmp_path))
    tokenizer.inner = Interrupted()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("w1")


def test_stderr_is_as_before_after_a_load(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    read_tokenizer(write(tmp_path))
    os.write(2, b"still here\n")
    print("and here", file=sys.stderr)
    assert capfd.readouterr().err == "still here\nand here\n"
