"""How commands write files: refused before the work, whole or not at all, one sentence that names the file."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from paged_ref.timeline.events import StepTimed, from_json
from paged_ref.views.common.files import check_folder, check_writable, recording, write_json, write_text


def test_a_place_that_cannot_be_written_is_refused_and_nothing_is_made(tmp_path: Path) -> None:
    missing = tmp_path / "no" / "place.json"
    with pytest.raises(ValueError, match=f"--json {missing} cannot be written: there is no directory {missing.parent}"):
        check_writable(missing, "--json")
    with pytest.raises(ValueError, match=f"^{tmp_path} cannot be written: it is a directory$"):
        check_writable(tmp_path)
    check_writable(tmp_path / "new.json")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_and_a_place_that_takes_no_files_are_found_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"^--json /proc/a.json cannot be written: no file can be made in /proc: "):
        check_writable(Path("/proc/a.json"), "--json")
    with pytest.raises(ValueError, match=r"^--out /proc/a/b cannot be written: no file can be made in /proc: "):
        check_folder(Path("/proc/a/b"), "--out")
    check_folder(tmp_path / "a" / "b", "--out")
    check_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file cannot be written: no file can be made in .*file: Not a directory"):
        check_folder(tmp_path / "file")
    monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: open("/dev/full", "wb", buffering=0))  # noqa: SIM115
    with pytest.raises(ValueError, match=f"no file can be made in {tmp_path}: No space left on device"):
        check_writable(tmp_path / "new.json")


def test_a_recording_on_a_full_disk_is_one_sentence() -> None:
    full = "^--record /dev/full cannot be written: No space left on device$"

    def record() -> None:
        with recording(Path("/dev/full")) as log:
            assert log is not None
            with pytest.raises(ValueError, match=full):
                log(StepTimed(0, 1))

    with pytest.raises(ValueError, match=full):
        record()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_places_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "old.json"
    file.write_text("old", encoding="utf-8")
    file.chmod(0o400)
    with pytest.raises(ValueError, match="it is read-only"):
        check_writable(file)
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o500)
    with pytest.raises(ValueError, match=r"no file can be made in .*folder: Permission denied"):
        check_writable(folder / "new.json")


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    file, link = tmp_path / "a.json", tmp_path / "link.json"
    write_json(file, {"old": 1})
    file.chmod(0o640)
    link.symlink_to(file)
    reader = file.open(encoding="utf-8")
    write_json(link, {"new": [2]})
    assert reader.read() == '{\n "old": 1\n}\n'  # a file that was open before still has the old content
    reader.close()
    assert json.loads(file.read_text(encoding="utf-8")) == {"new": [2]}
    assert link.is_symlink()
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "link.json"]


def test_a_failure_leaves_the_old_file_and_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.txt"
    write_text(file, "old")

    def full(self: Path, *args: object, **settings: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ValueError, match=f"{file} cannot be written: No space left on device"):
        write_text(file, "new")
    assert file.read_text(encoding="utf-8") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_device_is_written_to_and_not_replaced() -> None:
    write_text(Path("/dev/null"), "gone")
    assert not Path("/dev/null").is_file()


def test_a_recording_can_be_read_while_it_grows(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    event = StepTimed(3, 250)
    with recording(file) as log:
        assert log is not None
        assert file.read_text(encoding="utf-8") == ""
        log(event)
        with file.open(encoding="utf-8") as reader:
            assert list(map(from_json, reader)) == [event]
    with recording(None) as log:
        assert log is None
    with pytest.raises(ValueError, match=f"--record {tmp_path} cannot be written: Is a directory"), recording(tmp_path):
        pass
