from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixbench.errors import InputError
from helixbench.profiler.cluster import ClusterProfile, Device, Link, ModelFacts, Node
from helixbench.records import (
    Provenance,
    decode_record,
    digest,
    encode_record,
    load_record,
    provenance_now,
    require_unique,
    require_writable,
    save_bytes,
    save_measurement,
    save_record,
    source_commit,
)
from helixbench.reference_server.run_log import RunLog
from helixbench.solver.problem.plan import Plan


def cluster(**changes: Any) -> ClusterProfile:
    model = ModelFacts(
        name="m",
        num_layers=4,
        activation_bytes_per_token=64.0,
        token_bytes=4.0,
        layer_weight_bytes=1e6,
        kv_bytes_per_token_per_layer=32.0,
    )
    node = Node(
        name="a",
        device=Device(kind="cpu", name="c", memory_bytes=1e9, facts={"clock_hz": 2e9}),
        max_layers=2,
        capacity_tokens_per_s=(10.0, 5.0),
    )
    fields: dict[str, Any] = {"model": model, "nodes": (node,), "provenance": Provenance(host="h")}
    return ClusterProfile(**fields | changes)


def edited(path: Path, *keys: str | int, value: Any) -> None:
    """Set the field at ``keys`` in the JSON file; ``...`` removes it."""
    record = json.loads(path.read_text())
    place = record
    for key in keys[:-1]:
        place = place[key]
    if value is ...:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    path.write_text(json.dumps(record))


def test_a_saved_record_is_loaded_as_it_was(tmp_path: Path) -> None:
    save_record(tmp_path / "new" / "folder" / "cluster.json", cluster())

    assert load_record(tmp_path / "new" / "folder" / "cluster.json", ClusterProfile) == cluster()
    assert next(iter(json.loads((tmp_path / "new" / "folder" / "cluster.json").read_text()))) == "schema"


@pytest.mark.parametrize(
    ("keys", "value", "named"),
    [
        (["model", "num_layers"], "four", r"\$\.model\.num_layers"),
        (["model", "num_layers"], ..., r"num_layers.*\$\.model"),
        (["model", "num_layers"], 0, r"num_layers: need >= 1, got 0.*\$\.model"),
        (["nodes", 0, "device", "kind"], "tpu", r"'tpu'.*\$\.nodes\[0\]\.device\.kind"),
        (["nodes", 0, "colour"], "red", r"unknown field `colour`.*\$\.nodes\[0\]"),
        (["nodes", 0, "device", "memory_bytes"], None, r"\$\.nodes\[0\]\.device\.memory_bytes"),
        (["nodes", 0, "capacity_tokens_per_s", 1], -5.0, r"capacity_tokens_per_s of a.*-5"),
        (["nodes", 0, "capacity_tokens_per_s"], [1.0], r"capacity_tokens_per_s of a: need 2 values.*got 1"),
        (["nodes"], [], r"nodes: need at least one"),
        (["model", "embedding_bytes"], -1.0, r"embedding_bytes: need a finite value >= 0, got -1.*\$\.model"),
        (["model", "head_bytes"], -1.0, r"head_bytes: need a finite value >= 0, got -1.*\$\.model"),
        (
            ["default_link"],
            {"bandwidth_bytes_per_s": 1e9, "latency_s": -1e-3},
            r"default_link\.latency_s: need a finite value >= 0, got -0\.001",
        ),
        (["schema"], "helixbench.plan/2", r"helixbench\.plan/2.*helixbench\.cluster/2"),
        (["colour"], 1, r"unknown field `colour`"),
    ],
)
def test_an_error_names_the_file_and_the_field(tmp_path: Path, keys: list[str | int], value: Any, named: str) -> None:
    path = tmp_path / "cluster.json"
    save_record(path, cluster())
    edited(path, *keys, value=value)

    with pytest.raises(InputError, match=named) as caught:
        load_record(path, ClusterProfile)

    assert str(caught.value).startswith(f"{path}: ")
    assert caught.value.exit_code == 2


def test_a_cluster_of_version_1_is_read_where_nothing_in_it_was_removed(tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    save_record(path, cluster())
    edited(path, "schema", value="helixbench.cluster/1")

    assert load_record(path, ClusterProfile) == cluster()


def test_a_record_of_an_earlier_version_says_how_to_make_it_again(tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    save_record(path, cluster())
    edited(path, "schema", value="helixbench.cluster/1")
    edited(path, "nodes", 0, "pace", value={})
    with pytest.raises(InputError, match=r"cluster/1 .*unknown field `pace`.*make it again with `helixbench profile`"):
        load_record(path, ClusterProfile)
    for kind, command in ((Plan, "solve"), (RunLog, "bench")):
        schema = str(kind.__struct_config__.tag).replace("/2", "/1")
        with pytest.raises(InputError, match=rf"x: a {schema} record .*make it again with `helixbench {command}`"):
            decode_record(b'{"schema": "%s"}' % schema.encode(), kind, origin="x")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"[]", "expected"),
        (b"null", "expected"),
        (b"\xff\xfe", "not a complete JSON file"),
        (b"PK\x03\x04", "not a complete JSON file"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "cluster.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=reason):
        load_record(path, ClusterProfile)


@given(share=st.floats(0, 1))
def test_a_file_cut_short_is_refused_wherever_it_is_cut(share: float) -> None:
    whole = encode_record(cluster()).rstrip()
    with pytest.raises(InputError, match=r"^x: "):
        decode_record(whole[: int(share * (len(whole) - 1))], ClusterProfile, origin="x")


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cluster\.json: cannot be read \(No such file"):
        load_record(tmp_path / "cluster.json", ClusterProfile)


def test_a_folder_in_place_of_the_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_record(tmp_path, ClusterProfile)


@pytest.mark.parametrize("failing", ["os.fsync", "os.replace", "os.chmod"])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "cluster.json"
    save_bytes(path, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(failing, full)
        with pytest.raises(InputError, match=r"cluster\.json: cannot be written \(No space left"):
            save_record(path, cluster())

    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["cluster.json"]


def test_an_interrupted_save_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cluster.json"
    save_bytes(path, b"old")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_record(path, cluster())

    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["cluster.json"]


FULL_DISK = """
import resource, sys
from pathlib import Path
from helixbench import records
from helixbench.errors import InputError

resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))
records._OTHER_FOLDERS = tuple(sys.argv[2:])
record = records.Provenance(note="measured for an hour" * 9)
try:
    if sys.argv[2:]:
        records.save_measurement(Path(sys.argv[1]), record)
    records.require_writable(Path(sys.argv[1]))
except InputError as error:
    print(error, file=sys.stderr)
"""


def test_space_is_tried_before_the_work(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path / "run.json"], capture_output=True, text=True)
    assert "run.json: cannot be written (File too large); choose another place" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_measurement_that_nothing_has_room_for_is_on_stdout(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", FULL_DISK, tmp_path / "run.json", tmp_path / "other"]
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | {"HOME": str(tmp_path)})
    assert json.loads(done.stdout)["note"] == "measured for an hour" * 9
    assert done.stderr.strip().endswith("the record of what was measured is on stdout")
    assert not list(tmp_path.rglob("*.json*"))


def test_a_measurement_that_cannot_be_written_is_in_another_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").write_text("a file where a folder was")
    monkeypatch.setattr("helixbench.records._OTHER_FOLDERS", (str(tmp_path / "full"), str(tmp_path / "other")))
    with pytest.raises(InputError, match=r"full/run\.json: cannot be written .*is in .*/other/run-\d+\.json"):
        save_measurement(tmp_path / "full" / "run.json", cluster())
    (saved,) = (tmp_path / "other").iterdir()
    assert load_record(saved, ClusterProfile) == cluster()


def test_a_file_in_the_way_of_the_folder_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match="cannot be written"):
        save_record(tmp_path / "out" / "cluster.json", cluster())
    assert (tmp_path / "out").read_text() == "mine"


def test_a_place_is_tried_without_leaving_anything_there(tmp_path: Path) -> None:
    require_writable(tmp_path / "new" / "cluster.json")
    assert list((tmp_path / "new").iterdir()) == []
    save_bytes(tmp_path / "cluster.json", b"old")
    require_writable(tmp_path / "cluster.json")
    assert (tmp_path / "cluster.json").read_bytes() == b"old"


@pytest.mark.parametrize("place", ["file/cluster.json", "folder"])
def test_a_place_that_cannot_be_written_is_found_by_trying(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=f"{place}: cannot be written"):
        require_writable(tmp_path / place)


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    gone = tmp_path / f".run.json.{killed.pid}.abc"
    kept = [tmp_path / name for name in (f".run.json.{os.getppid()}.abc", f".other.json.{killed.pid}.abc", ".run.json")]
    for path in (gone, *kept):
        path.write_text("half")
    save_bytes(tmp_path / "run.json", b"whole")
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "run.json", *kept])


def test_a_saved_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "any").write_text("")
    save_record(tmp_path / "cluster.json", cluster())
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("any", "cluster.json")}
    assert len(modes) == 1


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    save_record(tmp_path / "cluster.json", cluster())
    assert digest(load_record(tmp_path / "cluster.json", ClusterProfile)) == digest(cluster())
    assert digest(cluster()) != digest(cluster(testbed="other"))


def test_provenance_says_when_where_and_by_what() -> None:
    provenance = provenance_now(inputs={"cluster": "sha256:0"}, note="n")
    assert provenance.created.endswith("+00:00")
    assert provenance.host
    assert provenance.command
    assert "python" in provenance.versions
    assert provenance.inputs == {"cluster": "sha256:0"}


def test_names_that_stand_twice_are_refused() -> None:
    require_unique(["a", "b"], field="nodes")
    with pytest.raises(ValueError, match=r"nodes: duplicate name 'a'"):
        require_unique(["a", "b", "a"], field="nodes")


def test_links_that_stand_twice_are_refused() -> None:
    link = Link(src="a", dst="coordinator", bandwidth_bytes_per_s=1.0)
    with pytest.raises(ValueError, match=r"links: duplicate name 'a -> coordinator'"):
        cluster(links=(link, link))


def test_provenance_names_the_commit_of_a_checkout(tmp_path: Path) -> None:
    assert source_commit(tmp_path) == ""
    git = tmp_path / ".git"
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    assert source_commit(tmp_path) == ""
    (git / "packed-refs").write_text("# pack-refs\n1111 refs/heads/other\n2222 refs/heads/main\n")
    assert source_commit(tmp_path) == "2222"
    (git / "refs" / "heads" / "main").write_text("3333\n")
    assert source_commit(tmp_path) == "3333"
    (git / "HEAD").write_text("4444\n")
    assert source_commit(tmp_path) == "4444"
