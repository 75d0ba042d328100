"""A load whose size is known: WORK times a fixed piece of arithmetic.

``python -m helixbench.reports.gate.calibration_load WORK``

Imports only the standard library, so that the load and not the start of the process is what is timed.
"""

import json
import statistics
import sys
import time

ITERATIONS = 25
UNIT = 24_000


def main(work: float) -> None:
    """Time every iteration; say all of them and their median."""
    size = round(UNIT * work)
    timings_s = []
    for _ in range(ITERATIONS):
        began_s = time.perf_counter()
        table: dict[int, int] = {}
        for i in range(size):
            table[i & 1023] = table.get(i & 1023, 0) + i
        timings_s.append(time.perf_counter() - began_s)
    print(json.dumps({"median_s": statistics.median(timings_s), "iterations_s": timings_s}))


if __name__ == "__main__":
    main(float(sys.argv[1]))
