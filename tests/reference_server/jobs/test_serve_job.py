from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from helixbench.errors import InputError
from helixbench.progress import Reporter
from helixbench.records import save_record
from helixbench.reference_server.http.options import HttpOptions
from helixbench.reference_server.jobs.driver import run_serve
from helixbench.reference_server.jobs.job import ServeJob
from tests.conftest import ModelDir
from tests.reference_server.plans import make_plan


@pytest.mark.parametrize(
    "spoil",
    [lambda path: path.write_text("{"), lambda path: path.unlink(), lambda path: path.write_text('{"model": 3}')],
    ids=["cut off", "missing", "no tokenizer"],
)
def test_a_tokenizer_that_cannot_be_read_is_refused_before_any_agent_is_asked(
    model_dir: ModelDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], object]
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(model_dir("test-llama"), directory)
    spoil(directory / "tokenizer.json")
    save_record(tmp_path / "plan.json", make_plan(directory, {"a": (0, 6)}, [(("a",), 1.0)]))
    job = ServeJob(
        plan=tmp_path / "plan.json",
        model=str(directory),
        addresses={"a": "tcp://127.0.0.1:1"},
        key_file=tmp_path / "none.key",
        testbed="",
        socket_fd=-1,
        url="",
        http=HttpOptions(),
    )
    monkeypatch.setattr(
        "helixbench.reference_server.jobs.driver.Agents", lambda *_, **__: pytest.fail("agents were asked")
    )
    with pytest.raises(InputError, match=f"{directory}: (transformers cannot load a tokenizer|its tokenizer has no)"):
        run_serve(job, Reporter())
