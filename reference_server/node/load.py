"""Loading a layer range: the runner that fits the model's kind. Only a Hugging Face model brings torch in."""

from __future__ import annotations

from typing import Any

from helixbench.errors import InputError
from helixbench.profiler.model.files import ModelFiles
from helixbench.profiler.model.hash_model import HashModel
from helixbench.profiler.model.model import Model
from helixbench.reference_server.node.hash_runner import HashRunner
from helixbench.reference_server.node.runner import StageRunner


def load_runner(
    model: Model, *, start: int, end: int, kv_capacity_tokens: int, dtype: str, device: str
) -> StageRunner[Any]:
    """Load layers ``[start, end)`` of a model onto a device.

    Raises:
        InputError: the model does not have these layers, or the device has no memory for them.
    """
    if isinstance(model, HashModel):
        return HashRunner(model, start=start, end=end, kv_capacity_tokens=kv_capacity_tokens, dtype=dtype)
    assert isinstance(model, ModelFiles)
    import torch

    from helixbench.profiler.measure.memory import out_of_memory_is
    from helixbench.profiler.model.dtypes import torch_dtype
    from helixbench.profiler.stage.stage import Stage
    from helixbench.reference_server.node.torch_runner import TorchRunner

    if device.startswith("cuda"):
        torch.cuda.set_device(device)  # kernels and libraries that ask for no device take this one
        # cuDNN plans anew for every shape, and the context of a decoding sequence grows at each step
        torch.backends.cuda.enable_cudnn_sdp(False)
    with out_of_memory_is(InputError, f"layers [{start},{end}) with {kv_capacity_tokens} KV tokens"):
        stage = Stage(
            model,
            start=start,
            end=end,
            kv_capacity_tokens=kv_capacity_tokens,
            dtype=torch_dtype(dtype),
            device=torch.device(device),
        )
    return TorchRunner(stage)


def prepare_for(model: Model, *, threads: int) -> None:
    """Import what stages of this model compute with, seconds of CPU for torch, and set its threads."""
    if isinstance(model, ModelFiles):
        import torch

        from helixbench.profiler.stage.stage import preload

        torch.set_num_threads(threads)
        preload(model.config)
