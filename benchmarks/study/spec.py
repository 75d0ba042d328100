"""The study file (TOML): clusters, placements, routings, workloads and seeds; every combination is one run."""

from __future__ import annotations

import hashlib
import tomllib
from pathlib import Path

import msgspec

from helixbench.errors import InputError
from helixbench.profiler.cluster import ClusterProfile
from helixbench.profiler.import_tables import with_imported_costs
from helixbench.records import load_record, require_unique
from helixbench.solver.placement import baselines
from helixbench.solver.problem.arrivals import Arrivals
from helixbench.solver.problem.traces import TracedRequest, read_trace
from helixbench.solver.problem.workload import Workload, fixed_workload
from helixbench.solver.questions.generate import make_cluster
from helixbench.solver.scheduling.work import Routing

METHODS = ("auto", *baselines.METHODS)


class Made(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A synthetic cluster, as ``helixbench cluster make`` generates it."""

    nodes: int
    types: int = 3
    regions: int = 1
    seed: int = 0


class ClusterSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A cluster profile (``file``) or a synthetic one (``make``); ``tables`` is a folder of timings to import."""

    name: str
    file: str = ""
    make: Made | None = None
    tables: str = ""

    def __post_init__(self) -> None:
        if bool(self.file) == (self.make is not None):
            raise ValueError(f"cluster {self.name}: need exactly one of `file` and `make`")


class PlacementSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A placement: a solver ``method`` with its ``objective``, or a ``plan`` file."""

    name: str
    method: str = ""
    objective: str = "throughput"
    plan: str = ""

    def __post_init__(self) -> None:
        if bool(self.method) == bool(self.plan):
            raise ValueError(f"placement {self.name}: need exactly one of `method` and `plan`")
        if self.objective not in ("throughput", "max-flow"):
            raise ValueError(f"placement {self.name}: objective is throughput or max-flow, got {self.objective!r}")


class WorkloadSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Lengths (a ``trace`` or two numbers) and arrivals: ``offline``, ``rate``, ``replay``, or a closed loop."""

    name: str
    trace: str = ""
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    offline: bool = False
    replay: bool = False
    rate: float | None = None
    burstiness: float = 1.0
    concurrency: int | None = None

    def __post_init__(self) -> None:
        if bool(self.trace) == (self.prompt_tokens is not None and self.output_tokens is not None):
            raise ValueError(f"workload {self.name}: need either `trace`, or `prompt_tokens` and `output_tokens`")
        ways = (self.offline, self.replay, self.rate is not None)
        if sum(ways) > 1 or (not any(ways) and self.concurrency is None):
            raise ValueError(f"workload {self.name}: need one of `offline`, `rate`, `replay`, or `concurrency` alone")
        if self.replay and not self.trace:
            raise ValueError(f"workload {self.name}: `replay` needs a `trace`")
        lengths = (self.prompt_tokens, self.output_tokens)
        if any(value is not None and value < 1 for value in (*lengths, self.concurrency)):
            raise ValueError(f"workload {self.name}: prompt_tokens, output_tokens, concurrency: need at least 1")
        if self.rate is None and self.burstiness != 1:
            raise ValueError(f"workload {self.name}: `burstiness` goes with `rate`")
        try:
            self.arrivals()
        except ValueError as error:
            raise ValueError(f"workload {self.name}: {str(error).replace('rate_per_s', 'rate')}") from error

    def arrivals(self) -> Arrivals:
        """The arrival process."""
        if self.rate is not None:
            kind = "poisson" if self.burstiness == 1 else "gamma"
            return Arrivals(kind=kind, rate_per_s=self.rate, burstiness=self.burstiness)  # type: ignore[arg-type]
        return Arrivals(kind="offline" if self.offline else "replay" if self.replay else "closed loop")


class StudySpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A study; each combination of cluster, placement, routing, workload and seed is one run."""

    title: str
    cluster: tuple[ClusterSpec, ...]
    placement: tuple[PlacementSpec, ...]
    workload: tuple[WorkloadSpec, ...]
    routings: tuple[Routing, ...] = ("iwrr",)
    seeds: tuple[int, ...] = (0,)
    duration_s: float = 600.0
    warmup_s: float = 60.0
    kv_share: float | None = None
    solve_s: float = 20.0

    def __post_init__(self) -> None:
        for field in ("cluster", "placement", "workload", "routings", "seeds"):
            if not getattr(self, field):
                raise ValueError(f"{field}: need at least one")
        for field in ("cluster", "placement", "workload"):
            require_unique([each.name for each in getattr(self, field)], field=f"{field} names")
        require_unique(self.routings, field="routings")
        require_unique([str(seed) for seed in self.seeds], field="seeds")
        if self.duration_s <= 0 or self.warmup_s < 0 or self.solve_s <= 0:
            raise ValueError("duration_s, solve_s: need > 0; warmup_s >= 0")
        if self.kv_share is not None and not 0 < self.kv_share <= 1:
            raise ValueError(f"kv_share: need more than 0 and at most 1, got {self.kv_share}")
        for placement in self.placement:
            if placement.method and placement.method not in METHODS:
                known = ", ".join(METHODS)
                raise ValueError(f"placement {placement.name}: method {placement.method!r} is none of {known}")


def load_study(path: Path) -> StudySpec:
    """Read a study file.

    Raises:
        InputError: not TOML, an unknown field, or a value out of range.
    """
    try:
        return msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), StudySpec)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except msgspec.ValidationError as error:
        raise InputError(f"{path}: {error}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: not a TOML file ({error})") from error


def inputs_of(spec: StudySpec, folder: Path) -> dict[str, str]:
    """Path -> digest of every file that the study names, including each file in a folder of tables.

    Raises:
        InputError: a file is missing.
    """
    names = {on.file for on in spec.cluster} | {p.plan for p in spec.placement} | {load.trace for load in spec.workload}
    for on in spec.cluster:
        tables = folder / on.tables
        inside = tables.rglob("*") if on.tables else ()
        names |= {(Path(on.tables) / path.relative_to(tables)).as_posix() for path in inside if path.is_file()}
    found = {}
    for name in sorted(names - {""}):
        path = folder / name
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
        found[name] = "sha256:" + hashlib.sha256(content).hexdigest()
    return found


def cluster_of(spec: ClusterSpec, folder: Path) -> ClusterProfile:
    """The cluster profile, its paths relative to ``folder``."""
    if spec.make is not None:
        made = spec.make
        profile = make_cluster(num_nodes=made.nodes, num_types=made.types, num_regions=made.regions, seed=made.seed)
    else:
        profile = load_record(folder / spec.file, ClusterProfile)
    return with_imported_costs(profile, folder / spec.tables) if spec.tables else profile


def workload_of(spec: WorkloadSpec, folder: Path) -> tuple[Workload, tuple[TracedRequest, ...]]:
    """The lengths, and for replayed arrivals the requests of the trace.

    Raises:
        InputError: the trace cannot be read, or no request is within the limits.
    """
    if not spec.trace:
        assert spec.prompt_tokens is not None
        assert spec.output_tokens is not None
        return fixed_workload(prompt_tokens=spec.prompt_tokens, output_tokens=spec.output_tokens), ()
    path = folder / spec.trace
    whole = read_trace(path)
    traced = tuple(r for r in whole.requests if _is_within(spec, r.prompt_tokens, r.output_tokens))
    if not traced:
        raise InputError(f"{path}: no request within max_prompt_tokens and max_output_tokens of {spec.name}")
    if spec.replay and not whole.has_arrivals:
        raise InputError(f"{path}: replay of {spec.name} needs the times of arrivals, which this trace does not have")
    lengths = tuple((r.prompt_tokens, r.output_tokens) for r in traced)
    return Workload(source=whole.source, lengths=lengths, notes=whole.notes), traced if spec.replay else ()


def _is_within(spec: WorkloadSpec, prompt_tokens: int, output_tokens: int) -> bool:
    prompt_fits = spec.max_prompt_tokens is None or prompt_tokens <= spec.max_prompt_tokens
    return prompt_fits and (spec.max_output_tokens is None or output_tokens <= spec.max_output_tokens)
