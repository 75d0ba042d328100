"""Replan: a plan for the nodes that are left, made by a process of its own while the server goes on.

``python -m helixbench.reference_server.coordinator.replan`` reads a question on stdin and answers on stdout.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
from collections.abc import Collection
from typing import TypeAlias

import msgspec

from helixbench.solver.problem.plan import Infeasible, Plan

TIME_LIMIT_S = 10.0
_log = logging.getLogger(__name__)

Found: TypeAlias = Plan | Infeasible
_decoder: msgspec.json.Decoder[Found] = msgspec.json.Decoder(Found)


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """Plan again what ``plan`` serves, on these of its cluster's nodes."""

    plan: Plan
    nodes: tuple[str, ...]


class Replanner:
    """At most one search at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._tried: frozenset[str] = frozenset()  # nodes that a plan was last looked for on

    @property
    def is_searching(self) -> bool:
        """Whether a search is under way."""
        return self._process is not None

    def start(self, plan: Plan, nodes: Collection[str]) -> bool:
        """Begin a search, unless one is under way or this one has been made; whether it was begun."""
        if self._process is not None or frozenset(nodes) == self._tried or not nodes:
            return False
        self._tried = frozenset(nodes)
        self._answer = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the search
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=self._answer, start_new_session=True
        )
        assert self._process.stdin is not None
        with self._process.stdin as stdin:
            stdin.write(msgspec.json.encode(Question(plan=plan, nodes=tuple(sorted(nodes)))))
        return True

    def poll(self) -> Found | None:
        """What was found, once; ``None`` while there is nothing, and where the search failed."""
        if self._process is None or self._process.poll() is None:
            return None
        code, self._process = self._process.returncode, None
        with self._answer as answer:
            answer.seek(0)
            raw = answer.read()
        if code != 0:
            _log.error("the search for a new plan ended with exit code %d", code)
            return None
        return _decoder.decode(raw)

    def close(self) -> None:
        """End a search that is under way."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._answer.close()
            self._process = None


def plan_again(question: Question) -> Found:
    """The best plan found for these nodes, for the same model, workload and objective."""
    from helixbench.solver.questions.answer import answer
    from helixbench.solver.questions.config import SolveConfig
    from helixbench.solver.questions.what_if import without_nodes

    plan = question.plan
    assert plan.cluster is not None, "only a plan that holds its profile can be made again"
    gone = [node.name for node in plan.cluster.nodes if node.name not in question.nodes]
    assumed = plan.assumptions
    config = SolveConfig(
        cluster=without_nodes(plan.cluster, gone),
        workload=assumed.workload,
        concurrency=assumed.concurrency,
        objective=assumed.objective,
        partial=assumed.partial_inference,
        start={name: held for name, held in plan.placement.items() if name in question.nodes},
        time_limit_s=TIME_LIMIT_S,
    )
    return answer(config).plan


def main() -> int:
    """Answer one question."""
    import os

    answer_to = os.dup(1)
    os.dup2(2, 1)  # solvers greet on stdout
    question = msgspec.json.decode(sys.stdin.buffer.read(), type=Question)
    found = plan_again(question)
    with os.fdopen(answer_to, "wb") as out:
        out.write(msgspec.json.encode(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
