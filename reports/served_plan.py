"""A plan served by a process of its own, and closed-loop load on it: what the pytest plugin offers to tests."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from helixbench.errors import MeasurementError
from helixbench.records import load_record
from helixbench.reference_server.http.options import API_KEY_VARIABLE
from helixbench.reference_server.jobs.job import Serving
from helixbench.solver.problem.plan import Plan

_STOP_TIMEOUT_S = 60.0
_POLL_S = 0.05
# A token id that every tokenizer has; the answers do not matter.
_PROMPT_TOKEN = 5


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """A closed loop of requests over the HTTP API. ``seconds`` run from the end of the warm-up to the last request."""

    concurrency: int
    num_requests: int
    prompt_tokens: int
    output_tokens: int
    seconds: float
    max_flow_tokens_per_s: float

    @property
    def total_tokens_per_s(self) -> float:
        """Prompt and output tokens per second."""
        return (self.prompt_tokens + self.output_tokens) / self.seconds

    @property
    def ratio_to_max_flow(self) -> float:
        """Measured throughput over the plan's bound."""
        return self.total_tokens_per_s / self.max_flow_tokens_per_s


class ServedPlan:
    """A served plan: ``url`` speaks the OpenAI completions API; ``loads`` lists the measurements, in order."""

    def __init__(self, serving: Serving, plan: Plan) -> None:
        self.url = serving.url
        self.plan = plan
        self.loads: list[Load] = []
        self._model = serving.model

    def complete(self, *, prompt_tokens: int, output_tokens: int, timeout_s: float = 600.0) -> tuple[int, int]:
        """Send one request; returns the prompt and output tokens that the server counted.

        Raises:
            MeasurementError: the server rejected it or did not answer.
        """
        body = {
            "model": self._model,
            "prompt": [_PROMPT_TOKEN] * prompt_tokens,
            "max_tokens": output_tokens,
            "ignore_eos": True,
            "temperature": 0,
        }
        usage = _post(f"{self.url}/v1/completions", body, timeout_s=timeout_s)["usage"]
        return int(usage["prompt_tokens"]), int(usage["completion_tokens"])

    def load(self, *, concurrency: int, num_requests: int, prompt_tokens: int = 64, output_tokens: int = 32) -> Load:
        """Keep ``concurrency`` requests in flight and measure ``num_requests``, after ``concurrency`` for warm-up.

        Raises:
            MeasurementError: a request failed.
        """
        finished: list[tuple[float, int, int]] = []
        lock = threading.Lock()

        def one(_index: int) -> None:
            prompt, output = self.complete(prompt_tokens=prompt_tokens, output_tokens=output_tokens)
            with lock:
                finished.append((time.perf_counter(), prompt, output))

        with ThreadPoolExecutor(max_workers=concurrency) as pool:
            list(pool.map(one, range(concurrency + num_requests)))
        finished.sort()
        counted = finished[concurrency:]
        measured = Load(
            concurrency=concurrency,
            num_requests=len(counted),
            prompt_tokens=sum(prompt for _, prompt, _ in counted),
            output_tokens=sum(output for _, _, output in counted),
            seconds=counted[-1][0] - finished[concurrency - 1][0],
            max_flow_tokens_per_s=self.plan.predicted.max_flow_tokens_per_s,
        )
        self.loads.append(measured)
        return measured


@contextlib.contextmanager
def serve_plan(plan_file: Path, *, model: str, testbed: Path | None) -> Iterator[ServedPlan]:
    """Run ``helixbench serve`` on a free port; at the end let its requests end, and stop it.

    Raises:
        InputError: the plan is not valid.
        MeasurementError: the server exited before it served.
    """
    plan = load_record(plan_file, Plan)
    with tempfile.TemporaryDirectory(prefix="helixbench-serve-") as folder:
        ready, log = Path(folder) / "ready.json", Path(folder) / "server.log"
        command = [sys.executable, "-m", "helixbench", "serve", str(plan_file), "--model", model, "--port", "0"]
        command += ["--ready-file", str(ready), *(() if testbed is None else ("--testbed", str(testbed)))]
        # A key that other servers of this environment require is not for this one.
        environment = {name: value for name, value in os.environ.items() if name != API_KEY_VARIABLE}
        with log.open("wb") as output:
            server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=output, env=environment)
        try:
            while not ready.exists():
                if server.poll() is not None:
                    last = log.read_text(errors="replace")[-800:]
                    raise MeasurementError(f"helixbench serve exited with {server.returncode}: {last}")
                time.sleep(_POLL_S)
            yield ServedPlan(load_record(ready, Serving), plan)
        finally:
            if server.poll() is None:
                server.terminate()  # not SIGINT, which what a shell runs in the background ignores
            server.wait(timeout=_STOP_TIMEOUT_S)


def _post(url: str, body: object, *, timeout_s: float) -> dict[str, dict[str, int]]:
    request = urllib.request.Request(
        url, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            answer: dict[str, dict[str, int]] = json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            body_text = error.read().decode(errors="replace")[:400]
        raise MeasurementError(f"{url}: HTTP {error.code}: {body_text}") from error
    except OSError as error:
        raise MeasurementError(f"{url}: no answer ({error})") from error
    return answer
