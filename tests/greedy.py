"""What transformers' own ``generate`` answers: the truth that a served plan is held against."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any, NamedTuple

import torch

# Logits of batches of other shapes differ by some 1e-5 in float32. A reference whose two best logits are nearer than
# this at some token would make equality a matter of luck; such a prompt is replaced by another one.
MIN_MARGIN = 2e-4


class Greedy(NamedTuple):
    """A prompt and its greedy continuation."""

    prompt: tuple[int, ...]
    output: tuple[int, ...]


@functools.cache
def load_whole(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The whole model as transformers loads and runs it, loaded once; no token ends an output."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    return model


def greedy_output(model: Any, prompt: tuple[int, ...], num_tokens: int) -> tuple[tuple[int, ...], float]:
    """The continuation, and the smallest distance between its best and second best logit."""
    ids = torch.tensor([prompt])
    result = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=num_tokens,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    best = torch.stack(result.logits, dim=1).topk(2, dim=-1).values[0]  # [N, 2]
    return tuple(result.sequences[0, len(prompt) :].tolist()), float((best[:, 0] - best[:, 1]).min())


def greedy_requests(directory: Path, *, count: int, seed: int) -> tuple[Greedy, ...]:
    """Requests of mixed lengths, from one token to three of the smallest sliding window, with their outputs."""
    model = load_whole(directory)
    draw = random.Random(seed)
    found: list[Greedy] = []
    while len(found) < count:
        prompt = tuple(draw.randrange(0x20, 0x7F) for _ in range(draw.choice((1, 2, 9, 23, 24, 25, 48, 71))))
        output, margin = greedy_output(model, prompt, draw.choice((1, 2, 12, 27, 40)))
        if margin > MIN_MARGIN:
            found.append(Greedy(prompt, output))
    return tuple(found)
