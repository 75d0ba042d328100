from __future__ import annotations

import itertools
import random

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helixbench.reference_server.node.token_sampling import ROWS, Draw, sample, score, uniform
from helixbench.solver.scheduling.work import SamplingParams

LOGITS = torch.tensor([0.0, 2.0, 1.0, -1.0])


def draw(params: SamplingParams, seed: int, *, logits: torch.Tensor = LOGITS, position: int = 0) -> int:
    return int(sample(logits[None], [Draw(params, seed, position)]))


def draws(params: SamplingParams, num_draws: int = 4000, logits: torch.Tensor = LOGITS) -> torch.Tensor:
    """Share of each token over seeds, shape [V]."""
    tokens = sample(logits.expand(num_draws, -1), [Draw(params, seed) for seed in range(num_draws)])
    return torch.bincount(tokens, minlength=len(logits)) / num_draws


def test_temperature_zero_is_greedy() -> None:
    assert draws(SamplingParams(), 20)[1] == 1


def test_draws_follow_the_softmax() -> None:
    assert torch.allclose(draws(SamplingParams(temperature=1.0)), LOGITS.softmax(-1), atol=0.03)


def test_draws_at_the_positions_of_one_sequence_follow_the_softmax() -> None:
    params = SamplingParams(temperature=1.0)
    tokens = torch.tensor([draw(params, 3, position=position) for position in range(4000)])
    assert torch.allclose(torch.bincount(tokens, minlength=4) / 4000, LOGITS.softmax(-1), atol=0.03)


def test_temperature_flattens() -> None:
    assert torch.allclose(draws(SamplingParams(temperature=2.0)), (LOGITS / 2).softmax(-1), atol=0.03)


def test_top_p_keeps_the_token_that_reaches_it() -> None:
    shares = draws(SamplingParams(temperature=1.0, top_p=0.7))  # the two likeliest hold 0.64 and 0.24
    assert shares[1] > 0
    assert shares[2] > 0
    assert shares[0] == shares[3] == 0


def test_a_tiny_top_p_is_greedy() -> None:
    assert draws(SamplingParams(temperature=1.0, top_p=1e-6), 50)[1] == 1


def test_top_k_keeps_the_likeliest() -> None:
    shares = draws(SamplingParams(temperature=1.0, top_k=2))
    assert torch.allclose(shares[1:3], LOGITS[1:3].softmax(-1), atol=0.03)
    assert shares[0] == shares[3] == 0
    assert torch.equal(
        draws(SamplingParams(temperature=1.0, top_k=9), 200), draws(SamplingParams(temperature=1.0), 200)
    )


def test_top_p_is_of_what_top_k_left() -> None:
    """Of the two likeliest the first holds 0.73: a nucleus of 0.7 is that one alone, as in transformers."""
    assert draws(SamplingParams(temperature=1.0, top_k=2, top_p=0.7), 200)[1] == 1


def test_min_p_is_relative_to_the_likeliest() -> None:
    shares = draws(SamplingParams(temperature=1.0, min_p=0.1))  # 1, 0.37, 0.14 and 0.05 of the likeliest
    assert shares[0] > 0
    assert shares[3] == 0
    assert draws(SamplingParams(temperature=1.0, min_p=1.0), 200)[1] == 1


def test_transformers_keeps_the_same_tokens() -> None:
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn((1, 60), generator=torch.Generator().manual_seed(0)) * 2
    warped = logits
    for warper in (TemperatureLogitsWarper(1.3), TopKLogitsWarper(30), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)):
        warped = warper(None, warped)
    shares = draws(SamplingParams(temperature=1.3, top_k=30, top_p=0.9, min_p=0.05), logits=logits[0])

    assert 5 < int((shares > 0).sum()) < 30
    assert torch.equal(shares > 0, warped[0].softmax(-1) > 0)
    assert torch.allclose(shares, warped[0].softmax(-1), atol=0.03)


def test_a_token_depends_on_seed_and_position_alone() -> None:
    params = SamplingParams(temperature=1.0)
    forwards = {position: draw(params, 5, position=position) for position in range(50)}
    backwards = {position: draw(params, 5, position=position) for position in reversed(range(50))}
    assert forwards == backwards
    assert len(set(forwards.values())) > 1
    assert [draw(params, 6, position=position) for position in range(50)] != list(forwards.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rest_of_the_batch_changes_nothing(dtype: torch.dtype) -> None:
    """Rows of all kinds, shuffled, cut and alone; bfloat16 has many equal logits."""
    rng = random.Random(0)
    rows = 3 * ROWS + 5
    logits = (torch.randn((rows, 300), generator=torch.Generator().manual_seed(0)) * 2).to(dtype)
    choices = itertools.product((0.0, 0.7, 1.5), (0, 1, 20, 400), (1.0, 0.8), (0.0, 0.1), ((), (3, 7)))
    kinds = [
        Draw(
            SamplingParams(temperature, top_p, top_k=top_k, min_p=min_p), rng.randrange(2**40), rng.randrange(99), bars
        )
        for temperature, top_k, top_p, min_p, bars in choices
    ]
    draws = [rng.choice(kinds) for _ in range(rows)]
    together = sample(logits, draws).tolist()
    alone = [int(sample(logits[row : row + 1], [draw])) for row, draw in enumerate(draws)]
    assert alone == together
    order = rng.sample(range(rows), rows)
    assert sample(logits[order], [draws[row] for row in order]).tolist() == [together[row] for row in order]
    assert sample(logits[:7], draws[:7]).tolist() == together[:7]


@pytest.mark.parametrize(
    ("seed", "position", "expected"), [(0, 0, 0.0565), (-(2**63), 1, 0.0631), (2**63 - 1, 2**31, 0.9371)]
)
def test_the_draw_is_the_same_on_every_machine(seed: int, position: int, expected: float) -> None:
    """Written down once: a change of these numbers breaks the replay of requests across versions."""
    assert uniform(seed, position) == pytest.approx(expected, abs=1e-4)


def test_barred_tokens_are_not_chosen() -> None:
    many = [Draw(SamplingParams(2.0, top_p), seed, 0, (1, 99)) for seed in range(200) for top_p in (1.0, 0.999)]
    greedy, *drawn = sample(LOGITS.expand(401, -1), [Draw(SamplingParams(), barred=(1, 3)), *many]).tolist()
    assert greedy == 2
    assert set(drawn) == {0, 2, 3}
    assert LOGITS[1] == 2.0, "the caller's logits are unchanged"


def test_scores_are_log_probabilities_best_first() -> None:
    rows = torch.stack([LOGITS, LOGITS.flip(0)])
    first, second = score(rows.bfloat16(), [3, 2], 2)
    expected = LOGITS.log_softmax(-1)
    assert first.logprob == pytest.approx(float(expected[3]))
    assert [token for token, _ in first.top] == [1, 2]
    assert [value for _, value in first.top] == pytest.approx([float(expected[1]), float(expected[2])])
    assert second.logprob == second.top[0][1], "the likeliest token's own score is the first of the list, to the bit"
    assert score(LOGITS[None], [0], 0)[0].top == ()
    assert len(score(LOGITS[None], [0], 20)[0].top) == 4


@given(
    logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=50),
    temperature=st.floats(1e-3, 2),
    top_p=st.floats(1e-9, 1),
    seed=st.integers(0, 2**32),
)
def test_a_drawn_token_is_in_the_nucleus(logits: list[float], temperature: float, top_p: float, seed: int) -> None:
    tensor = torch.tensor(logits)
    token = draw(SamplingParams(temperature, top_p), seed, logits=tensor)

    probabilities = (tensor.double() / temperature).softmax(-1)
    assert float(probabilities[probabilities > probabilities[token]].sum()) < top_p


def test_half_precision_logits_are_accepted() -> None:
    assert draw(SamplingParams(temperature=1.0, top_p=0.1), 0, logits=LOGITS.bfloat16()) == 1


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"seed": -(2**63) - 1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"min_p": float("nan")}, "min_p"),
        ({"num_logprobs": 21}, "logprobs"),
    ],
)
def test_values_out_of_range_are_refused(fields: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SamplingParams(**fields)  # type: ignore[arg-type]


def test_params_survive_the_wire() -> None:
    params = SamplingParams(temperature=0.5, top_p=0.9, seed=2**63 - 1, top_k=5, min_p=0.25, num_logprobs=3)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params
