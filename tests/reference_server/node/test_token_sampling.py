from __future__ import annotations

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helixbench.reference_server.node.token_sampling import sample
from helixbench.solver.scheduling.work import SamplingParams

LOGITS = torch.tensor([0.0, 2.0, 1.0, -1.0])


def draws(params: SamplingParams, num_draws: int = 4000, logits: torch.Tensor = LOGITS) -> torch.Tensor:
    """Share of each token, shape [V]."""
    generator = torch.Generator().manual_seed(0)
    tokens = [sample(logits, params, generator) for _ in range(num_draws)]
    return torch.bincount(torch.tensor(tokens), minlength=len(logits)) / num_draws


def test_temperature_zero_is_greedy_and_needs_no_generator() -> None:
    assert sample(LOGITS, SamplingParams(), None) == 1


def test_draws_follow_the_softmax() -> None:
    assert torch.allclose(draws(SamplingParams(temperature=1.0)), LOGITS.softmax(-1), atol=0.03)


def test_temperature_flattens() -> None:
    assert torch.allclose(draws(SamplingParams(temperature=2.0)), (LOGITS / 2).softmax(-1), atol=0.03)


def test_top_p_keeps_the_token_that_reaches_it() -> None:
    shares = draws(SamplingParams(temperature=1.0, top_p=0.7))  # the two likeliest hold 0.64 and 0.24
    assert shares[1] > 0
    assert shares[2] > 0
    assert shares[0] == shares[3] == 0


def test_a_tiny_top_p_is_greedy() -> None:
    assert draws(SamplingParams(temperature=1.0, top_p=1e-6), 50)[1] == 1


def test_a_seed_replays() -> None:
    params = SamplingParams(temperature=1.0, seed=5)
    runs = [[sample(LOGITS, params, g) for _ in range(20)] for g in (torch.Generator().manual_seed(5) for _ in "ab")]
    assert runs[0] == runs[1]
    assert len(set(runs[0])) > 1


@given(
    logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=50),
    temperature=st.floats(1e-3, 2),
    top_p=st.floats(1e-9, 1),
    seed=st.integers(0, 2**32),
)
def test_a_drawn_token_is_in_the_nucleus(logits: list[float], temperature: float, top_p: float, seed: int) -> None:
    tensor = torch.tensor(logits)
    token = sample(tensor, SamplingParams(temperature, top_p), torch.Generator().manual_seed(seed))

    probabilities = (tensor.double() / temperature).softmax(-1)
    assert float(probabilities[probabilities > probabilities[token]].sum()) < top_p


def test_half_precision_logits_are_accepted() -> None:
    assert sample(LOGITS.bfloat16(), SamplingParams(temperature=1.0, top_p=0.1), torch.Generator()) == 1


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
    ],
)
def test_values_out_of_range_are_refused(fields: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SamplingParams(**fields)  # type: ignore[arg-type]


def test_params_survive_the_wire() -> None:
    params = SamplingParams(temperature=0.5, top_p=0.9, seed=2**63 - 1)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params
