"""HashStage: a layer range of a hash model, computed with NumPy for many sequences at once.

The function is that of ``hash_reference``. Layer ``l`` adds a key of each token to the running sum of its sequence and
caches the sum in the token's slot; a token's word then takes in the sum before it and one earlier sum, which is drawn
by its position. So every slot is read by the next token and may be read again by any later one.

Axes: T tokens, N items, L layers held, C slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from helixbench.profiler.model.hash_model import HashModel
from helixbench.profiler.stage.batch import StageItem
from helixbench.profiler.stage.kv_slots import KvSlots

Words: TypeAlias = NDArray[np.uint64]
Slots: TypeAlias = NDArray[np.intp]

_SHIFT, _FACTOR, _ONE, _THREE = np.uint64(32), np.uint64(0xD6E8FEB86659FD93), np.uint64(1), np.uint64(3)


class HashCache(KvSlots):
    """Running sums of each slot, by layer; the slot after the last is never written and stands for no sum yet."""

    def __init__(self, *, num_layers: int, capacity_tokens: int) -> None:
        super().__init__(capacity_tokens)
        self.sums = np.zeros((capacity_tokens + 1, num_layers), dtype=np.uint64)  # [C + 1, L]

    def _move(self, source: int, target: int, size: int) -> None:
        self.sums[target : target + size] = self.sums[source : source + size]  # NumPy minds the overlap


class HashOutput(msgspec.Struct, frozen=True):
    """What leaves the stage: the word of each token [T], in the order of ``items``."""

    items: tuple[StageItem, ...]
    words: Words


class HashStage:
    """Layers ``[start, end)`` of a hash model, and the cache of their sums.

    Raises:
        InputError: a range that the model does not have.
    """

    def __init__(self, model: HashModel, *, start: int, end: int, kv_capacity_tokens: int, dtype: str) -> None:
        self.weight_bytes = model.range_bytes(start, end, dtype=dtype)
        self.start, self.end = start, end
        self.is_last = end == model.num_layers
        self.vocab_size = model.vocab_size
        self.kv = HashCache(num_layers=end - start, capacity_tokens=kv_capacity_tokens)
        self._numbers = np.arange(start + 1, end + 1, dtype=np.uint64)  # [L], of the model's layers, from 1
        self._factors = _mix(self._numbers) | _ONE  # [L]

    def forward(self, items: Sequence[StageItem]) -> HashOutput:
        """Run one batch; items come back in another order, as ``HashOutput.items`` says.

        The caller has reserved KV slots for every item's request.
        """
        by_request: dict[int, list[StageItem]] = {}  # request -> its part: more than one item where chunks caught up
        for item in sorted(items, key=lambda item: item.entry_layer):
            by_request.setdefault(item.request, []).append(item)
        parts = list(by_request.values())
        singles = [part[0] for part in parts if len(part) == 1 and part[0].num_tokens == 1]
        chunks = [part for part in parts if len(part) > 1 or part[0].num_tokens > 1]
        words = [self._run_singles(singles)] if singles else []
        words += [self._run_chunks(chunks)] if chunks else []
        in_order = (*singles, *(item for part in chunks for item in part))
        return HashOutput(in_order, words[0] if len(words) == 1 else np.concatenate(words))

    def tokens(self, words: Words) -> list[int]:
        """Greedy tokens of the last layer's words [N]."""
        chosen: list[int] = (_mix(words) % np.uint64(self.vocab_size)).tolist()
        return chosen

    def _run_singles(self, items: Sequence[StageItem]) -> Words:
        """One token of each sequence: what a layer adds to its word is known before the word is, for all layers."""
        sums = self.kv.sums
        offsets = self._offsets(items)  # [N]
        positions = np.array([item.past for item in items])  # [N]
        before = sums[self._slots_before(offsets, positions)]  # [N, L]
        recalled = sums[self._recalled_slots(offsets, positions)]  # [N, L]
        added = np.ascontiguousarray(_mix(before + _THREE * recalled + self._numbers).T)  # [L, N]
        entering = np.zeros((self.end - self.start, len(items)), dtype=np.uint64)  # [L, N], words before each layer
        words = _entry_words(items)  # [N]
        for layer, entered in self._layers(items):
            entering[layer, :entered] = words[:entered]
            words[:entered] *= self._factors[layer]
            words[:entered] += added[layer, :entered]
        sums[offsets + positions] = before + _mix(entering.T + positions.astype(np.uint64)[:, None])
        return words

    def _run_chunks(self, parts: Sequence[Sequence[StageItem]]) -> Words:
        """Several tokens of each sequence, layer by layer: the sums within a part are prefix sums of its keys."""
        items = [item for part in parts for item in part]
        firsts = [part[0] for part in parts]  # [N]
        counts = np.array([item.num_tokens for item in items])
        ends = np.cumsum([sum(item.num_tokens for item in part) for part in parts])  # [N]
        starts = np.concatenate([[0], ends[:-1]])
        owners = np.repeat(np.arange(len(parts)), ends - starts)  # [T], token -> part
        pasts = np.array([item.past for item in items])
        positions = np.arange(ends[-1]) + np.repeat(pasts - (np.cumsum(counts) - counts), counts)  # [T]
        part_offsets = self._offsets(firsts)  # [N]
        own = part_offsets[owners] + positions
        recalled = self._recalled_slots(part_offsets[owners], positions)  # [T]
        before_parts = self._slots_before(part_offsets, np.array([item.past for item in firsts]))  # [N]
        places = positions.astype(np.uint64)
        words = _entry_words(items)  # [T]
        for layer, entered in self._layers(firsts):
            t = int(ends[entered - 1])
            sums = self.kv.sums[:, layer]  # [C + 1], a view
            keys = _mix(words[:t] + places[:t])
            running = np.cumsum(keys)  # over all parts, so each is put right by where it starts
            first = starts[:entered]
            running += (sums[before_parts[:entered]] - (running[first] - keys[first]))[owners[:t]]
            sums[own[:t]] = running
            added = _mix(running - keys + _THREE * sums[recalled[:t]] + self._numbers[layer])
            words[:t] = words[:t] * self._factors[layer] + added
        return words

    def _layers(self, items: Sequence[StageItem]) -> Iterator[tuple[int, int]]:
        """(layer of the stage, items that have entered by then); ``items`` are in the order of their entry layers."""
        entries = [item.entry_layer - self.start for item in items]
        entered = 0
        for layer in range(entries[0], self.end - self.start):
            while entered < len(entries) and entries[entered] <= layer:
                entered += 1
            yield layer, entered

    def _offsets(self, items: Sequence[StageItem]) -> Slots:
        return np.array([self.kv.extent(item.request).offset for item in items])

    def _slots_before(self, offsets: Slots, positions: Slots) -> Slots:
        """Slot of the token before each; the empty slot where there is none."""
        return np.where(positions > 0, offsets + positions - 1, self.kv.capacity_tokens)

    def _recalled_slots(self, offsets: Slots, positions: Slots) -> Slots:
        """Slot of the earlier token that each looks back to, drawn by its position; the empty slot if there is none."""
        places = positions.astype(np.uint64)
        drawn = (_mix(places) % np.maximum(places, _ONE)).astype(np.intp)
        return np.where(positions > 0, offsets + drawn, self.kv.capacity_tokens)


def _mix(words: Words) -> Words:
    mixed = words >> _SHIFT
    mixed ^= words
    mixed *= _FACTOR
    mixed ^= mixed >> _SHIFT
    return mixed


def _entry_words(items: Sequence[StageItem]) -> Words:
    """Words of the tokens as they enter: of their ids at layer 0, else as they came."""
    parts: list[Any] = [item.inputs if item.entry_layer else item.inputs.astype(np.uint64) + _ONE for item in items]
    words = np.concatenate(parts)
    num_ids = sum(item.num_tokens for item in items if item.entry_layer == 0)  # they come first
    words[:num_ids] = _mix(words[:num_ids])
    return words
