"""What a demo runs: a model, a testbed, a load, and the baselines that the plan is compared with."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

import msgspec

from helixbench.records import save_bytes

GPU_SHARE = 0.85
"""Of a GPU's memory, for weights, workspace and KV cache."""


class DemoCluster(StrEnum):
    """Emulated clusters that come with helixbench; each is the name of its testbed."""

    TWO_PLACES = "two-places"
    PUBLISHED24 = "published24"
    THREE_REGIONS = "three-regions"


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """One demo.

    Requests of equal length finish in waves, so a window of whole rounds (``num_requests`` a multiple of
    ``concurrency``) counts each prompt once, wherever it begins. ``model_arguments`` are those of ``model make``,
    ``bench_arguments`` further ones of ``bench``; ``baselines`` are methods of ``solve``.
    """

    model_title: str
    model_arguments: tuple[str, ...]
    testbed: Path
    prompt_tokens: int = 64
    output_tokens: int = 32
    concurrency: int
    num_requests: int
    solve_s: int = 15
    profile_s: int | None = None
    bench_arguments: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ()

    @property
    def load_arguments(self) -> tuple[str, ...]:
        """Lengths and requests in flight, as ``solve`` and ``bench`` take them."""
        return (
            *("--prompt-tokens", str(self.prompt_tokens), "--output-tokens", str(self.output_tokens)),
            *("--concurrency", str(self.concurrency)),
        )


def setting_of(cluster: DemoCluster) -> Setting:
    """The demo of an emulated cluster: real tokens of a small model, or the shapes of a large one."""
    if cluster is DemoCluster.TWO_PLACES:
        return Setting(
            model_title="make a small Hugging Face model",
            model_arguments=("--preset", "nano", "--seed", "0"),
            testbed=Path(cluster),
            output_tokens=16,
            concurrency=28,
            num_requests=28,
            solve_s=10,
            baselines=("swarm", "petals"),
        )
    return Setting(
        model_title="make a model of Llama-2-70B's shapes",
        model_arguments=("--like", "llama2-70b"),
        testbed=Path(cluster),
        prompt_tokens=256,
        output_tokens=64,
        concurrency=240,
        num_requests=240,
        solve_s=60,
        bench_arguments=("--replay-memory", "250MB"),  # 24 agents share this machine's memory
        # The other rules fill nodes with weights: what is left for KV caches admits some 30 requests.
        baselines=("swarm",),
    )


def setting_of_testbed(testbed: Path, *, baselines: tuple[str, ...] = ("swarm", "petals")) -> Setting:
    """The demo of any testbed, for a small model."""
    return Setting(
        model_title="make a small Hugging Face model",
        model_arguments=("--preset", "tiny", "--seed", "0"),
        testbed=testbed,
        concurrency=24,
        num_requests=144,
        solve_s=20,
        profile_s=60,
        baselines=baselines,
    )


def setting_of_own_devices(out: Path) -> Setting:
    """The demo of this machine: its CUDA devices, one node each, in a testbed file written to ``out``; else its CPU.

    Two nodes on one processor compete for its memory, so baselines would tell little: there are none.
    """
    import torch

    count = torch.cuda.device_count()
    if not count:
        return setting_of_testbed(Path("two-cpus"), baselines=())
    memory_bytes = [torch.cuda.get_device_properties(index).total_memory for index in range(count)]
    nodes = [
        f'[[node]]\nname = "gpu{index}"\ndevice = "cuda:{index}"\nmemory = "{GPU_SHARE * size / 1e9:.1f}GB"\n'
        for index, size in enumerate(memory_bytes)
    ]
    save_bytes(out / "testbed.toml", "\n".join(nodes).encode())
    return setting_of_testbed(out / "testbed.toml", baselines=())
