"""The server as a process of the command line, for tests that need a real socket."""

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def running(
    *arguments: str, environment: dict[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen, str, list[str]]]:
    """Run the command line's server on a free port; yields the process, its address and the list of its log lines."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mixencoder", "serve", "--port", "0", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
    )
    lines, address = [], []
    started = threading.Event()

    def read():
        for line in process.stderr:
            lines.append(line)
            if match := re.search(r"running on (http://[\d.:]+)", line):
                address.append(match[1])
                started.set()
        started.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert started.wait(120)
        assert address, "".join(lines)
        yield process, address[0], lines
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        reader.join(10)
        process.stdout.close()
