"""The loop of one node: describes itself, loads a layer range and serves it, and takes commands in between.

It starts without torch, which comes in with a CUDA device or the first Hugging Face model.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import zmq

from helixbench.errors import HelixbenchError, InputError, MeasurementError
from helixbench.profiler.cluster import COORDINATOR
from helixbench.profiler.device import describe_device, with_current_facts
from helixbench.profiler.machine import library_versions, machine_facts
from helixbench.profiler.model.model import Model, open_model
from helixbench.reference_server.node.load import load_runner, prepare_for
from helixbench.reference_server.node.peers import Peers
from helixbench.reference_server.node.progress import Progress
from helixbench.reference_server.node.runtime import NodeRuntime, Outbound
from helixbench.reference_server.testbed.cpu import available_cpus
from helixbench.reference_server.testbed.emulation import EmulatedNode, make_device
from helixbench.reference_server.wire.held import HeldMessages, due_s
from helixbench.reference_server.wire.keys import load_key_file
from helixbench.reference_server.wire.messages import (
    Answer,
    Command,
    Counters,
    Describe,
    Description,
    Done,
    Echo,
    Echoed,
    Failed,
    Forget,
    LinkCounters,
    Load,
    Loaded,
    OpenModel,
    PeerPing,
    PeerPong,
    Profile,
    ReadCounters,
    Release,
    Renew,
    RequestsFailed,
    Sampled,
    SetSpeed,
    Shutdown,
    Status,
    Work,
    decode_command,
)
from helixbench.reference_server.wire.seldom import Seldom
from helixbench.reference_server.wire.transport import Transport, reply
from helixbench.solver.problem.plan import LayerRange
from helixbench.solver.scheduling.history import HistoryKeeper
from helixbench.solver.scheduling.watch import REPORT_EVERY_S, Report

_log = logging.getLogger(__name__)
_IDLE_POLL_MS = 1_000
MAX_ECHO_BYTES = 1 << 24


Handler: TypeAlias = Callable[["Agent", Any], Answer]

LEASE_S = 5.0
"""An owner that is not heard of for so long has gone: its stage is unloaded."""

LEAVE_S = 30.0
"""An agent that is told to end waits so long for its requests to end."""

_REPORT_POLL_MS = 100
_OWN_DELAY_S = 1.0
_TOUCH_S = 0.05  # between two looks at peers, owner and reports
NOTHING_DONE = Report(
    due_in_s=0.0,
    iterations=0,
    measured_s=0.0,
    predicted_s=0.0,
    has_work=False,
    progress_age_s=0.0,
    kv_used_tokens=0,
)


class Lease(msgspec.Struct):
    """The run that an agent is loaded for, whose it is in words, and until when that holds unless it is renewed."""

    run: str
    owner: str
    until_s: float


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What an agent is started with.

    ``threads`` compute on a CPU, one for each core where it is ``None``, on the cores of ``cpus`` where it names any.
    ``emulate`` is the file of a device whose times the agent keeps, ``time_scale`` times as slow.
    """

    listen: str
    key: Path
    device: str = "cpu"
    memory_bytes: float | None = None
    threads: int | None = None
    cpus: tuple[int, ...] = ()
    emulate: Path | None = None
    time_scale: float = 1.0


class Agent:
    """One node's loop: receive, run an iteration, send its result.

    Args:
        config: device and address.
        handlers: commands beyond those of serving (to profile the node), each with the function that answers it.

    Attributes:
        hold: until when an iteration's result is held.
    """

    def __init__(self, config: AgentConfig, handlers: Mapping[type[Command], Handler] | None = None) -> None:
        self.device_name = config.device
        self._threads = config.threads or max(1, int(available_cpus()))
        self.hold = make_device(config.emulate, time_scale=config.time_scale)
        if isinstance(self.hold, EmulatedNode):
            self.device = self.hold.describe(config.memory_bytes)
        else:
            self.device = describe_device(config.device, memory_bytes=config.memory_bytes, threads=self._threads)
        self.transport = Transport(load_key_file(config.key))
        try:
            self._router, self.address = self.transport.listen(config.listen)
        except InputError:
            self.transport.close()
            raise
        self._runtime: NodeRuntime | None = None
        self._progress: Progress | None = None  # of the stage that is loaded
        self._lease: Lease | None = None  # of the run that it is loaded for
        self._peers = self._make_peers({}, {})
        self._latency_s: dict[str, float] = {}  # peer -> seconds that messages there are held
        self._held: HeldMessages[tuple[Work, list[bytes]]] = HeldMessages()
        self._controller: bytes | None = None  # who loaded the stage, and gets its tokens and reports
        self._asking = b""  # whose command is being obeyed
        self._sent: dict[str, LinkCounters] = {}  # peer -> what went there
        self._busy_s = 0.0
        self._iterations = 0
        self._tokens = {True: 0, False: 0}  # is decode -> tokens run
        self._history = HistoryKeeper()
        self._stopped = False
        self._seldom = Seldom(_log)
        self._touched_s = 0.0  # when peers, owner and reports were last looked at
        self._leaves_by_s: float | None = None  # when a leaving agent stops at the latest
        self._handlers: dict[type[Command], Callable[..., Answer | None]] = {
            Describe: self._describe,
            OpenModel: self._open_model,
            Load: self._load_for,
            Forget: self._forget,
            SetSpeed: self._set_speed,
            Release: self._release,
            ReadCounters: self._counters,
            Shutdown: self._shutdown,
            **{kind: functools.partial(handler, self) for kind, handler in (handlers or {}).items()},
        }

    def serve(self) -> None:
        """Run until told to stop. What goes wrong ends no more than the requests that it concerns."""
        while not self._stopped:
            try:
                self.turn(_IDLE_POLL_MS)
            except HelixbenchError as error:
                self._batch_failed(error)
            except Exception as error:
                _log.exception("an iteration failed")
                self._batch_failed(MeasurementError(f"an iteration failed: {error!r}; the agent's log says more"))

    def _batch_failed(self, error: HelixbenchError) -> None:
        _log.error("%s", error)
        attempts = tuple(item.request for _, item in self._runtime.shape) if self._runtime else ()
        if attempts and self._controller is not None:
            self.tell_controller(RequestsFailed(attempts, str(error)))

    def stop(self) -> None:
        """Leave the loop after this turn."""
        self._stopped = True

    def leave(self) -> None:
        """Take no new requests and stop once there are none left, or after ``LEAVE_S``; asked again, stop at once."""
        if self._progress is None or self._leaves_by_s is not None:
            self.stop()
            return
        self._leaves_by_s = time.perf_counter() + LEAVE_S
        self._progress.is_leaving = True
        self._progress.next_s = 0.0  # it is said at once

    def close(self) -> None:
        """Close all sockets."""
        self._peers.close()
        self.transport.close()

    def turn(self, timeout_ms: int) -> bool:
        """One round of the loop; ``True`` when an iteration ran.

        Everything that the server does per iteration happens in here, so this is what the profiler times.

        Raises:
            HelixbenchError: the iteration could not be run, or its result not be sent.
        """
        has_work = self._runtime is not None and self._runtime.has_work
        wait_ms = math.ceil(self.runtime.wait_s() * 1000) if has_work else timeout_ms
        if self._lease is not None:
            wait_ms = min(wait_ms, _REPORT_POLL_MS)
        is_anything = self._router.poll(self._held.poll_ms(wait_ms))
        begin = time.perf_counter()
        if is_anything or has_work:
            with contextlib.suppress(zmq.Again):
                while True:
                    self._receive(self._router.recv_multipart(zmq.NOBLOCK))
        for work, rest in self._held.take():  # after receiving: what came during an iteration may be due by now
            self._accept(work, rest)
        self._keep_in_touch()  # after all that waited was read: a long iteration here is no silence of the owner's
        if self._runtime is None or not self._runtime.has_work or self._runtime.wait_s() > 0:
            return False
        decoded = self._tokens[True]
        going = self._runtime.run_batch(self._tokens)
        self.hold.finish(begin, self._runtime.shape)
        if self._progress is not None:  # before anything is sent: an emulated device's cost knows nothing of that
            self._progress.ran(begin_s=begin, end_s=time.perf_counter())
        self._runtime.ended()
        for outbound in going:
            self._send(outbound)
        end = time.perf_counter()
        kv_tokens = self._runtime.runner.kv.used_tokens
        scale = self.hold.time_scale
        begin, end = begin / scale, end / scale
        self._history.add(begin, end, decode_tokens=self._tokens[True] - decoded, kv_tokens=kv_tokens)
        self._busy_s += end - begin
        self._iterations += 1
        return True

    def _announce(self) -> None:
        """Before an iteration that may take longer than the time between two reports, say so."""
        if self._progress is not None and self._progress.begin() > REPORT_EVERY_S:
            self._report(time.perf_counter())

    def _keep_in_touch(self) -> None:
        """Ask peers, report to the owner when that is due, and let the stage go where the owner has gone."""
        if self._lease is None:
            return
        now_s = time.perf_counter()
        if now_s < self._touched_s + _TOUCH_S:
            return  # asking the sockets of peers takes more than an iteration may lose
        late_s = now_s - self._touched_s
        if late_s > _OWN_DELAY_S:  # this process did not run: its owner may not have, either, and is not late for that
            self._lease.until_s += late_s
        self._touched_s = now_s
        self._peers.tick(now_s)
        if self._leaves_by_s is not None and (now_s > self._leaves_by_s or self._is_done_before(now_s)):
            self.stop()
        if now_s > self._lease.until_s:
            _log.warning("%s has not been heard of for %g s; its stage is unloaded", self._lease.owner, LEASE_S)
            self.unload()
        elif self._progress is not None and now_s >= self._progress.next_s:
            self._report(now_s)

    def _is_done_before(self, now_s: float) -> bool:
        """Whether a leaving agent has no requests, a second after it said that it wants none."""
        assert self._leaves_by_s is not None
        return now_s > self._leaves_by_s - LEAVE_S + 1.0 and not self.runtime.attempts

    def _report(self, now_s: float) -> None:
        assert self._lease is not None
        assert self._progress is not None
        report = self._progress.report(now_s=now_s, peers=self._peers.seen(now_s))
        self.tell_controller(Status(self._lease.run, self._lease.owner, report))

    def load(self, command: Load) -> Loaded:
        """Hold another layer range; what was held and queued before is dropped.

        Raises:
            InputError: the model differs from the one meant, the range does not fit the memory, or another run has a
                stage loaded here and is still there.
        """
        self._require_free(command.run, take_over=command.take_over)
        self.unload()
        model = self.open_model(command.model, command.model_digest)
        self._require_room(model, command)
        runner = load_runner(
            model,
            start=command.start,
            end=command.end,
            kv_capacity_tokens=command.kv_capacity_tokens,
            dtype=command.dtype,
            device=self.device_name,
        )
        self._peers = self._make_peers(command.peers, command.bytes_per_s)
        self._runtime = NodeRuntime(
            command.node,
            runner,
            max_batch_tokens=command.max_batch_tokens,
            max_decode_batch=command.max_decode_batch,
            replay_memory_bytes=command.replay_memory_bytes,
        )
        self._runtime.announce = self._announce
        self._latency_s = command.latency_s
        held = LayerRange(command.start, command.end)
        self.hold.load(model.facts(dtype=command.dtype), held, seed=command.node)
        if command.run:
            now_s = self._touched_s = time.perf_counter()
            self._lease = Lease(command.run, command.owner, now_s + LEASE_S)
            scale = self.hold.time_scale
            self._progress = Progress(
                self._runtime, command.cost, held, is_last=runner.is_last, time_scale=scale, now_s=now_s
            )
        return Loaded(weight_bytes=runner.weight_bytes, kv_capacity_tokens=runner.kv.capacity_tokens)

    def _load_for(self, command: Load) -> Loaded:
        """As ``load``, for whoever sends the command: that is where tokens and reports go from now on."""
        self._require_free(command.run, take_over=command.take_over)
        self._controller = self._asking
        return self.load(command)

    def _require_free(self, run: str, *, take_over: bool) -> None:
        lease = self._lease
        if lease is not None and lease.run != run and not take_over and time.perf_counter() < lease.until_s:
            raise InputError(
                f"it serves run {lease.run} of {lease.owner}; end that one first, or take over with --take-over"
            )

    def _forget(self, _: Forget) -> None:
        """Drop every request and go on with the stage."""
        if self._runtime is not None:
            self._runtime.close_all()

    def _release(self, command: Release) -> None:
        if self._lease is not None and self._lease.run == command.run:
            self.unload()

    def _set_speed(self, command: SetSpeed) -> None:
        self.hold.set_speed(command.factor)

    def _renew(self, identity: bytes, run: str) -> None:
        """Renew the lease of the run; whoever asks for another one hears whose stage is loaded here, if any."""
        now_s = time.perf_counter()
        if self._lease is not None and self._lease.run == run:
            self._lease.until_s = now_s + LEASE_S
            return
        owner = self._lease or Lease("", "", 0.0)
        self.tell(identity, Status(owner.run, owner.owner, NOTHING_DONE))

    def _make_peers(self, addresses: Mapping[str, str], bytes_per_s: Mapping[str, float]) -> Peers:
        return Peers(self.transport, addresses, bytes_per_s, now_s=time.perf_counter())

    def _require_room(self, model: Model, command: Load) -> None:
        """Check that weights and KV cache fit, before anything is loaded."""
        sizes = (command.kv_capacity_tokens, command.max_batch_tokens, command.max_decode_batch)
        if any(size is not None and size < 1 for size in sizes):
            got = ", ".join(str(size) for size in sizes)
            raise InputError(f"kv_capacity_tokens, max_batch_tokens, max_decode_batch: need >= 1, got {got}")
        weight_bytes = model.range_bytes(command.start, command.end, dtype=command.dtype)
        num_layers = command.end - command.start
        kv_bytes_per_token = num_layers * model.facts(dtype=command.dtype).kv_bytes_per_token_per_layer
        capacity = int((self.device.memory_bytes - weight_bytes) // kv_bytes_per_token)
        if capacity < command.kv_capacity_tokens:
            raise InputError(
                f"layers [{command.start},{command.end}) take {weight_bytes / 1e6:.0f} MB of "
                f"{self.device.memory_bytes / 1e6:.0f} MB and leave room for {max(capacity, 0)} KV tokens of the "
                f"{command.kv_capacity_tokens} needed; give the node more memory, or profile and solve again"
            )

    def unload(self) -> None:
        """Drop the stage, its queue, its peers and its counters."""
        self._peers.close()
        if self._runtime is not None:
            self._runtime.runner.drop()
        self._peers, self._runtime, self._sent = self._make_peers({}, {}), None, {}
        self._lease = self._progress = None
        self._latency_s, self._held = {}, HeldMessages()
        self._busy_s, self._iterations, self._tokens = 0.0, 0, {True: 0, False: 0}
        self._history = HistoryKeeper()

    def open_model(self, model: str, digest: str) -> Model:
        """Open the model that the other end means, ready to load stages of it.

        Raises:
            InputError: its files on this node are others.
        """
        opened = open_model(model)
        if opened.digest() != digest:
            raise InputError(f"model {model}: its files on this node differ from the coordinator's; copy them again")
        prepare_for(opened, threads=self._threads)
        return opened

    @property
    def runtime(self) -> NodeRuntime:
        """The stage that is loaded, ready to run."""
        assert self._runtime is not None, "nothing is loaded"
        return self._runtime

    def tell(self, identity: bytes, answer: Answer, payload: bytes | None = None) -> int:
        """Answer a peer; returns the bytes sent, 0 where the peer has gone: it is not waited for."""
        try:
            return reply(self._router, identity, answer, payload)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            kind = type(answer).__name__
            self._seldom.say(logging.WARNING, f"gone before {kind}", f"a peer has gone before its answer ({kind})")
            return 0

    def tell_controller(self, answer: Answer) -> int:
        """Answer whoever loaded the stage or asked for the profile; returns the bytes sent."""
        assert self._controller is not None, "nobody has asked for anything"
        return self.tell(self._controller, answer)

    def send_to_peer(self, peer: str, work: Work, payload: memoryview | None) -> int:
        """Hand work to the next node; returns the bytes sent.

        Raises:
            MeasurementError: a node that was not among the peers when the stage was loaded.
        """
        return self._peers.send(peer, work, payload, now_s=time.perf_counter())

    def discard_message(self, timeout_ms: int) -> None:
        """Take the next message off the socket and drop it."""
        if self._router.poll(timeout_ms):
            self._router.recv_multipart()

    def _receive(self, frames: list[bytes]) -> None:
        identity, header, *rest = frames
        kind = "unreadable"
        try:
            if len(rest) > 1:
                raise MeasurementError(f"a message of {len(frames)} frames was received; at most 3 are sent")
            command = decode_command(header)
            kind = type(command).__name__
            if isinstance(command, Work):
                if command.due_s:
                    self._held.add((command, rest), due_s=command.due_s)
                else:
                    self._accept(command, rest)
            elif isinstance(command, Echo):
                self._echo(identity, command, rest)
            elif isinstance(command, PeerPing):
                self.tell(identity, PeerPong())
            elif isinstance(command, Renew):
                self._renew(identity, command.run)
            else:
                self._obey(identity, command)
        except HelixbenchError as error:
            self._fail(identity, error, kind)
        except Exception as error:
            self._seldom.say(logging.ERROR, f"failed {kind}", "a command failed", exc_info=True)
            self._fail(identity, MeasurementError(f"a command failed: {error!r}; the agent's log says more"), kind)

    def _obey(self, identity: bytes, command: Command) -> None:
        if type(command) not in self._handlers:
            raise MeasurementError(f"this agent does not take the command {type(command).__name__}")
        if isinstance(command, Profile):
            self._require_free("", take_over=False)
            self._controller = identity
        self._asking = identity
        answer = self._handlers[type(command)](command)
        if answer is not None:
            self.tell(identity, answer)

    def _accept(self, work: Work, rest: list[bytes]) -> None:
        """Hand work to the runtime, unless it is of a run that is not the one loaded: late then, and no error."""
        if self._runtime is None or work.run != (self._lease.run if self._lease else ""):
            if work.run:
                if self._progress is not None:
                    self._progress.num_dropped += 1
                return
            raise MeasurementError("work came before a layer range was loaded")
        for outbound in self._runtime.accept(work, rest[0] if rest else None):
            self._send(outbound)

    def _echo(self, identity: bytes, command: Echo, rest: list[bytes]) -> None:
        if not 0 <= command.reply_bytes <= MAX_ECHO_BYTES:
            raise MeasurementError(f"an echo of {command.reply_bytes} bytes was asked for; at most {MAX_ECHO_BYTES}")
        payload = bytes(command.reply_bytes) if command.reply_bytes else None
        self.tell(identity, Echoed(command.number, len(rest[0]) if rest else 0), payload)

    def _fail(self, identity: bytes, error: HelixbenchError, kind: str) -> None:
        self._seldom.say(logging.ERROR, kind, str(error))
        self.tell(identity, Failed(str(error), error.exit_code))

    def _send(self, outbound: Outbound) -> None:
        name, message = outbound.peer or COORDINATOR, outbound.message
        latency_s = self._latency_s.get(name, 0.0)
        if isinstance(message, Work):
            assert outbound.peer is not None
            run = self._lease.run if self._lease else ""
            if latency_s or run:
                message = msgspec.structs.replace(message, due_s=due_s(latency_s), run=run)
            size = self.send_to_peer(outbound.peer, message, outbound.payload)
        else:
            if isinstance(message, Sampled) and latency_s:
                message = msgspec.structs.replace(message, due_s=due_s(latency_s))
            size = self.tell_controller(message)
        before = self._sent.get(name, LinkCounters())
        self._sent[name] = LinkCounters(
            before.payload_bytes + size, before.messages + 1, before.tokens + outbound.tokens
        )

    def _open_model(self, command: OpenModel) -> Done:
        self.open_model(command.model, command.model_digest)
        return Done()

    def _describe(self, _: Describe) -> Description:
        return Description(
            device=with_current_facts(self.device),
            versions=library_versions(),
            machine=machine_facts(),
            time_scale=self.hold.time_scale,
        )

    def _counters(self, _: ReadCounters) -> Counters:
        if self._runtime is None:
            raise MeasurementError("no layer range is loaded, so there is nothing to count")
        kv = self._runtime.runner.kv
        peak, kv.peak_tokens = kv.peak_tokens, kv.used_tokens
        return Counters(
            busy_s=self._busy_s,
            iterations=self._iterations,
            prefill_tokens=self._tokens[False],
            decode_tokens=self._tokens[True],
            kv_peak_tokens=peak,
            kv_capacity_tokens=kv.capacity_tokens,
            sent=dict(self._sent),
            history=self._history.read(time.perf_counter() / self.hold.time_scale),
            late_iterations=self.hold.late_iterations,
            release_error_s=self.hold.release_error_s,
        )

    def _shutdown(self, _: Shutdown) -> Done:
        self.stop()
        return Done()
