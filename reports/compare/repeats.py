"""Pairs from runs that were recorded before: two files, or two folders of repeats."""

from __future__ import annotations

from pathlib import Path

import msgspec

from helixbench.errors import InputError, MeasurementError
from helixbench.records import digest
from helixbench.reference_server.run_log import RunLog
from helixbench.reports.compare.regression import Pair, Question, Regression, judge
from helixbench.reports.gate.pairs import run_metric
from helixbench.reports.loading import load_run


class _Schema(msgspec.Struct):
    schema: str


def judge_recorded(question: Question, base: Path, new: Path) -> Regression:
    """The regression gate over recorded runs, paired in the order in which they were made.

    Raises:
        MeasurementError: no runs, or not as many of the one as of the other.
        InputError: a file that is no run.
    """
    runs_base, runs_new = load_runs(base), load_runs(new)
    if len(runs_base) != len(runs_new):
        raise MeasurementError(f"{base} has {len(runs_base)} runs and {new} has {len(runs_new)}: no pairs")
    pairs = [
        Pair(run_metric(a, question.metric, origin=str(base)), run_metric(b, question.metric, origin=str(new)))
        for a, b in zip(runs_base, runs_new, strict=True)
    ]
    return judge(question, pairs, notes=tuple(_notes(runs_base, runs_new)))


def are_runs(path: Path) -> bool:
    """Whether the path is a folder, or a file that says it is a run, or nothing that says what it is."""
    if not path.is_file():
        return True
    try:
        schema = msgspec.json.decode(path.read_bytes(), type=_Schema).schema
    except (msgspec.DecodeError, UnicodeDecodeError):
        return True
    return schema == str(RunLog.__struct_config__.tag)


def load_runs(path: Path) -> list[RunLog]:
    """One run, or all ``*.json`` of a folder in the order in which they were made.

    Raises:
        MeasurementError: nothing there.
        InputError: one run listed twice under two names: a copy is no repeat.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise MeasurementError(f"{path}: no run in this folder, so nothing was measured")
    runs = [load_run(file) for file in files]
    if len({digest(run) for run in runs}) < len(runs):
        raise InputError(f"{path}: the same run lies there twice; a copy is no repeat")
    return sorted(runs, key=lambda run: run.provenance.created)


def _notes(base: list[RunLog], new: list[RunLog]) -> list[str]:
    notes = []
    sides = [side for side, runs in (("BASE", base), ("NEW", new)) if any(run.simulated for run in runs)]
    if sides:
        notes.append(f"{' and '.join(sides)}: simulated, no hardware ran")
    last_base, first_new = base[-1].provenance.created, new[0].provenance.created
    last_new, first_base = new[-1].provenance.created, base[0].provenance.created
    if last_base < first_new or last_new < first_base:
        notes.append("all runs of one side were made before the other's: a drift of the machine counts as a change")
    if any(a.plan != b.plan for a, b in zip(base, new, strict=True)):
        notes.append("the two sides ran different plans")
    if any(a.concurrency != b.concurrency for a, b in zip(base, new, strict=True)):
        notes.append("the two sides ran at different concurrency")
    return notes
