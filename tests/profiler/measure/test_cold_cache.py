from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helixbench.profiler.measure import cold_cache
from helixbench.profiler.measure.cold_cache import CacheFlood, cold_bytes, layers_in_turn

LAYER_BYTES = 1 << 20


@pytest.mark.parametrize(
    ("said", "num_bytes"),
    [("8192K\n", 12 << 20), (None, 48 << 20), ("strange", 48 << 20), ("1048576K", 128 << 20)],
)
def test_more_than_the_cache_holds_is_read_and_not_without_end(
    said: str | None, num_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = tmp_path / "size"
    if said is not None:
        size.write_text(said)
    monkeypatch.setattr(cold_cache, "_LEVEL_3", size)
    assert cold_bytes() == num_bytes
    flood = CacheFlood()
    flood()
    assert flood._buffer.numel() * flood._buffer.element_size() == num_bytes


def stage_of(num_layers: int) -> SimpleNamespace:
    """A stage of layers whose weights all hold the layer's number."""
    layers = [torch.nn.Linear(512, 512, bias=False).requires_grad_(False) for _ in range(num_layers)]
    for number, layer in enumerate(layers):
        layer.weight.fill_(number)
    return SimpleNamespace(layers=layers)


@pytest.mark.parametrize(("num_layers", "counts"), [(6, (1, 6)), (6, (3, 6)), (2, (1, 2)), (1, (1,))])
def test_more_than_the_cache_holds_is_streamed_before_the_same_weights_come_again(
    num_layers: int, counts: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cold_cache, "cold_bytes", lambda: 10 * LAYER_BYTES)
    stage = stage_of(num_layers)
    next_turn = layers_in_turn(stage, counts)  # type: ignore[arg-type]
    for count in counts:
        streamed: list[int] = []  # where the weights of each layer that ran lie
        for _ in range(40):
            next_turn()
            assert [int(layer.weight[0, 0]) for layer in stage.layers] == list(range(num_layers)), "each in its place"
            streamed += [layer.weight.data_ptr() for layer in stage.layers[num_layers - count :]]
        last_at: dict[int, int] = {}
        for at, where in enumerate(streamed):
            assert at - last_at.get(where, at - 10) >= 10, "layers of 1 MB between"
            last_at[where] = at


def test_a_stage_larger_than_the_cache_needs_no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cold_cache, "cold_bytes", lambda: 3 * LAYER_BYTES)
    stage = stage_of(4)
    own = list(stage.layers)
    layers_in_turn(stage, (4,))()  # type: ignore[arg-type]
    assert stage.layers == own
