"""Write the device files that come with helixbench: ``python -m benchmarks.device_files [FOLDER]``.

Peak rates and memory are those of public data sheets. A100, L4, T4 and V100 also have timings of LLaMA-2 70B layers
that were published with the Helix paper (``examples/data/gpu_profiles``). There they reach 0.75 to 0.83 of their peak
bandwidth and 0.41 to 0.80 of their peak operations per second, which is why every roofline takes 0.8 and 0.6.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import msgspec

from helixbench.profiler.cost.measured import MeasuredCost
from helixbench.profiler.emulated_device import EmulatedDevice, ModelTimes, Roofline
from helixbench.profiler.import_tables import MEMORY_UTILIZATION, WORKSPACE_BYTES, import_cost
from helixbench.profiler.model.hash_model import make_hash_model
from helixbench.profiler.model.model import open_model
from helixbench.profiler.model.synthetic import make_model
from helixbench.records import save_record

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "reference_server" / "testbed" / "shipped"
TABLES = ROOT / "examples" / "data" / "gpu_profiles"
SHIPPED = ROOT / "profiler" / "devices"

FLOPS_REACHED, BANDWIDTH_REACHED = 0.6, 0.8
LAUNCH_S, STEP_S = 40e-6, 1e-3
GBIT = 1e9 / 8

DEMO_DEVICES = ("A100-40GB", "L4", "RTX-4090", "T4", "Jetson-AGX-Orin-64GB")
STANDS_FOR = "llama3-8b"
"""Whose layers those of the demo's small model stand for: they take as long."""

# Name -> (memory GB, dense FP16 TFLOP/s, memory GB/s, NIC Gbit/s, data sheet, table of timings)
DEVICES: dict[str, tuple[float, float, float, float, str, str]] = {
    "A100-40GB": (40, 312, 1555, 100, "NVIDIA A100 data sheet, SXM4 40 GB", "a100"),
    "V100": (16, 125, 900, 25, "NVIDIA V100 data sheet, SXM2 16 GB", "v100"),
    "L4": (24, 121, 300, 25, "NVIDIA L4 data sheet (FP16 without sparsity)", "l4"),
    "T4": (16, 65, 320, 25, "NVIDIA T4 data sheet", "t4"),
    "H100-80GB": (80, 989, 3350, 400, "NVIDIA H100 data sheet, SXM5 (FP16 without sparsity)", ""),
    "H200": (141, 989, 4800, 400, "NVIDIA H200 data sheet, SXM (FP16 without sparsity)", ""),
    "RTX-4090": (24, 165, 1008, 10, "NVIDIA Ada GPU architecture white paper (FP16 with FP32 accumulate, dense)", ""),
    "Jetson-AGX-Orin-64GB": (64, 42.5, 204.8, 10, "NVIDIA Jetson AGX Orin data sheet (FP16 tensor cores, dense)", ""),
}


def device(name: str) -> EmulatedDevice:
    """The device of that name."""
    memory_gb, tflops, gb_per_s, nic_gbit, sheet, table = DEVICES[name]
    return EmulatedDevice(
        name=name,
        memory_bytes=MEMORY_UTILIZATION * memory_gb * 1e9 - WORKSPACE_BYTES,
        nic_bytes_per_s=nic_gbit * GBIT,
        times=(llama2_70b_times(table),) if table else (),
        roofline=Roofline(
            flops=tflops * 1e12,
            memory_bandwidth_bytes_per_s=gb_per_s * 1e9,
            launch_s=LAUNCH_S,
            step_s=STEP_S,
            flops_reached=FLOPS_REACHED,
            bandwidth_reached=BANDWIDTH_REACHED,
        ),
        source=(
            f"peak rates and memory: {sheet}; assumed: {FLOPS_REACHED} of the operations and {BANDWIDTH_REACHED} of "
            f"the bandwidth reached, {1e6 * LAUNCH_S:.0f} us per layer and {1e3 * STEP_S:.0f} ms per iteration for the "
            f"host, a NIC of {nic_gbit:g} Gbit/s, {MEMORY_UTILIZATION:.0%} of the memory used, of which "
            f"{WORKSPACE_BYTES / 1e9:.0f} GB by the engine"
        ),
    )


def llama2_70b_times(table: str) -> ModelTimes:
    """Times of that table's layers: 8192 wide, 28672 in the feed-forward, 8 of 64 heads for keys and values, FP16."""
    cost = import_cost(TABLES, table)
    return ModelTimes(
        model="llama2-70b",
        layer_weight_bytes=2.0 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192),
        kv_bytes_per_token_per_layer=2.0 * 2 * 1024,
        cost=msgspec.structs.replace(cost, samples=(), workspace_bytes=0.0),
        origin="published timings",
    )


def demo_device(name: str) -> EmulatedDevice:
    """The device of that name for the demo's model: each of its layers takes the time of a layer of a large model."""
    whole = device(name)
    assert whole.roofline is not None
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder, "small"), Path(folder, "large")
        make_model(small, preset="nano")
        make_hash_model(large, like=STANDS_FOR)
        computed, timed = (
            open_model(str(path)).facts(dtype=dtype) for path, dtype in ((small, "float32"), (large, "bfloat16"))
        )
    cost = MeasuredCost(
        stage=whole.roofline.stage_cost(timed),
        samples=(),
        held_out_error_median=0.0,
        held_out_error_p90=0.0,
        workspace_bytes=0.0,
        max_batch_tokens=whole.roofline.max_batch_tokens,
        source=f"roofline of {name} for layers of {STANDS_FOR}, for which those of this small model stand",
    )
    times = ModelTimes(
        model="nano",
        layer_weight_bytes=computed.layer_weight_bytes,
        kv_bytes_per_token_per_layer=computed.kv_bytes_per_token_per_layer,
        cost=cost,
        origin="data sheet",
    )
    return msgspec.structs.replace(whole, times=(times,), roofline=None)


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else SHIPPED
    for each in DEVICES:
        save_record(folder / f"{each}.json", device(each))
        print(folder / f"{each}.json")
    for each in DEMO_DEVICES if len(sys.argv) == 1 else ():
        save_record(DEMO / f"{each}.json", demo_device(each))
        print(DEMO / f"{each}.json")
