"""The commands as a user types them: mistakes are one message and exit code 2, and nothing is half written."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from helixbench import __main__ as front_door
from helixbench.profiler.cluster import COORDINATOR, ClusterProfile, Device, Node
from helixbench.profiler.model.model import open_model
from helixbench.records import decode_record, encode_record, load_record, save_record
from helixbench.reference_server.commands.nodes import nodes_of_options
from helixbench.reference_server.run_log import RunLog
from helixbench.reference_server.wire.keys import load_key_file
from helixbench.solver.problem.plan import Plan
from tests.conftest import ModelDir
from tests.reference_server.plans import ONE_NODE, THREE_IN_A_ROW, make_plan
from tests.reference_server.running import RunningAgents

Command = Callable[..., tuple[int, str, str]]
END_TIMEOUT_S = 90


@pytest.fixture
def helix(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """The command in this process: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["helixbench", *(str(argument) for argument in arguments)])
        with pytest.raises(SystemExit) as ended:
            front_door.main()
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    return run


@pytest.fixture
def plan(model_dir: ModelDir, tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    save_record(path, make_plan(model_dir("test-llama"), *ONE_NODE))
    return path


def refused(result: tuple[int, str, str], *parts: str) -> None:
    code, out, err = result
    assert code == 2, err
    assert out == ""
    assert "Traceback" not in err
    assert err.startswith("helixbench: ")
    assert err.count("\n") == 1, err
    for part in parts:
        assert part in err


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--requests", "3", "--duration-s", "4"], ["--requests and --duration-s: give one of them"]),
        (["--prompt-tokens", "3"], ["--prompt-tokens and --output-tokens: give both or neither"]),
        (["--prompt-tokens", "0", "--output-tokens", "3"], ["need at least 1 of each"]),
        (["--trace", "t.csv", "--prompt-tokens", "3"], ["--trace and --prompt-tokens/--output-tokens: give one"]),
        (["--trace", "none.csv"], ["none.csv: cannot be read as a trace"]),
        (["--testbed", "none.toml"], ["none.toml: cannot be read"]),
        (["--model", "/no/such/model"], ["--model /no/such/model: no such directory"]),
    ],
)
def test_bench_refuses_options_that_do_not_fit(
    helix: Command, plan: Path, model_dir: ModelDir, tmp_path: Path, options: list[str], parts: list[str]
) -> None:
    refused(helix("bench", plan, "--model", model_dir("test-llama"), "-o", "run.json", *options), *parts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json"]


def test_a_place_that_cannot_be_written_is_refused_before_any_agent_starts(
    helix: Command, plan: Path, model_dir: ModelDir, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    model = ["--model", model_dir("test-llama"), "-o", "folder"]
    refused(helix("bench", plan, *model), "folder: cannot be written (Is a directory)")
    refused(helix("profile", *model), "folder: cannot be written (Is a directory)")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "plan.json"]


def test_bench_needs_a_concurrency_from_somewhere(helix: Command, plan: Path, model_dir: ModelDir) -> None:
    made = load_record(plan, Plan)
    save_record(
        plan, msgspec.structs.replace(made, assumptions=msgspec.structs.replace(made.assumptions, concurrency=None))
    )
    refused(helix("bench", plan, "--model", model_dir("test-llama"), "-o", "run.json"), "--concurrency is missing")


def spoilt(plan: Path, change: Callable[[dict[str, object]], object]) -> None:
    raw = json.loads(plan.read_text())
    change(raw)
    plan.write_text(json.dumps(raw))


@pytest.mark.parametrize("command", ["bench", "serve"])
@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda raw: raw.update(schema="helixbench.run/2"), "expected a helixbench.plan/2 record"),
        (lambda raw: raw.pop("flows"), "missing required field `flows`"),
        (lambda raw: raw.update(colour="red"), "unknown field `colour`"),
        (lambda raw: raw.update(num_layers="six"), "Expected `int`, got `str` - at `$.num_layers`"),
        (lambda raw: raw["placement"].update(n0=[0, 4]), "placement: layers [4,6) are held by no node"),
        (lambda raw: raw["placement"].update(n0=[0, 9]), "[0,9) goes beyond the model's 6 layers"),
    ],
    ids=["schema", "missing", "unknown", "type", "uncovered", "beyond"],
)
def test_a_broken_plan_is_named_with_its_field(
    helix: Command,
    plan: Path,
    model_dir: ModelDir,
    tmp_path: Path,
    command: str,
    change: Callable[[dict[str, object]], object],
    part: str,
) -> None:
    spoilt(plan, change)
    options = ["-o", "run.json"] if command == "bench" else ["--port", 0]

    refused(helix(command, plan, "--model", model_dir("test-llama"), *options), "plan.json", part)
    assert not (tmp_path / "run.json").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]"])
def test_a_plan_that_is_no_json_is_named(helix: Command, plan: Path, model_dir: ModelDir, content: bytes) -> None:
    plan.write_bytes(content)
    refused(helix("bench", plan, "--model", model_dir("test-llama"), "-o", "run.json"), "plan.json")


def test_a_missing_plan_is_named(helix: Command, model_dir: ModelDir) -> None:
    refused(helix("bench", "no.json", "--model", model_dir("test-llama"), "-o", "r.json"), "no.json: cannot be read")


def test_profile_refuses_what_it_cannot_run_before_it_starts_anything(
    helix: Command, model_dir: ModelDir, tmp_path: Path
) -> None:
    half, other = tmp_path / "half", tmp_path / "other"
    for copy in (half, other):
        shutil.copytree(model_dir("test-llama"), copy)
    weights = (half / "model.safetensors").read_bytes()
    (half / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (other / "config.json").write_text('{"model_type": "mamba"}')
    (tmp_path / "old.toml").write_text('[[node]]\nname = "n"\ncpu = 0.4\nmemory = "1GB"\n')

    def profile(model: Path, *options: str) -> tuple[int, str, str]:
        return helix("profile", "--model", model, "-o", tmp_path / "out" / "cluster.json", *options)

    refused(profile(half), "model.safetensors: not a complete safetensors file")
    refused(profile(other), "model_type 'mamba' is not supported: MambaForCausalLM has no part named embed_tokens")
    refused(profile(tmp_path), "config.json: no such file")
    refused(profile(model_dir("test-llama"), "--dtype", "int8"), "--dtype int8: need auto or one of float32")
    refused(profile(model_dir("test-llama"), "--testbed", "old.toml"), "old.toml: Object contains unknown field `cpu`")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["-o", "c.json"], "--model is missing"),
        (["--model", "m"], "--output is missing"),
        (["--model", "m", "-o", "c.json", "--resume"], "--resume: goes with --device"),
        (["--model", "m", "-o", "c.json", "--device", "cpu", "--testbed", "t"], "--testbed: does not go with --device"),
        (["--model", "m", "-o", "c.json", "--device", "cpu", "--only", "network"], "--only: does not go with --device"),
        (["--model", "m", "-o", "c.json", "--compute-of", "b.json"], "--compute-of: goes with --only network"),
    ],
)
def test_profile_refuses_options_that_do_not_go_together(helix: Command, options: list[str], part: str) -> None:
    refused(helix("profile", *options), part)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--agent", "a=h:1"], "--agent: give --key FILE with it"),
        (["--agent", "a=h:1", "--key", "k", "--testbed", "t"], "and no --testbed"),
        (["--key", "k"], "--key: belongs to --agent"),
        (["--agent", "a=h:1", "--key", "/nowhere/k"], "no such file"),
    ],
)
def test_nodes_are_of_a_testbed_or_of_agents(
    helix: Command, plan: Path, model_dir: ModelDir, options: list[str], part: str
) -> None:
    refused(helix("bench", plan, "--model", model_dir("test-llama"), "-o", "run.json", *options), part)


def test_agents_that_run_are_a_testbed_of_addresses(running: RunningAgents) -> None:
    spec = nodes_of_options(None, ["a=10.0.0.1:5", "b=10.0.0.2:5"], running.key_file)
    assert [(node.name, node.address) for node in spec.remote_nodes] == [("a", "10.0.0.1:5"), ("b", "10.0.0.2:5")]
    assert spec.key_file == running.key_file


def test_serve_says_when_its_port_is_taken(helix: Command, plan: Path, model_dir: ModelDir) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = helix("serve", plan, "--model", model_dir("test-llama"), "--port", port)
    refused(result, f"--host 127.0.0.1 --port {port}: cannot listen there (Address already in use")


def test_agent_refuses_what_it_cannot_start_with(helix: Command, running: RunningAgents, tmp_path: Path) -> None:
    readable = tmp_path / "readable.key"
    shutil.copy(running.key_file, readable)
    readable.chmod(0o644)

    def agent(*options: object) -> tuple[int, str, str]:
        return helix("agent", "--listen", "127.0.0.1:0", *options)

    refused(agent(), "agent: need --listen HOST:PORT and --key FILE (make one with --make-key FILE)")
    refused(agent("--key", "none.key"), "none.key: cannot be read")
    refused(agent("--key", readable), "other users can read this key; run: chmod 600")
    beyond = ("--listen", "127.0.0.1:99999", "--key", running.key_file)
    refused(agent(*beyond), "--listen 127.0.0.1:99999: need HOST:PORT with a port of 0 to 65535")
    refused(agent("--key", running.key_file, "--memory", "much"), "--memory much:")
    refused(agent("--key", running.key_file, "--device", "abacus"), "--device abacus: need cpu or cuda:N")
    refused(agent("--key", running.key_file, "--device", "cuda:77"), "--device cuda:77: torch")
    refused(helix("agent", "--make-key", running.key_file), "cannot be written (File exists)")


def test_make_key_writes_a_key(helix: Command, tmp_path: Path) -> None:
    code, out, err = helix("agent", "--make-key", "new.key")

    assert (code, err) == (0, "")
    assert out == "new.key: a new cluster key; copy it to every node\n"
    assert load_key_file(tmp_path / "new.key").public


def test_model_make_writes_a_hash_model_of_a_published_size(helix: Command, tmp_path: Path) -> None:
    code, out, _ = helix("model", "make", "made", "--like", "llama2-70b", "--layers", 12, "--wire", "small")

    assert code == 0
    assert out == (
        "made: hash model of 12 layers like llama2-70b; per layer 1711 MB of weights and 4096 bytes of KV cache per "
        "token, 8 bytes per token between nodes\n"
    )
    assert open_model(str(tmp_path / "made")).num_layers == 12
    refused(
        helix("model", "make", "made", "--like", "gpt-7"), "--like gpt-7: sizes not known; known models: llama1-30b"
    )
    refused(helix("model", "make", "made", "--like", "llama2-7b", "--seed", 3), "--preset and --seed: not with --like")
    refused(helix("model", "make", "made", "--layers", 3), "--layers and --wire: only with --like MODEL")


def test_model_make_writes_a_model_or_says_why_not(helix: Command, tmp_path: Path) -> None:
    code, out, _ = helix("model", "make", "made", "--preset", "test-qwen3", "--seed", 5)

    assert (code, out) == (0, "made: model test-qwen3, seed 5\n")
    assert (tmp_path / "made" / "model.safetensors").exists()
    refused(helix("model", "make", "made", "--preset", "huge"), "--preset 'huge': no such preset")
    refused(helix("model", "make", tmp_path), "holds files that `helixbench model make` did not make")


# Whole commands, on agents that run already


def address_testbed(running: RunningAgents, folder: Path) -> Path:
    """A testbed of agents that were started by hand."""
    path = folder / "testbed.toml"
    nodes = "".join(f'[[node]]\nname = "{name}"\naddress = "{at}"\n' for name, at in running.addresses.items())
    path.write_text(f'key = "{running.key_file}"\n{nodes}')
    return path


def in_own_process(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "helixbench", *(str(argument) for argument in arguments)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=END_TIMEOUT_S, cwd=folder)


def test_bench_on_agents_started_by_hand_prints_the_record_it_wrote(
    running: RunningAgents, model_dir: ModelDir, tmp_path: Path
) -> None:
    model = model_dir("test-llama")
    save_record(tmp_path / "plan.json", make_plan(model, *THREE_IN_A_ROW))
    options = ["--testbed", address_testbed(running, tmp_path), "--concurrency", 3, "--requests", 6, "--seed", 9]

    done = in_own_process("bench", "plan.json", "--model", model, *options, "-o", "run.json", "--json", folder=tmp_path)

    assert done.returncode == 0, done.stderr
    run = load_record(tmp_path / "run.json", RunLog)
    assert done.stdout.encode() == encode_record(run)
    assert decode_record(done.stdout.encode(), RunLog, origin="stdout") == run
    assert (run.concurrency, run.seed) == (3, 9)
    assert "bench plan.json --model" in run.provenance.command
    assert run.testbed in done.stderr.replace("\n", " ")
    assert len(run.requests_in_window()) >= 6


def test_the_network_alone_is_profiled_and_takes_the_compute_of_a_profile(
    running: RunningAgents, model_dir: ModelDir, tmp_path: Path
) -> None:
    few = RunningAgents(dict(list(running.addresses.items())[:1]), running.key_file)
    (name,) = few.addresses
    agent = ["--agent", f"{name}={few.addresses[name]}", "--key", few.key_file]
    options = ["--model", model_dir("test-llama"), *agent, "--only", "network"]

    done = in_own_process("profile", *options, "-o", "links.json", "--json", folder=tmp_path)

    assert done.returncode == 0, done.stderr
    found = decode_record(done.stdout.encode(), ClusterProfile, origin="stdout")
    assert [(link.src, link.dst) for link in found.links] == [(COORDINATOR, name), (name, COORDINATOR)]
    assert found.node(name).max_layers == 0

    device = Device(kind="cpu", name="profiled", memory_bytes=1e9)
    node = Node(name=name, device=device, max_layers=1, capacity_tokens_per_s=(5.0,))
    for digest, code in ((found.model.digest, 0), ("another", 2)):
        model = msgspec.structs.replace(found.model, digest=digest)
        save_record(tmp_path / "old.json", ClusterProfile(model=model, nodes=(node,)))
        options = [*options, "--compute-of", "old.json"]
        done = in_own_process("profile", *options, "-o", "new.json", folder=tmp_path)
        assert done.returncode == code, done.stderr
    new = load_record(tmp_path / "new.json", ClusterProfile)
    assert new.node(name) == node
    assert len(new.links) == 2
    assert "--compute-of" in done.stderr


def test_a_refusal_of_the_driver_is_the_commands(running: RunningAgents, model_dir: ModelDir, tmp_path: Path) -> None:
    save_record(tmp_path / "plan.json", make_plan(model_dir("test-llama"), *THREE_IN_A_ROW))
    options = ["--testbed", address_testbed(running, tmp_path), "-o", "run.json"]

    done = in_own_process("bench", "plan.json", "--model", model_dir("test-qwen2"), *options, folder=tmp_path)

    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.count("helixbench: ") == 1
    assert "plan.json: made for model test-llama" in done.stderr
    assert not (tmp_path / "run.json").exists()
