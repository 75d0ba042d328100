"""A run without hardware says so wherever its numbers appear."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from helixbench.reports.gate.benchmark_json import run_samples
from tests.reports.conftest import Command
from tests.reports.report_examples import example_run

Save = Callable[[msgspec.Struct | bytes, str], Path]
RUN = msgspec.structs.replace(example_run(), simulated=True)


@pytest.mark.parametrize("simulated", [True, False])
def test_every_output_of_a_run_names_it_simulated(
    simulated: bool, command: Command, save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    run = save(msgspec.structs.replace(RUN, simulated=simulated), "run.json")
    html, comment, junit, summary = (tmp_path / name for name in ("r.html", "r.md", "j.xml", "s.md"))

    shown = command("report", run, "--html", html, "--markdown", comment)
    gated = command("gate", run, "--junit", junit, "--markdown", summary)

    outputs = {
        "terminal": shown.stdout,
        "HTML": html.read_text().split("<body>")[1].split("<script")[0],
        "comment": comment.read_text(),
        "gate and annotations": gated.stdout,
        "JUnit": junit.read_text(),
        "step summary": summary.read_text(),
        "JSON": command("report", run, "--json").stdout.replace('"is_simulated": false', ""),
    }
    assert {name for name, text in outputs.items() if "simulated" in text} == (set(outputs) if simulated else set())


def test_simulated_times_are_no_series_of_measured_ones() -> None:
    assert {name.split()[0] for name in run_samples(RUN)} == {"simulated"}
    assert not any("simulated" in name for name in run_samples(example_run()))


def test_gates_and_comparisons_name_the_simulated_side(command: Command, tmp_path: Path) -> None:
    for side, simulated in (("base", False), ("new", True)):
        (tmp_path / side).mkdir()
        for seed in range(4):
            run = msgspec.structs.replace(example_run(seed=seed), simulated=simulated)
            (tmp_path / side / f"{seed}.json").write_bytes(msgspec.json.encode(run))

    assert "NEW: simulated, no hardware ran" in command("gate", tmp_path / "base", tmp_path / "new").stdout
    compared = command(
        "compare", tmp_path / "base" / "0.json", tmp_path / "new" / "0.json", "--html", tmp_path / "c.html"
    )
    assert "new is simulated" in compared.stdout
    assert "new is simulated" in (tmp_path / "c.html").read_text()
