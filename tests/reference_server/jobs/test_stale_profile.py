"""A plan whose profile was made on something else is refused, with what differs; allowed, every output says so."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from helixbench.errors import InputError
from helixbench.profiler.cluster import Device
from helixbench.profiler.model.files import ModelFiles
from helixbench.profiler.staleness import identity_of
from helixbench.records import save_record
from helixbench.reference_server.jobs.driver import open_plan, stale_parts_of
from helixbench.reference_server.wire.messages import Description
from helixbench.solver.problem.plan import LayerRange, Plan
from tests.conftest import ModelDir
from tests.reference_server.plans import make_plan

HERE = Device(kind="cpu", name="Example CPU", memory_bytes=1e9, facts={"threads": 1.0})
VERSIONS = {"torch": "2.11.0", "transformers": "5.10.0"}
DESCRIBED = {"a": Description(device=HERE, versions=VERSIONS, machine={})}


def plan_made_on(model: Path, made_on: dict[str, str]) -> Plan:
    plan = make_plan(model, {"a": (0, 6)}, [(("a",), 1.0)])
    return msgspec.structs.replace(plan, nodes={"a": msgspec.structs.replace(plan.nodes["a"], made_on=made_on)})


@pytest.fixture
def files(model_dir: ModelDir) -> ModelFiles:
    return ModelFiles(str(model_dir("test-llama")))


def test_the_same_device_and_versions_are_served(files: ModelFiles) -> None:
    plan = plan_made_on(files.directory, identity_of(HERE, VERSIONS))
    assert stale_parts_of(plan, files, DESCRIBED, allow_stale=False) == ()


def test_a_plan_of_tables_holds_for_no_device(files: ModelFiles) -> None:
    assert stale_parts_of(plan_made_on(files.directory, {}), files, DESCRIBED, allow_stale=False) == ()


def test_another_device_or_version_is_refused_with_what_differs(files: ModelFiles) -> None:
    other = msgspec.structs.replace(HERE, name="Other CPU", facts={"threads": 4.0})
    plan = plan_made_on(files.directory, identity_of(other, {**VERSIONS, "torch": "2.10.0"}))

    with pytest.raises(InputError) as refused:
        stale_parts_of(plan, files, DESCRIBED, allow_stale=False)

    line = "a: name Other CPU -> Example CPU, threads 4 -> 1, torch 2.10 -> 2.11"
    assert line in str(refused.value)
    assert "--allow-stale" in str(refused.value)
    assert stale_parts_of(plan, files, DESCRIBED, allow_stale=True) == (line,)


def test_other_files_of_as_many_layers_are_refused_unless_allowed(files: ModelFiles, tmp_path: Path) -> None:
    plan = msgspec.structs.replace(plan_made_on(files.directory, {}), model_digest="sha256:other")
    save_record(tmp_path / "plan.json", plan)
    addresses = {"a": "127.0.0.1:1"}

    with pytest.raises(InputError, match="made for model"):
        open_plan(tmp_path / "plan.json", str(files.directory), addresses)
    opened, _ = open_plan(tmp_path / "plan.json", str(files.directory), addresses, allow_stale=True)
    (line,) = stale_parts_of(opened, files, DESCRIBED, allow_stale=True)
    assert line.startswith("model: sha256:other -> sha256:")

    deeper = msgspec.structs.replace(plan, num_layers=8, placement={"a": LayerRange(0, 8)})
    save_record(tmp_path / "plan.json", deeper)
    with pytest.raises(InputError, match="8 layers"):
        open_plan(tmp_path / "plan.json", str(files.directory), addresses, allow_stale=True)
