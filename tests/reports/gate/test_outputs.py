from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from pytest_benchmark.stats import Stats

from helixbench.reports.compare.regression import Pair, Question, judge
from helixbench.reports.gate.annotations import MAX_OF_A_KIND, annotation_lines
from helixbench.reports.gate.benchmark_json import benchmark_json, run_samples, statistics_of
from helixbench.reports.gate.cases import Case, Status, regression_cases, run_cases
from helixbench.reports.gate.junit import junit_xml
from helixbench.reports.gate.summary import gate_summary
from helixbench.reports.render.markdown import markdown
from helixbench.reports.verdict.validate import validate
from tests.reports.conftest import Command
from tests.reports.report_examples import example_run

Save = Callable[[msgspec.Struct | bytes, str], Path]
QUESTION = Question(metric="total_tokens_per_s", is_higher_better=True)


def case(status: str, name: str = "x") -> Case:
    return Case(suite="s", name=name, status=Status(status), message=f"{name} is {status}")


def test_junit_has_real_failures() -> None:
    root = ET.fromstring(junit_xml(run_cases(validate(example_run(speed=0.7)))))

    assert root.tag == "testsuites"
    assert (root.get("tests"), root.get("failures"), root.get("errors")) == ("8", "1", "0")
    failure = root.find(".//testcase/failure")
    assert failure is not None
    assert "must be at least 0.85" in (failure.get("message") or "")
    assert "not shaped" in (failure.text or "")


def test_junit_calls_what_could_not_be_measured_an_error() -> None:
    run = msgspec.structs.replace(example_run(), cut_short="out of \x00 memory")

    root = ET.fromstring(junit_xml(run_cases(validate(run))))

    assert root.get("errors") == "1"
    assert "out of  memory" in (root.find(".//error").get("message") or "")  # type: ignore[union-attr]


@pytest.mark.parametrize(("is_strict", "tag"), [(False, "skipped"), (True, "failure")])
def test_junit_of_an_undecided_gate_depends_on_how_strict_it_is(is_strict: bool, tag: str) -> None:
    undecided = judge(QUESTION, [Pair(1.0, 0.7), Pair(1.0, 1.3), Pair(1.0, 1.0)])

    root = ET.fromstring(junit_xml(regression_cases(undecided), is_strict=is_strict))

    assert undecided.answer == "INCONCLUSIVE"
    assert root.find(f".//{tag}") is not None


def test_annotations_keep_to_githubs_limit_and_count_the_rest() -> None:
    cases = [case("passed"), *(case("failed", f"case {i}") for i in range(14)), case("undecided")]

    lines = annotation_lines(cases)

    errors = [line for line in lines if line.startswith("::error ")]
    assert len(errors) == MAX_OF_A_KIND
    assert errors[0] == "::error title=helixbench s%3A case 0::case 0 is failed"
    assert "and 5 more" in errors[-1]
    assert lines[0].startswith("::error")
    assert [line.split()[0] for line in lines[10:]] == ["::warning", "::notice"]


def test_an_annotation_cannot_carry_a_second_command() -> None:
    nasty = Case(suite="s", name="a,b", status=Status.FAILED, message="one\n::set-output name=x::y 100%")
    lines = annotation_lines([nasty])

    assert lines == ("::error title=helixbench s%3A a%2Cb::one%0A::set-output name=x::y 100%25",)


def test_annotations_are_written_only_inside_actions(
    command: Command, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = save(example_run(speed=0.7), "run.json")
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    assert "::error" not in command("gate", run).stdout

    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    assert "::error title=helixbench" in command("gate", run).stdout


def test_markdown_lists_what_did_not_pass_first() -> None:
    text = markdown(gate_summary([case("passed", "good"), case("undecided", "open"), case("failed", "bad")]))

    assert text.startswith("### helixbench gate: 2 of 3 not passed")
    assert text.index("bad is failed") < text.index("open is undecided") < text.index("good is passed")


def test_statistics_are_pytest_benchmarks_own() -> None:
    values = [0.5, 0.1, 0.9, 0.4, 0.45, 0.6, 3.0]
    reference = Stats()
    for value in values:
        reference.update(value)

    ours = statistics_of(values)

    for name in ("min", "max", "mean", "stddev", "median", "ops", "total"):
        assert ours[name] == pytest.approx(getattr(reference, name)), name
    assert ours["rounds"] == 7
    assert (ours["q1"], ours["q3"], ours["outliers"]) == (pytest.approx(0.425), 0.75, "1;1")


def test_pytest_benchmark_compares_our_files(command: Command, save: Save, tmp_path: Path) -> None:
    files = []
    for name, speed in (("0001_base", 1.0), ("0002_new", 0.9)):
        file = tmp_path / f"{name}.json"
        command("gate", save(example_run(speed=speed), "run.json"), "--benchmark-json", file)
        files.append(str(file))

    code = "import sys, warnings; warnings.simplefilter('ignore'); from pytest_benchmark.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "compare", *files], capture_output=True, text=True, check=False, cwd=tmp_path
    )

    assert done.returncode == 0, done.stderr
    assert "ttft" in done.stdout
    assert "seconds_per_token" in done.stdout


def test_the_benchmark_file_has_what_github_action_benchmark_reads() -> None:
    content = json.loads(json.dumps(benchmark_json(run_samples(example_run()))))

    for entry in content["benchmarks"]:
        assert entry["fullname"].startswith("helixbench::")
        for field in ("ops", "stddev", "mean", "rounds"):
            assert isinstance(entry["stats"][field], int | float)
