"""Run a command in this process's group, and end the whole group when whoever started this one goes away.

usage: guard.py COMMAND...      (standard input is a pipe that the starter holds open for as long as it lives)
"""
import os
import signal
import subprocess
import sys
import threading


def end(child: subprocess.Popen) -> None:
    "Interrupt everything in this group, and kill what is left after ten seconds"
    os.killpg(0, signal.SIGINT)
    try:
        child.wait(timeout=10)
    except subprocess.TimeoutExpired:
        pass
    os.killpg(0, signal.SIGKILL)


def main() -> int:
    "The command's exit status"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)      # not SIG_IGN, which the command would inherit
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)

    def watch() -> None:
        os.read(0, 1)       # returns when the starter closes the pipe or dies, however it dies
        end(child)

    threading.Thread(target=watch, daemon=True).start()
    status = child.wait()
    if status:
        os.killpg(0, signal.SIGTERM)    # jobs that a killed command left behind
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
