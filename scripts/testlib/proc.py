# SPDX-License-Identifier: Apache-2.0
"""Child processes that leave nothing behind, and a sign of life while they work."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

_children = set()
_lock = threading.Lock()


def start(argv, **options):
    """Popen in a process group of its own, so that end() takes its children along."""
    child = subprocess.Popen(argv, start_new_session=True, stdin=subprocess.DEVNULL, **options)
    with _lock:
        _children.add(child)
    return child


def end(child):
    """Ends what is left of the group: first politely, since a script may have more to end."""
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    with _lock:
        _children.discard(child)


def end_all():
    for child in list(_children):
        end(child)


def finish(child, timeout=None):
    """Exit status, or None when `timeout` seconds were not enough; nothing of it runs on."""
    try:
        return child.wait(timeout)
    except subprocess.TimeoutExpired:
        return None
    finally:
        end(child)


def last_line(path):
    try:
        with open(path, "rb") as f:
            f.seek(0, os.SEEK_END)
            f.seek(max(0, f.tell() - 400))
            lines = f.read().decode(errors="replace").replace("\r", "\n").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")[:60]


def tail(path, lines=40):
    with open(path, errors="replace") as f:
        return "".join(f.readlines()[-lines:])


@contextlib.contextmanager
def progress(label, log):
    """Says what is going on: each second on a terminal, else every 20 s."""
    done = threading.Event()
    begin = time.monotonic()
    tty = sys.stdout.isatty()

    def report():
        while not done.wait(1 if tty else 20):
            line = f"{label} ... {time.monotonic() - begin:.0f} s  {last_line(log)}"
            print(f"\r\033[K{line}" if tty else line, end="" if tty else "\n", flush=True)

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if tty:
            print("\r\033[K", end="", flush=True)


def logged(label, argv, log, timeout=None, **options):
    """Runs argv with its output in `log` and a sign of life; exit status or None (timeout)."""
    with open(log, "ab") as out, progress(label, log):
        return finish(start(argv, stdout=out, stderr=subprocess.STDOUT, **options), timeout)
