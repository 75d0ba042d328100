"""What a node's doctor looks at. A fact that nobody tells is ``None``."""

from __future__ import annotations

import msgspec


class GpuFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU as NVML tells it; ``throttle_reasons`` are NVML's bits."""

    name: str
    uuid: str
    throttle_reasons: int | None = None
    is_persistent: bool | None = None
    is_mig: bool | None = None
    is_ecc: bool | None = None
    uncorrected_errors: int | None = None
    memory_used_bytes: float | None = None
    memory_total_bytes: float | None = None
    temperature_celsius: float | None = None
    sm_frequency_hz: float | None = None
    sm_max_frequency_hz: float | None = None


class NodeFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One machine, as the process of a node sees it.

    ``requirements`` are those of this distribution's metadata. ``driver_cuda`` is the newest CUDA of the driver,
    ``torch_cuda`` the one that torch was built for. ``gpus`` are in NVML's order, ``torch_uuids`` in torch's, which is
    another one and may be of fewer (``CUDA_VISIBLE_DEVICES``). ``why_no_testbed`` is empty where shaped namespaces can
    be made.
    """

    host: str
    system: str
    python: str
    versions: dict[str, str]
    requirements: tuple[str, ...]
    requires_python: str
    has_nvidia_device: bool
    nvml_problem: str = ""
    driver: str | None = None
    driver_cuda: str | None = None
    gpus: tuple[GpuFacts, ...] = ()
    torch_cuda: str | None = None
    torch_sees_gpus: int | None = None
    torch_uuids: tuple[str, ...] | None = None
    torch_problem: str = ""
    visible_devices: str | None = None
    iperf3: str | None = None
    programs: tuple[str, ...] = ()
    is_root: bool = False
    can_administer_network: bool | None = None
    why_no_testbed: str = ""
    cgroup_version: int | None = None
    logical_cores: int = 1
    usable_cores: float = 1.0
    load: float | None = None
    governors: tuple[str, ...] = ()
    memory_available_bytes: float | None = None
    memory_limit_bytes: float | None = None
    disk_folder: str = ""
    disk_free_bytes: float | None = None
    max_open_files: int | None = None
    is_clock_synchronised: bool | None = None
    can_open_port: str = ""
