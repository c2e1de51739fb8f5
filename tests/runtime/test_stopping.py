"""A signal may come while the handler of another one runs, on the same thread."""

from __future__ import annotations

import subprocess
import sys

# A second signal at every line of what the first one's handler calls.
SIGNALLED = """
import signal, sys
from wdmoe.runtime.stopping import StopFlag
flag = StopFlag()
nested = 0
def on_term(signum, frame):
    global nested
    nested += 1
    flag.set()
def on_line(frame, event, argument):
    if event == "line":
        sys.settrace(None)
        signal.raise_signal(signal.SIGTERM)
        sys.settrace(on_line)
    return on_line
def on_interrupt(signum, frame):
    sys.settrace(on_line)
    flag.set()
    sys.settrace(None)
signal.signal(signal.SIGTERM, on_term)
signal.signal(signal.SIGINT, on_interrupt)
signal.raise_signal(signal.SIGINT)
print(flag.is_set(), nested > 0)
"""


def test_a_signal_inside_the_handler_of_another_does_not_block_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", SIGNALLED], capture_output=True, text=True, timeout=10, check=False)
    assert done.stdout == "True True\n", done.stderr
