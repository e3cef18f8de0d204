"""What the launcher starts in the place of a rank: it starts the rank, and outlives it.

The launcher kills all that it has started, or none, when one of these processes ends: before the ranks can say what has
happened, or never. So the launcher knows the guards only. Those of ranks.py are run as a script. In the environment is
the port of the process that waits, which sends the arguments of `paged-ref` (the launcher would end a command at a
colon), and gets one byte: the rank's exit status.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

PORT, GUARDED = "PAGED_REF_RANKS", "PAGED_REF_GUARDED"  # in the environment of a guard, and of its rank
INTERRUPT, KILL = b"i", b"k"  # what the process that waits may say; its end is KILL, too
ENDED = (0, 2, 130)  # exit statuses of ranks that have ended together
PAUSE = 0.02  # seconds between two looks at the rank
TO_SPEAK = 1  # seconds that the other ranks have before the launcher knows


def guard(arguments: Sequence[str], line: socket.socket | None = None) -> int:
    """Run the rank, and return its exit status: 1 where it was killed."""
    command = [sys.executable, "-m", "paged_ref", *arguments]
    rank = subprocess.Popen(command, close_fds=False, env={**os.environ, GUARDED: "1"})
    while rank.poll() is None:
        try:
            if select.select([line] if line else [], [], [], PAUSE)[0]:
                word = line.recv(1) if line else KILL
                rank.send_signal(signal.SIGINT if word == INTERRUPT else signal.SIGKILL)
                if word != INTERRUPT:
                    rank.wait()
        except KeyboardInterrupt:
            pass  # the rank has got it, too
    return rank.returncode if rank.returncode >= 0 else 1


def own_guard(arguments: Sequence[str]) -> int:
    """The guard of a rank that another mpiexec has started: this process."""
    status = guard(arguments)
    if status not in ENDED:
        time.sleep(TO_SPEAK)
    return status


def main() -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # the launcher's word that a rank has ended; the rank inherits this
    try:
        line = socket.create_connection(("127.0.0.1", int(os.environ[PORT])))
    except OSError:
        return  # the process that waits has ended already
    with line:
        arguments = json.loads(line.makefile("rb", buffering=0).readline())
        line.sendall(bytes([guard(arguments, line)]))
        line.recv(1)  # until all ranks have ended


if __name__ == "__main__":
    main()
