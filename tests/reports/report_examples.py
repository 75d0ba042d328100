"""Records for the tests of reports: a cluster, its plan and a closed-loop run that agrees with itself."""

from __future__ import annotations

import random

import msgspec

from helixbench.profiler.cluster import COORDINATOR, ClusterProfile, DefaultLink, Device, Link, ModelFacts, Node
from helixbench.profiler.cost.measured import MeasuredCost
from helixbench.profiler.cost.model import StageCost
from helixbench.records import Provenance, digest
from helixbench.reference_server.run_log import LinkUse, NodeUse, RequestRecord, RunLog, TokenCount, Window
from helixbench.solver.problem.plan import (
    Assumptions,
    Expected,
    LayerRange,
    LinkFlow,
    NodeFlow,
    Plan,
    Predicted,
    SolverFacts,
)
from helixbench.solver.problem.workload import fixed_workload

PROMPT, OUTPUT, CONCURRENCY = 64, 32, 16
NOT_SHAPED = "links are not shaped: not root"


def example_profile() -> ClusterProfile:
    return ClusterProfile(
        model=ModelFacts(
            name="tiny-llama",
            num_layers=16,
            activation_bytes_per_token=512.0,
            token_bytes=4.0,
            layer_weight_bytes=2.1e6,
            kv_bytes_per_token_per_layer=1024.0,
            dtype="float32",
        ),
        nodes=(
            _measured_node("big", cores=0.8, layer_s=0.0004),
            _measured_node("mid", cores=0.5, layer_s=0.0007),
            Node(
                name="small",
                device=Device(kind="cuda", name="T4", memory_bytes=16e9),
                max_layers=8,
                capacity_tokens_per_s=tuple(1600.0 / k for k in range(1, 9)),
                region="far",
            ),
        ),
        links=(Link(src="small", dst="mid", bandwidth_bytes_per_s=1e7, latency_s=0.004, source="iperf3"),),
        default_link=DefaultLink(bandwidth_bytes_per_s=5e7, latency_s=0.0002),
        testbed=f"three nodes on one machine; {NOT_SHAPED}",
        provenance=_provenance({}),
    )


def example_plan() -> Plan:
    return Plan(
        model="tiny-llama",
        num_layers=16,
        placement={"big": LayerRange(0, 10), "mid": LayerRange(8, 16), "small": LayerRange(0, 8)},
        flows=(
            _flow(COORDINATOR, "big", 280.0, 1.2e7),
            _flow(COORDINATOR, "small", 120.0, 1.2e7),
            _flow("big", "mid", 280.0, 9.7e4),
            _flow("small", "mid", 120.0, 1.9e4),
            _flow("mid", COORDINATOR, 400.0, 1.2e7),
        ),
        nodes={
            "big": NodeFlow(flow_tokens_per_s=280.0, capacity_tokens_per_s=610.0, kv_capacity_tokens=40000),
            "mid": NodeFlow(flow_tokens_per_s=400.0, capacity_tokens_per_s=400.0, kv_capacity_tokens=20000),
            "small": NodeFlow(flow_tokens_per_s=120.0, capacity_tokens_per_s=200.0, kv_capacity_tokens=6000),
        },
        predicted=Predicted(
            max_flow_tokens_per_s=400.0,
            upper_bound_tokens_per_s=415.0,
            gap=0.0375,
            expected=(_expected(8, 260.0), _expected(CONCURRENCY, 375.0)),
            bottleneck=("node mid",),
        ),
        assumptions=Assumptions(
            workload=fixed_workload(prompt_tokens=PROMPT, output_tokens=OUTPUT),
            partial_inference=True,
            objective="throughput",
            concurrency=CONCURRENCY,
            notes=(NOT_SHAPED,),
        ),
        solver=SolverFacts(method="milp", backend="HiGHS 1.15", seconds=1.3, status="optimal"),
        cluster_digest=digest(example_profile()),
        provenance=_provenance({"cluster": digest(example_profile())}),
    )


def example_run(*, seed: int = 0, speed: float = 1.0, seconds: float = 48.0) -> RunLog:
    """A closed loop of ``CONCURRENCY`` requests; every count follows from the requests, so all checks hold.

    Args:
        seed: of the latencies.
        speed: measured over expected, about.
        seconds: length of the run; the window leaves out 8 s at each end.
    """
    plan = example_plan()
    requests = _closed_loop(random.Random(seed), speed=speed, seconds=seconds)
    window = Window(8.0, seconds - 8.0)
    prompts = [(r.first_token_s, r.prompt_tokens) for r in requests]
    outputs = [(time_s, 1) for r in requests for time_s in _output_times(r)]
    timeline = tuple(
        TokenCount(float(i + 1), _sum_within(prompts, i, i + 1), _sum_within(outputs, i, i + 1))
        for i in range(int(seconds))
    )
    prefill = _sum_within(prompts, window.start_s, window.end_s)
    decode = _sum_within(outputs, window.start_s, window.end_s)
    shares = {"big": 0.7, "mid": 1.0, "small": 0.3}
    return RunLog(
        plan=plan,
        workload=plan.assumptions.workload,
        concurrency=CONCURRENCY,
        routing="iwrr",
        seed=seed,
        window=window,
        prompt_tokens=prefill,
        output_tokens=decode,
        requests=tuple(r for r in requests if r.finish_s <= seconds),
        pipelines=((("big", 0, 10), ("mid", 10, 16)), (("small", 0, 8), ("mid", 8, 16))),
        nodes={name: _node_use(plan, name, share, prefill, decode, window.seconds) for name, share in shares.items()},
        links=tuple(_link_use(flow, prefill + decode, plan) for flow in plan.flows),
        timeline=timeline,
        device_names={"big": "2 vCPU", "mid": "2 vCPU", "small": "T4"},
        testbed=f"three nodes on one machine; {NOT_SHAPED}",
        provenance=_provenance({"plan": digest(plan)}),
    )


def run_bytes(run: RunLog, **changes: object) -> bytes:
    """The run as it lies on disk, with top-level fields replaced in the JSON, valid or not."""
    raw = msgspec.json.decode(msgspec.json.encode(run))
    raw.update(changes)
    return msgspec.json.encode(raw)


def _measured_node(name: str, *, cores: float, layer_s: float) -> Node:
    cost = StageCost(
        step_s=0.002,
        step_item_s=0.0001,
        step_token_s=0.0,
        layer_s=layer_s,
        token_knots=(1.0, 16.0),
        layer_token_s=(2e-5, 1e-5),
        layer_decode_item_s=1e-5,
        layer_decode_context_s=1e-8,
        layer_prefill_chunk_s=1e-5,
        layer_prefill_pair_s=1e-9,
        embed_s=1e-4,
        embed_token_s=1e-6,
        head_s=1e-3,
        head_item_s=1e-5,
        max_tokens=256.0,
        max_context_tokens=4096.0,
    )
    return Node(
        name=name,
        device=Device(kind="cpu", name="2 vCPU", memory_bytes=1.5e9, facts={"cores": cores}),
        max_layers=16,
        cost=MeasuredCost(
            stage=cost,
            samples=(),
            held_out_error_median=0.021,
            held_out_error_p90=0.064,
            workspace_bytes=5e7,
            max_batch_tokens=256,
            source="the served stage, in its own loop",
        ),
    )


def _expected(concurrency: int, total: float) -> Expected:
    return Expected(
        concurrency=concurrency,
        total_tokens_per_s=total,
        output_tokens_per_s=total / 3,
        ttft_s=1.0,
        tpot_s=0.1,
        low_total_tokens_per_s=total * 0.95,
        high_total_tokens_per_s=total * 1.05,
        in_flight=float(concurrency),
        node_busy={"big": 0.61, "mid": 0.94, "small": 0.56},
        node_batch_tokens={"big": 8.7, "mid": 12.4, "small": 3.7},
    )


def _flow(src: str, dst: str, flow: float, capacity: float) -> LinkFlow:
    return LinkFlow(src=src, dst=dst, flow_tokens_per_s=flow, capacity_tokens_per_s=capacity)


def _provenance(inputs: dict[str, str]) -> Provenance:
    return Provenance(
        created="2026-05-04T03:02:01+00:00",
        host="testhost",
        command="helixbench bench plan.json --concurrency 16",
        versions={"python": "3.11.9", "helixbench": "0.1.0"},
        inputs=inputs,
    )


def _closed_loop(rng: random.Random, *, speed: float, seconds: float) -> list[RequestRecord]:
    """Each of the loop's clients starts its next request when one finishes."""
    done = []
    for client in range(CONCURRENCY):
        now = 0.01 * client
        while now < seconds:
            first = now + rng.uniform(0.6, 1.4) / speed
            finish = first + (OUTPUT - 1) * rng.uniform(0.08, 0.12) / speed
            done.append(
                RequestRecord(
                    arrival_s=now,
                    first_token_s=first,
                    finish_s=finish,
                    prompt_tokens=PROMPT,
                    output_tokens=OUTPUT,
                    pipeline=0 if rng.random() < 0.7 else 1,
                )
            )
            now = finish
    return done


def _output_times(request: RequestRecord) -> list[float]:
    step = (request.finish_s - request.first_token_s) / (OUTPUT - 1)
    return [request.first_token_s + i * step for i in range(OUTPUT - 1)] + [request.finish_s]


def _sum_within(events: list[tuple[float, int]], start: float, end: float) -> int:
    return sum(count for time_s, count in events if start <= time_s < end)


def _node_use(plan: Plan, name: str, share: float, prefill: int, decode: int, seconds: float) -> NodeUse:
    expected = plan.predicted.expected[-1]
    return NodeUse(
        busy_s=expected.node_busy[name] * seconds,
        iterations=round(decode * share / expected.node_batch_tokens[name]),
        prefill_tokens=round(prefill * share),
        decode_tokens=round(decode * share),
        kv_peak_tokens=1500,
        kv_capacity_tokens=plan.nodes[name].kv_capacity_tokens or 0,
    )


def _link_use(flow: LinkFlow, tokens: int, plan: Plan) -> LinkUse:
    share = flow.flow_tokens_per_s / plan.predicted.max_flow_tokens_per_s
    width = 4 if COORDINATOR in (flow.src, flow.dst) else 512
    return LinkUse(
        src=flow.src,
        dst=flow.dst,
        payload_bytes=round(tokens * share * width),
        messages=round(tokens * share / 10),
        tokens=round(tokens * share),
    )
