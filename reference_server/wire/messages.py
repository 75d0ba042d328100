"""Messages between coordinator and agents: one typed header in msgpack, then the raw bytes of at most one tensor.

The coordinator sends a ``Command`` to an agent, which replies with an ``Answer``; agents pass ``Work`` on.
Unknown types, wrong values and overlong headers are errors.
"""

from __future__ import annotations

from typing import TypeAlias, TypeVar

import msgspec

from helixbench.errors import MeasurementError
from helixbench.profiler.cluster import Device, MessageTime
from helixbench.profiler.cost.measured import CostSample, MeasuredCost, Quality
from helixbench.profiler.cost.model import StageCost
from helixbench.solver.scheduling.history import History
from helixbench.solver.scheduling.recover import REPLAY_MEMORY_BYTES
from helixbench.solver.scheduling.watch import Report
from helixbench.solver.scheduling.work import OpenRequest, Scores, WorkItem

MAX_FRAME_BYTES = 1 << 30
MAX_HEADER_BYTES = 1 << 24


class Work(msgspec.Struct, frozen=True, tag="work", omit_defaults=True):
    """Requests to open and close, and tokens to run; the tensor frame holds the items' inputs, concatenated.

    Inputs from the coordinator are token ids (int32), those between nodes hidden states in ``dtype``. The receiver
    holds the message until ``due_s`` (see ``held``), and drops it where it is of another run than the one loaded.
    """

    items: tuple[WorkItem, ...] = ()
    opens: tuple[OpenRequest, ...] = ()
    closes: tuple[int, ...] = ()
    dtype: str = "int32"
    due_s: float = 0.0
    run: str = ""


class Sampled(msgspec.Struct, frozen=True, tag="sampled", omit_defaults=True):
    """New tokens from a last stage, as (request, token), and the scores of those requests that want them.

    They are not read before ``due_s`` (see ``held``).
    """

    tokens: tuple[tuple[int, int], ...]
    scores: tuple[Scores, ...] = ()
    due_s: float = 0.0


class CannotReplay(msgspec.Struct, frozen=True, tag="cannot-replay"):
    """A node no longer keeps all states that the attempt wants to be sent again."""

    attempt: int


class RequestsFailed(msgspec.Struct, frozen=True, tag="requests-failed"):
    """A node cannot run these attempts, for that reason; it goes on with all others."""

    attempts: tuple[int, ...]
    message: str


class Forget(msgspec.Struct, frozen=True, tag="forget"):
    """Close every request: the coordinator gave this node up, and takes it back with nothing of its past."""


class Renew(msgspec.Struct, frozen=True, tag="renew"):
    """The owner of this run is still there; answered by a ``Status``."""

    run: str


class Release(msgspec.Struct, frozen=True, tag="release"):
    """The run is over: its stage is unloaded, and the agent is free for another one."""

    run: str


class Status(msgspec.Struct, frozen=True, tag="status"):
    """Progress of the run that has its stage loaded here; ``run`` is empty, as is ``owner``, where none has."""

    run: str
    owner: str
    report: Report


class PeerPing(msgspec.Struct, frozen=True, tag="peer-ping"):
    """Ask the next node's loop whether it turns; answered by a ``PeerPong``."""


class PeerPong(msgspec.Struct, frozen=True, tag="peer-pong"):
    """It does."""


class SetSpeed(msgspec.Struct, frozen=True, tag="set-speed"):
    """From now on an emulated device takes ``factor`` times what it took when it was loaded."""

    factor: float


class Describe(msgspec.Struct, frozen=True, tag="describe"):
    """Ask an agent for its ``Description``."""


class Description(msgspec.Struct, frozen=True, tag="description"):
    """An agent's device, its library versions, and the state of its machine (see ``machine_facts``).

    ``time_scale`` seconds here stand for one of an emulated device's.
    """

    device: Device
    versions: dict[str, str]
    machine: dict[str, str | float]
    time_scale: float = 1.0


class OpenModel(msgspec.Struct, frozen=True, tag="open-model"):
    """Open a model and import what its stages compute with, before anything is measured. The answer is ``Done``."""

    model: str
    model_digest: str


class Load(msgspec.Struct, frozen=True, tag="load"):
    """Load layers ``[start, end)`` of a model; ``peers`` maps the next nodes of its pipelines to their addresses.

    ``latency_s`` maps them and the coordinator to the time for which messages there are held, ``bytes_per_s`` those of
    them whose link is known to what it carries; both by the wall clock. With a ``run`` the agent belongs to ``owner``,
    in words, for as long as that renews it, and reports its progress; another run is refused unless it takes over.
    Iterations are compared with ``cost`` where that is given.
    """

    model: str
    model_digest: str
    dtype: str
    node: str
    start: int
    end: int
    kv_capacity_tokens: int
    max_batch_tokens: int
    max_decode_batch: int | None
    peers: dict[str, str]
    latency_s: dict[str, float] = {}
    bytes_per_s: dict[str, float] = {}
    run: str = ""
    owner: str = ""
    take_over: bool = False
    cost: StageCost | None = None
    replay_memory_bytes: int = REPLAY_MEMORY_BYTES


class Loaded(msgspec.Struct, frozen=True, tag="loaded"):
    """The layer range is loaded."""

    weight_bytes: int
    kv_capacity_tokens: int


class Profile(msgspec.Struct, frozen=True, tag="profile"):
    """Profile the node: time stages of this model over a grid of batches."""

    model: str
    model_digest: str
    dtype: str
    max_batch_tokens: int
    max_context_tokens: int
    budget_s: float


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """Progress of a long command."""

    done: int
    total: int
    note: str = ""


class Profiled(msgspec.Struct, frozen=True, tag="profiled"):
    """Samples of a profiled node. ``workspace_bytes`` is the memory of an iteration beside weights and KV cache.

    An emulated device has no samples to fit: ``cost`` is its own, ``origin`` its source.
    """

    samples: tuple[CostSample, ...]
    workspace_bytes: float
    max_layers: int
    source: str
    quality: Quality | None = None
    cost: MeasuredCost | None = None
    origin: str = ""


class ReadCounters(msgspec.Struct, frozen=True, tag="read-counters"):
    """Ask for the counters since the stage was loaded."""


class LinkCounters(msgspec.Struct, frozen=True, array_like=True):
    """Payload sent to one peer."""

    payload_bytes: int = 0
    messages: int = 0
    tokens: int = 0


class Counters(msgspec.Struct, frozen=True, tag="counters"):
    """Work of an agent since its stage was loaded. ``sent`` maps peers (or the coordinator) to their counters.

    Seconds are the device's. ``late_iterations`` and ``release_error_s`` are those of an emulated device, the latter by
    the wall clock (see ``emulation.RealDevice``).
    """

    busy_s: float
    iterations: int
    prefill_tokens: int
    decode_tokens: int
    kv_peak_tokens: int
    kv_capacity_tokens: int
    sent: dict[str, LinkCounters]
    history: History
    late_iterations: int = 0
    release_error_s: float = 0.0


class Echo(msgspec.Struct, frozen=True, tag="echo"):
    """Answer with the tensor frame's length and a frame of ``reply_bytes``: the transport's round trip or bandwidth."""

    number: int
    reply_bytes: int = 0


class Echoed(msgspec.Struct, frozen=True, tag="echoed"):
    """Answer to ``Echo``."""

    number: int
    payload_bytes: int


class IperfServe(msgspec.Struct, frozen=True, tag="iperf-serve"):
    """Start ``count`` iperf3 servers, each for one test; earlier ones are stopped."""

    count: int


class IperfServing(msgspec.Struct, frozen=True, tag="iperf-serving"):
    """Ports on which the agent's iperf3 servers listen.

    None where iperf3 is not installed, or where a server did not come to listen, for the reason in ``error``.
    """

    ports: tuple[int, ...]
    error: str = ""


class MeasureLink(msgspec.Struct, frozen=True, tag="measure-link"):
    """Measure the link to a peer agent, or from it where ``reverse``.

    Bandwidth by iperf3 with the peer's server at ``iperf_port``; where that is ``None``, over the server's own
    transport. Messages of ``message_bytes`` are timed as long as one takes at most ``message_limit_s``.
    ``rough_bytes_per_s`` is an estimate of the bandwidth, where there is one.
    """

    address: str
    iperf_port: int | None
    seconds: float
    reverse: bool = False
    message_bytes: tuple[int, ...] = ()
    message_limit_s: float = 1.0
    rough_bytes_per_s: float | None = None


class LinkMeasured(msgspec.Struct, frozen=True, tag="link-measured"):
    """One attempt at a link; ``latency_s`` is one way.

    Numbers are ``None`` where they were not measured, for the reason in ``error``. ``iperf3`` names the version that
    measured bandwidth; it is empty where the server's own transport did.
    """

    bandwidth_bytes_per_s: float | None
    latency_s: float | None
    iperf3: str = ""
    message_times: tuple[MessageTime, ...] = ()
    error: str = ""


class Flow(msgspec.Struct, frozen=True, array_like=True):
    """One of several simultaneous iperf3 tests: to the server at that host and port, or from it where ``reverse``.

    ``rough_bytes_per_s`` is an estimate of its rate beside the others.
    """

    host: str
    port: int
    reverse: bool
    rough_bytes_per_s: float


class MeasureFlows(msgspec.Struct, frozen=True, tag="measure-flows"):
    """Run these iperf3 tests, all at the same time."""

    flows: tuple[Flow, ...]
    seconds: float


class FlowsMeasured(msgspec.Struct, frozen=True, tag="flows-measured"):
    """Bytes/s of each flow while all of them ran; empty where one failed, for the reason in ``error``."""

    bytes_per_s: tuple[float, ...]
    error: str = ""


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Ask the agent to exit."""


class Done(msgspec.Struct, frozen=True, tag="done"):
    """A command without a result is complete."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """A command failed; ``exit_code`` as in ``helixbench.errors``."""

    message: str
    exit_code: int


Command: TypeAlias = (
    Describe
    | OpenModel
    | Load
    | Forget
    | Renew
    | Release
    | PeerPing
    | SetSpeed
    | Profile
    | ReadCounters
    | IperfServe
    | MeasureLink
    | MeasureFlows
    | Echo
    | Shutdown
    | Work  # to an agent
)
Answer: TypeAlias = (
    Description
    | Loaded
    | Profiled
    | Progress
    | Counters
    | IperfServing
    | LinkMeasured
    | FlowsMeasured
    | Echoed
    | Done
    | Failed
    | Sampled
    | CannotReplay
    | RequestsFailed
    | Status
    | PeerPong  # from an agent
)

# What msgspec raises on bytes that are no message: text that is not UTF-8 and deep nesting have errors of their own.
_NOT_A_MESSAGE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

MessageT = TypeVar("MessageT")
_encoder = msgspec.msgpack.Encoder()
_command_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_answer_decoder: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


def encode(message: Command | Answer) -> bytes:
    """Header bytes of a message."""
    return _encoder.encode(message)


def decode_command(header: bytes) -> Command:
    """Typed message from a header that came to an agent.

    Raises:
        MeasurementError: the bytes are no such message.
    """
    return _decoded(header, _command_decoder, "a command")


def decode_answer(header: bytes) -> Answer:
    """Typed message from a header that came to the coordinator.

    Raises:
        MeasurementError: the bytes are no such message.
    """
    return _decoded(header, _answer_decoder, "an answer")


def _decoded(header: bytes, decoder: msgspec.msgpack.Decoder[MessageT], what: str) -> MessageT:
    try:
        if len(header) > MAX_HEADER_BYTES:
            raise msgspec.DecodeError(f"header of {len(header)} bytes; at most {MAX_HEADER_BYTES} are allowed")
        return decoder.decode(header)
    except _NOT_A_MESSAGE as error:
        raise MeasurementError(f"{what} was received that is not understood ({error}); do versions differ?") from error
