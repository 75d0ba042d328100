"""Studies: every combination once, in one table."""

from __future__ import annotations

import csv
import io
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import msgspec
import pytest

from benchmarks.study import __main__ as study_command
from benchmarks.study import runs
from benchmarks.study.runs import known_rows, run_study
from benchmarks.study.spec import load_study
from helixbench.errors import InputError
from helixbench.records import save_record
from helixbench.reference_server.simulation import simulate
from tests.reference_server.simulation.cases import four_nodes

STUDY = """
title = "four nodes"
routings = ["iwrr", "random"]
seeds = [0, 1]
duration_s = 2.0
warmup_s = 0.5
solve_s = 2.0

[[cluster]]
name = "four"
file = "cluster.json"

[[placement]]
name = "petals"
method = "petals"

[[placement]]
name = "by hand"
plan = "plan.json"

[[workload]]
name = "offline"
prompt_tokens = 40
output_tokens = 12
offline = true

[[workload]]
name = "trickle"
trace = "trace.csv"
max_prompt_tokens = 50
rate = 5.0
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    profile, plan = four_nodes(memory_bytes=8e6)  # little room: few requests in flight, so little to follow
    save_record(tmp_path / "cluster.json", profile)
    save_record(tmp_path / "plan.json", plan)
    (tmp_path / "trace.csv").write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.5,20,3\n2023-11-16 18:15:47.5,99,3\n"
    )
    (tmp_path / "study.toml").write_text(STUDY)
    return tmp_path


def test_a_study_goes_on_where_it_was_left_and_refuses_another_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, path = load_study(folder / "study.toml"), folder / "out" / "study.json"
    whole = run_study(spec, folder)
    turns = iter([False] * 11 + [True])  # asked once a run, and once in each turn of a run
    part = run_study(spec, folder, plans=folder / "out", is_interrupted=lambda: next(turns, True))
    assert 0 < len(part.rows) < len(whole.rows)
    assert part.rows == whole.rows[: len(part.rows)]
    save_record(path, part)
    simulated = []
    monkeypatch.setattr(runs, "simulate", lambda *a, **k: simulated.append(1) or simulate(*a, **k))

    rest = run_study(spec, folder, known=known_rows(spec, folder, path), plans=folder / "out")

    assert rest.rows == whole.rows
    assert len(simulated) == len(whole.rows) - len(part.rows)
    with pytest.raises(InputError, match="another study"):
        known_rows(msgspec.structs.replace(spec, duration_s=3.0), folder, path)


def test_a_restart_that_is_interrupted_while_it_loads_keeps_every_row(folder: Path) -> None:
    spec = load_study(folder / "study.toml")
    known = run_study(spec, folder).rows[:3]
    assert run_study(spec, folder, known=known, is_interrupted=lambda: True).rows == known


@pytest.mark.parametrize("name", ["cluster.json", "plan.json", "trace.csv"])
def test_rows_and_plans_of_other_input_files_are_not_taken(folder: Path, name: str) -> None:
    spec, out = load_study(folder / "study.toml"), folder / "out"
    asked = iter([False] * 4)
    save_record(out / "study.json", run_study(spec, folder, plans=out, is_interrupted=lambda: next(asked, True)))
    plans = set(out.glob("plan-*.json"))
    assert plans
    with (folder / name).open("a") as file:
        file.write("2023-11-16 18:15:48.5,20,4\n" if name == "trace.csv" else "\n")

    with pytest.raises(InputError, match=f"study.json: {name} changed since"):
        known_rows(spec, folder, out / "study.json")
    asked = iter([False] * 4)
    run_study(spec, folder, plans=out, is_interrupted=lambda: next(asked, True))
    assert set(out.glob("plan-*.json")) > plans, "planned anew"


def test_what_one_combination_cannot_do_is_its_row_s_problem(folder: Path) -> None:
    longer = STUDY.replace("prompt_tokens = 40", "prompt_tokens = 900000", 1)
    (folder / "study.toml").write_text(longer)
    rows = run_study(load_study(folder / "study.toml"), folder).rows
    assert len(rows) == 16
    assert all("KV" in row.problem for row in rows if row.workload == "offline" and row.placement == "by hand")
    assert all(row.total_tokens_per_s for row in rows if row.workload == "trickle" and row.placement == "by hand")


def test_what_the_solver_refuses_is_its_rows_problem(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise InputError("cannot be planned")

    monkeypatch.setattr(runs, "solve_placement", refuse)
    rows = run_study(load_study(folder / "study.toml"), folder).rows
    assert {(row.placement, row.problem) for row in rows} == {("petals", "cannot be planned"), ("by hand", "")}


def test_a_study_runs_every_combination_and_writes_table_and_chart(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study_command.main([str(folder / "study.toml"), "-o", str(folder / "out")]) == 0
    assert "SIMULATED: no hardware ran" in capsys.readouterr().out

    rows = json.loads((folder / "out" / "study.json").read_text())["rows"]
    keys = {(r["workload"], r["placement"], r["routing"], r["seed"]) for r in rows}
    assert len(keys) == len(rows) == 2 * 2 * 2 * 2
    assert all(r["total_tokens_per_s"] > 0 and not r["problem"] for r in rows)
    trickles = [r for r in rows if r["workload"] == "trickle" and r["placement"] == "by hand"]
    assert {r["peak_in_flight"] for r in trickles} <= {1, 2, 3}

    table = list(csv.DictReader(io.StringIO((folder / "out" / "study.csv").read_text())))
    assert [float(r["total_tokens_per_s"]) for r in table] == [r["total_tokens_per_s"] for r in rows]
    assert {r["source"] for r in table} == {"simulated"}
    for row, line in zip(rows, table, strict=True):
        shares = list(row["busy"].values())
        assert shares == sorted(shares, reverse=True)
        assert row["busiest_share"] == shares[0]
        assert line["busy"] == "; ".join(f"{node} {share:.2f}" for node, share in row["busy"].items())
        assert (row["waiting_at_end"] is None) == (row["workload"] == "offline")
        assert 0 <= row["in_flight_at_end"] <= row["peak_in_flight"]
    assert any(r["in_flight_at_end"] > 0 for r in rows)

    picture = ET.fromstring((folder / "out" / "study.svg").read_text())
    bars = [e for e in picture.iter("{http://www.w3.org/2000/svg}rect") if e.get("height") == "11"]
    assert len(bars) == 2 * 2 * 2
    assert "(simulated): output tokens/s" in (folder / "out" / "study.svg").read_text()
    hand = [r for r in rows if (r["workload"], r["placement"], r["routing"]) == ("offline", "by hand", "iwrr")]
    output, total = (sum(r[name] for r in hand) / 2 for name in ("output_tokens_per_s", "total_tokens_per_s"))
    assert f"{output:.0f} ({total:.0f})" in [e.text for e in picture.iter("{http://www.w3.org/2000/svg}text")]


def test_seeds_of_a_study_differ_and_repeat(folder: Path) -> None:
    outputs = []
    for name in ("one", "two"):
        study_command.main([str(folder / "study.toml"), "-o", str(folder / name)])
        outputs.append((folder / name / "study.json").read_bytes())
    assert outputs[0] == outputs[1]
    rows = [r for r in json.loads(outputs[0])["rows"] if r["workload"] == "trickle" and r["routing"] == "random"]
    assert rows[0]["ttft_p50_s"] != rows[1]["ttft_p50_s"]


def test_a_placement_without_a_plan_is_a_row_that_says_why(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = STUDY.replace('method = "petals"', 'method = "separate"').replace(
        'file = "cluster.json"', "make = { nodes = 3 }"
    )
    text = text.split('[[placement]]\nname = "by hand"')[0] + "[[workload]]" + text.split("[[workload]]")[1]
    (folder / "study.toml").write_text(text)
    study_command.main([str(folder / "study.toml"), "--json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert all(r["total_tokens_per_s"] is None and "layers" in r["problem"] for r in rows)


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ('method = "petals"', 'method = "petal"', "method 'petal' is none of auto, petals"),
        ("offline = true", "", "need one of `offline`, `rate`, `replay`"),
        ('file = "cluster.json"', "", "need exactly one of `file` and `make`"),
        ("max_prompt_tokens = 50", "max_prompt_tokens = 5", "no request within"),
        ('"random"]', '"astrology"]', "routings"),
        ("seeds = [0, 1]", "seeds = []", "seeds: need at least one"),
        ("title", "titel", "titel"),
        ("rate = 5.0", "rate = 0", "workload trickle: rate: need more than 0"),
        ("rate = 5.0", "rate = 5.0\nburstiness = 0", "workload trickle: burstiness: need more than 0"),
        ("offline = true", "concurrency = 0", "concurrency: need at least 1"),
        ("offline = true", "offline = true\nburstiness = 2", "`burstiness` goes with `rate`"),
        ('name = "by hand"', 'name = "petals"', "placement names: duplicate name 'petals'"),
        ("seeds = [0, 1]", "seeds = [1, 1]", "seeds: duplicate name '1'"),
        ('plan = "plan.json"', 'plan = "none.json"', "none.json: cannot be read"),
    ],
)
def test_mistakes_in_a_study_are_named(folder: Path, before: str, after: str, says: str) -> None:
    (folder / "study.toml").write_text(STUDY.replace(before, after, 1))
    with pytest.raises(InputError, match=says):
        study_command.main([str(folder / "study.toml")])


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "examples" / "studies").glob("*.toml")), ids=lambda p: p.stem
)
def test_committed_studies_are_valid(path: Path) -> None:
    assert load_study(path).title
