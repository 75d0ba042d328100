"""The JSON Schemas accept every record of this repository and refuse what the types refuse."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import msgspec
import pytest

from helixbench.profiler.emulated_device import device_of_node
from helixbench.records import encode_record
from helixbench.reports.schemas import SchemaName, json_schema
from tests.reports.conftest import Command
from tests.reports.report_examples import example_plan, example_profile, example_run

ROOT = Path(__file__).parents[2]
RECORDS: dict[SchemaName, msgspec.Struct] = {
    SchemaName.CLUSTER: example_profile(),
    SchemaName.PLAN: example_plan(),
    SchemaName.RUN: example_run(),
    SchemaName.DEVICE: device_of_node(example_profile(), "big"),
}


def validator(name: SchemaName) -> jsonschema.Draft202012Validator:
    schema = json.loads(json_schema(name))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def example_records() -> list[Path]:
    """Every JSON file that names a schema, of the examples and of the devices that come with helixbench."""
    files = [*(ROOT / "examples").rglob("*.json"), *(ROOT / "profiler" / "devices").glob("*.json")]
    return [path for path in sorted(files) if "schema" in json.loads(path.read_text())]


@pytest.mark.parametrize("name", SchemaName)
def test_a_record_of_each_kind_is_valid(name: SchemaName) -> None:
    validator(name).validate(json.loads(encode_record(RECORDS[name])))


@pytest.mark.parametrize("path", example_records(), ids=lambda path: path.stem)
def test_every_example_file_is_valid(path: Path) -> None:
    content = json.loads(path.read_text())
    validator(SchemaName(content["schema"].removeprefix("helixbench.").split("/")[0])).validate(content)


@pytest.mark.parametrize("name", SchemaName)
@pytest.mark.parametrize("change", [{"extra": 1}, {"schema": "helixbench.other/1"}, {"schema": None}])
def test_what_the_types_refuse_is_not_valid(name: SchemaName, change: dict[str, object]) -> None:
    content = {**json.loads(encode_record(RECORDS[name])), **change}
    if content["schema"] is None:
        del content["schema"]

    assert not validator(name).is_valid(content)


def test_the_command_prints_a_schema(command: Command) -> None:
    result = command("schema", "plan")

    assert result.exit_code == 0
    assert json.loads(result.stdout)["$ref"] == "#/$defs/Plan"
    assert command("schema", "nothing").exit_code == 2


def test_a_field_of_the_wrong_type_is_named() -> None:
    content = json.loads(encode_record(RECORDS[SchemaName.PLAN]))
    content["placement"]["big"][1] = "ten"

    error = jsonschema.exceptions.best_match(validator(SchemaName.PLAN).iter_errors(content))

    assert error is not None
    assert list(error.absolute_path) == ["placement", "big", 1]
