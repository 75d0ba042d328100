"""Start a testbed, print its run id, and hold it until something ends this process.

Run as ``python -m tests.reference_server.testbed.hold_testbed MODE LOG_DIR``. Mode ``driver`` holds it inside
``run_driver`` with a driver that answers SIGINT with exit code 5; ``plain`` holds it without isolation.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

from tests.reference_server.testbed.beds import run_id_of, small_spec, start

DRIVER = """
import signal, sys, time
signal.signal(signal.SIGINT, lambda *_: sys.exit(5))
print("driver up", flush=True)
time.sleep(600)
"""


def main(mode: str, log_dir: str) -> None:
    # whatever this was started from ignores, as a background shell does with SIGINT and nohup with SIGHUP
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with start(small_spec(), Path(log_dir), mode="child", isolate=mode != "plain") as bed:
        print(run_id_of(bed), flush=True)
        if mode == "driver":
            sys.exit(bed.run_driver([sys.executable, "-S", "-c", DRIVER]))
        time.sleep(600)


if __name__ == "__main__":
    main(*sys.argv[1:])
