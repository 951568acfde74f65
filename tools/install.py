"""Install packages with pip and show how far it is: ``python tools/install.py PIP_ARGUMENTS``.

Plain pip is either silent for minutes or prints a thousand lines. This prints what it is doing in
one line that moves on a terminal, and in a line now and then elsewhere. It needs nothing but
Python, since it runs before anything is installed. If pip fails, its last lines are shown.
"""

import re
import subprocess
import sys
import sysconfig
import threading
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path

PIP = [sys.executable, "-u", "-m", "pip", "install", "--progress-bar", "off"]
SHOWN_AFTER_FAILURE = 40
QUIET_SECONDS = 10  # between lines, where they cannot replace each other
ADDRESS = re.compile(r"\w+://\S*?([^/\s]*)(?=[\s,;)'\"]|$)")
COLLECTING = re.compile(r"(?:Collecting |Processing \S*/)([\w.]+)")
DOWNLOADING = re.compile(r"\s*Downloading ([\w.]+-[\w.]+)\S* \(([\d.]+ [kMG]B)\)")
INSTALLING = re.compile(r"Installing collected packages: (.*)")


class Progress:
    """What pip is doing, from what it prints."""

    def __init__(self) -> None:
        """Start before pip has printed anything."""
        self.found = 0
        self.wanted = 0
        self.before = 0
        self.state = "looking for packages"

    def read(self, line: str) -> None:
        """Take note of one line of pip."""
        if match := COLLECTING.match(line):
            self.found += 1
            self.state = f"looking for packages: {self.found} found, now {match[1]}"
        elif (match := DOWNLOADING.match(line)) and ".metadata" not in line:
            self.state = f"downloading {match[1].replace('-', ' ')}, {match[2]}"
        elif match := INSTALLING.match(line):
            self.wanted = len(match[1].split(","))
            self.before = installed()

    def __str__(self) -> str:
        """Say it in a few words."""
        if self.wanted:  # pip says nothing while it installs: count what has arrived
            return f"installing: {installed() - self.before} of {self.wanted} packages"
        return self.state


def installed() -> int:
    """Return how many packages this Python has."""
    return sum(1 for _ in Path(sysconfig.get_path("purelib")).glob("*.dist-info"))


def without_addresses(line: str) -> str:
    """Return a line of pip with the files' names in place of their addresses.

    >>> without_addresses("Downloading https://example.org/a/b-1.0.whl (1 MB) from http://x/")
    'Downloading b-1.0.whl (1 MB) from '
    """
    return ADDRESS.sub(r"\1", line)


def show(progress: Progress, done: threading.Event) -> None:
    """Print where pip is until it is done."""
    start, moving, last = time.monotonic(), sys.stdout.isatty(), ""
    while not done.wait(1 if moving else QUIET_SECONDS):
        text = f"  {time.monotonic() - start:4.0f} s  {progress}"
        if moving:
            print(f"\r{text[:79].ljust(max(79, len(last)))}", end="", flush=True)
        else:
            print(text, flush=True)
        last = text
    if moving:
        print(f"\r{' ' * 79}\r", end="", flush=True)


def install(arguments: Iterable[str]) -> int:
    """Run pip; return its exit status."""
    progress, done = Progress(), threading.Event()
    lines: deque[str] = deque(maxlen=SHOWN_AFTER_FAILURE)
    shower = threading.Thread(target=show, args=(progress, done))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    options = {"text": True, "encoding": "utf-8", "errors": "replace"}
    with subprocess.Popen([*PIP, *arguments], **pipes, **options) as pip:
        shower.start()
        try:
            for line in pip.stdout or ():
                lines.append(without_addresses(line.rstrip()))
                progress.read(lines[-1])
        except KeyboardInterrupt:
            pip.terminate()
            raise
        finally:
            done.set()
            shower.join()
    if pip.returncode:
        print("\n".join(lines), file=sys.stderr)
    return pip.returncode


if __name__ == "__main__":
    try:
        sys.exit(install(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
