"""Pairs from recorded runs: two files, or two folders of repeats."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from helixbench.errors import InputError, MeasurementError
from helixbench.records import digest
from helixbench.reference_server.run_log import RunLog
from helixbench.reports.compare.regression import Pair, Question, Regression, judge
from helixbench.reports.loading import load_output
from helixbench.reports.verdict.run_metrics import metric_of


def judge_recorded(question: Question, base: Path, new: Path) -> Regression:
    """Decide the question from recorded runs, paired in the order of their creation.

    Raises:
        MeasurementError: no runs, or different numbers of them.
        InputError: a file that is not a run.
    """
    runs_base, runs_new = _load_runs(base), _load_runs(new)
    if len(runs_base) != len(runs_new):
        raise MeasurementError(f"{base} has {len(runs_base)} runs and {new} has {len(runs_new)}: cannot pair them")
    pairs = [
        Pair(metric_of(a, question.metric, origin=str(base)), metric_of(b, question.metric, origin=str(new)))
        for a, b in zip(runs_base, runs_new, strict=True)
    ]
    return judge(question, pairs, notes=tuple(_notes(runs_base, runs_new)))


def _load_runs(path: Path) -> list[RunLog]:
    """One run, or every ``*.json`` of a folder by time of creation."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise MeasurementError(f"{path}: the folder contains no run, so nothing was measured")
    runs = [load_output(file, RunLog) for file in files]
    if len({digest(run) for run in runs}) < len(runs):
        raise InputError(f"{path}: contains the same run twice; a copy is not a repeat")
    return sorted(runs, key=lambda run: run.provenance.created)


def _notes(base: list[RunLog], new: list[RunLog]) -> Iterator[str]:
    simulated = [side for side, runs in (("BASE", base), ("NEW", new)) if any(run.simulated for run in runs)]
    if simulated:
        yield f"{' and '.join(simulated)}: simulated, no hardware ran"
    created = [[run.provenance.created for run in runs] for runs in (base, new)]
    if created[0][-1] < created[1][0] or created[1][-1] < created[0][0]:
        yield "all runs of one side precede those of the other: a drift of the machine looks like a change"
    if any(a.plan != b.plan for a, b in zip(base, new, strict=True)):
        yield "the two sides ran different plans"
    if any(a.concurrency != b.concurrency for a, b in zip(base, new, strict=True)):
        yield "the two sides ran at different concurrency"
