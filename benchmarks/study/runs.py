"""Simulates every combination of a study and keeps one row for each."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, cast

import msgspec

from benchmarks.study.spec import PlacementSpec, StudySpec, WorkloadSpec, cluster_of, inputs_of, workload_of
from helixbench.errors import InputError, MeasurementError
from helixbench.profiler.cluster import ClusterProfile
from helixbench.records import digest, load_record, save_record
from helixbench.reference_server.simulation.config import SimulationConfig
from helixbench.reference_server.simulation.simulator import SimulationResult, simulate
from helixbench.solver import Infeasible, SolveConfig, solve_placement
from helixbench.solver.problem.plan import Plan
from helixbench.solver.problem.traces import TracedRequest
from helixbench.solver.problem.workload import Workload


class StudyRow(msgspec.Struct, frozen=True, kw_only=True):
    """One run, or why there is none (``problem``). ``busy`` maps a node to the share of the window spent in iterations.

    ``kv_peak`` is the largest share of its KV cache that any node used. ``waiting_at_end`` and ``in_flight_at_end``
    count requests at the end of the window; offline arrivals leave ``waiting_at_end`` undefined, so it is ``None``.
    """

    cluster: str
    workload: str
    placement: str
    routing: str
    seed: int
    total_tokens_per_s: float | None = None
    output_tokens_per_s: float | None = None
    ttft_p50_s: float | None = None
    ttft_p99_s: float | None = None
    tpot_p50_s: float | None = None
    tpot_p99_s: float | None = None
    requests: int | None = None
    peak_in_flight: int | None = None
    max_flow_tokens_per_s: float | None = None
    expected_tokens_per_s: float | None = None
    busiest: str = ""
    busiest_share: float | None = None
    mean_busy: float | None = None
    kv_peak: float | None = None
    waiting_at_end: int | None = None
    in_flight_at_end: int | None = None
    busy: dict[str, float] = {}
    problem: str = ""


class StudyResult(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="schema", tag="helixbench.study/1"
):
    """Rows of a study, in the order of its file. Everything in it is simulated.

    ``study`` is the digest of the study file, ``inputs`` maps each file that it names to its digest.
    """

    title: str
    study: str
    inputs: dict[str, str]
    rows: tuple[StudyRow, ...]
    simulated: bool = True


def run_study(
    spec: StudySpec,
    folder: Path,
    *,
    known: Sequence[StudyRow] = (),
    plans: Path | None = None,
    on_rows: Callable[[StudyResult, int], None] = lambda _done, _total: None,
    is_interrupted: Callable[[], bool] = lambda: False,
) -> StudyResult:
    """Simulate every combination; an interrupted study keeps the rows that are complete.

    Args:
        spec: the study.
        folder: the folder that its paths are relative to.
        known: rows of an earlier, interrupted start; they are not simulated again.
        plans: folder that caches plans, so that a later start uses the same ones.
        on_rows: called after every run with the result so far and the total number of runs.
        is_interrupted: polled between and during runs.

    Raises:
        InputError: a file that the study names is missing or invalid. A combination that cannot be planned or
            simulated is no error: its row states the ``problem``.
    """
    total = len(spec.cluster) * len(spec.workload) * len(spec.placement) * len(spec.routings) * len(spec.seeds)
    result = StudyResult(title=spec.title, study=digest(spec), inputs=inputs_of(spec, folder), rows=())
    rows_known = {key_of(row): row for row in known}
    kept = plans and plans / f"plan-{_study_key(result)}"
    for row in _rows(spec, folder, rows_known, kept, is_interrupted):
        if key_of(row) not in rows_known and is_interrupted():
            break  # this run was cut short
        result = msgspec.structs.replace(result, rows=(*result.rows, row))
        on_rows(result, total)
    return result


def key_of(row: StudyRow) -> tuple[str, str, str, str, int]:
    """The combination that a row belongs to."""
    return row.cluster, row.workload, row.placement, row.routing, row.seed


def known_rows(spec: StudySpec, folder: Path, path: Path) -> tuple[StudyRow, ...]:
    """Rows of an earlier start of the same study with the same input files; none if ``path`` does not exist.

    Raises:
        InputError: ``path`` belongs to another study, or an input file has changed since.
    """
    if not path.exists():
        return ()
    before = load_record(path, StudyResult)
    if before.study != digest(spec):
        raise InputError(f"{path}: belongs to another study; remove it or choose another folder")
    now = inputs_of(spec, folder)
    if before.inputs != now:
        names = sorted(name for name in before.inputs.keys() | now if before.inputs.get(name) != now.get(name))
        raise InputError(f"{path}: {', '.join(names)} changed since; remove it or choose another folder")
    return before.rows


def _study_key(result: StudyResult) -> str:
    """Eight hex digits of the study and its input files: cached plans of another study are not reused."""
    names = [result.study, *(f"{name} {value}" for name, value in sorted(result.inputs.items()))]
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:8]


def _rows(
    spec: StudySpec,
    folder: Path,
    known: Mapping[tuple[str, str, str, str, int], StudyRow],
    plans: Path | None,
    is_interrupted: Callable[[], bool],
) -> Iterator[StudyRow]:
    profiles = [cluster_of(on, folder) for on in spec.cluster]  # read all files before the first run
    loads = [(load, *workload_of(load, folder)) for load in spec.workload]
    for on, profile in zip(spec.cluster, profiles, strict=True):
        made: dict[tuple[int, int], Plan | str] = {}  # (first equivalent load, placement) -> plan, or why there is none
        for load, workload, trace in loads:
            # Loads that a solver cannot tell apart share one plan.
            alike = next(index for index, other in enumerate(spec.workload) if _plans_for(other) == _plans_for(load))
            for number, placement in enumerate(spec.placement):
                for routing in spec.routings:
                    for seed in spec.seeds:
                        row = StudyRow(
                            cluster=on.name, workload=load.name, placement=placement.name, routing=routing, seed=seed
                        )
                        if key_of(row) in known:
                            yield known[key_of(row)]
                            continue
                        if is_interrupted():
                            return
                        plan = made.get((alike, number))
                        if plan is None:
                            kept = plans and Path(f"{plans}-{spec.cluster.index(on)}-{alike}-{number}.json")
                            plan = made[alike, number] = _plan(placement, profile, workload, load, spec, folder, kept)
                        if isinstance(plan, str):
                            yield msgspec.structs.replace(row, problem=plan)
                            continue
                        config = _config(spec, load, workload, trace, row)
                        try:
                            result = simulate(plan, profile, config, is_interrupted=is_interrupted)
                        except (InputError, MeasurementError) as error:
                            yield msgspec.structs.replace(row, problem=str(error))
                            continue
                        yield _filled(row, result)


def _plans_for(load: WorkloadSpec) -> tuple[object, ...]:
    """The parts of a load that a plan depends on: lengths, and the concurrency of a closed loop."""
    lengths = (load.trace, load.max_prompt_tokens, load.max_output_tokens, load.prompt_tokens, load.output_tokens)
    return (*lengths, load.concurrency if load.arrivals().kind == "closed loop" else None)


def _plan(
    placement: PlacementSpec,
    profile: ClusterProfile,
    workload: Workload,
    load: WorkloadSpec,
    spec: StudySpec,
    folder: Path,
    kept: Path | None,
) -> Plan | str:
    """The plan, or the reason that there is none."""
    if placement.plan:
        return load_record(folder / placement.plan, Plan)
    if kept is not None and kept.exists():
        return load_record(kept, Plan)
    is_closed = load.arrivals().kind == "closed loop"
    try:
        plan = solve_placement(
            SolveConfig(
                cluster=profile,
                workload=workload,
                concurrency=load.concurrency if is_closed else None,
                objective=cast(Literal["throughput", "max-flow"], placement.objective),
                method=placement.method,
                time_limit_s=spec.solve_s,
            )
        )
    except InputError as error:
        return str(error)
    if isinstance(plan, Infeasible):
        return plan.reason
    if kept is not None:
        save_record(kept, plan)
    return plan


def _config(
    spec: StudySpec, load: WorkloadSpec, workload: Workload, trace: tuple[TracedRequest, ...], row: StudyRow
) -> SimulationConfig:
    return SimulationConfig(
        workload=workload,
        arrivals=load.arrivals(),
        trace=trace,
        routing=row.routing,  # type: ignore[arg-type]
        seed=row.seed,
        concurrency=load.concurrency,
        duration_s=spec.duration_s,
        warmup_s=spec.warmup_s,
        kv_share=spec.kv_share,
    )


def _filled(row: StudyRow, result: SimulationResult) -> StudyRow:
    run = result.run
    ttft, tpot = run.latency_percentiles("ttft", (50, 99)), run.latency_percentiles("tpot", (50, 99))
    busy = {name: use.busy_s / run.window.seconds for name, use in sorted(run.nodes.items())}
    busy = dict(sorted(busy.items(), key=lambda item: -item[1]))
    busiest = next(iter(busy))
    expected = run.plan.predicted.expected
    return msgspec.structs.replace(
        row,
        total_tokens_per_s=run.total_tokens_per_s,
        output_tokens_per_s=run.output_tokens_per_s,
        ttft_p50_s=ttft[0] if ttft else None,
        ttft_p99_s=ttft[1] if ttft else None,
        tpot_p50_s=tpot[0] if tpot else None,
        tpot_p99_s=tpot[1] if tpot else None,
        requests=len(run.requests_in_window()),
        peak_in_flight=run.concurrency,
        max_flow_tokens_per_s=run.plan.predicted.max_flow_tokens_per_s,
        expected_tokens_per_s=expected[-1].total_tokens_per_s if expected else None,
        busiest=busiest,
        busiest_share=busy[busiest],
        mean_busy=sum(busy.values()) / len(busy),
        kv_peak=max(use.kv_peak_tokens / use.kv_capacity_tokens for use in run.nodes.values()),
        waiting_at_end=None if run.arrivals == "offline" else result.num_waiting,
        in_flight_at_end=result.num_in_flight,
        busy=busy,
        problem=run.cut_short,
    )


def csv_of(rows: Sequence[StudyRow]) -> str:
    """The rows as CSV, one column per field, unknown values empty; all busy shares in one column."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*StudyRow.__struct_fields__, "source"])
    for row in rows:
        writer.writerow([*(_cell(value) for value in msgspec.structs.astuple(row)), "simulated"])
    return text.getvalue()


def _cell(value: object) -> object:
    if isinstance(value, dict):
        return "; ".join(f"{node} {share:.2f}" for node, share in value.items())
    return "" if value is None else value
