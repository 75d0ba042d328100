"""Read a suite file (TOML): testbeds, workloads, and the cases that combine them."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import msgspec

from helixbench.errors import InputError
from helixbench.reference_server.testbed.spec import testbed_from_tree, testbed_path
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


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: str

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"name {self.name!r}: use letters, digits, `.`, `_` and `-`, 63 at most")


class _TestbedToml(_Entry, frozen=True, forbid_unknown_fields=True, kw_only=True):
    file: str | None = None
    node: tuple[dict[str, Any], ...] = ()
    network: dict[str, Any] = {}
    link: tuple[dict[str, Any], ...] = ()
    coordinator: dict[str, Any] = {}
    key: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.file is None) == (not self.node):
            raise ValueError(f"testbed {self.name} needs either `file` or its own nodes")
        if self.file is not None and self.tree:
            raise ValueError(f"testbed {self.name}: set `{next(iter(self.tree))}` in {self.file} instead")

    @property
    def tree(self) -> dict[str, Any]:
        """The keys of a testbed file that stand here."""
        keys = ("node", "network", "link", "coordinator", "key")
        return {key: value for key in keys if (value := getattr(self, key))}


class _WorkloadToml(_Entry, frozen=True, forbid_unknown_fields=True, kw_only=True):
    prompt_tokens: Positive | None = None
    output_tokens: Positive | None = None
    trace: str | None = None
    scale: Amount = 1.0
    max_prompt_tokens: Positive | None = None
    max_output_tokens: Positive | None = None
    concurrency: Concurrency | None = None
    requests: Positive | None = None
    duration_s: Amount | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        lengths = (self.prompt_tokens, self.output_tokens)
        if self.trace is not None and lengths != (None, None):
            raise ValueError(f"workload {self.name}: `trace` and fixed lengths exclude each other; give one")
        if self.trace is None and None in lengths:
            raise ValueError(f"workload {self.name} needs `prompt_tokens` and `output_tokens`, or a `trace`")
        if self.trace is None and (self.scale != 1.0 or self.max_prompt_tokens or self.max_output_tokens):
            raise ValueError(f"workload {self.name}: `scale` and `max_…_tokens` require a `trace`; remove them")


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


def load_suite(path: Path, *, only: tuple[str, ...] = ()) -> Suite:
    """Read a suite file and the testbeds and traces that it refers to.

    Args:
        path: the TOML file; its paths are relative to its folder.
        only: names of the cases to keep; empty for all.

    Raises:
        InputError: not TOML, an unknown key, a wrong type or value, a duplicate or unknown name, a request longer than
            nodes are profiled for, or a name in ``only`` that is not a case.
    """
    suite = _Reader(path).suite()
    known = [case.name for case in suite.cases]
    for name in only:
        if name not in known:
            raise InputError(f"--only {name}: {path} has no such case; it has {', '.join(known)}")
    cases = tuple(case for case in suite.cases if not only or case.name in only)
    return msgspec.structs.replace(suite, cases=cases)


class _Reader:
    """Converts one file into a suite; every error names file, field, value and remedy."""

    def __init__(self, path: Path) -> None:
        self._path, self._folder = path, path.parent
        self._toml = _decode(path)

    def suite(self) -> Suite:
        toml = self._toml
        self._require_unique("testbed", [testbed.name for testbed in toml.testbed])
        self._require_unique("workload", [workload.name for workload in toml.workload])
        testbeds = {entry.name: self._testbed(f"testbed[{i}]", entry) for i, entry in enumerate(toml.testbed)}
        loads = {entry.name: (entry, self._workload(entry)) for entry in toml.workload}
        cases = tuple(self._case(f"case[{i}]", entry, testbeds, loads) for i, entry in enumerate(toml.case))
        self._require_unique("case", [case.name for case in cases])
        return Suite(
            name=toml.name or self._path.stem,
            model=self._model(toml.model),
            profile=toml.profile,
            solve_time_limit_s=toml.solve_time_limit_s,
            cases=cases,
        )

    def _model(self, model: ModelChoice) -> ModelChoice:
        """``path`` is a directory relative to the suite if that exists, else a hub id."""
        if model.path is None or not (self._folder / model.path).is_dir():
            return model
        return msgspec.structs.replace(model, path=str((self._folder / model.path).resolve()))

    def _testbed(self, field: str, entry: _TestbedToml) -> SuiteTestbed:
        if entry.file is None:
            tree, origin, file = entry.tree, f"{self._path}: testbed {entry.name}", None
            spec = testbed_from_tree(tree, origin=origin, folder=self._folder)
            if spec.key_file is not None:
                tree["key"] = str(spec.key_file.resolve())
            text = "".join(f"{key} = {toml_of(value)}\n" for key, value in tree.items())
        else:
            file = self._folder / entry.file
            if not file.exists() and not file.suffix:
                file = testbed_path(Path(entry.file))
            try:
                text = file.read_text(encoding="utf-8")
                tree = tomllib.loads(text)
            except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
                self._reject(f"{field}.file", str(file), f"cannot be read as TOML ({error})")
            spec = testbed_from_tree(tree, origin=str(file), folder=file.parent)
        return SuiteTestbed(name=entry.name, spec=spec, text=text, file=file)

    def _workload(self, entry: _WorkloadToml) -> Workload:
        if entry.trace is not None:
            lengths = trace_workload(self._folder / entry.trace, scale=entry.scale)
            return _capped(lengths, entry.max_prompt_tokens, entry.max_output_tokens)
        assert entry.prompt_tokens is not None
        assert entry.output_tokens is not None
        return fixed_workload(prompt_tokens=entry.prompt_tokens, output_tokens=entry.output_tokens)

    def _case(
        self,
        field: str,
        entry: _CaseToml,
        testbeds: dict[str, SuiteTestbed],
        loads: dict[str, tuple[_WorkloadToml, Workload]],
    ) -> SuiteCase:
        if entry.testbed not in testbeds:
            self._reject(f"{field}.testbed", entry.testbed, f"no such testbed; there are {', '.join(testbeds)}")
        if entry.workload not in loads:
            self._reject(f"{field}.workload", entry.workload, f"no such workload; there are {', '.join(loads)}")
        load, workload = loads[entry.workload]
        name = entry.name or f"{entry.testbed}-{entry.workload}"
        if not _NAME.fullmatch(name):
            self._reject(f"{field}.name", name, "use letters, digits, `.`, `_` and `-`, 63 at most")
        concurrency = entry.concurrency or load.concurrency
        if concurrency is None:
            self._reject(f"{field}.concurrency", None, f'set it here or in the workload: a number or "{KV_FULL}"')
        # A window in the case replaces the one of its workload.
        has_window = entry.requests is not None or entry.duration_s is not None
        requests, duration_s = (entry.requests, entry.duration_s) if has_window else (load.requests, load.duration_s)
        if (requests is None) == (duration_s is None):
            self._reject(f"{field}.requests", requests, "give either `requests` or `duration_s`")
        limit = self._toml.profile.max_context_tokens
        if workload.max_kv_tokens > limit:
            self._reject(
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

    def _require_unique(self, kind: str, names: Sequence[str]) -> None:
        for index, name in enumerate(names):
            if name in names[:index]:
                self._reject(f"{kind}[{index}].name", name, f"duplicate name of a {kind}")

    def _reject(self, field: str, value: object, problem: str) -> NoReturn:
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


def _capped(workload: Workload, max_prompt_tokens: int | None, max_output_tokens: int | None) -> Workload:
    """The workload with longer prompts and outputs cut to those lengths."""
    caps = {"in": max_prompt_tokens, "out": max_output_tokens}
    named = [f"{what} <= {most}" for what, most in caps.items() if most is not None]
    lengths = tuple(
        (min(prompt, max_prompt_tokens or prompt), min(output, max_output_tokens or output))
        for prompt, output in workload.lengths
    )
    return Workload(source=", ".join([workload.source, *named]), lengths=lengths)


def toml_of(value: object) -> str:
    """A TOML value, tables inline; JSON writes strings, numbers and booleans in the same way."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {toml_of(entry)}" for key, entry in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml_of, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
