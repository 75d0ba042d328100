"""Names of dtypes, as they stand in options, files and messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from helixbench.errors import InputError

if TYPE_CHECKING:
    import torch

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # dtypes that a stage runs in -> bytes of an element


def dtype_bytes(name: str) -> int:
    """Bytes of an element.

    Raises:
        InputError: no stage runs in that dtype.
    """
    if name not in DTYPE_BYTES:
        raise InputError(f"--dtype {name}: need auto or one of {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[name]


def torch_dtype(name: str) -> torch.dtype:
    """Torch's dtype of that name.

    Raises:
        InputError: no stage runs in that dtype.
    """
    import torch

    dtype_bytes(name)
    dtype: Any = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def resolve_dtype(asked: str, saved: str) -> str:
    """``auto`` is the dtype that the model was saved in."""
    if asked == "auto":
        return saved
    dtype_bytes(asked)
    return asked
