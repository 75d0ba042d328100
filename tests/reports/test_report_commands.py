from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from helixbench.records import encode_record
from helixbench.reports.verdict.verdict import Verdict
from tests.reports.conftest import Command
from tests.reports.report_examples import example_plan, example_profile, example_run, run_bytes

Save = Callable[[msgspec.Struct | bytes, str], Path]
RUN = example_run()


@pytest.mark.parametrize("record", [RUN, example_plan(), example_profile()], ids=["run", "plan", "cluster"])
def test_report_shows_any_record_and_writes_its_files(record: msgspec.Struct, command: Command, save: Save) -> None:
    file = save(record, "record.json")

    result = command("report", file, "--html", file.parent / "r.html", "--markdown", file.parent / "r.md")

    assert result.exit_code == 0
    assert "tiny-llama" in result.stdout
    assert (file.parent / "r.html").read_text().startswith("<!doctype html>")
    assert (file.parent / "r.md").read_text().startswith("### helixbench")
    assert "wrote" in result.stderr


def test_report_json_is_the_verdict_and_nothing_else(command: Command, save: Save) -> None:
    result = command("report", save(RUN, "run.json"), "--json")

    verdict = msgspec.json.decode(result.stdout, type=Verdict)
    assert verdict.measured_tokens_per_s == RUN.total_tokens_per_s
    assert "VERDICT" in result.stderr


@pytest.mark.parametrize(("speed", "exit_code", "word"), [(1.0, 0, "PASS"), (0.7, 1, "FAIL"), (1.3, 1, "FAIL")])
def test_gate_ends_with_its_answer(speed: float, exit_code: int, word: str, command: Command, save: Save) -> None:
    result = command("gate", save(example_run(speed=speed), "run.json"))

    assert result.exit_code == exit_code
    assert result.stdout.startswith(word)


def test_gate_json_is_the_verdict(command: Command, save: Save) -> None:
    result = command("gate", save(RUN, "run.json"), "--json")

    assert msgspec.json.decode(result.stdout, type=Verdict).outcome == "as predicted"
    assert result.stderr.startswith("PASS")


WHOLE = encode_record(RUN)
# what was done to the file -> (its bytes, the exit code, what the message says)
BAD_FILES: dict[str, tuple[bytes, int, str]] = {
    "above the bound": (
        encode_record(example_run(speed=1.3)),
        1,
        "the cost model or a unit is wrong",
    ),
    "tokens counted twice": (run_bytes(RUN, prompt_tokens=2 * RUN.prompt_tokens), 3, "contradicts itself"),
    "window left out": (WHOLE.replace(b'"window"', b'"windows"', 1), 2, "window"),
    "infinite time": (WHOLE.replace(b'"busy_s": ', b'"busy_s": 1e999, "x": ', 1), 2, "run.json"),
    "empty": (b"", 3, "empty, so nothing was measured"),
    "truncated": (WHOLE[: len(WHOLE) // 2], 2, "not a complete JSON file"),
    "NaN": (WHOLE.replace(b'"busy_s": ', b'"busy_s": NaN, "x": ', 1), 2, "not a complete JSON file"),
    "negative tokens": (run_bytes(RUN, prompt_tokens=-1), 2, "need >= 0"),
    "missing window": (run_bytes(RUN, window=None), 2, "window"),
    "backward window": (run_bytes(RUN, window={"start_s": 9, "end_s": 8}), 2, "start_s < end_s"),
    "unknown key": (run_bytes(RUN, speed=3), 2, "speed"),
    "a plan": (encode_record(example_plan()), 2, "helixbench.run/2"),
    "cut short": (run_bytes(RUN, cut_short="the agent of mid died"), 3, "the agent of mid died"),
    "no requests": (run_bytes(RUN, requests=[]), 3, "no request finished"),
    "another concurrency": (run_bytes(RUN, concurrency=99), 3, "no prediction for concurrency 99"),
    "a list": (b"[1]", 2, "expected"),
    "not text": (b"\xff\xfe\x00", 2, "not a complete JSON file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_gate_never_passes_bad_input(name: str, command: Command, save: Save, tmp_path: Path) -> None:
    content, exit_code, message = BAD_FILES[name]

    junit = tmp_path / "junit.xml"

    result = command("gate", save(content, "run.json"), "--junit", junit)

    assert result.exit_code == exit_code, result
    if junit.exists():
        counted = ET.parse(junit).getroot().attrib
        assert int(counted["failures"]) + int(counted["errors"]) >= 1
    assert message in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


def test_gate_without_a_file_could_not_measure(command: Command, tmp_path: Path) -> None:
    result = command("gate", tmp_path / "run.json")

    assert result.exit_code == 3
    assert "no such file" in result.stderr


def test_report_refuses_what_it_cannot_read(command: Command, save: Save, tmp_path: Path) -> None:
    assert command("report", tmp_path / "nothing.json").exit_code == 2
    assert command("report", tmp_path).exit_code == 2
    assert command("report", save(b"", "empty.json")).exit_code == 2
    assert command("report", save(b"{}", "object.json")).exit_code == 2
    unknown = command("report", save(b'{"schema": "helixbench.run/9"}', "later.json"))
    assert unknown.exit_code == 2
    assert "helixbench.run/9" in unknown.stderr
    earlier = command("report", save(b'{"schema": "helixbench.run/1"}', "earlier.json"))
    assert earlier.exit_code == 2
    assert "make it again with `helixbench bench`" in earlier.stderr


def test_a_run_of_another_plan_is_refused(command: Command, save: Save) -> None:
    run = save(RUN, "run.json")
    same = save(example_plan(), "plan.json")
    other = save(msgspec.structs.replace(example_plan(), model="another"), "other.json")

    assert command("gate", run, "--plan", same).exit_code == 0
    refused = command("gate", run, "--plan", other)
    assert refused.exit_code == 2
    assert "another plan" in refused.stderr


@pytest.mark.parametrize("ratios", [("1.2", "1.1"), ("nan", "1.1"), ("-1", "1"), ("0.9", "inf")])
def test_gate_refuses_a_band_that_is_none(ratios: tuple[str, str], command: Command, save: Save) -> None:
    result = command("gate", save(RUN, "run.json"), "--min-ratio", ratios[0], "--max-ratio", ratios[1])

    assert result.exit_code == 2
    assert "--min-ratio" in result.stderr
