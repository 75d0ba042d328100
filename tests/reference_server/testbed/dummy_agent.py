"""Stands in for an agent: listens, says so, and tells whoever connects the address that it was called from.

Run as a script: ``dummy_agent.py HOST:PORT [MODE]``. Mode ``iperf`` also serves iperf3 in the same place, ``refuse``
and ``crash`` end before listening, ``silent`` never listens, ``child`` starts a process that would outlive it.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time


def main(listen: str, mode: str = "") -> None:
    if mode == "refuse":
        sys.exit("no such device")  # exit code 1, turned into 2 below
    if mode == "crash":
        raise RuntimeError("out of luck")
    if mode == "silent":
        time.sleep(600)
    if mode == "child":
        subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"], start_new_session=True)
    host, _, port = listen.rpartition(":")
    if mode == "iperf":
        subprocess.Popen(["iperf3", "-s", "-B", host], stdout=subprocess.DEVNULL)
    with socket.create_server((host, int(port))) as server:
        print("a log line that is not the answer")
        print(json.dumps({"listening": "{}:{}".format(*server.getsockname())}), flush=True)
        while True:
            connection, caller = server.accept()
            with connection:
                connection.sendall(caller[0].encode())


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except SystemExit as refusal:
        print(refusal, file=sys.stderr)
        sys.exit(2)
