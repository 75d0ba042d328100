"""Every decoder-only family that transformers knows: is it admitted, and are its stages' logits transformers' own?

    python -m benchmarks.families [FAMILY ...]

A small model of each with random weights is cut in two stages. Six sequences enter in chunks and decode beside each
other; their logits are compared with those of the whole model. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from helixbench.errors import InputError
from helixbench.profiler.model.architecture import describe
from helixbench.profiler.model.files import ModelFiles
from helixbench.profiler.stage.batch import StageItem
from helixbench.profiler.stage.stage import Stage

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "sliding_window": 7,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "pad_token_id": 0,
}
ONLY_SMALLER = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")
LENGTHS = (1, 6, 7, 8, 9, 30)  # around the window
CHUNK, DECODES = 5, 4
TOLERANCE = 1e-3  # of the logits' spread; float32
MAX_PARAMETERS = 60_000_000
CPU = torch.device("cpu")


def small_config(family: str) -> Any:
    """A small config of the family, with those of ``SIZES`` that it has."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    default = kind()
    sizes = {}
    for name, value in SIZES.items():
        try:
            own = getattr(default, name)
        except (AttributeError, ValueError):
            continue
        is_smaller = isinstance(own, int) and own >= value
        if name not in ONLY_SMALLER or is_smaller:
            sizes[name] = value
    if getattr(default, "sliding_window", None) is None:
        sizes.pop("sliding_window", None)
    return kind(**sizes)


def batches() -> Iterator[list[tuple[int, int, int]]]:
    """(sequence, its first token, number of tokens) of each batch: chunks, then single tokens, all side by side."""
    parts = []
    for length in LENGTHS:
        chunked = max(0, length - DECODES)
        cuts = [*range(0, chunked, CHUNK), *range(chunked, length), length]
        parts.append(list(itertools.pairwise(cuts)))
    for step in range(max(map(len, parts))):
        yield [(n, *(own[step][0], own[step][1] - own[step][0])) for n, own in enumerate(parts) if step < len(own)]


def largest_difference(directory: Path, num_layers: int) -> float:
    """Of logits of two stages and of the whole model, over the logits' standard deviation."""
    from transformers import AutoModelForCausalLM

    files = ModelFiles(str(directory))
    cut = max(1, num_layers // 2)
    stages = [
        Stage(files, start=start, end=end, kv_capacity_tokens=sum(LENGTHS), dtype=torch.float32, device=CPU)
        for start, end in ((0, cut), (cut, num_layers))
        if start < end
    ]
    generator = torch.Generator().manual_seed(3)
    sequences = [torch.randint(3, 300, (length,), generator=generator) for length in LENGTHS]
    for stage in stages:
        for number, length in enumerate(LENGTHS):
            stage.kv.reserve(number, length)
    caps = getattr(files.config, "attn_logit_softcapping", None) is not None
    options = {"attn_implementation": "eager"} if caps else {}
    whole = AutoModelForCausalLM.from_pretrained(directory, **options).eval()
    with torch.inference_mode():
        expected = [whole(sequence[None]).logits[0] for sequence in sequences]
    worst = 0.0
    for batch in batches():
        inputs = [sequences[number][past : past + size] for number, past, size in batch]
        for stage in stages:
            items = [
                StageItem(n, past, size, stage.start, True, x) for (n, past, size), x in zip(batch, inputs, strict=True)
            ]
            output = stage.forward(items)
            inputs = list(output.hidden.split([size for _, _, size in batch]))
        assert output.logits is not None
        for (number, past, size), logits in zip(batch, output.logits, strict=True):
            worst = max(worst, float((logits - expected[number][past + size - 1]).abs().max()))
    return worst / float(torch.cat(expected).std())


def outcome(family: str) -> str:
    """What becomes of a small model of the family, in a few words."""
    from transformers import AutoModelForCausalLM

    try:
        config = small_config(family)
    except Exception as error:  # a config that cannot be small is no finding about the family
        return f"not tried: no small config ({type(error).__name__})"
    try:
        num_layers = len(describe(config).layers)
    except InputError as error:
        return f"refused: {str(error).split(' is not supported: ')[-1][:140]}"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    if sum(parameter.numel() for parameter in model.parameters()) > MAX_PARAMETERS:
        return "not tried: its small config is large"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 1.2 / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        difference = largest_difference(Path(folder), num_layers)
    return f"{'equal' if difference < TOLERANCE else 'DIFFERENT'}: {difference:.1e}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.utils import logging

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", nargs="*", help="model_type; default: all that transformers has")
    asked = parser.parse_args(arguments).family
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print("| family | |\n| --- | --- |")
    for family in asked or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        print(f"| {family} | {outcome(family)} |", flush=True)


if __name__ == "__main__":
    main()
