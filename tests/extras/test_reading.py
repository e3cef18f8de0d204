"""Files from elsewhere: only regular ones, no more than a limit, and JSON through one reader."""

from __future__ import annotations

import gzip
import os
import re
from pathlib import Path

import pytest

from paged_ref.extras.reading import JSON_LIMIT, parse_json, read_file, read_json, read_json_object, read_text


def refused(path: Path, message: str, **how: bool) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{path} {message}")) as caught:
        read_file(path, **how)
    assert "\n" not in str(caught.value)


def test_a_file_is_read_packed_or_not(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"", b"x", b"some text\n" * 1000):
        path.write_bytes(content)
        assert read_file(path) == read_file(path, unpack=True) == content
        path.write_bytes(gzip.compress(content))
        assert read_file(path, unpack=True) == content
        assert read_file(path) == gzip.compress(content)


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/zero"), Path("/dev/null"), tmp_path / "pipe"):
        refused(path, "cannot be read: it is a pipe or a device; a regular file is needed")
    refused(tmp_path, "cannot be read: Is a directory")
    refused(tmp_path / "nothing", "cannot be read: No such file or directory")


def test_a_file_over_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(10**13)  # a hole: it takes no place on the disk
    refused(path, "has 10000000000000 bytes; at most 4294967296 are read")
    path.write_bytes(b"12345")
    assert read_file(path, 5) == b"12345"
    with pytest.raises(ValueError, match="has 5 bytes; at most 4 are read"):
        read_file(path, 4)


def test_a_gzip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    """One member of a gzip file shrinks to a thousandth; a file may have any number of members."""
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(bytes(1 << 26)) * 64)  # 4 MB, and 4 GiB unpacked
    size = path.stat().st_size
    refused(path, f"has {size} bytes and unpacks to more than {50 * size}; at most that many are read", unpack=True)
    path.write_bytes(gzip.compress(bytes(15 << 20)))  # 15 KB: so little may be all alike
    assert len(read_file(path, unpack=True)) == 15 << 20


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-9], lambda raw: raw[:20] + b"xxxx" + raw[24:], lambda raw: raw[:-1] + b"!"]
)
def test_a_damaged_gzip_file_is_refused(tmp_path: Path, damage: object) -> None:
    path = tmp_path / "text.gz"
    path.write_bytes(damage(gzip.compress(b"".join(b"%d," % i for i in range(999)))))  # type: ignore[operator]
    refused(path, "is damaged: ", unpack=True)


def test_text_is_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match="is not text in UTF-8: byte 3 is wrong"):
        read_text(path)


# --- JSON ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 1000 + "]" * 1000, "nested more than 100 deep at column 101"),
        ('{"a":' * 100_000, "nested more than 100 deep at column 501"),
        ("\n[" * 1000, "nested more than 100 deep at line 102, column 1"),
        ('{"a": 1' + "0" * 400 + "}", "a number that needs more than 64 bits at column 7"),
        ("[1,\n -1" + "0" * 5000 + "]", "a number that needs more than 64 bits at line 2, column 2"),
        ("1e400", "a number that needs more than 64 bits at column 1"),
        ('{"a": [1,\n 2,,3]}', "Expecting value at line 2, column 4"),
        ('"abc', "Unterminated string starting at column 1"),
        ('"' + '\\"' * 100_000, "Unterminated string"),
        ('["a\tb"]', "Invalid control character at column 4"),
        ("1.2.3", "Extra data at column 4"),
        ("", "Expecting value at column 1"),
        ("[1]]", "Extra data at column 4"),
    ],
    ids=range(13),
)
def test_what_is_no_json_is_one_sentence_with_the_place(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"not JSON: {message}")):
        parse_json(text)


def test_what_is_json_is_read() -> None:
    assert parse_json("[" * 100 + "]" * 100)
    for text in ('{"[[[[": "{{{{\\\\"}', "[1e3, -2, 0.5, 9223372036854775807, true, null]", '"\\"[\\""', " [] "):
        assert parse_json(text) is not Ellipsis
    assert parse_json('{"a": {"b": [1, "x"]}}') == {"a": {"b": [1, "x"]}}
    assert parse_json('["' + "[" * 5000 + '"]') == ["[" * 5000]
    assert parse_json('"1' + "0" * 400 + '"') == "1" + "0" * 400


def test_a_json_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[1, 2]")
    assert read_json(path) == [1, 2]
    with pytest.raises(ValueError, match=re.escape(f"{path} holds a list; a JSON object is needed")):
        read_json_object(path)
    path.write_text("[" * 1000)
    with pytest.raises(ValueError, match=re.escape(f"{path} is not JSON: nested more than 100 deep at column 101")):
        read_json(path)
    with path.open("wb") as file:
        file.truncate(JSON_LIMIT + 1)
    with pytest.raises(ValueError, match="has 67108865 bytes; at most 67108864 are read"):
        read_json(path)
