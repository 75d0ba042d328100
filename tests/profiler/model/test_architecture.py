"""Which families a stage can run, and the sentence that says why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helixbench.errors import InputError
from helixbench.profiler.model import architecture
from helixbench.profiler.model.architecture import PROBE, LayerAttention, describe
from helixbench.profiler.model.presets import PRESETS

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def config_of(family: str, **changes: Any) -> Any:
    """Config of a family that the installed transformers may not have."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, f"{family}Config"):
        pytest.skip(f"this transformers has no {family}")
    return getattr(transformers, f"{family}Config")(**(SIZES | changes))


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("GPT2", {}, "GPT2LMHeadModel has no part named embed_tokens"),
        ("FalconH1", {}, "FalconH1ForCausalLM has no part named norm"),
        ("NanoChat", {}, "its norm is used 2 times"),
        ("DiffLlama", {}, "layer 0 attends 2 times through transformers' attention interface"),
        ("GptOss", {"head_dim": 16, "num_local_experts": 4}, "layer 0: its attention needs s_aux"),
        ("DeepseekV2", {"num_key_value_heads": 4}, "layer 0: its keys .* and values .* differ in shape"),
        ("Qwen3Next", {}, "its layers keep a state beside keys and values"),
        ("StableLm", {}, "layer 0: its arguments do not reach its attention"),
        ("Dory", {}, "hidden states are changed between its layers"),
    ],
)
def test_what_a_stage_cannot_run_is_refused_with_the_part(family: str, changes: dict[str, Any], reason: str) -> None:
    config = config_of(family, **changes)
    with pytest.raises(InputError, match=f"model_type '{config.model_type}' is not supported: {reason}"):
        describe(config)


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "tiny"])
def test_every_preset_is_described(preset: str) -> None:
    config = PRESETS[preset].config()
    found = describe(config)

    assert len(found.layers) == len(found.attention) == config.num_hidden_layers
    assert {each[:2] for each in found.attention} == {(config.num_key_value_heads, found.attention[0].head_dim)}
    parts = [*found.embedding, *found.head, *(name for names in found.layers for name in names)]
    assert sorted(parts) == sorted(found.shapes)


@pytest.mark.parametrize(
    ("preset", "windows"),
    [
        ("test-llama", [None] * 6),
        ("test-mistral", [24] * 6),
        ("test-phi3", [24] * 6),
        ("test-gemma2", [24, None] * 3),
        ("test-gemma3", [24, None] * 3),
    ],
)
def test_windows_are_those_of_transformers_masks(preset: str, windows: list[int | None]) -> None:
    assert [each.window for each in describe(PRESETS[preset].config()).attention] == windows


def test_a_window_that_the_config_switches_off_is_none() -> None:
    off = describe(config_of("Qwen2", use_sliding_window=False, sliding_window=24))
    on = describe(config_of("Qwen2", use_sliding_window=True, sliding_window=24, max_window_layers=2))

    assert [each.window for each in off.attention] == [None] * 4
    assert on.attention == (LayerAttention(2, 16, None),) * 2 + (LayerAttention(2, 16, 24),) * 2


@pytest.mark.parametrize("kind", ["create_chunked_causal_mask", "create_bidirectional_mask"])
def test_masks_that_are_no_windows_are_refused(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    from transformers import masking_utils
    from transformers.models.llama import modeling_llama

    config = config_of("Llama")
    config.attention_chunk_size = 8
    real = getattr(masking_utils, kind)

    def mask(*, position_ids: Any, **arguments: Any) -> Any:
        return real(**arguments, **({"position_ids": position_ids} if "chunked" in kind else {}))

    monkeypatch.setattr(modeling_llama, "create_causal_mask", mask)
    with pytest.raises(InputError, match="its attention mask is neither causal nor a sliding window"):
        describe(config)


def test_chunks_are_told_from_a_window() -> None:
    def chunk(_batch: Any, _head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= query) & (key // 8 == query // 8)

    assert not architecture._window_as_mask(mask_function=chunk, config=config_of("Llama")).is_causal


def test_values_that_no_file_holds_are_transformers_own() -> None:
    """The scale of Gemma's embeddings and its two sets of rotary frequencies."""
    from transformers import AutoModelForCausalLM

    config = PRESETS["test-gemma3"].config()
    real = AutoModelForCausalLM.from_config(config)
    causal = architecture.build(config, attention="eager", dtype=torch.float32)
    architecture.fill_buffers(causal, [causal], device=torch.device("cpu"))
    buffers = dict(real.named_buffers())

    assert len(buffers) == 5
    assert all(torch.equal(value, buffers[name]) for name, value in causal.named_buffers())


def test_a_buffer_without_a_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    causal = architecture.build(PRESETS["test-gemma3"].config(), attention="eager", dtype=torch.float32)
    monkeypatch.setattr(type(causal), "_init_weights", lambda *_: None)
    with pytest.raises(InputError, match=r"transformers gives buffer \w+ no value"):
        architecture.fill_buffers(causal, [causal], device=torch.device("cpu"))


def test_the_probe_leaves_the_config_as_it_was() -> None:
    config = PRESETS["test-qwen3-moe"].config()
    before = config.to_dict()
    describe(config)
    assert config.to_dict() == before
    assert config._attn_implementation != PROBE
