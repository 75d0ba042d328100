from __future__ import annotations

import stat
from pathlib import Path

import msgspec
import pytest
import zmq

from helixbench.errors import InputError
from helixbench.reference_server.wire.keys import ClusterKey, load_key_file, make_key_file


def test_a_made_key_is_a_curve_pair_that_its_owner_alone_can_read(tmp_path: Path) -> None:
    path = tmp_path / "cluster.key"
    make_key_file(path)

    key = load_key_file(path)

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert zmq.curve_public(key.secret.encode()) == key.public.encode()


def test_keys_differ(tmp_path: Path) -> None:
    for name in "ab":
        make_key_file(tmp_path / name)
    assert load_key_file(tmp_path / "a") != load_key_file(tmp_path / "b")


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "cluster.key"
    make_key_file(path)
    before = path.read_bytes()

    with pytest.raises(InputError, match=r"cluster\.key: cannot be written \(File exists\)"):
        make_key_file(path)
    assert path.read_bytes() == before


def test_a_key_in_a_folder_that_is_not_there_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be written \(No such file or directory\)"):
        make_key_file(tmp_path / "nowhere" / "cluster.key")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "cluster.key"
    make_key_file(path)
    path.chmod(mode)

    with pytest.raises(InputError, match=f"other users can read this key; run: chmod 600 {path}"):
        load_key_file(path)


def test_a_missing_key_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be read .* make one with: helixbench agent --make-key"):
        load_key_file(tmp_path / "cluster.key")


HALF = "0123456789abcdefghijABCDEFGHIJ.-:+=^!/*?"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b'{"public": "\xff\xfe"}',
        msgspec.json.encode({"public": HALF[:-1], "secret": HALF}),
        msgspec.json.encode({"public": HALF, "secret": HALF + "a"}),
        msgspec.json.encode({"public": HALF, "secret": " " * 40}),
        msgspec.json.encode({"public": "é" * 40, "secret": HALF}),
        msgspec.json.encode({"public": HALF, "secret": HALF, "more": 1}),
    ],
)
def test_what_is_no_key_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cluster.key"
    path.write_bytes(content)
    path.chmod(0o600)

    with pytest.raises(InputError, match=f"{path}: not a cluster key"):
        load_key_file(path)


def test_every_character_of_z85_may_stand_in_a_key() -> None:
    z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
    assert len(z85) == 85
    for start in range(0, 85, 5):
        half = (z85 + z85)[start : start + 40]
        assert ClusterKey(public=half, secret=half).public == half
