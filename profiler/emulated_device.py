"""EmulatedDevice: memory, NIC and stage times of a device that is not there. The file ``device.json``.

An emulated node computes on whatever it has and releases its results when these stage times say so.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from helixbench.errors import InputError
from helixbench.profiler.cluster import STAGE_TIMES_FACT, ClusterProfile, Device, ModelFacts
from helixbench.profiler.cost.measured import MeasuredCost
from helixbench.profiler.cost.model import StageCost
from helixbench.profiler.model.dtypes import dtype_bytes
from helixbench.records import digest, load_record

Origin: TypeAlias = Literal["profile", "published timings", "data sheet"]
"""Where stage times come from: measured here, measured and published by others, or computed from peak rates."""

DEFAULT_DTYPE = "float16"
"""Of a model that does not say."""

DIGEST_FACT = "device_digest"
"""Among the facts of an emulated device: the digest of its file, for its times are all that it is."""

SAME_LAYER = 0.15
"""Relative difference of weight bytes up to which layers are taken as equal: published sizes are rounded."""


_UNBOUNDED_TOKENS = 1e9  # a context that no sequence has: peak rates hold for any


class Roofline(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Stage times from peak rates: a layer takes as long as reading its weights or computing them, the longer of both.

    Attributes:
        flops: floating-point operations per second, peak; one rate, whatever the dtype.
        memory_bandwidth_bytes_per_s: peak.
        launch_s: host time per layer, for its kernels.
        step_s: host time per iteration: batching, sampling, copies.
        flops_reached: share of ``flops`` that matrix products reach.
        bandwidth_reached: share of ``memory_bandwidth_bytes_per_s`` that reading reaches.
        max_batch_tokens: of one iteration.
    """

    flops: float
    memory_bandwidth_bytes_per_s: float
    launch_s: float
    step_s: float = 0.0
    flops_reached: float = 1.0
    bandwidth_reached: float = 1.0
    max_batch_tokens: int = 2048

    def __post_init__(self) -> None:
        for field in ("flops", "memory_bandwidth_bytes_per_s"):
            if not 0 < getattr(self, field) < float("inf"):
                raise ValueError(f"{field}: need a finite value > 0, got {getattr(self, field)}")
        for field in ("flops_reached", "bandwidth_reached"):
            if not 0 < getattr(self, field) <= 1:
                raise ValueError(f"{field}: need a share of the peak, above 0 and up to 1, got {getattr(self, field)}")
        if not (0 <= self.launch_s < float("inf") and 0 <= self.step_s < float("inf")):
            raise ValueError("launch_s, step_s: need finite seconds >= 0")
        if self.max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens: need >= 1, got {self.max_batch_tokens}")

    def stage_cost(self, model: ModelFacts) -> StageCost:
        """The cost of that model's layers.

        A token costs ``2 * parameters`` operations. While they take less time than reading the weights, more tokens
        cost nothing; from the batch at which both take the same on, each costs its operations. Attention reads the
        cached keys and values, and computes four operations per hidden element and (query, key) pair of a prompt.
        The embedding is read by row; the head is read and computed.
        """
        dtype = dtype_bytes(model.dtype or DEFAULT_DTYPE)
        flops = self.flops * self.flops_reached
        bytes_per_s = self.memory_bandwidth_bytes_per_s * self.bandwidth_reached
        read_s = model.layer_weight_bytes / bytes_per_s
        token_s = 2 * model.layer_weight_bytes / dtype / flops
        ridge_tokens = read_s / token_s
        knots, prices = ((1.0, ridge_tokens), (0.0, token_s)) if ridge_tokens > 1 else ((1.0,), (token_s,))
        return StageCost.with_zeros(
            step_s=self.step_s,
            layer_s=self.launch_s + max(read_s, token_s),
            token_knots=knots,
            layer_token_s=prices,
            layer_decode_context_s=model.kv_bytes_per_token_per_layer / bytes_per_s,
            layer_prefill_pair_s=4 * model.activation_bytes_per_token / dtype / flops,
            embed_token_s=model.activation_bytes_per_token / bytes_per_s,
            head_s=model.head_bytes / bytes_per_s,
            head_item_s=2 * model.head_bytes / dtype / flops,
            max_tokens=float(self.max_batch_tokens),
            max_context_tokens=_UNBOUNDED_TOKENS,
        )


class ModelTimes(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Stage times of the layers of one model. They hold for every model with layers of the same sizes."""

    model: str
    layer_weight_bytes: float
    kv_bytes_per_token_per_layer: float
    cost: MeasuredCost
    origin: Origin

    def is_of(self, model: ModelFacts) -> bool:
        """Whether that model's layers are of these sizes."""
        is_near = abs(model.layer_weight_bytes - self.layer_weight_bytes) <= SAME_LAYER * self.layer_weight_bytes
        return is_near and model.kv_bytes_per_token_per_layer == self.kv_bytes_per_token_per_layer


class StageTimes(msgspec.Struct, frozen=True):
    """Stage times of an emulated device for one model, and where they come from."""

    cost: MeasuredCost
    origin: Origin


class EmulatedDevice(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    kw_only=True,
    omit_defaults=True,
    tag_field="schema",
    tag="helixbench.device/1",
):
    """A device by its figures. ``memory_bytes`` is for weights and KV cache; ``source`` says where figures are from.

    Stage times are those of ``times`` for the models listed there, and of ``roofline`` for any other.
    """

    name: str
    memory_bytes: float
    nic_bytes_per_s: float | None = None
    times: tuple[ModelTimes, ...] = ()
    roofline: Roofline | None = None
    source: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.memory_bytes < float("inf"):
            raise ValueError(f"memory_bytes: need a finite value > 0, got {self.memory_bytes}")
        if self.nic_bytes_per_s is not None and not 0 < self.nic_bytes_per_s < float("inf"):
            raise ValueError(f"nic_bytes_per_s: need a finite value > 0, got {self.nic_bytes_per_s}")
        if not self.times and self.roofline is None:
            raise ValueError("need `times` of some model, or a `roofline`")

    def stage_times(self, model: ModelFacts) -> StageTimes:
        """Stage times for that model.

        Raises:
            InputError: the device has times of other models alone.
        """
        for times in self.times:
            if times.is_of(model):
                return StageTimes(times.cost, times.origin)
        if self.roofline is None:
            known = ", ".join(
                f"{times.model} (layers of {times.layer_weight_bytes / 1e6:.4g} MB)" for times in self.times
            )
            raise InputError(
                f"device {self.name}: has no times for {model.name} (layers of {model.layer_weight_bytes / 1e6:.4g} "
                f"MB), only for {known}; profile {model.name} on that device, or give the device file a `roofline`"
            )
        cost = MeasuredCost(
            stage=self.roofline.stage_cost(model),
            samples=(),
            held_out_error_median=0.0,
            held_out_error_p90=0.0,
            workspace_bytes=0.0,
            max_batch_tokens=self.roofline.max_batch_tokens,
            source=f"roofline of {self.name}",
        )
        return StageTimes(cost, "data sheet")

    def describe(self, *, memory_bytes: float | None = None) -> Device:
        """The device as a node has it, with that much memory or its own."""
        origins = sorted({times.origin for times in self.times} | ({"data sheet"} if self.roofline else set()))
        return Device(
            kind="emulated",
            name=self.name,
            memory_bytes=memory_bytes or self.memory_bytes,
            facts={DIGEST_FACT: digest(self), STAGE_TIMES_FACT: ", ".join(origins)},
        )


def device_of_node(cluster: ClusterProfile, node_name: str) -> EmulatedDevice:
    """The device of a profiled node, to be emulated elsewhere.

    Raises:
        InputError: no such node, or one without measured stage times.
    """
    by_name = {node.name: node for node in cluster.nodes}
    node = by_name.get(node_name)
    if node is None:
        raise InputError(f"node {node_name}: no such node in the profile; it has {', '.join(by_name)}")
    if node.cost is None:
        raise InputError(
            f"node {node_name}: has a capacity table but no stage times, so nothing says what a batch takes"
        )
    nics = [rate for rate in (node.nic_out_bytes_per_s, node.nic_in_bytes_per_s) if rate is not None]
    times = ModelTimes(
        model=cluster.model.name,
        layer_weight_bytes=cluster.model.layer_weight_bytes,
        kv_bytes_per_token_per_layer=cluster.model.kv_bytes_per_token_per_layer,
        cost=msgspec.structs.replace(node.cost, samples=(), workspace_bytes=0.0, quality=None),
        origin="profile",
    )
    return EmulatedDevice(
        name=node.device.name,
        memory_bytes=node.device.memory_bytes - node.cost.workspace_bytes,
        nic_bytes_per_s=min(nics, default=None),
        times=(times,),
        source=f"profile of node {node_name}, {cluster.provenance.created or 'date not stated'}: {node.cost.source}",
    )


def device_path(name: str, *, folder: Path) -> Path:
    """The file of a device: one that comes with helixbench by its name, or a JSON file relative to a folder.

    Raises:
        InputError: no such device.
    """
    if name.endswith(".json"):
        return folder / name
    shipped = Path(str(resources.files("helixbench.profiler") / "devices"))
    path = shipped / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in shipped.glob("*.json")))
        raise InputError(f"emulated device {name}: not known; there are {known}, or name a device file FILE.json")
    return path


def load_device(path: Path) -> EmulatedDevice:
    """Read a device file."""
    return load_record(path, EmulatedDevice)
