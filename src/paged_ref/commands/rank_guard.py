"""What the launcher starts in the place of a rank: it starts the rank, and is its line to the process that waits.

The launcher kills all that it has started, or none, when one of these processes ends: before the ranks can say what has
happened, or never. So the launcher knows the guards only, which end together. Run as a script, with the arguments of
`paged-ref`; in the environment is the port of the process that waits, which gets one byte: the rank's exit status.
"""

import os
import select
import signal
import socket
import subprocess
import sys

PORT = "PAGED_REF_RANKS"
INTERRUPT, KILL = b"i", b"k"  # what the process that waits may say; its end is KILL, too
PAUSE = 0.02  # seconds between two looks at the rank


def main() -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # the launcher's word that a rank has ended; the rank inherits this
    try:
        line = socket.create_connection(("127.0.0.1", int(os.environ[PORT])))
    except OSError:
        return  # the process that waits has ended already
    with line:
        rank = subprocess.Popen([sys.executable, "-m", "paged_ref", *sys.argv[1:]], close_fds=False)
        while rank.poll() is None:
            if select.select([line], [], [], PAUSE)[0]:
                word = line.recv(1)
                rank.send_signal(signal.SIGINT if word == INTERRUPT else signal.SIGKILL)
                if word != INTERRUPT:
                    rank.wait()
        line.sendall(bytes([rank.returncode if rank.returncode >= 0 else 1]))
        line.recv(1)  # until all ranks have ended


if __name__ == "__main__":
    main()
