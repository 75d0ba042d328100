"""The plugin in projects outside this one, each run by a pytest process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

from helixbench.records import encode_record
from tests.reports.report_examples import example_plan, example_profile
from tests.reports.stand_in import write_stand_in

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "test_helixbench_gates.py"

# Stands in for `python -m helixbench serve`: writes the ready file and answers completions.
STAND_IN = """
import signal, http.server, json, sys, time
from pathlib import Path

class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["model"] == "tiny"
        time.sleep(0.8)
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        raw = json.dumps({"usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)
    def log_message(self, *_):
        pass

if "broken" in sys.argv:
    sys.exit("helixbench: the model does not fit")
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
ready = Path(sys.argv[sys.argv.index("--ready-file") + 1])
url = f"http://127.0.0.1:{server.server_port}"
ready.with_suffix(".part").write_text(json.dumps({"schema": "helixbench.serving/1", "url": url, "model": "tiny"}))
ready.with_suffix(".part").rename(ready)
open("starts", "a").write("x")
signal.signal(signal.SIGTERM, signal.default_int_handler)
try:
    server.serve_forever()
except KeyboardInterrupt:
    open("stops", "a").write("x")
"""


def run_pytest(folder: Path, *arguments: str | Path, is_module: bool = False) -> subprocess.CompletedProcess[str]:
    """``pytest`` as the user of a project in ``folder`` runs it, with this project and its entry point installed."""
    installed = folder / "installed"
    if not installed.exists():
        write_stand_in(installed, STAND_IN)
        plugins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
        metadata = installed / "helixbench-0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: helixbench\nVersion: 0\n")
        lines = [f"{name} = {module}" for name, module in plugins.items()]
        (metadata / "entry_points.txt").write_text("\n".join(["[pytest11]", *lines]) + "\n")
    command = [sys.executable, "-m", "pytest"] if is_module else [str(Path(sys.executable).parent / "pytest")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "COV"))}
    return subprocess.run(
        [*command, "-p", "no:cacheprovider", *map(str, arguments)],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def write_test(folder: Path, code: str) -> Path:
    path = folder / "test_user.py"
    path.write_text("import pytest\n" + textwrap.dedent(code))
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, ...]:
    """Options that name a plan and a profile."""
    (tmp_path / "plan.json").write_bytes(encode_record(example_plan()))
    (tmp_path / "cluster.json").write_bytes(encode_record(example_profile()))
    return ("--helixbench-plan", "plan.json", "--helixbench-cluster", "cluster.json")


def test_the_example_passes_and_the_session_is_recorded(tmp_path: Path, files: tuple[str, ...]) -> None:
    shutil.copy(EXAMPLE, tmp_path)

    done = run_pytest(tmp_path, *files, "--helixbench-model", "m", "--helixbench-json", "out.json")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout
    assert "x max-flow" in done.stdout
    record = json.loads((tmp_path / "out.json").read_text())
    assert [gate["is_passed"] for gate in record["gates"]] == [True, True]
    assert record["schema"] == "helixbench.pytest/1"
    assert record["loads"][0]["num_requests"] == 16
    assert (tmp_path / "stops").read_text() == "x"


def test_without_files_the_example_is_skipped_with_reasons(tmp_path: Path) -> None:
    shutil.copy(EXAMPLE, tmp_path)

    done = run_pytest(tmp_path, "-rs", "-k", "not product")

    assert done.returncode == 0
    assert "3 skipped" in done.stdout
    assert "add --helixbench-plan FILE" in done.stdout
    assert "helixbench " not in done.stdout.split("short test summary")[0]


def test_the_plan_is_served_once_for_all_tests(tmp_path: Path, files: tuple[str, ...]) -> None:
    write_test(
        tmp_path,
        """
        def test_one(helixbench_server):
            helixbench_server.complete(prompt_tokens=3, output_tokens=2)
        def test_two(helixbench_server):
            assert helixbench_server.complete(prompt_tokens=3, output_tokens=2) == (3, 2)
        """,
    )

    done = run_pytest(tmp_path, *files, "--helixbench-model", "m")

    assert "2 passed" in done.stdout, done.stdout
    assert (tmp_path / "starts").read_text() == "x"


def test_a_server_that_does_not_start_is_an_error_with_its_words(tmp_path: Path, files: tuple[str, ...]) -> None:
    write_test(tmp_path, "def test_it(helixbench_server): pass")

    done = run_pytest(tmp_path, *files, "--helixbench-model", "broken")

    assert done.returncode == 1
    assert "the model does not fit" in done.stdout


@pytest.mark.parametrize(
    ("mark", "message"),
    [("min_ratio=0.99", "accepted 0.99 .. 1.05"), ("max_ratio=0.01", "accepted 0 .. 0.01")],
)
def test_a_flow_outside_its_band_fails(mark: str, message: str, tmp_path: Path, files: tuple[str, ...]) -> None:
    write_test(
        tmp_path,
        f"""
        @pytest.mark.helixbench_max_flow({mark})
        def test_flow(helixbench_server):
            helixbench_server.load(concurrency=2, num_requests=2, prompt_tokens=30, output_tokens=8)
        """,
    )

    done = run_pytest(tmp_path, *files, "--helixbench-model", "m")

    assert done.returncode == 1
    assert message in done.stdout
    assert "FAIL  test_user.py::test_flow" in done.stdout


def test_a_gate_that_measured_nothing_fails(tmp_path: Path, files: tuple[str, ...]) -> None:
    write_test(
        tmp_path,
        """
        @pytest.mark.helixbench_max_flow(min_ratio=0.1)
        def test_flow():
            pass
        @pytest.mark.helixbench_median(max_s=1)
        def test_median():
            pass
        """,
    )

    done = run_pytest(tmp_path)

    assert "2 failed" in done.stdout
    assert done.stdout.count("measured nothing") >= 2


@pytest.mark.parametrize(("limit_s", "exit_code"), [(3600.0, 0), (0.001, 1)])
def test_a_median_is_held_against_its_limit(limit_s: float, exit_code: int, tmp_path: Path) -> None:
    write_test(
        tmp_path,
        f"""
        import time
        @pytest.mark.helixbench_median(max_s={limit_s})
        def test_median(helixbench_benchmark):
            assert helixbench_benchmark(lambda: time.sleep(0.01) or 7, rounds=3, warmup_rounds=0) == 7
        """,
    )

    done = run_pytest(tmp_path, "--benchmark-json", "b.json")

    assert done.returncode == exit_code, done.stdout
    benchmark = json.loads((tmp_path / "b.json").read_text())["benchmarks"][0]
    assert benchmark["stats"]["rounds"] == 3
    assert benchmark["extra_info"] == {"device": "cpu"}


def test_a_damaged_file_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{")
    write_test(tmp_path, "def test_it(helixbench_plan): pass")

    done = run_pytest(tmp_path, "--helixbench-plan", "plan.json")

    assert done.returncode == 1
    assert "not a complete JSON file" in done.stdout


def test_a_project_that_does_not_use_the_plugin_is_left_alone(tmp_path: Path) -> None:
    """Its own packages, options, fixtures and markers of plain names are its own."""
    for name in ("reports", "solver"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"OWNER = '{name} of the project'")
    (tmp_path / "conftest.py").write_text(
        "def pytest_addoption(parser): parser.addoption('--plan', default='theirs')\n"
        "def pytest_configure(config): config.addinivalue_line('markers', 'gate(kind): theirs')\n"
    )
    write_test(
        tmp_path,
        """
        import reports, solver

        @pytest.fixture
        def plan(pytestconfig):
            return pytestconfig.getoption("--plan")

        @pytest.mark.gate("logical")
        def test_own(plan):
            assert (plan, reports.OWNER, solver.OWNER) == ("theirs", "reports of the project", "solver of the project")
        """,
    )

    done = run_pytest(tmp_path, "--strict-markers", is_module=True)

    assert "1 passed" in done.stdout, done.stdout + done.stderr
    assert "= helixbench =" not in done.stdout


def test_importing_the_plugin_imports_only_the_standard_library() -> None:
    code = """
import sys, pytest
before = set(sys.modules)
import helixbench.reports.pytest_plugin
print(*sorted({name for name in set(sys.modules) - before if name.split(".")[0] not in sys.stdlib_module_names}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["helixbench", "helixbench.reports", "helixbench.reports.pytest_plugin"]


# A device that queues work and does it when it is waited for; there is no CUDA device in these tests.
FAKE_CUDA = """
    import sys, time, types

    queue = []

    def synchronize(device):
        assert device == "cuda:0"
        while queue:
            queue.pop()()

    torch = types.ModuleType("torch")
    torch.cuda = types.SimpleNamespace(synchronize=synchronize)
    sys.modules["torch"] = torch

    def work():
        queue.append(lambda: time.sleep(0.01))
        return "queued"
"""


def test_a_stage_on_a_device_is_timed_until_the_device_has_finished(tmp_path: Path) -> None:
    write_test(
        tmp_path,
        textwrap.dedent(FAKE_CUDA)
        + textwrap.dedent("""
        def test_stage(helixbench_benchmark):
            assert helixbench_benchmark(work, device="cuda:0", rounds=5, warmup_rounds=2) == "queued"
            assert queue == []
        """),
    )

    done = run_pytest(tmp_path, "--benchmark-json", "b.json")

    assert done.returncode == 0, done.stdout
    benchmark = json.loads((tmp_path / "b.json").read_text())["benchmarks"][0]
    assert benchmark["extra_info"] == {"device": "cuda:0"}
    assert benchmark["stats"]["rounds"] == 5
    assert benchmark["stats"]["min"] >= 0.01, "every round includes the work that was queued"
