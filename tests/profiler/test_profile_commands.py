"""``helixbench profile import``: costs fitted to others' tables."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from helixbench.errors import InputError
from helixbench.profiler.cli import profile_commands
from helixbench.profiler.cluster import ClusterProfile, DefaultLink, Device, ModelFacts, Node
from helixbench.records import decode_record, load_record, save_record

MODEL = ModelFacts(
    name="toy",
    num_layers=4,
    activation_bytes_per_token=100.0,
    token_bytes=2.0,
    layer_weight_bytes=1e6,
    kv_bytes_per_token_per_layer=10.0,
)


@pytest.fixture
def app() -> typer.Typer:
    made = typer.Typer()

    @made.callback()
    def root() -> None: ...

    made.add_typer(profile_commands(), name="profile")
    return made


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    node = Node(
        name="a",
        device=Device(kind="cuda", name="X1", memory_bytes=1e8),
        max_layers=4,
        capacity_tokens_per_s=(40.0, 20.0, 13.0, 10.0),
    )
    path = tmp_path / "tables.json"
    save_record(path, ClusterProfile(model=MODEL, nodes=(node,), default_link=DefaultLink(1e9)))
    return path


def write_tables(folder: Path) -> Path:
    """Of a device that takes 1 ms and 0.1 ms for each token of a prompt, 0.2 ms for each decoding sequence."""
    for phase, per_token_ms in (("prompt", 0.1), ("decode", 0.2)):
        rows = [f"{tokens},{1 + per_token_ms * tokens}" for tokens in range(1, 257)]
        (folder / f"toy_x1_{phase}.csv").write_text("\n".join(rows))
    return folder


def test_an_unknown_subcommand_is_wrong_usage(app: typer.Typer) -> None:
    assert CliRunner().invoke(app, ["profile", "guess"]).exit_code == 2


def test_import_fits_the_tables_of_each_device(app: typer.Typer, cluster: Path, tmp_path: Path) -> None:
    options = ["--tables", str(write_tables(tmp_path)), "--workspace-bytes", "1e6", "--json"]
    options += ["-o", str(tmp_path / "out.json")]
    result = CliRunner().invoke(app, ["profile", "import", str(cluster), *options])
    assert result.exit_code == 0, result.output
    imported = load_record(tmp_path / "out.json", ClusterProfile)
    assert decode_record(result.stdout.encode(), ClusterProfile, origin="stdout") == imported
    (node,) = imported.nodes
    assert node.capacity_tokens_per_s is None
    assert node.cost is not None
    assert node.cost.held_out_error_p90 < 0.01
    assert "toy_x1_prompt.csv" in node.cost.source
    assert node.device.memory_bytes == pytest.approx(0.9e8), "what an engine leaves is not planned with"
    assert node.cost.workspace_bytes == 1e6


def test_import_refuses_a_workspace_that_a_device_cannot_hold(app: typer.Typer, cluster: Path, tmp_path: Path) -> None:
    options = ["--tables", str(write_tables(tmp_path)), "-o", str(tmp_path / "never.json")]
    result = CliRunner().invoke(app, ["profile", "import", str(cluster), *options])
    assert isinstance(result.exception, InputError)
    assert "--workspace-bytes 3e+09: need at least 0" in str(result.exception)
    assert not (tmp_path / "never.json").exists()


def test_import_names_the_table_that_is_missing(app: typer.Typer, cluster: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["profile", "import", str(cluster), "--tables", str(tmp_path), "-o", "never.json"])
    assert isinstance(result.exception, InputError)
    assert "no files named *_x1_prompt.csv" in str(result.exception)
