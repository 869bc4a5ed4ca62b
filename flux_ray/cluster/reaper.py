"""A small process that ends what a Ray of the run's own would leave behind. It is run as a script, not imported.

Takes:  a folder, and the sessions of Ray's processes (arguments); a pipe from the driver as its standard input.
Knows:  the pipe ends with the driver, however that ended. Ray's agents would stay for a minute, with their ports; the
        folder, which is of temporary files, for ever, and so would semaphores that bear its name (scratch.py).
"""

import os
import shutil
import signal
import sys
import time

GRACE_S = 4.0  # for those that end by themselves
SHARED = "/dev/shm"


def sessions() -> dict[int, int]:
    """Process ► its session."""
    found = {}
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                found[int(name)] = int(file.read().rpartition(")")[2].split()[3])
        except (OSError, ValueError, IndexError):  # it has just ended
            continue
    return found


def main() -> None:
    folder, *sessions_of_ray = sys.argv[1:]
    wanted = {int(argument) for argument in sessions_of_ray}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    end_s = time.monotonic() + GRACE_S
    while any(session in wanted for session in sessions().values()) and time.monotonic() < end_s:
        time.sleep(0.1)
    for process, session in sessions().items():
        if session in wanted:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
    shutil.rmtree(folder, ignore_errors=True)
    for name in os.listdir(SHARED) if os.path.isdir(SHARED) else ():
        if name.startswith(f"sem.{os.path.basename(folder)}-"):
            os.unlink(os.path.join(SHARED, name))


if __name__ == "__main__":
    main()
