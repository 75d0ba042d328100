"""Names of dtypes, as they stand in options, files and messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from helixbench.errors import InputError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of that name.

    Raises:
        InputError: not one that a stage runs in.
    """
    import torch

    if name not in DTYPES:
        raise InputError(f"--dtype {name}: need auto or one of {', '.join(DTYPES)}")
    dtype: Any = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def resolve_dtype(asked: str, config: Any) -> str:
    """``auto`` is the dtype that the model was saved in, float32 where its config does not say."""
    if asked != "auto":
        torch_dtype(asked)
        return asked
    saved = getattr(config, "dtype", None)
    return "float32" if saved is None else str(saved).removeprefix("torch.")
