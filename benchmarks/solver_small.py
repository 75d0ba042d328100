"""Random small clusters against brute force: plans, and every bound.

Run: ``python -m benchmarks.solver_small [count] [first seed]``. One of three is in several regions, half of them
without labels; partial inference, limits on concurrency, NICs, pins and both kinds of nodes come in turn, as in
``tests/solver``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tests.solver.bounds.test_region_links import check_region_bound
from tests.solver.bounds.test_work import check_bounds
from tests.solver.placement.test_exclusive_groups import check_exclusive_groups_against_brute_force
from tests.solver.placement.test_optimality import check_against_brute_force
from tests.solver.placement.test_survival import check_survival_against_brute_force

CHECKS: dict[str, Callable[[int], object]] = {
    "plan equals brute force": check_against_brute_force,
    "plan that survives a loss, its price and what is left equal brute force": check_survival_against_brute_force,
    "plan with exclusive groups equals brute force": check_exclusive_groups_against_brute_force,
    "work and configurations never below it": check_bounds,
    "links between regions never below it": check_region_bound,
}


def main(count: int, first: int) -> int:
    """Check this number of seeds, printing each failure and a summary; returns the number of failures."""
    failed = dict.fromkeys(CHECKS, 0)
    began = time.perf_counter()
    for seed in range(first, first + count):
        for name, check in CHECKS.items():
            try:
                check(seed)
            except AssertionError as error:
                failed[name] += 1
                print(f"seed {seed}: {name}: {str(error).splitlines()[:1]}", flush=True)
        if (seed - first) % 25 == 24:
            print(f"{seed - first + 1} of {count} done, {time.perf_counter() - began:.0f} s", flush=True)
    for name, bad in failed.items():
        print(f"{name}: {count - bad} of {count}")
    print(f"{time.perf_counter() - began:.0f} s")
    return sum(failed.values())


if __name__ == "__main__":
    numbers = [int(text) for text in sys.argv[1:]]
    sys.exit(main(numbers[0] if numbers else 300, numbers[1] if len(numbers) > 1 else 0) > 0)
