"""The suite file (TOML): testbeds, workloads, and the cases that join them. Reading it starts and measures nothing."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, NoReturn

import msgspec

from helixbench.errors import InputError
from helixbench.reference_server.testbed.spec import testbed_from_tree
from helixbench.reports.suite.suite import (
    KV_FULL,
    Amount,
    Concurrency,
    ModelChoice,
    Positive,
    ProfileLimits,
    Suite,
    SuiteCase,
    SuiteTestbed,
)
from helixbench.solver.problem.workload import Workload, fixed_workload, trace_workload

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def load_suite(path: Path, *, only: tuple[str, ...] = ()) -> Suite:
    """Read a suite file and the testbeds and traces that it names.

    Args:
        path: the TOML file; what it names is relative to its folder.
        only: names of the cases to keep; empty for all.

    Raises:
        InputError: not TOML, an unknown key, a wrong type or value, a name that stands twice or stands for nothing, a
            request longer than is profiled, or a case of ``only`` that there is not.
    """
    toml = _Reader(path)
    suite = toml.suite()
    unknown = [name for name in only if all(case.name != name for case in suite.cases)]
    if unknown:
        known = ", ".join(case.name for case in suite.cases)
        raise InputError(f"--only {unknown[0]}: {path} has no such case; it has {known}")
    if not only:
        return suite
    return msgspec.structs.replace(suite, cases=tuple(case for case in suite.cases if case.name in only))


class _TestbedToml(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: str
    file: str | None = None
    node: tuple[dict[str, Any], ...] = ()
    network: dict[str, Any] = {}
    link: tuple[dict[str, Any], ...] = ()
    coordinator: dict[str, Any] = {}
    key: str | None = None


class _WorkloadToml(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: str
    prompt_tokens: Positive | None = None
    output_tokens: Positive | None = None
    trace: str | None = None
    scale: Amount = 1.0
    max_prompt_tokens: Positive | None = None
    max_output_tokens: Positive | None = None
    concurrency: Concurrency | None = None
    requests: Positive | None = None
    duration_s: Amount | None = None


class _CaseToml(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    testbed: str
    workload: str
    name: str | None = None
    concurrency: Concurrency | None = None
    requests: Positive | None = None
    duration_s: Amount | None = None


class _SuiteToml(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    testbed: Annotated[tuple[_TestbedToml, ...], msgspec.Meta(min_length=1)]
    workload: Annotated[tuple[_WorkloadToml, ...], msgspec.Meta(min_length=1)]
    case: Annotated[tuple[_CaseToml, ...], msgspec.Meta(min_length=1)]
    name: str | None = None
    model: ModelChoice = ModelChoice()
    profile: ProfileLimits = ProfileLimits()
    solve_time_limit_s: Amount = 20.0


class _Reader:
    """Turns one file into a suite; every refusal names file, field, value and remedy."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._toml = _decode(path)

    def suite(self) -> Suite:
        toml = self._toml
        self._check_names("testbed", [testbed.name for testbed in toml.testbed])
        self._check_names("workload", [workload.name for workload in toml.workload])
        testbeds = {entry.name: self._testbed(f"testbed[{i}]", entry) for i, entry in enumerate(toml.testbed)}
        loads = {entry.name: (entry, self._workload(f"workload[{i}]", entry)) for i, entry in enumerate(toml.workload)}
        cases = tuple(self._case(f"case[{i}]", entry, testbeds, loads) for i, entry in enumerate(toml.case))
        self._check_names("case", [case.name for case in cases])
        return Suite(
            name=toml.name or self._path.stem,
            model=self._model(toml.model),
            profile=toml.profile,
            solve_time_limit_s=toml.solve_time_limit_s,
            cases=cases,
        )

    def _model(self, model: ModelChoice) -> ModelChoice:
        """A path that exists beside the suite is meant, else a hub id."""
        if model.path is None or not (self._path.parent / model.path).is_dir():
            return model
        return msgspec.structs.replace(model, path=str((self._path.parent / model.path).resolve()))

    def _testbed(self, field: str, entry: _TestbedToml) -> SuiteTestbed:
        inline = {
            key: value for key in ("node", "network", "link", "coordinator", "key") if (value := getattr(entry, key))
        }
        if (entry.file is None) == ("node" not in inline):
            self._refuse(field, entry.name, "a testbed needs `file` or nodes of its own, not both")
        if entry.file is not None:
            if inline:
                self._refuse(
                    f"{field}.{next(iter(inline))}", entry.name, "belongs into the testbed's file; take it out"
                )
            return self._testbed_file(f"{field}.file", entry.name, self._path.parent / entry.file)
        spec = testbed_from_tree(inline, origin=f"{self._path}: testbed {entry.name}", folder=self._path.parent)
        if spec.key_file is not None:
            inline["key"] = str(spec.key_file.resolve())
        return SuiteTestbed(name=entry.name, spec=spec, text=testbed_toml(inline), file=None)

    def _testbed_file(self, field: str, name: str, file: Path) -> SuiteTestbed:
        try:
            text = file.read_text(encoding="utf-8")
            tree = tomllib.loads(text)
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            self._refuse(field, str(file), f"cannot be read as TOML ({error})")
        return SuiteTestbed(
            name=name, spec=testbed_from_tree(tree, origin=str(file), folder=file.parent), text=text, file=file
        )

    def _workload(self, field: str, entry: _WorkloadToml) -> Workload:
        lengths = (entry.prompt_tokens, entry.output_tokens)
        if entry.trace is None:
            if entry.prompt_tokens is None or entry.output_tokens is None:
                self._refuse(field, entry.name, "needs `prompt_tokens` and `output_tokens`, or a `trace`")
            if entry.scale != 1.0 or entry.max_prompt_tokens or entry.max_output_tokens:
                self._refuse(field, entry.name, "`scale` and `max_…_tokens` go with a `trace`; take them out")
            return fixed_workload(prompt_tokens=entry.prompt_tokens, output_tokens=entry.output_tokens)
        if lengths != (None, None):
            self._refuse(field, entry.name, "`trace` and fixed lengths both say how long requests are; give one")
        return capped(
            trace_workload(self._path.parent / entry.trace, scale=entry.scale),
            max_prompt_tokens=entry.max_prompt_tokens,
            max_output_tokens=entry.max_output_tokens,
        )

    def _case(
        self,
        field: str,
        entry: _CaseToml,
        testbeds: dict[str, SuiteTestbed],
        loads: dict[str, tuple[_WorkloadToml, Workload]],
    ) -> SuiteCase:
        if entry.testbed not in testbeds:
            self._refuse(f"{field}.testbed", entry.testbed, f"no such testbed; there are {', '.join(testbeds)}")
        if entry.workload not in loads:
            self._refuse(f"{field}.workload", entry.workload, f"no such workload; there are {', '.join(loads)}")
        load, workload = loads[entry.workload]
        name = entry.name or f"{entry.testbed}-{entry.workload}"
        concurrency = entry.concurrency or load.concurrency
        if concurrency is None:
            self._refuse(f"{field}.concurrency", None, f'say it here or in the workload: a number or "{KV_FULL}"')
        own = entry.requests is not None or entry.duration_s is not None
        requests, duration_s = (
            (entry.requests, entry.duration_s) if own else (load.requests, load.duration_s)
        )  # what a case says replaces what its workload says
        if (requests is None) == (duration_s is None):
            self._refuse(f"{field}.requests", requests, "say `requests` or `duration_s`, one of them")
        limit = self._toml.profile.max_context_tokens
        if workload.max_kv_tokens > limit:
            self._refuse(
                f"{field}.workload",
                entry.workload,
                f"its longest request has {workload.max_kv_tokens} tokens, but nodes are profiled up to {limit}; "
                "raise profile.max_context_tokens or cap the lengths",
            )
        return SuiteCase(
            name=name,
            testbed=testbeds[entry.testbed],
            workload=workload,
            concurrency=concurrency,
            requests=requests,
            duration_s=duration_s,
        )

    def _check_names(self, kind: str, names: list[str]) -> None:
        for index, name in enumerate(names):
            if not _NAME.fullmatch(name):
                self._refuse(f"{kind}[{index}].name", name, "use letters, digits, `.`, `_` and `-`, 63 at most")
            if name in names[:index]:
                self._refuse(f"{kind}[{index}].name", name, f"another {kind} has this name; names must differ")

    def _refuse(self, field: str, value: object, problem: str) -> NoReturn:
        shown = "is missing" if value is None else f"is {value!r}"
        raise InputError(f"{self._path}: {field} {shown}: {problem}")


def _decode(path: Path) -> _SuiteToml:
    try:
        return msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), _SuiteToml)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a TOML file ({error})") from error
    except msgspec.ValidationError as error:
        raise InputError(f"{path}: {error}") from error


def capped(workload: Workload, *, max_prompt_tokens: int | None, max_output_tokens: int | None) -> Workload:
    """The workload with longer prompts and outputs cut to those lengths."""
    caps = [
        f"{what} <= {most}"
        for what, most in (("in", max_prompt_tokens), ("out", max_output_tokens))
        if most is not None
    ]
    if not caps:
        return workload
    return Workload(
        source=", ".join([workload.source, *caps]),
        lengths=tuple(
            (min(prompt, max_prompt_tokens or prompt), min(output, max_output_tokens or output))
            for prompt, output in workload.lengths
        ),
    )


def testbed_toml(tree: dict[str, Any]) -> str:
    """TOML of a testbed's tree: plain values, tables of plain values, and lists of such tables."""
    lines = [f"{key} = {_value(value)}" for key, value in tree.items() if not _is_nested(value)]
    for key, value in tree.items():
        if _is_nested(value):
            tables = [value] if isinstance(value, dict) else value
            heading = f"[{key}]" if isinstance(value, dict) else f"[[{key}]]"
            for table in tables:
                lines += ["", heading, *(f"{name} = {_value(entry)}" for name, entry in table.items())]
    return "\n".join(lines).strip() + "\n"


def _is_nested(value: object) -> bool:
    return isinstance(value, dict) or (isinstance(value, list | tuple) and any(isinstance(v, dict) for v in value))


def _value(value: object) -> str:
    """A TOML value: JSON writes strings, numbers, booleans and lists of them as TOML reads them."""
    return json.dumps(value, ensure_ascii=False)
