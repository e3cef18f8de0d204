"""What the launcher starts in the place of a rank: it starts the rank, and outlives it for a moment.

The launcher kills all that it has started as soon as one of these processes is killed, before the ranks can say what
has happened. So it knows the guards, not the ranks. Run as a script, with the arguments of `paged-ref`.
"""

import signal
import subprocess
import sys
import time

INTERRUPTED = 130  # the exit status: all ranks are
TO_SPEAK = 0.5  # seconds between the end of a rank and that of its guard

if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # the launcher's word that a rank has ended; the rank inherits this
    rank = subprocess.Popen([sys.executable, "-m", "paged_ref", *sys.argv[1:]], close_fds=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the rank
    status = rank.wait()
    if status not in (0, INTERRUPTED):
        time.sleep(TO_SPEAK)
    sys.exit(max(status, 1) if status else 0)
