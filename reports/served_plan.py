"""A plan being served by this program, and a closed loop of requests against it: what the pytest plugin offers."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from helixbench.errors import MeasurementError
from helixbench.solver.problem.plan import Plan

_URL = re.compile(r"serving .* on (https?://\S+)")
_STOP_TIMEOUT_S = 60.0
# Token ids that every tokenizer has: what the model says to them does not matter here.
_PROMPT_TOKEN = 5


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """A closed loop of requests that went through the HTTP API, held against the plan's max-flow.

    Tokens count prompt and output alike; ``seconds`` runs from the first finished warm-up request on, so starting up is
    left out.
    """

    concurrency: int
    num_requests: int
    prompt_tokens: int
    output_tokens: int
    seconds: float
    max_flow_tokens_per_s: float

    @property
    def total_tokens_per_s(self) -> float:
        """Prompt and output tokens a second."""
        return (self.prompt_tokens + self.output_tokens) / self.seconds

    @property
    def ratio_to_max_flow(self) -> float:
        """Measured over the plan's bound."""
        return self.total_tokens_per_s / self.max_flow_tokens_per_s


class ServedPlan:
    """A served plan: its ``url`` speaks the OpenAI completions API. ``loads`` lists what was measured, in order."""

    def __init__(self, *, url: str, plan: Plan) -> None:
        self.url = url
        self.plan = plan
        self.loads: list[Load] = []

    def complete(self, *, prompt_tokens: int, output_tokens: int, timeout_s: float = 600.0) -> tuple[int, int]:
        """One request; the prompt and output tokens that the server counted.

        Raises:
            MeasurementError: the server refused it or did not answer.
        """
        body = {
            "model": self._model(),
            "prompt": [_PROMPT_TOKEN] * prompt_tokens,
            "max_tokens": output_tokens,
            "ignore_eos": True,
            "temperature": 0,
        }
        usage = _post(f"{self.url}/v1/completions", body, timeout_s=timeout_s)["usage"]
        return int(usage["prompt_tokens"]), int(usage["completion_tokens"])

    def load(self, *, concurrency: int, num_requests: int, prompt_tokens: int = 64, output_tokens: int = 32) -> Load:
        """Keep ``concurrency`` requests in flight until as many as ``num_requests`` have been counted.

        The first ``concurrency`` requests warm up and are not counted.

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

    def _model(self) -> str:
        return str(_get(f"{self.url}/v1/models")["data"][0]["id"])


@contextlib.contextmanager
def serve_plan(plan_file: Path, plan: Plan, *, model: str, testbed: Path | None) -> Iterator[ServedPlan]:
    """Start ``helixbench serve`` on a free port; stop it at the end, as Ctrl-C would.

    Raises:
        MeasurementError: it ended before it served.
    """
    command = [sys.executable, "-m", "helixbench", "serve", str(plan_file), "--model", model, "--port", "0"]
    if testbed is not None:
        command += ["--testbed", str(testbed)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        said: list[str] = []
        url = _wait_for_url(server.stderr, said)
        drain = threading.Thread(target=said.extend, args=(server.stderr,), daemon=True)
        drain.start()  # a full pipe would stop the server
        if url is None:
            server.wait()
            raise MeasurementError(f"helixbench serve ended with exit {server.returncode}: {''.join(said)[-800:]}")
        _wait_until_ready(url, server)
        yield ServedPlan(url=url, plan=plan)
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGINT)
        try:
            server.wait(timeout=_STOP_TIMEOUT_S)
        finally:
            server.stderr.close()


def _wait_for_url(lines: Iterator[str], said: list[str]) -> str | None:
    for line in lines:
        said.append(line)
        found = _URL.search(line)
        if found:
            return found.group(1)
    return None


def _wait_until_ready(url: str, server: subprocess.Popen[str], *, timeout_s: float = 60.0) -> None:
    until_s = time.monotonic() + timeout_s
    while True:
        try:
            _get(f"{url}/v1/models")
        except MeasurementError:
            if server.poll() is not None or time.monotonic() > until_s:
                raise
            time.sleep(0.05)
        else:
            return


def _get(url: str) -> dict[str, list[dict[str, str]]]:
    found: dict[str, list[dict[str, str]]] = json.loads(_open(urllib.request.Request(url), timeout_s=30.0))
    return found


def _post(url: str, body: object, *, timeout_s: float) -> dict[str, dict[str, int]]:
    request = urllib.request.Request(
        url, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}, method="POST"
    )
    found: dict[str, dict[str, int]] = json.loads(_open(request, timeout_s=timeout_s))
    return found


def _open(request: urllib.request.Request, *, timeout_s: float) -> bytes:
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            content: bytes = response.read()
    except urllib.error.HTTPError as error:
        with error:
            told = error.read().decode(errors="replace")[:400]
        raise MeasurementError(f"{request.full_url}: HTTP {error.code}: {told}") from error
    except OSError as error:
        raise MeasurementError(f"{request.full_url}: no answer ({error})") from error
    return content
