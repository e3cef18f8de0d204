"""Starting the ranks of a command, and ending them together."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

import numpy as np

from ..distributed.group import Group, GroupClosed, GroupError
from ..tuned.threads import blas_threads
from . import rank_guard

LAUNCHER = "mpiexec.hydra"  # of MPICH and its kin; the wheel puts it beside Python
SIZE_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")  # that an mpiexec sets: of MPICH and its kin, of Open MPI
STATUSES = (0, 1, 2, 130)  # of commands
PATIENCE = 0.6  # seconds that ranks have to end after Ctrl-C
# What the launcher says of ranks that ended without its leave. The ranks have said why.
_NOISE = re.compile(rb"\[mpiexec@|\[proxy:|YOUR APPLICATION TERMINATED|This typically refers|Please see the FAQ|=|\n")


def started_ranks() -> int:
    """The ranks that an mpiexec started, this process among them; 0: there was none."""
    return int(next((os.environ[name] for name in SIZE_VARIABLES if name in os.environ), 0))


def start(size: int, arguments: Sequence[str], text: bytes = b"") -> int:
    """Run `paged-ref` with these arguments on `size` ranks, with `text` as the standard input of rank 0, and return the
    exit status: 1 where a rank was killed. Raises ValueError where there is no launcher, and KeyboardInterrupt."""
    beside = Path(sys.executable).with_name(LAUNCHER)
    launcher = str(beside) if beside.is_file() else shutil.which(LAUNCHER)
    if launcher is None:
        raise ValueError(f"{LAUNCHER} was not found, which starts ranks; the extra `distributed` brings it")
    command = [launcher, "-disable-auto-cleanup", "-n", str(size), sys.executable, "-P", rank_guard.__file__]
    # In a session of its own, the launcher gets no Ctrl-C from the terminal but the one that is sent below.
    pipe = subprocess.PIPE
    ranks = subprocess.Popen([*command, *arguments], stdin=pipe, stderr=pipe, start_new_session=True)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that this process ends them
    try:
        _pass_on(ranks, text)
        status = ranks.wait()
        return status if status in STATUSES else 1
    except BaseException:
        ranks.send_signal(signal.SIGINT)
        try:
            ranks.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            ranks.kill()
        _pass_on(ranks)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _pass_on(ranks: subprocess.Popen[bytes], text: bytes = b"") -> None:
    """Give `text` to rank 0, and show what the ranks say on standard error."""
    assert ranks.stdin is not None
    assert ranks.stderr is not None
    if not ranks.stdin.closed:
        ranks.stdin.write(text)
        ranks.stdin.close()
    for line in ranks.stderr:
        if not _NOISE.match(line):
            sys.stderr.write(line.decode(errors="replace"))
            sys.stderr.flush()


def on_rank(work: Callable[[Group], int]) -> int:
    """Do `work(group)` on this rank, and return the exit status.

    Where the ranks cannot go on, each says one sentence and ends here: MPI's own end would wait for all of them.
    """
    try:
        group: Group = importlib.import_module("paged_ref.distributed.mpi").MPIGroup()
    except ImportError as error:
        raise ValueError(f"ranks need the extra `distributed`, which brings mpi4py and mpich: {error}") from None
    try:
        with blas_threads() if group.rank else nullcontext():
            status = work(group)
        if group.rank == 0:
            group.close()
        return status
    except GroupError as error:
        _end(group, 1, str(error))
    except KeyboardInterrupt:
        _end(group, 130, "interrupted")
    except (ValueError, OSError) as error:
        if group.rank == 0 and not group.in_step:
            group.close()
            raise
        return _as_rank_0(group, str(error))
    except BaseException:
        traceback.print_exc()
        _end(group, 1, f"rank {group.rank} has ended; this is a fault of the program: please report it")


def _as_rank_0(group: Group, error: str) -> int:
    """Rank 0 mostly has the same error, says it, and closes the group."""
    try:
        group.take(0, np.int32)
    except GroupClosed:
        return 2
    except GroupError as other:
        _end(group, 1, str(other))
    _end(group, 2, f"error: {error}")


def _end(group: Group, status: int, said: str) -> NoReturn:
    """End this rank; on rank 0, the others with it."""
    print(f"paged-ref: rank {group.rank}: {said}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    if group.rank == 0:
        group.close(said)
    os._exit(status)
