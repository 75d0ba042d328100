from __future__ import annotations

import random

import pytest

from helixbench.profiler.model import hash_reference
from helixbench.profiler.model.hash_reference import Output, first_differences, reference_tokens

SIZES = {"num_layers": 5, "vocab_size": 1000}


def outputs(count: int) -> list[Output]:
    draw = random.Random(3)
    prompts = [tuple(draw.randrange(1000) for _ in range(draw.randrange(1, 30))) for _ in range(count)]
    return [
        Output(number, prompt, reference_tokens(prompt, max_tokens=draw.randrange(1, 20), **SIZES))
        for number, prompt in enumerate(prompts)
    ]


def test_tokens_depend_on_every_earlier_token_and_on_their_order() -> None:
    prompt = list(range(100, 112))
    whole = reference_tokens(prompt, max_tokens=8, **SIZES)
    for position in range(len(prompt)):
        other = [*prompt[:position], 7, *prompt[position + 1 :]]
        assert reference_tokens(other, max_tokens=8, **SIZES) != whole
        swapped = [*prompt[:position], *prompt[position:][::-1]]
        assert position >= len(prompt) - 1 or reference_tokens(swapped, max_tokens=8, **SIZES) != whole
    assert reference_tokens(prompt, max_tokens=8, num_layers=4, vocab_size=1000) != whole


def test_output_does_not_repeat_itself() -> None:
    assert len(set(reference_tokens([1], max_tokens=200, **SIZES))) > 150


def test_a_stop_token_ends_the_output() -> None:
    whole = reference_tokens([1, 2], max_tokens=9, **SIZES)
    assert reference_tokens([1, 2], max_tokens=9, stop_token_ids={whole[4]}, **SIZES) == whole[:5]


@pytest.mark.parametrize("max_sums", [1 << 24, 700, 1])
def test_every_difference_is_found_where_it_is(monkeypatch: pytest.MonkeyPatch, max_sums: int) -> None:
    """Whether requests are checked all at once, a few at a time, or one by one."""
    monkeypatch.setattr(hash_reference, "_MAX_SUMS", max_sums)
    served = outputs(40)
    assert first_differences(served, **SIZES) == {}
    wrong = {3: 0, 17: len(served[17].tokens) - 1, 20: len(served[20].tokens) // 2}
    for request, index in wrong.items():
        tokens = list(served[request].tokens)
        tokens[index] = (tokens[index] + 1) % 1000
        served[request] = Output(request, served[request].prompt, tokens)
    assert first_differences(served, **SIZES) == wrong


def test_two_swapped_outputs_are_found() -> None:
    first, second, *rest = outputs(6)
    swapped = [Output(0, first.prompt, second.tokens), Output(1, second.prompt, first.tokens), *rest]
    assert set(first_differences(swapped, **SIZES)) == {0, 1}


def test_no_outputs_have_no_differences() -> None:
    assert first_differences([], **SIZES) == {}
