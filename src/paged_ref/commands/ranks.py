"""Starting the ranks of a command, and ending them together."""

from __future__ import annotations

import codecs
import importlib
import json
import math
import os
import re
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import NoReturn

import numpy as np

from ..distributed.group import Group, GroupClosed, GroupError
from ..tuned.threads import blas_threads
from . import rank_guard

LAUNCHER = "mpiexec.hydra"  # of MPICH and its kin; the wheel puts it beside Python
SIZE_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")  # that an mpiexec sets: of MPICH and its kin, of Open MPI
TO_START = 30  # seconds until all guards must be there
TO_WONDER = 5  # seconds without output until a word about it; a first run compiles for several times as long
TO_SPEAK = 3  # seconds that ranks have to end when one has ended badly
TO_STOP = 0.55  # seconds that ranks have to end after Ctrl-C
# What the launcher says of ranks that ended without its leave. The ranks have said why.
_NOISE = re.compile(rb"\[mpiexec@|\[proxy:|YOUR APPLICATION TERMINATED|This typically refers|Please see the FAQ|=|\n")


def started_ranks() -> int:
    """The ranks that an mpiexec started, this process among them; 0: there was none."""
    return int(next((os.environ[name] for name in SIZE_VARIABLES if name in os.environ), 0))


def start(size: int, arguments: Sequence[str], text: bytes = b"") -> int:
    """Run `paged-ref` with these arguments on `size` ranks of this machine, and return the exit status: 1 where a rank
    was killed. `text` is the standard input of rank 0. Raises ValueError where there is no launcher, OSError where
    standard output fails, and KeyboardInterrupt. However this process ends, no rank is left: rank_guard.py sees to
    that."""
    beside = Path(sys.executable).with_name(LAUNCHER)
    launcher = str(beside) if beside.is_file() else shutil.which(LAUNCHER)
    if launcher is None:
        raise ValueError(f"{LAUNCHER} was not found, which starts ranks; the extra `distributed` brings it")
    command = [launcher, "-disable-auto-cleanup", "-n", str(size), sys.executable, "-P", rank_guard.__file__]
    with ExitStack() as stack, tempfile.TemporaryFile() as given:
        given.write(text)
        given.seek(0)
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        server.settimeout(TO_START)
        variables = {**os.environ, rank_guard.PORT: str(server.getsockname()[1])}
        # In a session of its own, the launcher gets no Ctrl-C of the terminal: the guards get it from here.
        pipe = subprocess.PIPE
        ranks = subprocess.Popen(command, stdin=given, stdout=pipe, stderr=pipe, env=variables, start_new_session=True)
        lines: list[socket.socket] = []
        failed: list[OSError] = []
        said: list[bytes] = []
        threads = [
            threading.Thread(target=_show, args=(ranks, lines, failed)),
            threading.Thread(target=_pass_on, args=(ranks, said)),
        ]
        for thread in threads:
            thread.start()
        try:
            while len(lines) < size:
                lines.append(stack.enter_context(server.accept()[0]))
            _tell(lines, json.dumps(list(arguments)).encode() + b"\n")
            statuses = _statuses(lines, said)
        except TimeoutError:
            raise ValueError(f"{LAUNCHER} did not start {size} ranks within {TO_START} seconds") from None
        finally:
            stack.close()  # the guards end now, and then the launcher
            ranks.wait()
            for thread in threads:
                thread.join()
    if failed:
        raise failed[0]
    if any(statuses) and not said:
        print(f"paged-ref: {LAUNCHER} or a process of it has ended in the middle of the run", file=sys.stderr)
        return 1
    return 1 if 1 in statuses else max(statuses)


def _statuses(lines: Sequence[socket.socket], said: list[bytes]) -> list[int]:
    """Wait for the exit statuses of all ranks. A rank that ends badly is the end of the others soon after; what is told
    of them is added to `said`."""
    waiting, statuses = list(lines), list[int]()

    def collect(until: float) -> None:
        while waiting:
            ready = select.select(waiting, [], [], max(0, until - time.monotonic()) if until < math.inf else None)[0]
            for line in ready:
                statuses.extend(line.recv(1) or b"\1")  # a guard that was killed says nothing
                waiting.remove(line)
            if not ready or (until == math.inf and any(statuses)):
                return

    try:
        collect(math.inf)
        collect(time.monotonic() + TO_SPEAK)
        if waiting:
            sentence = f"paged-ref: a rank has ended, and {len(waiting)} that did not notice were ended"
            print(sentence, file=sys.stderr)
            said.append(sentence.encode())
    except KeyboardInterrupt:
        _tell(waiting, rank_guard.INTERRUPT)
        collect(time.monotonic() + TO_STOP)
        raise
    finally:
        _tell(waiting, rank_guard.KILL)
    return statuses + [1] * len(waiting)


def _tell(lines: Sequence[socket.socket], word: bytes) -> None:
    for line in lines:
        with suppress(OSError):  # the guard has ended
            line.sendall(word)


def _show(ranks: subprocess.Popen[bytes], lines: Sequence[socket.socket], failed: list[OSError]) -> None:
    """Show what the ranks print. Where that fails, as with `| head`, `failed` has the error, and the ranks end."""
    assert ranks.stdout is not None
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    patience: float | None = TO_WONDER
    while True:
        if not select.select([ranks.stdout], [], [], patience)[0]:
            print("\npaged-ref: the ranks compile, as they do in their first run, or load the model", file=sys.stderr)
            patience = None
        if not (data := os.read(ranks.stdout.fileno(), 1 << 16)):
            return
        try:
            if not failed:
                sys.stdout.write(decoder.decode(data))
                sys.stdout.flush()
        except OSError as error:
            failed.append(error)
            _tell(lines, rank_guard.KILL)


def _pass_on(ranks: subprocess.Popen[bytes], said: list[bytes]) -> None:
    """Show what the ranks say on standard error, and keep it in `said`."""
    assert ranks.stderr is not None
    for line in ranks.stderr:
        if not _NOISE.match(line):
            said.append(line)
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
    sys.stderr.write(f"paged-ref: rank {group.rank}: {said}\n")  # in one write: ranks share the stream
    sys.stderr.flush()
    sys.stdout.flush()
    if group.rank == 0:
        group.close(said)
    os._exit(status)
