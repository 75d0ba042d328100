from __future__ import annotations

from types import SimpleNamespace

import msgspec
import pytest

from helixbench.profiler.cluster import Device, Node
from helixbench.profiler.device import describe_device, torch_cuda_facts
from helixbench.profiler.staleness import differences, identity_of, identity_of_node, stale_parts

GPU = Device(
    kind="cuda",
    name="X1",
    memory_bytes=8e10,
    facts={"uuid": "aaaa", "driver": "570.1", "power_limit_w": 700.0, "temperature_celsius": 40.0},
)
VERSIONS = {"torch": "2.11.1+cu128", "transformers": "5.10.0", "helixbench": "0.1.0", "python": "3.11.9", "zlib": "1"}


def test_the_same_device_and_versions_are_not_stale() -> None:
    assert differences(identity_of(GPU, VERSIONS), identity_of(GPU, VERSIONS)) == ()


@pytest.mark.parametrize(
    ("fact", "value", "difference"),
    [
        ("uuid", "bbbb", "uuid aaaa -> bbbb"),
        ("driver", "580.2", "driver 570.1 -> 580.2"),
        ("power_limit_w", 350.0, "power_limit_w 700 -> 350"),
        ("temperature_celsius", 80.0, None),
        ("new_fact", "x", None),
    ],
)
def test_device_facts_that_decide_the_speed_count(fact: str, value: str | float, difference: str | None) -> None:
    other = msgspec.structs.replace(GPU, facts={**GPU.facts, fact: value})
    found = differences(identity_of(GPU, VERSIONS), identity_of(other, VERSIONS))
    assert found == ((difference,) if difference else ())


@pytest.mark.parametrize("fact", ["driver", "power_limit_w"])
def test_what_decides_a_gpus_speed_and_is_known_on_one_side_only_is_named(fact: str) -> None:
    whole = identity_of(GPU, {})
    without = {name: value for name, value in whole.items() if name != fact}
    value = whole[fact]
    assert differences(whole, without) == (f"{fact} not known now ({value} when profiled)",)
    assert differences(without, whole) == (f"{fact} not known when profiled ({value} now)",)


def test_another_cuda_of_the_same_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(uuid="aaaa", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30)
    found = []
    for cuda in ("12.8", "13.0", None):
        monkeypatch.setattr("torch.version.cuda", cuda)
        device = Device(kind="cuda", name="X1", memory_bytes=8e10, facts=torch_cuda_facts(properties))
        found.append(identity_of(device, VERSIONS))
    assert differences(found[0], found[1]) == ("torch_cuda 12.8 -> 13.0",)
    assert "torch_cuda" not in found[2]


@pytest.mark.parametrize(
    ("library", "version", "is_stale"),
    [
        ("torch", "2.11.2+cpu", False),
        ("torch", "2.12.0", True),
        ("transformers", "5.11.0", True),
        ("helixbench", "0.2.0", True),
        ("helixbench", "0.1.7", False),
        ("zlib", "2", False),
    ],
)
def test_a_patch_release_is_not_another_version(library: str, version: str, is_stale: bool) -> None:
    found = identity_of(GPU, {**VERSIONS, library: version})
    assert bool(differences(identity_of(GPU, VERSIONS), found)) == is_stale


def test_another_kind_of_device_is_named_with_its_node() -> None:
    cpu = Device(kind="cpu", name="Example CPU", memory_bytes=1e9)
    profiled, found = {"a": identity_of(GPU, {}), "b": {}}, {"a": identity_of(cpu, {}), "b": identity_of(GPU, {})}
    assert stale_parts(profiled, found) == ("a: device cuda -> cpu, name X1 -> Example CPU",)


def test_a_node_from_a_table_holds_for_no_device() -> None:
    node = Node(name="t", device=GPU, max_layers=1, capacity_tokens_per_s=(1.0,))
    assert identity_of_node(node) == {}
    assert identity_of_node(msgspec.structs.replace(node, versions=VERSIONS))["torch"] == "2.11"


def test_this_machine_is_itself() -> None:
    first, second = (identity_of(describe_device("cpu", threads=2), VERSIONS) for _ in range(2))
    assert differences(first, second) == ()
    assert {"name", "threads", "machine"} <= first.keys()
