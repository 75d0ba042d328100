from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from helixbench.profiler.stage import attention
from helixbench.profiler.stage.attention import MAX_GATHERED_SLOTS, MAX_PADDING, RaggedBatch, Span, _groups

KV_HEADS, GROUP, HEAD_DIM = 2, 3, 8
HEADS = KV_HEADS * GROUP
TOLERANCE = 1e-5

# (cached tokens, new tokens) of each sequence
SIZES = st.lists(st.tuples(st.integers(0, 30), st.one_of(st.just(1), st.integers(1, 12))), min_size=1, max_size=6)


def by_definition(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    past: int,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Softmax over what each query sees, one query and one head at a time: [N, H, D] of [N, H, D] and [C, K, D]."""
    out = torch.empty_like(query)
    for n in range(query.shape[0]):
        position = past + n
        begin = 0 if window is None else max(0, position - window + 1)
        for h in range(HEADS):
            seen_keys = key[begin : position + 1, h // GROUP]  # [S, D]
            scores = seen_keys @ query[n, h] * scaling  # [S]
            weights = torch.softmax(scores if softcap is None else softcap * torch.tanh(scores / softcap), dim=0)
            out[n, h] = weights @ value[begin : position + 1, h // GROUP]
    return out


@settings(deadline=None)
@given(
    sizes=SIZES,
    window=st.one_of(st.none(), st.integers(1, 40)),
    softcap=st.sampled_from((None, 0.5, 4.0)),
    gather_up_to=st.sampled_from((0, 12, 10**6)),
    gap=st.integers(0, 5),
    seed=st.integers(0, 2**16),
)
def test_ragged_attention_is_attention_of_each_sequence(
    sizes: list[tuple[int, int]], window: int | None, softcap: float | None, gather_up_to: int, gap: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    spans, offset = [], gap
    for past, new in sizes:
        spans.append(Span(offset, past, new))
        offset += past + new + gap
    num_tokens = sum(new for _, new in sizes)
    # Slots that belong to no sequence hold what would show up at once.
    arena = torch.full((2, 2, KV_HEADS, offset, HEAD_DIM), 1e6)  # [L, 2, K, C, D]
    query, key, value = (random(1, heads, num_tokens, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    contexts = []
    first = 0
    for span in spans:
        cached = random(2, KV_HEADS, span.past, HEAD_DIM)
        arena[1, :, :, span.offset : span.offset + span.past] = cached
        new = torch.stack((key[0, :, first : first + span.num_tokens], value[0, :, first : first + span.num_tokens]))
        contexts.append(torch.cat((cached, new), dim=2))  # [2, K, C, D]
        first += span.num_tokens

    batch = RaggedBatch(spans, arena=arena, first_layer=5, windows={6: window}, gather_up_to=gather_up_to)
    out = batch.attend(6, query, key, value, scaling=0.3, softcap=softcap)

    assert out.shape == (1, num_tokens, HEADS, HEAD_DIM)
    first = 0
    for span, (keys, values) in zip(spans, contexts, strict=True):
        rows = slice(first, first + span.num_tokens)
        expected = by_definition(
            query[0, :, rows].transpose(0, 1),
            keys.transpose(0, 1),
            values.transpose(0, 1),
            past=span.past,
            scaling=0.3,
            window=window,
            softcap=softcap,
        )
        assert torch.allclose(out[0, rows], expected, atol=TOLERANCE)
        written = arena[1, :, :, span.offset : span.offset + span.past + span.num_tokens]
        assert torch.equal(written, torch.stack((keys, values)))
        first += span.num_tokens
    assert torch.equal(arena[0], torch.full_like(arena[0], 1e6)), "another layer's slots were written"
    owned = sum(past + new for past, new in sizes)
    assert (arena[1] == 1e6).sum() == 2 * KV_HEADS * HEAD_DIM * (offset - owned), "a slot of nobody was written"


def test_capped_scores_in_parts_are_those_of_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 9, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))

    def attend() -> torch.Tensor:
        arena = torch.zeros((1, 2, KV_HEADS, 9, HEAD_DIM))
        batch = RaggedBatch([Span(0, 0, 9)], arena=arena, first_layer=0, windows={0: 4}, gather_up_to=0)
        return batch.attend(0, query, key, value, scaling=0.3, softcap=2.0)

    whole = attend()
    monkeypatch.setattr(attention, "MAX_CAPPED_SCORES", 2 * 9 * HEADS)

    assert torch.allclose(attend(), whole, atol=TOLERANCE)


@given(sizes=SIZES)
def test_positions_go_on_from_what_is_cached(sizes: list[tuple[int, int]]) -> None:
    spans = [Span(100 * number, past, new) for number, (past, new) in enumerate(sizes)]
    arena = torch.zeros((1, 2, 1, 1000, 2))

    positions = RaggedBatch(spans, arena=arena, first_layer=0, windows={0: None}, gather_up_to=0).positions

    assert positions.tolist() == list(itertools.chain(*(range(past, past + new) for past, new in sizes)))


@given(pasts=st.lists(st.integers(0, 5000), min_size=1, max_size=64))
def test_groups_hold_every_decode_once_and_waste_little(pasts: list[int]) -> None:
    decodes = [(row, Span(0, past, 1)) for row, past in enumerate(pasts)]

    groups = _groups(decodes)

    assert sorted(itertools.chain(*groups)) == sorted(decodes)
    for group in groups:
        lengths = [span.past + 1 for _, span in group]
        padded = max(lengths) * len(lengths)
        assert padded - sum(lengths) <= MAX_PADDING * padded


@given(past=st.integers(0, 5000), count=st.integers(1, 64))
def test_decodes_of_one_length_are_as_few_groups_as_may_be(past: int, count: int) -> None:
    in_one = max(1, MAX_GATHERED_SLOTS // (past + 1))
    assert len(_groups([(row, Span(0, past, 1)) for row in range(count)])) == -(-count // in_one)


@given(pasts=st.lists(st.integers(0, 5000), min_size=1, max_size=64), most=st.integers(1, 20_000))
def test_no_group_copies_more_than_is_allowed(pasts: list[int], most: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "MAX_GATHERED_SLOTS", most)
        groups = _groups([(row, Span(0, past, 1)) for row, past in enumerate(pasts)])

    assert sum(map(len, groups)) == len(pasts)
    for group in groups:
        assert len(group) == 1 or len(group) * (group[0][1].past + 1) <= most


@pytest.mark.parametrize("gather_up_to", [0, 10**6])
@given(first=st.integers(1, 20), second=st.integers(1, 20))
def test_a_batch_may_hold_one_sequence_twice(gather_up_to: int, first: int, second: int) -> None:
    """Two chunks of one prompt in one batch see what they see in two batches."""
    assume(first + second > 2)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, first + second, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    arenas = [torch.zeros((1, 2, KV_HEADS, 40, HEAD_DIM)) for _ in range(2)]
    chunks = [Span(0, 0, first), Span(0, first, second)]

    together = RaggedBatch(chunks, arena=arenas[0], first_layer=0, windows={0: None}, gather_up_to=gather_up_to).attend(
        0, query, key, value, scaling=0.3
    )
    whole = RaggedBatch(
        [Span(0, 0, first + second)], arena=arenas[1], first_layer=0, windows={0: None}, gather_up_to=0
    ).attend(0, query, key, value, scaling=0.3)

    assert torch.allclose(together, whole, atol=TOLERANCE)
    assert torch.equal(*arenas)
