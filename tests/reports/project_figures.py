"""The deterministic figures of this project, gated by ``test_project_figures.py`` against the file beside this one.

``python -m tests.reports.project_figures`` writes that file anew, where a change is meant.
"""

from __future__ import annotations

from pathlib import Path

from profiler.records import save_record
from reference_server.messages import Hop, OpenRequest, Sampled, Work, WorkItem, encode
from reference_server.sampling import SamplingParams
from reports.exact import Figure, Figures
from solver import Plan, problems_of, solve_placement

from ..solver.clusters import WORKLOAD, random_cluster

DECODE = WorkItem(request=1000, past=95, num_tokens=1, sample=True, is_decode=True)
OPEN = OpenRequest(
    request=1000, hops=(Hop("node-0", 0, 8), Hop("node-1", 8, 16)), kv_tokens=96, sampling=SamplingParams()
)
MESSAGES = {
    "an iteration of 16 decodes": Work(items=(DECODE,) * 16),
    "an iteration that opens a request": Work(items=(DECODE,), opens=(OPEN,)),
    "16 sampled tokens": Sampled(tokens=((1000, 30000),) * 16),
}
BASELINE = Path(__file__).with_name("project_figures.json")
SEEDS = range(12)


def project_figures() -> Figures:
    """Optimal flows of small clusters, soundness of their plans, sizes of messages."""
    figures: dict[str, Figure] = {}
    flows, num_problems, gap = [], 0, 0.0
    for seed in SEEDS:
        profile = random_cluster(seed)
        answer = solve_placement(profile, WORKLOAD, objective="max-flow")
        if not isinstance(answer, Plan):
            flows.append(0.0)
            continue
        flows.append(answer.predicted.max_flow_tokens_per_s)
        gap = max(gap, answer.predicted.gap)
        num_problems += len(list(problems_of(profile, answer)))
    for seed, flow in zip(SEEDS, flows, strict=True):
        figures[f"optimal flow of random cluster {seed}, tokens/s"] = Figure(value=flow, better="equal", tolerance=1e-4)
    figures["problems that the checker finds"] = Figure(value=num_problems, better="equal")
    figures["largest gap left"] = Figure(value=round(gap, 6), better="lower")
    for name, message in MESSAGES.items():
        figures[f"bytes of {name}"] = Figure(value=len(encode(message)), better="lower")
    return Figures(figures=figures)


if __name__ == "__main__":
    save_record(BASELINE, project_figures())
    print(f"{BASELINE} written")
