"""Runs a compiler, and ends it when the program that wants it has ended, however that came about.

    python native_child.py SECONDS FOLDER COMMAND...

`native_build` starts this file as a process of its own and holds the other end of its standard input. When that end is
closed, or after so many seconds, the compiler and all it has started are killed. If the program has ended, the folder,
which nobody will read, is removed as well. The exit status is the compiler's, or `TOOK_TOO_LONG`.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading

TOOK_TOO_LONG = 124


def kill(process: subprocess.Popen) -> None:
    """Ends a process and those that it has started, which are of its group."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


def end_with_the_program(process: subprocess.Popen, folder: str) -> None:
    sys.stdin.buffer.read()
    try:
        kill(process)
    except ProcessLookupError:
        pass
    finally:
        process.wait()  # what it writes last is removed too
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)


def main(seconds: str, folder: str, *command: str) -> int:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=end_with_the_program, args=(process, folder), daemon=True).start()
    try:
        return process.wait(float(seconds))
    except subprocess.TimeoutExpired:
        kill(process)
        return TOOK_TOO_LONG


if __name__ == "__main__":
    # At once: nothing is to be waited for, least of all the thread that reads.
    os._exit(main(*sys.argv[1:]) & 0xFF)
