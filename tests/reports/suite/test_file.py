from __future__ import annotations

from pathlib import Path

import pytest

from helixbench.errors import InputError
from helixbench.reference_server.testbed.spec import load_testbed
from helixbench.reports.suite.file import load_suite
from tests.reports.suite.suite_examples import SUITE, write_suite

SUITES = Path(__file__).parents[3] / "examples" / "suites"


def test_a_case_joins_a_testbed_and_a_workload(tmp_path: Path) -> None:
    suite = load_suite(write_suite(tmp_path))

    two, full = suite.cases
    assert (two.name, two.testbed.name, two.concurrency, two.requests) == ("two-chat", "two", 16, 48)
    assert two.workload.lengths == ((64, 32),)
    assert (full.name, full.concurrency) == ("full", "kv-full")
    assert [testbed.name for testbed in suite.testbeds] == ["two", "inline"]


def test_nodes_in_the_suite_are_a_testbed_as_a_file_is(tmp_path: Path) -> None:
    inline = load_suite(write_suite(tmp_path)).testbeds[1]
    (tmp_path / "written.toml").write_text(inline.text)

    assert load_testbed(tmp_path / "written.toml") == inline.spec
    assert inline.spec.node_names == ("a", "b")
    assert inline.spec.coordinator_bandwidth_bytes_per_s == 10e6 / 8


def test_lengths_of_a_trace_are_scaled_then_cut(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("ContextTokens,GeneratedTokens\n1000,100\n40,900\n3,4\n")
    fixed = SUITE[SUITE.index("prompt_tokens") : SUITE.index("concurrency")]
    trace = 'trace = "trace.csv"\nscale = 0.1\nmax_prompt_tokens = 50\nmax_output_tokens = 60\n'

    workload = load_suite(write_suite(tmp_path, SUITE.replace(fixed, trace))).cases[0].workload

    assert workload.lengths == ((50, 10), (4, 60), (1, 1))
    assert workload.source == "trace.csv x 0.1, in <= 50, out <= 60"


def test_only_keeps_those_cases(tmp_path: Path) -> None:
    assert [case.name for case in load_suite(write_suite(tmp_path), only=("full",)).cases] == ["full"]
    with pytest.raises(InputError, match=r"--only none: .*it has two-chat, full"):
        load_suite(write_suite(tmp_path), only=("none",))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('file = "two.toml"', 'file = "none.toml"', r"testbed\[0\].file .*none.toml.*cannot be read"),
        ('file = "two.toml"', "", r"testbed two needs either `file` or its own nodes .*`\$.testbed\[0\]`"),
        ('testbed = "two"', 'testbed = "three"', r"case\[0\].testbed is 'three': no such testbed; there are two, inli"),
        ('workload = "chat"\nname', 'workload = "none"\nname', r"case\[1\].workload is 'none': no such workload"),
        ('memory = "60MB"', "threads = 0", r"testbed inline: .*node\[0\].threads"),
        ("requests = 48", "", r"case\[0\].requests is missing: give either `requests` or `duration_s`"),
        (
            "requests = 48",
            "requests = 48\nduration_s = 9",
            r"case\[0\].requests is 48: give either",
        ),
        ("requests = 48", "requests = 0", r"workload\[0\].requests"),
        ("requests = 48", "request = 48", r"unknown field `request`"),
        ("concurrency = 16\n", "", r"case\[0\].concurrency is missing"),
        ('"kv-full"', '"full"', r"case\[1\].concurrency"),
        (
            "prompt_tokens = 64",
            "prompt_tokens = 490",
            r"longest request has 522 tokens, but nodes are profiled up to 5",
        ),
        ("prompt_tokens = 64", "scale = 2.0", r"workload chat needs `prompt_tokens` and `output_tokens`"),
        ("prompt_tokens = 64", "prompt_tokens = 64\nscale = 2.0", r"`scale` and `max_…_tokens` require a `trace`"),
        ('name = "full"', 'name = "two-chat"', r"case\[1\].name is 'two-chat': duplicate name of a case"),
        ('name = "full"', 'name = "a/b"', r"case\[1\].name is 'a/b': use letters"),
        ("[[case]]", "[[case", "not a TOML file"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in SUITE
    with pytest.raises(InputError, match=message) as refused:
        load_suite(write_suite(tmp_path, SUITE.replace(old, new, 1)))
    assert str(tmp_path) in str(refused.value)


def test_the_emulated_suite_covers_what_a_prediction_has_to_hold_for() -> None:
    suite = load_suite(SUITES / "emulated.toml")
    pairs = [pair for case in suite.cases for pair in case.workload.lengths]

    assert all(testbed.spec.is_emulated for testbed in suite.testbeds)
    assert len(suite.cases) >= 9
    assert {len(testbed.spec.local_nodes) for testbed in suite.testbeds} == {2, 3, 4, 8}
    assert max(prompt / output for prompt, output in pairs) >= 60
    assert min(prompt / output for prompt, output in pairs) <= 0.25
    assert {case.concurrency for case in suite.cases} >= {1, "kv-full"}
    assert any(len(set(case.workload.lengths)) > 100 for case in suite.cases)
    rates = [link.bandwidth_bytes_per_s for testbed in suite.testbeds for link in testbed.spec.links]
    assert min(rate for rate in rates if rate is not None) < 50e6 / 8
    assert any(testbed.spec.has_latencies for testbed in suite.testbeds)


def test_the_published_suite_takes_testbeds_by_name() -> None:
    suite = load_suite(SUITES / "published.toml")

    assert [len(testbed.spec.local_nodes) for testbed in suite.testbeds] == [24, 24]
    assert suite.model.make_arguments == ("--like", "llama2-70b")


def test_the_hardware_suite_is_of_real_devices() -> None:
    suite = load_suite(SUITES / "hardware.toml")

    assert [node.cpus for node in suite.testbeds[0].spec.local_nodes] == [(0,), (1,)]
    assert suite.model.make_arguments == ("--preset", "tiny", "--seed", "0")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ('preset = "tiny"\nlike = "llama3-8b"', "preset and like exclude each other"),
        ('like = "llama3-8b"\nseed = 1', "`seed` is of a preset; remove it beside like"),
    ],
)
def test_one_model_is_asked_for(tmp_path: Path, model: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_suite(write_suite(tmp_path, SUITE + f"[model]\n{model}\n"))
