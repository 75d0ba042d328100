"""One node, whole model: this server against transformers' own ``generate`` and ``generate_batch``.

The same model, threads, prompts and output lengths for all; each runs in a process of its own, stopped while it is not
its turn, and they take turns in one run, so that what changes on the machine meanwhile changes for all of them. This
server is timed from the coordinator's end: a real agent, real sockets, encryption and all. Needs psutil, which
``generate_batch`` asks for on CPU.

    python -m benchmarks.single_node [--rounds 5] [--batch 16] [--prompt-tokens 64] [--output-tokens 64]
"""

from __future__ import annotations

import argparse
import json
import random
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from helixbench.profiler.cluster import COORDINATOR
from helixbench.profiler.model.files import ModelFiles
from helixbench.profiler.model.synthetic import make_model
from helixbench.reference_server.coordinator.engine import Engine
from helixbench.reference_server.coordinator.loading import load_plan
from helixbench.reference_server.wire.client import Agents
from helixbench.reference_server.wire.keys import load_key_file, make_key_file
from helixbench.solver.problem.plan import Assumptions, LayerRange, LinkFlow, NodeFlow, Plan, Predicted, SolverFacts
from helixbench.solver.problem.workload import fixed_workload
from helixbench.solver.scheduling.requests import Request

WORKER = "--worker"
MAX_BATCH_TOKENS = 512
PAGE_TOKENS = 16  # a lower bound of transformers' page size, to give it pages enough
Lengths = tuple[int, int, int]  # sequences, prompt tokens, output tokens


def prompts_of(lengths: Lengths, vocab_size: int, seed: int) -> list[list[int]]:
    """The prompts of one round."""
    draw = random.Random(seed)
    return [[draw.randrange(vocab_size) for _ in range(lengths[1])] for _ in range(lengths[0])]


def run_worker(kind: str, model: str, lengths: Lengths) -> None:
    """Serve rounds over stdin and stdout: a seed comes in, the seconds that the round took go out."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    torch.set_num_threads(1)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    config = GenerationConfig(max_new_tokens=lengths[2], do_sample=False, eos_token_id=-1, pad_token_id=0)
    pages = lengths[0] * (lengths[1] + lengths[2]) // PAGE_TOKENS + 2 * lengths[0]
    batching = ContinuousBatchingConfig(num_blocks=pages, max_batch_tokens=MAX_BATCH_TOKENS)
    print("ready", flush=True)
    for line in sys.stdin:
        prompts = prompts_of(lengths, loaded.config.vocab_size, int(line))
        begin = time.perf_counter()
        if kind == "generate":
            tokens = loaded.generate(torch.tensor(prompts), generation_config=config)[:, lengths[1] :]
        else:
            outputs = loaded.generate_batch(
                inputs=prompts,
                generation_config=config,
                continuous_batching_config=batching,
                progress_bar=False,
                persistent_manager=True,
            )
            tokens = torch.tensor([output.generated_tokens for output in outputs.values()])
        assert tokens.shape == (lengths[0], lengths[2]), tokens.shape
        print(time.perf_counter() - begin, flush=True)


def one_node_plan(files: ModelFiles, lengths: Lengths) -> Plan:
    """The whole model on a node called ``only``."""
    flow = {"flow_tokens_per_s": 1.0, "capacity_tokens_per_s": 1.0}
    kv_tokens = lengths[0] * (lengths[1] + lengths[2])
    return Plan(
        model="bench",
        num_layers=files.num_layers,
        placement={"only": LayerRange(0, files.num_layers)},
        flows=(LinkFlow(src=COORDINATOR, dst="only", **flow), LinkFlow(src="only", dst=COORDINATOR, **flow)),
        nodes={"only": NodeFlow(**flow, kv_capacity_tokens=kv_tokens, max_batch_tokens=MAX_BATCH_TOKENS)},
        predicted=Predicted(max_flow_tokens_per_s=1.0, upper_bound_tokens_per_s=1.0, gap=0.0),
        assumptions=Assumptions(
            workload=fixed_workload(prompt_tokens=lengths[1], output_tokens=lengths[2]),
            partial_inference=False,
            objective="throughput",
        ),
        solver=SolverFacts(method="by hand", backend="none", seconds=0.0, status="not searched"),
        model_digest=files.digest(),
        dtype="float32",
    )


def serve_round(engine: Engine, lengths: Lengths, vocab_size: int, seed: int) -> float:
    """Seconds until all requests of a round have ended."""
    open_requests = lengths[0]

    def count(events: list) -> list[Request]:  # type: ignore[type-arg]
        nonlocal open_requests
        open_requests -= sum(1 for event in events if event.reason)
        return []

    requests = [
        Request(number=seed * lengths[0] + index, prompt=tuple(prompt), max_tokens=lengths[2])
        for index, prompt in enumerate(prompts_of(lengths, vocab_size, seed))
    ]
    begin = time.perf_counter()
    engine.submit(requests)
    while open_requests:
        engine.step(1000, on_events=count)
    return time.perf_counter() - begin


def main() -> None:
    """Run all three in turn, print output tokens/s and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    arguments = parser.parse_args()
    lengths = (arguments.batch, arguments.prompt_tokens, arguments.output_tokens)
    with tempfile.TemporaryDirectory() as folder:
        model, key = Path(folder) / "model", Path(folder) / "key"
        make_model(model)
        make_key_file(key)
        files = ModelFiles(str(model))
        command = [
            sys.executable,
            "-m",
            "helixbench.reference_server.launch.agent",
            "--listen",
            "127.0.0.1:0",
            "--key",
            str(key),
        ]
        agent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        workers = {
            kind: subprocess.Popen(
                [sys.executable, "-m", __spec__.name, WORKER, kind, str(model), json.dumps(lengths)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for kind in ("generate", "generate_batch")
        }
        try:
            assert agent.stdout is not None
            address = json.loads(agent.stdout.readline())["listening"]
            with Agents({"only": address}, load_key_file(key)) as agents:
                engine = load_plan(agents, one_node_plan(files, lengths), files)
                runs: dict[str, Callable[[int], float]] = {
                    "helixbench": lambda seed: serve_round(engine, lengths, files.vocab_size, seed)
                }
                runs |= {kind: (lambda seed, w=worker: _ask(w, seed, engine)) for kind, worker in workers.items()}
                for worker in workers.values():
                    assert worker.stdout is not None
                    assert worker.stdout.readline() == "ready\n", "a worker did not start; is psutil installed?"
                    worker.send_signal(signal.SIGSTOP)
                _report(runs, lengths, arguments.rounds)
        finally:
            for process in (agent, *workers.values()):
                process.kill()
                process.wait()


def _ask(worker: subprocess.Popen[str], seed: int, engine: Engine) -> float:
    """A round of a worker; meanwhile the engine renews the lease of its agent, which would be free otherwise."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.send_signal(signal.SIGCONT)
    worker.stdin.write(f"{seed}\n")
    worker.stdin.flush()
    while not select.select([worker.stdout], [], [], 0)[0]:
        engine.step(500)
    seconds = float(worker.stdout.readline())
    worker.send_signal(signal.SIGSTOP)
    return seconds


def _report(runs: dict[str, Callable[[int], float]], lengths: Lengths, rounds: int) -> None:
    rates: dict[str, list[float]] = {kind: [] for kind in runs}
    for seed in range(rounds + 1):
        for kind, run in runs.items():
            rate = lengths[0] * lengths[2] / run(seed)
            if seed:  # the first round warms up
                rates[kind].append(rate)
    for kind, values in rates.items():
        print(f"{kind:<16} {statistics.median(values):8.1f} output tokens/s (median of {rounds})")
    for kind in list(rates)[1:]:
        ratios = [ours / theirs for ours, theirs in zip(rates["helixbench"], rates[kind], strict=True)]
        print(
            f"helixbench / {kind}: {statistics.median(ratios):.3f} (of pairs: {min(ratios):.3f} .. {max(ratios):.3f})"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER]:
        run_worker(sys.argv[2], sys.argv[3], tuple(json.loads(sys.argv[4])))
    else:
        main()
