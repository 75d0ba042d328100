"""Models that tests share, each made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from tests.greedy import Greedy, greedy_requests

# The same examples in every run and no deadline, so that a change is what makes a test fail, and not the load of the
# machine. To look for new failures:
# pytest --hypothesis-profile=default
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

ModelDir = Callable[[str], Path]
GreedyOf = Callable[[str], tuple[Greedy, ...]]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> ModelDir:
    """Directory of a preset's model; made when it is first asked for."""
    from helixbench.profiler.model.synthetic import make_model

    folder = tmp_path_factory.mktemp("models")

    def directory(preset: str) -> Path:
        if not (folder / preset).exists():
            make_model(folder / preset, preset=preset)
        return folder / preset

    return directory


@pytest.fixture(scope="session")
def greedy_of(model_dir: ModelDir) -> GreedyOf:
    """What transformers answers to 32 requests of mixed lengths, by preset; worked out once."""
    known: dict[str, tuple[Greedy, ...]] = {}

    def answers(preset: str) -> tuple[Greedy, ...]:
        if preset not in known:
            known[preset] = greedy_requests(model_dir(preset), count=32, seed=7)
        return known[preset]

    return answers
