"""Writing a model directory: whole or not at all, and never over files that helixbench did not write."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from helixbench.errors import InputError
from helixbench.records import load_record, save_record

MARKER_NAME = "helixbench-model.json"


class MadeModel(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="schema", tag="helixbench.model/1"
):
    """Marks a directory as written by helixbench, so that it may be replaced, and says from what it was made."""

    preset: str
    seed: int


def write_model_directory(directory: Path, write: Callable[[Path], None], *, preset: str, seed: int = 0) -> None:
    """Create or replace a model directory.

    Args:
        directory: where to.
        write: writes the model's files into the folder that it is given.
        preset: what the model is made from; for the marker.
        seed: of its weights; for the marker.

    Raises:
        InputError: the directory has content that helixbench did not write, or cannot be written.
    """
    directory = directory.resolve()
    _require_replaceable(directory)
    temporary: Path | None = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        whole = temporary / "new"
        whole.mkdir()
        write(whole)
        save_record(whole / MARKER_NAME, MadeModel(preset=preset, seed=seed))
        if directory.exists():
            directory.rename(temporary / "old")
        whole.rename(directory)
    except OSError as error:
        raise InputError(f"{directory}: cannot be written ({error.strerror or error}); choose another place") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _require_replaceable(directory: Path) -> None:
    if not directory.exists():
        return
    remedy = "choose a new or empty directory"
    if not directory.is_dir():
        raise InputError(f"{directory}: is a file, not a directory; {remedy}")
    if (directory / MARKER_NAME).exists():
        load_record(directory / MARKER_NAME, MadeModel)
    elif any(directory.iterdir()):
        raise InputError(f"{directory}: holds files that `helixbench model make` did not make; {remedy}")
