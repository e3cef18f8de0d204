"""Compiled functions on machines that leave Numba no place to keep them: a package that is read-only, no home."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import paged_ref
from paged_ref.tuned import cpu_code, numba_cache

RUN = "import sys; from paged_ref.cli import main; sys.exit(main(sys.argv[1:]))"
ARGV = ["generate", "--prompt", "Four score and seven years ago our", "--max-tokens", "2", "--backend", "cpu"]
# The smallest of the functions of `cpu-simd`; each is kept in the same way.
CALL = """
import numpy as np
from paged_ref.core.attention.attention import Addresses
from paged_ref.tuned.cpu_simd import in_bounds
addresses = Addresses(np.array([3]), np.array([0, 1]), np.array([[0]]), None, np.array([2]))
print(in_bounds(addresses, 1, 2, 4))
"""


@pytest.fixture(scope="module")
def read_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package in which no folder takes a cache, not even root's: a file stands in its place."""
    place = tmp_path_factory.mktemp("read_only")
    package = Path(paged_ref.__file__).parent
    shutil.copytree(package, place / "paged_ref", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("core/attention", "tuned"):
        (place / "paged_ref" / folder / "__pycache__").touch()
    return place


def run(read_only: Path, code: str, temporary: Path, **more: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
    environment = kept | {"PYTHONPATH": str(read_only), "HOME": "/dev/null/none", "TMPDIR": str(temporary)} | more
    environment |= {"PAGED_REF_DEVICE": "cpu"}
    command = [sys.executable, "-c", code, *ARGV]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=temporary, timeout=300)


def test_the_temporary_directory_takes_the_cache_and_the_next_run_finds_it(read_only: Path, tmp_path: Path) -> None:
    folder = tmp_path / f"paged_ref-{os.getuid()}"
    done = run(read_only, RUN, tmp_path)
    assert (done.returncode, done.stdout) == (0, "Four score and seven years ago our fathers brought\n"), done.stderr
    assert done.stderr == (
        "paged-ref: warning: Numba has no place to keep compiled functions beside the package or at home; they are "
        f"kept in {folder}\n"
    )
    check_that_the_next_run_finds(folder, "*.nb*", lambda: run(read_only, RUN, tmp_path))


def test_the_machine_code_of_the_vector_loop_is_kept_there_too(read_only: Path, tmp_path: Path) -> None:
    def call() -> subprocess.CompletedProcess[str]:
        return run(read_only, CALL, tmp_path)

    done = call()
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    assert done.stderr.count("RuntimeWarning") == 1
    check_that_the_next_run_finds(tmp_path / f"paged_ref-{os.getuid()}", "*.o", call)
    nowhere = run(read_only, f"import tempfile; tempfile.tempdir = '/dev/null/none'\n{CALL}", tmp_path)
    assert (nowhere.returncode, nowhere.stdout) == (0, "True\n"), nowhere.stderr
    assert "they are compiled again in each run" in nowhere.stderr


def check_that_the_next_run_finds(
    folder: Path, pattern: str, again: Callable[[], subprocess.CompletedProcess[str]]
) -> None:
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob(pattern)}
    assert kept
    assert again().returncode == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob(pattern)} == kept
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_without_any_place_nothing_is_kept_and_one_line_says_so(read_only: Path, tmp_path: Path) -> None:
    done = run(read_only, f"import tempfile; tempfile.tempdir = '/dev/null/none'; {RUN}", tmp_path)
    assert (done.returncode, done.stdout) == (0, "Four score and seven years ago our fathers brought\n"), done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("they are compiled again in each run\n")


def test_a_folder_that_others_may_write_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in it would be run."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = tmp_path / f"paged_ref-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    assert numba_cache.temporary() is None
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    assert numba_cache.temporary() is None
    folder.unlink()
    assert numba_cache.temporary() == str(folder)


def test_machine_code_that_others_may_write_is_not_run(tmp_path: Path) -> None:
    file = tmp_path / "code.o"
    assert cpu_code._kept(file) is None
    cpu_code._keep(file, b"code")
    assert cpu_code._kept(file) == b"code"
    assert [path.name for path in tmp_path.iterdir()] == ["code.o"]
    file.chmod(0o620)
    assert cpu_code._kept(file) is None


def test_a_user_without_a_home_gets_no_folder_with_its_name(
    read_only: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    for name in ("XDG_CACHE_HOME", "NUMBA_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert numba_cache._is_homeless()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not numba_cache._is_homeless()


@pytest.mark.parametrize("backend", [[], ["--backend", "cpu"]], ids=["auto", "cpu"])
def test_without_the_compiler_every_path_works(backend: list[str]) -> None:
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1", "PAGED_REF_DEVICE": "cpu"}
    command = [sys.executable, "-c", RUN, *ARGV[:-2], *backend]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.stdout, done.stderr) == ("Four score and seven years ago our fathers brought\n", "")


def test_without_the_compiler_the_vector_loop_says_so() -> None:
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1", "PAGED_REF_DEVICE": "cpu"}
    code = "from paged_ref.kernels import backends, why_not; print(backends()[:2], why_not('cpu-simd'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout == "('reference', 'cpu') its loop is for the compiler, and NUMBA_DISABLE_JIT is set\n"


FEW_ROWS = (
    "import numpy as np; from paged_ref.tuned.linear import linear;"
    "x, w = np.ones((5, 1024), 'f'), np.ones((1024, 1024), 'f'); assert (linear(x, w) == 1024).all()"
)


@pytest.mark.parametrize("more", [{}, {"NUMBA_DISABLE_JIT": "1"}])
def test_products_of_few_rows_need_no_place_and_no_compiler(
    read_only: Path, tmp_path: Path, more: dict[str, str]
) -> None:
    done = run(read_only, FEW_ROWS, tmp_path, **more)
    assert done.returncode == 0, done.stderr
