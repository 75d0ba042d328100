"""A causal LM of transformers, run over a range of its layers by its own forward pass.

Whatever a family does before its first layer (scaled embeddings), beside its layers (one rotary embedding or several)
or after the last (scaled or capped logits) is done by its own code: the layers alone are exchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from helixbench.profiler.model.architecture import base_of


class _Pass:
    """What one forward pass is to do: layers ``[begin, end)``, and what it leaves behind."""

    begin = 0
    end = 0
    entering: torch.Tensor | None = None  # takes the place of what comes to the first layer
    rows: torch.Tensor | None = None  # of the hidden states, that the final norm and the head are for
    hidden: torch.Tensor | None = None  # after layer ``end - 1``, before the final norm
    mark: Callable[[int], None] | None = None  # told of each layer that was run, and of ``begin - 1`` before the first


class _Place:
    """Stands in the place of a layer: runs it where it is in the range, else hands on what comes.

    No module, whose call costs microseconds: a stage passes the places of all layers that it does not hold.
    """

    def __init__(self, index: int, layer: nn.Module, now: _Pass) -> None:
        self._index, self._layer, self._now = index, layer, now

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)  # a family's forward pass may ask a layer for its kind

    def __call__(self, hidden_states: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        now, index = self._now, self._index
        if index == 0 and now.entering is not None:
            hidden_states = now.entering
        if now.begin <= index < now.end:
            if now.mark is not None and index == now.begin:
                now.mark(index - 1)
            hidden_states = self._layer(hidden_states, *arguments, **options)
            if now.mark is not None:
                now.mark(index)
            assert isinstance(hidden_states, torch.Tensor), "a layer gives hidden states alone"
        return hidden_states


class _Norm:
    """Stands in the place of the final norm: keeps the hidden states, and norms the rows that logits are wanted of."""

    def __init__(self, norm: nn.Module, now: _Pass) -> None:
        self._norm, self._now = norm, now

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        now = self._now
        now.hidden = hidden_states
        if now.rows is None:
            return hidden_states
        every = len(now.rows) == hidden_states.shape[1]
        normed: torch.Tensor = self._norm(hidden_states if every else hidden_states[:, now.rows])
        return normed


class _Decoder:
    """Stands in the place of the decoder in its causal LM: runs it, or answers with states that it has left before."""

    def __init__(self, base: Any) -> None:
        self._base = base
        self.last_hidden_state: torch.Tensor | None = None

    def __getattr__(self, name: str) -> None:
        """What else an output of transformers may hold: nothing."""
        return

    def __getitem__(self, index: int) -> torch.Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self if self.last_hidden_state is not None else self._base(*arguments, **options)


class LayeredModel:
    """Runs parts of a causal LM. Axes: T tokens, E hidden size, S rows that logits are wanted of, V vocabulary."""

    def __init__(self, causal: Any) -> None:
        self._now = _Pass()
        self._causal, self._base = causal, base_of(causal)
        self._norm = self._base.norm
        self._places = [_Place(index, layer, self._now) for index, layer in enumerate(self._base.layers)]
        self._decoder = _Decoder(self._base)
        _exchange(self._base, "layers", self._places)
        _exchange(self._base, "norm", _Norm(self._norm, self._now))
        _exchange(causal, causal.base_model_prefix, self._decoder)

    def mark_layers(self, mark: Callable[[int], None] | None) -> None:
        """From now on tell ``mark`` of each layer once it was run, and of the one before them as the first begins."""
        self._now.mark = mark

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Embedding [T, E] of token ids [T], before what a family's forward pass does to it."""
        embedded: torch.Tensor = self._base.embed_tokens(token_ids)
        return embedded

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [S, V] of hidden states [S, E]."""
        self._decoder.last_hidden_state = self._norm(hidden[None])
        try:
            logits: torch.Tensor = self._causal(inputs_embeds=hidden[None], use_cache=False).logits[0]
            return logits
        finally:
            self._decoder.last_hidden_state = None

    def run(
        self,
        inputs: torch.Tensor,
        begin: int,
        end: int,
        *,
        positions: torch.Tensor,
        rows: Sequence[int] | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Layers ``[begin, end)``.

        Args:
            inputs: hidden states [T, E]; token ids [T] where the embedding is to come first.
            begin: first layer.
            end: end of the range.
            positions: of the tokens, for the rotary embedding. # [1, T]
            rows: whose logits are wanted, [S]; ``None`` for no logits.
            options: for the layers' attention.

        Returns:
            Hidden states [T, E] and, where ``rows`` are given, logits [S, V].
        """
        now = self._now
        are_ids = not inputs.is_floating_point()
        now.begin, now.end, now.entering = begin, end, None if are_ids else inputs[None]
        now.rows = rows if rows is None else torch.tensor(rows, device=inputs.device, dtype=torch.long)
        given = {"input_ids" if are_ids else "inputs_embeds": inputs[None]}
        self._base.layers = self._places[:end]
        try:
            model = self._base if rows is None else self._causal
            output = model(**given, position_ids=positions, use_cache=False, **options)
            assert now.hidden is not None
            return now.hidden[0], None if rows is None else output.logits[0]
        finally:
            now.entering = now.rows = now.hidden = None


def _exchange(module: nn.Module, name: str, stand_in: Any) -> None:
    """Give a child module's name to something that is none."""
    delattr(module, name)
    setattr(module, name, stand_in)
