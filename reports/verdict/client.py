"""Another client's result file beside a run: guidellm's, ``vllm bench serve``'s and aiperf's, held to the same plan.

Sources: guidellm ``benchmarks.json`` (its ``inter_token_latency_ms`` is what is called TPOT here: after the first
token); vLLM ``vllm bench serve --save-result``; aiperf ``profile_export_aiperf.json`` (likewise
``inter_token_latency``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from helixbench.errors import InputError


class ClientLatency(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A latency as the client states it, in seconds; ``None`` where it does not."""

    mean_s: float | None = None
    p50_s: float | None = None
    p90_s: float | None = None
    p99_s: float | None = None


class ClientResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a client measured, of the requests that succeeded. Times are those of the served devices."""

    client: str
    num_requests: int
    num_failed: int
    duration_s: float
    prompt_tokens: int
    output_tokens: int
    ttft: ClientLatency
    tpot: ClientLatency
    concurrency: int | None = None

    @property
    def total_tokens_per_s(self) -> float:
        """Prompt and output tokens a second."""
        return (self.prompt_tokens + self.output_tokens) / self.duration_s

    @property
    def output_tokens_per_s(self) -> float:
        """Output tokens a second."""
        return self.output_tokens / self.duration_s


def load_client(path: Path, *, benchmark: int | None = None, time_scale: float = 1.0) -> ClientResult:
    """Read a client's result file, of whichever client it is.

    Args:
        path: the file.
        benchmark: which of several in a guidellm file, counted from 1; ``None`` for the only one.
        time_scale: wall-clock seconds for one of the served devices'.

    Raises:
        InputError: unreadable, of no known client, or without a figure that is needed.
    """
    try:
        tree = msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a client's JSON result ({error})") from error
    known = [read for key, read in _READERS.items() if isinstance(tree, dict) and key in tree]
    if not known:
        raise InputError(
            f"{path}: neither guidellm's `benchmarks`, vLLM's `mean_ttft_ms` nor aiperf's `time_to_first_token` is in "
            "it; give guidellm's benchmarks.json, the file of `vllm bench serve --save-result`, or "
            "profile_export_aiperf.json"
        )
    return known[0](_Tree(tree, str(path)), benchmark, time_scale)


class _Tree:
    """A JSON object whose missing and odd values are errors with their place."""

    def __init__(self, tree: Mapping[str, object], where: str) -> None:
        self.tree, self.where = tree, where

    def at(self, *path: str) -> object:
        """The value at that path; ``None`` where there is none."""
        found: object = self.tree
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    def number(self, *path: str) -> float | None:
        """A finite number of at least 0 at that path; ``None`` where there is none."""
        found = self.at(*path)
        is_number = isinstance(found, int | float) and not isinstance(found, bool)
        return float(found) if is_number and 0 <= found < math.inf else None  # type: ignore[arg-type, operator]

    def needed(self, *path: str) -> float:
        """The number at that path.

        Raises:
            InputError: there is none.
        """
        found = self.number(*path)
        if found is None:
            raise InputError(f"{self.where}: {'.'.join(path)} is {self.at(*path)!r}: need a number of at least 0")
        return found

    def latency(self, unit_s: float, **paths: tuple[str, ...]) -> ClientLatency:
        """Statistics, each at its path, in units of so many seconds."""
        values = {name: self.number(*path) for name, path in paths.items()}
        return ClientLatency(**{name: None if value is None else value * unit_s for name, value in values.items()})


def _guidellm(tree: _Tree, benchmark: int | None, time_scale: float) -> ClientResult:
    found = tree.at("benchmarks")
    benchmarks = found if isinstance(found, list) else []
    if benchmark is None and len(benchmarks) != 1:
        raise InputError(f"{tree.where}: {len(benchmarks)} benchmarks in it: choose one with --client-benchmark N")
    index = (benchmark or 1) - 1
    if not (0 <= index < len(benchmarks) and isinstance(benchmarks[index], dict)):
        raise InputError(f"{tree.where}: no benchmark {index + 1}; there are {len(benchmarks)}")
    one = _Tree(benchmarks[index], f"{tree.where}: benchmarks[{index}]")
    duration_s = one.number("duration")
    if duration_s is None:
        duration_s = one.needed("end_time") - one.needed("start_time")

    def latency(name: str) -> ClientLatency:
        at = ("metrics", name, "successful")
        percentiles = {f"{p}_s": (*at, "percentiles", p) for p in ("p50", "p90", "p99")}
        return one.latency(1e-3 / time_scale, mean_s=(*at, "mean"), **percentiles)

    return _result(
        one,
        client="guidellm",
        num_requests=one.needed("metrics", "request_totals", "successful"),
        num_failed=one.number("metrics", "request_totals", "errored"),
        duration_s=duration_s / time_scale,
        prompt_tokens=one.needed("metrics", "prompt_token_count", "successful", "total_sum"),
        output_tokens=one.needed("metrics", "output_token_count", "successful", "total_sum"),
        ttft=latency("time_to_first_token_ms"),
        tpot=latency("inter_token_latency_ms"),
    )


def _vllm(tree: _Tree, benchmark: int | None, time_scale: float) -> ClientResult:
    _require_one(tree, benchmark)

    def latency(name: str) -> ClientLatency:
        return tree.latency(
            1e-3 / time_scale,
            mean_s=(f"mean_{name}_ms",),
            p50_s=(f"median_{name}_ms",),
            p90_s=(f"p90_{name}_ms",),
            p99_s=(f"p99_{name}_ms",),
        )

    return _result(
        tree,
        client="vllm bench serve",
        num_requests=tree.needed("completed"),
        num_failed=tree.number("failed"),
        duration_s=tree.needed("duration") / time_scale,
        prompt_tokens=tree.needed("total_input_tokens"),
        output_tokens=tree.needed("total_output_tokens"),
        ttft=latency("ttft"),
        tpot=latency("tpot"),
        concurrency=tree.number("max_concurrency"),
    )


def _aiperf(tree: _Tree, benchmark: int | None, time_scale: float) -> ClientResult:
    _require_one(tree, benchmark)

    def latency(name: str) -> ClientLatency:
        units_s = {"ms": 1e-3, "sec": 1.0, "s": 1.0, "us": 1e-6, "ns": 1e-9}
        unit = tree.at(name, "unit")
        if tree.at(name) is not None and unit not in units_s:
            raise InputError(f"{tree.where}: {name}.unit is {unit!r}: need one of {', '.join(units_s)}")
        percentiles = {f"{p}_s": (name, p) for p in ("p50", "p90", "p99")}
        return tree.latency(units_s.get(str(unit), 1.0) / time_scale, mean_s=(name, "avg"), **percentiles)

    requests = tree.needed("request_count", "avg")

    def tokens(name: str) -> float:
        total = tree.number(name, "sum")
        return requests * tree.needed(name, "avg") if total is None else total

    throughput = tree.needed("request_throughput", "avg")
    return _result(
        tree,
        client="aiperf",
        num_requests=requests,
        num_failed=tree.number("error_request_count", "avg"),
        duration_s=(tree.number("benchmark_duration", "avg") or requests / max(throughput, 1e-12)) / time_scale,
        prompt_tokens=tokens("input_sequence_length"),
        output_tokens=tokens("output_sequence_length"),
        ttft=latency("time_to_first_token"),
        tpot=latency("inter_token_latency"),
        concurrency=tree.number("input_config", "loadgen", "concurrency"),
    )


def _require_one(tree: _Tree, benchmark: int | None) -> None:
    if benchmark not in (None, 1):
        raise InputError(f"{tree.where}: one benchmark is in it, and --client-benchmark is {benchmark}")


def _result(
    tree: _Tree,
    *,
    client: str,
    num_requests: float,
    num_failed: float | None,
    duration_s: float,
    prompt_tokens: float,
    output_tokens: float,
    ttft: ClientLatency,
    tpot: ClientLatency,
    concurrency: float | None = None,
) -> ClientResult:
    if duration_s <= 0 or num_requests < 1:
        raise InputError(f"{tree.where}: {num_requests:g} requests succeeded in {duration_s:g} s: nothing was measured")
    return ClientResult(
        client=client,
        num_requests=round(num_requests),
        num_failed=round(num_failed or 0),
        duration_s=duration_s,
        prompt_tokens=round(prompt_tokens),
        output_tokens=round(output_tokens),
        ttft=ttft,
        tpot=tpot,
        concurrency=None if concurrency is None else round(concurrency),
    )


_READERS: dict[str, Callable[[_Tree, int | None, float], ClientResult]] = {
    "benchmarks": _guidellm,
    "mean_ttft_ms": _vllm,
    "time_to_first_token": _aiperf,
}
"""Key that only this client's file has -> how to read it."""
