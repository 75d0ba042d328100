"""The plugin in projects outside this one, each run by a pytest process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from helixbench.records import encode_record
from helixbench.reports.stage_timing import device_timer
from tests.reports.report_examples import example_plan, example_profile
from tests.reports.stand_in import write_stand_in

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "test_helixbench_gates.py"

# Stands in for `python -m helixbench serve`: the same line on stderr and the two addresses that the plugin asks.
STAND_IN = """
import http.server, json, sys, time

class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, body):
        raw = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)
    def do_GET(self):
        self.answer({"data": [{"id": "tiny"}]})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(0.8)
        self.answer({"usage": {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}})
    def log_message(self, *_):
        pass

if "broken" in sys.argv:
    sys.exit("helixbench: the model does not fit")
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(f"serving tiny on http://127.0.0.1:{server.server_port} (OpenAI-compatible)", file=sys.stderr, flush=True)
open("starts", "a").write("x")
try:
    server.serve_forever()
except KeyboardInterrupt:
    open("stops", "a").write("x")
"""


def run_pytest(folder: Path, *arguments: str | Path, is_module: bool = False) -> subprocess.CompletedProcess[str]:
    """``pytest`` as the user of a project in ``folder`` runs it, with this project installed."""
    if not (folder / "installed").exists():
        write_stand_in(folder / "installed", STAND_IN)
    command = [sys.executable, "-m", "pytest"] if is_module else [str(Path(sys.executable).parent / "pytest")]
    paths = os.pathsep.join([str(folder / "installed"), str(ROOT)])
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "COV"))}
    return subprocess.run(
        [*command, "-p", "no:cacheprovider", "-p", "pytest_benchmark.plugin", *map(str, arguments)],
        cwd=folder,
        env={**environment, "PYTHONPATH": paths, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def write_test(folder: Path, code: str) -> Path:
    path = folder / "test_user.py"
    path.write_text("import pytest\n" + textwrap.dedent(code))
    return path


PLUGIN = ("-p", "helixbench.reports.pytest_plugin")


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, ...]:
    """Options that name a plan and a profile."""
    (tmp_path / "plan.json").write_bytes(encode_record(example_plan()))
    (tmp_path / "cluster.json").write_bytes(encode_record(example_profile()))
    return ("--plan", "plan.json", "--cluster-profile", "cluster.json")


def test_the_example_passes_and_the_session_is_recorded(tmp_path: Path, files: tuple[str, ...]) -> None:
    shutil.copy(EXAMPLE, tmp_path)

    done = run_pytest(tmp_path, *PLUGIN, *files, "--helixbench-model", "m", "--helixbench-json", "out.json")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout
    assert "PLACEMENT" in done.stdout
    assert "x max-flow" in done.stdout
    record = json.loads((tmp_path / "out.json").read_text())
    assert [gate["is_passed"] for gate in record["gates"]] == [True, True]
    assert record["loads"][0]["num_requests"] == 16
    assert (tmp_path / "stops").read_text() == "x"


def test_without_files_the_example_is_skipped_with_reasons(tmp_path: Path) -> None:
    shutil.copy(EXAMPLE, tmp_path)

    done = run_pytest(tmp_path, *PLUGIN, "-rs", "-k", "not product")

    assert done.returncode == 0
    assert "3 skipped" in done.stdout
    assert "pytest --plan FILE" in done.stdout
    assert "helixbench " not in done.stdout.split("short test summary")[0]


def test_the_plan_is_served_once_for_all_tests(tmp_path: Path, files: tuple[str, ...]) -> None:
    write_test(
        tmp_path,
        """
        def test_one(pipeline):
            pipeline.complete(prompt_tokens=3, output_tokens=2)
        def test_two(pipeline):
            assert pipeline.complete(prompt_tokens=3, output_tokens=2) == (3, 2)
        """,
    )

    done = run_pytest(tmp_path, *PLUGIN, *files, "--helixbench-model", "m")

    assert "2 passed" in done.stdout, done.stdout
    assert (tmp_path / "starts").read_text() == "x"


def test_a_server_that_does_not_start_is_an_error_with_its_words(tmp_path: Path, files: tuple[str, ...]) -> None:
    write_test(tmp_path, "def test_it(pipeline): pass")

    done = run_pytest(tmp_path, *PLUGIN, *files, "--helixbench-model", "broken")

    assert done.returncode == 1
    assert "the model does not fit" in done.stdout


@pytest.mark.parametrize(
    ("mark", "message"),
    [("min_ratio=0.99", "asked for 0.99 .. 1.05"), ("max_ratio=0.01", "asked for 0 .. 0.01")],
)
def test_a_flow_outside_its_band_fails(mark: str, message: str, tmp_path: Path, files: tuple[str, ...]) -> None:
    write_test(
        tmp_path,
        f"""
        @pytest.mark.max_flow({mark})
        def test_flow(pipeline):
            pipeline.load(concurrency=2, num_requests=2, prompt_tokens=30, output_tokens=8)
        """,
    )

    done = run_pytest(tmp_path, *PLUGIN, *files, "--helixbench-model", "m")

    assert done.returncode == 1
    assert message in done.stdout
    assert "FAIL  test_user.py::test_flow" in done.stdout


def test_a_gate_that_measured_nothing_fails(tmp_path: Path, files: tuple[str, ...]) -> None:
    write_test(
        tmp_path,
        """
        @pytest.mark.max_flow(min_ratio=0.1)
        def test_flow():
            pass
        @pytest.mark.gate(max_median_s=1)
        def test_median():
            pass
        """,
    )

    done = run_pytest(tmp_path, *PLUGIN)

    assert "2 failed" in done.stdout
    assert done.stdout.count("measured nothing") >= 2


@pytest.mark.parametrize(("limit_s", "exit_code"), [(3600.0, 0), (0.001, 1)])
def test_a_median_is_held_against_its_limit(limit_s: float, exit_code: int, tmp_path: Path) -> None:
    write_test(
        tmp_path,
        f"""
        import time
        @pytest.mark.gate(max_median_s={limit_s})
        def test_median(stage_benchmark):
            assert stage_benchmark(lambda: time.sleep(0.01) or 7, rounds=3, warmup_rounds=0) == 7
        """,
    )

    done = run_pytest(tmp_path, *PLUGIN, "--benchmark-json", "b.json")

    assert done.returncode == exit_code, done.stdout
    benchmark = json.loads((tmp_path / "b.json").read_text())["benchmarks"][0]
    assert benchmark["stats"]["rounds"] == 3
    assert benchmark["extra_info"] == {"device": "cpu"}


def test_a_damaged_file_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{")
    write_test(tmp_path, "def test_it(plan): pass")

    done = run_pytest(tmp_path, *PLUGIN, "--plan", "plan.json")

    assert done.returncode == 1
    assert "not a complete JSON file" in done.stdout


OWN_REPORTS = """
    def test_own_folder():
        import reports
        from pathlib import Path
        assert Path(list(reports.__path__)[0]).parent == Path(__file__).parent
"""


def test_a_project_with_its_own_reports_package_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "__init__.py").touch()
    write_test(tmp_path, OWN_REPORTS)

    done = run_pytest(tmp_path, is_module=True)

    assert "1 passed" in done.stdout, done.stdout
    assert "helixbench" not in done.stdout
    assert "--cluster-profile" not in run_pytest(tmp_path, "--help").stdout


def test_a_project_with_a_reports_package_can_ask_for_the_plugin_by_the_command(
    tmp_path: Path, files: tuple[str, ...]
) -> None:
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "__init__.py").touch()
    write_test(tmp_path, "def test_plan(plan): assert plan.num_layers == 16")

    assert "1 passed" in run_pytest(tmp_path, *PLUGIN, *files).stdout


@pytest.mark.parametrize("is_module", [False, True])
def test_a_project_with_a_folder_of_reports_can_ask_for_the_plugin(
    is_module: bool, tmp_path: Path, files: tuple[str, ...]
) -> None:
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "coverage.html").touch()
    write_test(tmp_path, "def test_plan(plan): assert plan.num_layers == 16")

    done = run_pytest(tmp_path, *PLUGIN, *files, is_module=is_module)

    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_device_time_is_between_events_behind_a_head_start(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        count = 0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            Event.count += 1
            self.number = Event.count

        def record(self) -> None:
            log.append(f"record {self.number}")

        def synchronize(self) -> None:
            log.append(f"wait {self.number}")

        def elapsed_time(self, end: Event) -> float:
            return 1000.0 * (end.number - self.number)

    class Device:
        def __init__(self, _name: str) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    cuda = SimpleNamespace(Event=Event, device=Device, _sleep=lambda _cycles: log.append("spin"))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    timer = device_timer("cuda:0")  # against stand-ins of CUDA's events: their order and number, not their precision

    durations = []
    for _ in range(2):
        start = timer()
        log.append("work")
        durations.append(timer() - start)

    assert durations == [1.0, 1.0]
    assert log == ["spin", "record 1", "work", "record 2", "wait 2", "spin", "record 3", "work", "record 4", "wait 4"]


# A device whose work takes 3 ms of its own time and none of the host's; there is no CUDA device in these tests.
FAKE_CUDA = """
    import sys, types

    class Device:
        now_ms = 0.0
        def __init__(self, name):
            assert name == "cuda:0"
        def __enter__(self): pass
        def __exit__(self, *_): pass

    class Event:
        def __init__(self, enable_timing): pass
        def record(self): self.at_ms = Device.now_ms
        def synchronize(self): pass
        def elapsed_time(self, end): return end.at_ms - self.at_ms

    def spin(cycles):
        Device.now_ms += 10.0

    torch = types.ModuleType("torch")
    torch.cuda = types.SimpleNamespace(Event=Event, device=Device, _sleep=spin)
    sys.modules["torch"] = torch

    def work():
        Device.now_ms += 3.0
        return "done"
"""


def test_a_stage_on_a_device_is_timed_by_events_with_pytest_benchmarks_statistics(tmp_path: Path) -> None:
    write_test(
        tmp_path,
        textwrap.dedent(FAKE_CUDA)
        + textwrap.dedent("""
        @pytest.mark.gate(max_median_s=0.0031)
        def test_stage(stage_benchmark):
            assert stage_benchmark(work, device="cuda:0", rounds=5, warmup_rounds=2) == "done"
        """),
    )

    done = run_pytest(tmp_path, *PLUGIN, "--benchmark-json", "b.json")

    assert done.returncode == 0, done.stdout
    benchmark = json.loads((tmp_path / "b.json").read_text())["benchmarks"][0]
    assert benchmark["extra_info"] == {"device": "cuda:0"}
    assert benchmark["stats"]["rounds"] == 5
    # Neither the launch, which takes no time here, nor the head start of 10 ms is in it.
    assert [benchmark["stats"][name] for name in ("min", "median", "max")] == pytest.approx([0.003] * 3)


def test_the_record_of_a_session_names_its_schema() -> None:
    from helixbench.reports.pytest_plugin import SessionRecord

    assert msgspec.json.encode(SessionRecord(gates=(), loads=())).startswith(b'{"schema":"helixbench.pytest/1"')
