"""Bandwidth measured against the shaped rate, and all pairs in rounds against one pair after the other.

    python -m benchmarks.links [--rates] [--rounds]

Needs root, namespaces and iperf3. Prints tables; asserts nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from helixbench.profiler.cluster import ClusterProfile
from helixbench.profiler.model.synthetic import make_model
from helixbench.records import load_record

MBIT = 1e6 / 8
FAST_MBIT, SLOW_MBIT = 2000, 400
PAIRS = {3: ("hub", "n3"), 10: ("hub", "n10"), 80: ("hub", "n80"), 400: ("hub", "n400"), 2000: ("fast", "n2000")}
NUM_NODES = 8


def rates_testbed() -> str:
    """A link of each rate.

    Only the two ends of the fastest have fast cards: a round then has one fast pair at most, for two cores carry no
    more of them at full rate. They have no slow link, for a node with one sends single frames to all.
    """
    lines = []
    for name in dict.fromkeys(end for pair in PAIRS.values() for end in pair):
        card = FAST_MBIT if name in PAIRS[FAST_MBIT] else SLOW_MBIT
        lines.append(f'[[node]]\nname = "{name}"\nmemory = "10MB"\nbandwidth = "{card}Mbit"')
    for rate, (a, b) in PAIRS.items():
        lines.append(f'[[link]]\nbetween = ["{a}", "{b}"]\nbandwidth = "{rate}Mbit"')
    return "\n".join([*lines, f'[coordinator]\nbandwidth = "{SLOW_MBIT}Mbit"']) + "\n"


def rounds_testbed() -> str:
    """Seven nodes and the coordinator, all alike."""
    nodes = [f'[[node]]\nname = "n{index}"\nmemory = "10MB"' for index in range(1, NUM_NODES)]
    return "\n".join([*nodes, '[network]\nbandwidth = "80Mbit"']) + "\n"


def measure(testbed: str, *options: str) -> ClusterProfile:
    """``helixbench profile --only network`` on that testbed."""
    with tempfile.TemporaryDirectory() as folder:
        spec, output = Path(folder) / "testbed.toml", Path(folder) / "network.json"
        spec.write_text(testbed)
        make_model(Path(folder) / "model", preset="test-llama", seed=0)
        argv = [sys.executable, "-m", "helixbench", "profile", "--only", "network", "--testbed", str(spec)]
        argv += ["--model", str(Path(folder) / "model"), "-o", str(output)]
        subprocess.run([*argv, *options], check=True, stdout=sys.stderr)
        return load_record(output, ClusterProfile)


def show_rates() -> None:
    """Each shaped link and each NIC against what the testbed file says."""
    network = measure(rates_testbed(), "--link-seconds", "2")
    print(f"testbed: {network.testbed}")
    print(f"{'link':<16}{'shaped':>8}{'measured Mbit/s':>17}{'ratio':>8}")
    for rate, pair in PAIRS.items():
        for src, dst in (pair, pair[::-1]):
            link = network.link(src, dst)
            assert link is not None
            measured = link.bandwidth_bytes_per_s / MBIT
            print(f"{src + ' > ' + dst:<16}{rate:>8}{measured:>17.2f}{measured / rate:>8.3f}")
    print(f"{'NIC':<16}{'shaped':>8}{'measured Mbit/s':>17}{'ratio':>8}")
    for node in network.nodes:
        shaped = FAST_MBIT if node.name in PAIRS[FAST_MBIT] else SLOW_MBIT
        for direction, limit in (("out", node.nic_out_bytes_per_s), ("in", node.nic_in_bytes_per_s)):
            if limit is not None:
                print(f"{f'{node.name} {direction}':<16}{shaped:>8}{limit / MBIT:>17.1f}{limit / MBIT / shaped:>8.3f}")


def show_rounds() -> None:
    """Seconds for all pairs of eight nodes and their NICs, both ways of going about it."""
    for name, more in (("rounds", ()), ("one pair after the other", ("--one-pair-at-a-time",))):
        begin = time.perf_counter()
        links = measure(rounds_testbed(), *more).links
        rates = [link.bandwidth_bytes_per_s / MBIT for link in links]
        print(
            f"{name:<26}{time.perf_counter() - begin:>7.1f} s for {len(links)} pairs, "
            f"{min(rates):.1f} to {max(rates):.1f} Mbit/s of 80"
        )


def main() -> None:
    """What was asked for, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", action="store_true")
    parser.add_argument("--rounds", action="store_true")
    asked = parser.parse_args()
    if asked.rates or not asked.rounds:
        show_rates()
    if asked.rounds or not asked.rates:
        show_rounds()


if __name__ == "__main__":
    main()
