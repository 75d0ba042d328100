"""What transformers' own ``generate`` answers: the truth that a served plan is held against."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from helixbench.profiler.model.presets import PRESETS

FAMILIES = tuple(preset for preset in PRESETS if preset.startswith("test-"))
"""A small model of each family that is compared with transformers."""

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
    from transformers import AutoConfig, AutoModelForCausalLM

    # transformers before 5.24 runs Gemma 2 with an attention function that leaves out its cap of the scores.
    caps = getattr(AutoConfig.from_pretrained(directory), "attn_logit_softcapping", None) is not None
    options = {"attn_implementation": "eager"} if caps else {}
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **options).eval()
    model.generation_config.eos_token_id = None
    return model


def greedy_outputs(
    model: Any, prompts: Sequence[tuple[int, ...]], num_tokens: int
) -> list[tuple[tuple[int, ...], list[float]]]:
    """The continuation of each prompt, and at every token the distance between its best and second best logit.

    They run as one batch, shorter prompts filled up on the left and masked there.
    """
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([(0,) * (longest - len(prompt)) + prompt for prompt in prompts])  # [B, T]
    mask = torch.tensor([(0,) * (longest - len(prompt)) + (1,) * len(prompt) for prompt in prompts])
    result = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=num_tokens,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    best = torch.stack(result.logits, dim=1).topk(2, dim=-1).values  # [B, N, 2]
    tokens, margins = result.sequences[:, longest:].tolist(), (best[..., 0] - best[..., 1]).tolist()
    return [(tuple(row), distances) for row, distances in zip(tokens, margins, strict=True)]


def greedy_requests(directory: Path, *, count: int, seed: int) -> tuple[Greedy, ...]:
    """Requests of mixed lengths, from one token to three of the smallest sliding window, with their outputs."""
    model = load_whole(directory)
    draw = random.Random(seed)
    found: list[Greedy] = []
    while len(found) < count:
        prompts = [
            tuple(draw.randrange(0x20, 0x7F) for _ in range(draw.choice((1, 2, 9, 23, 24, 25, 48, 71))))
            for _ in range(count)
        ]
        for prompt, (output, margins) in zip(prompts, greedy_outputs(model, prompts, 40), strict=True):
            length = draw.choice((1, 2, 12, 27, 40))
            if min(margins[:length]) > MIN_MARGIN:
                found.append(Greedy(prompt, output[:length]))
    return tuple(found[:count])
