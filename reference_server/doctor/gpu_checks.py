"""Whether driver, torch and GPUs fit each other and run at full speed. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from helixbench.reference_server.doctor.facts import GpuFacts, NodeFacts
from helixbench.reference_server.doctor.findings import GB, Finding, State, ok, problem, warning
from helixbench.reference_server.doctor.versions import numbers

USED_GPU_MEMORY = 0.1  # of all of it: more, and something else runs there


def examine_driver(facts: NodeFacts) -> Iterator[Finding]:
    """The driver, and whether torch fits it."""
    if facts.driver is None:
        if facts.has_nvidia_device:
            yield problem(
                "driver",
                f"there is an NVIDIA device, but NVML says: {facts.nvml_problem or 'nothing'}",
                "install or reload the driver until nvidia-smi works, and pip install nvidia-ml-py",
            )
        else:
            yield ok("driver", "no NVIDIA device; this node computes on CPU")
        return
    yield ok("driver", f"{facts.driver}, CUDA {facts.driver_cuda} at most, {len(facts.gpus)} GPU(s)")
    if not facts.gpus or facts.torch_problem:
        return
    if facts.torch_cuda is None:
        yield problem("torch CUDA", "torch is built without CUDA", "install torch from its CUDA wheel index")
    elif facts.driver_cuda is not None and numbers(facts.torch_cuda)[:1] > numbers(facts.driver_cuda)[:1]:
        yield problem(
            "torch CUDA",
            f"torch is built for CUDA {facts.torch_cuda}, the driver goes up to {facts.driver_cuda}",
            "update the driver, or install torch for the driver's CUDA",
        )
    elif not facts.torch_sees_gpus:
        shown = "unset" if facts.visible_devices is None else repr(facts.visible_devices)
        yield problem(
            "torch CUDA",
            f"torch for CUDA {facts.torch_cuda} sees no GPU; CUDA_VISIBLE_DEVICES is {shown}",
            "unset CUDA_VISIBLE_DEVICES, or name a device (or MIG instance) that exists",
        )
    else:
        yield ok("torch CUDA", f"built for CUDA {facts.torch_cuda}, sees {facts.torch_sees_gpus} GPU(s)")


# NVML's bits of clock event reasons, those that make a device slower than it was measured: bit -> (state, name)
_THROTTLING: dict[int, tuple[State, str]] = {
    0x04: ("warning", "power cap"),
    0x08: ("problem", "hardware slowdown"),
    0x20: ("warning", "temperature (software)"),
    0x40: ("problem", "temperature (hardware)"),
    0x80: ("problem", "power brake"),
}


def examine_gpus(facts: NodeFacts) -> Iterator[Finding]:
    """Each GPU: what slows it down, or takes its memory."""
    for index, gpu in enumerate(facts.gpus):
        name, label = f"gpu {index}", _label(gpu, facts)
        found = [*_gpu_state(name, label, gpu), *_gpu_modes(name, label, gpu)]
        yield from found or [ok(name, f"{label}{_clock_text(gpu)}")]


def _label(gpu: GpuFacts, facts: NodeFacts) -> str:
    """Name and UUID, and which of torch's devices it is: NVML's numbers, which checks are named by, are not torch's."""
    if facts.torch_uuids is None or gpu.is_mig:  # torch sees instances, which have UUIDs of their own
        return f"{gpu.name} {gpu.uuid}"
    if gpu.uuid in facts.torch_uuids:
        return f"{gpu.name} {gpu.uuid} (cuda:{facts.torch_uuids.index(gpu.uuid)})"
    why = "" if facts.visible_devices is None else f": CUDA_VISIBLE_DEVICES is {facts.visible_devices!r}"
    return f"{gpu.name} {gpu.uuid} (not seen by torch{why})"


def _clock_text(gpu: GpuFacts) -> str:
    if gpu.sm_frequency_hz is None or gpu.sm_max_frequency_hz is None:
        return ""
    return f", {gpu.sm_frequency_hz / 1e6:.0f} of {gpu.sm_max_frequency_hz / 1e6:.0f} MHz now"


def _gpu_state(name: str, label: str, gpu: GpuFacts) -> Iterator[Finding]:
    for bit, (state, reason) in _THROTTLING.items():
        if (gpu.throttle_reasons or 0) & bit:
            at = "" if gpu.temperature_celsius is None else f" at {gpu.temperature_celsius:.0f} °C"
            yield Finding(
                check=name,
                state=state,
                says=f"{label} is throttled by {reason}{at}",
                remedy="look at cooling, power supply and power limit (nvidia-smi -q -d PERFORMANCE), then measure",
            )
    if gpu.uncorrected_errors:
        yield problem(
            name,
            f"{label} has had {gpu.uncorrected_errors} uncorrected memory errors since it was started",
            "reset or reboot it; replace it when they come again (nvidia-smi -q -d ECC)",
        )
    used, total = gpu.memory_used_bytes, gpu.memory_total_bytes
    if used is not None and total and used > USED_GPU_MEMORY * total:
        yield warning(
            name,
            f"{used / GB:.1f} of {total / GB:.1f} GB of {label} are used already",
            "end what uses it (nvidia-smi), or start the agent with less --memory",
        )


def _gpu_modes(name: str, label: str, gpu: GpuFacts) -> Iterator[Finding]:
    if gpu.is_persistent is False:
        yield warning(name, f"{label}: persistence mode is off", "nvidia-smi -pm 1, or run nvidia-persistenced")
    if gpu.is_mig:
        yield warning(
            name,
            f"{label} is divided (MIG)",
            "give each agent one instance: CUDA_VISIBLE_DEVICES=MIG-UUID (nvidia-smi -L)",
        )
