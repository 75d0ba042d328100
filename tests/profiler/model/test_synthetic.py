from __future__ import annotations

import hashlib
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from helixbench.errors import InputError
from helixbench.profiler.model import synthetic as model_maker
from helixbench.profiler.model.synthetic import EOS_ID, PRESETS, make_model
from tests.conftest import ModelDir

TEST_PRESETS = [name for name in PRESETS if name.startswith("test-")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for preset in TEST_PRESETS:
        make_model(folder / preset, preset=preset)
    return folder


def greedy(model: Any, prompts: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """New tokens [B, T] and the logits [B, T, V] that they were taken from."""
    out = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        max_new_tokens=num_tokens,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[:, prompts.shape[1] :], torch.stack(out.logits, dim=1)


def printable_prompts(num_prompts: int, num_tokens: int) -> torch.Tensor:
    return torch.randint(0x20, 0x7F, (num_prompts, num_tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("preset", TEST_PRESETS)
def test_transformers_loads_every_parameter(made: Path, preset: str) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(made / preset, output_loading_info=True)

    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.float32
    assert model.config.num_hidden_layers == 6
    assert model.config.num_key_value_heads < model.config.num_attention_heads


def test_presets_cover_tied_heads_and_a_sliding_window(made: Path) -> None:
    configs = {name: AutoModelForCausalLM.from_pretrained(made / name).config for name in TEST_PRESETS}

    assert len({config.model_type for config in configs.values()}) == len(TEST_PRESETS) == 12
    assert {config.tie_word_embeddings for config in configs.values()} == {True, False}
    assert configs["test-mistral"].sliding_window == 24


@pytest.mark.parametrize("preset", TEST_PRESETS)
def test_greedy_output_varies_and_is_far_from_ties(made: Path, preset: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(made / preset)
    new_tokens, logits = greedy(model, printable_prompts(16, 40), 64)
    top_two = logits.topk(2, dim=-1).values
    gaps = top_two[..., 0] - top_two[..., 1]

    assert new_tokens.shape == (16, 64), "eos ended a request early"
    assert min(len(set(row.tolist())) for row in new_tokens) >= 16
    assert len(set(new_tokens.flatten().tolist())) >= 80
    assert len({tuple(row.tolist()) for row in new_tokens}) == 16
    assert gaps.median() > 0.3
    assert (gaps < 1e-3).float().mean() < 0.01


@pytest.mark.parametrize("preset", TEST_PRESETS)
def test_output_depends_on_the_oldest_token_in_reach(made: Path, preset: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(made / preset)
    prompts = printable_prompts(1, 40).repeat(2, 1)
    prompts[1, 0] = prompts[0, 0] + 1 if prompts[0, 0] < 0x7E else 0x20

    new_tokens, _ = greedy(model, prompts, 64)

    assert (new_tokens[0] == new_tokens[1]).float().mean() < 0.5


@pytest.mark.parametrize("preset", TEST_PRESETS)
def test_eos_is_never_near_the_top(made: Path, preset: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(made / preset)
    _, logits = greedy(model, printable_prompts(4, 20), 32)

    assert (logits.max(dim=-1).values - logits[..., EOS_ID]).min() > 1


def test_tiny_has_the_documented_sizes(model_dir: ModelDir) -> None:
    with safe_open(model_dir("tiny") / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert shapes["model.layers.15.self_attn.k_proj.weight"] == (4 * 64, 512)
    assert shapes["model.layers.15.mlp.down_proj.weight"] == (512, 1408)
    assert shapes["lm_head.weight"] == shapes["model.embed_tokens.weight"] == (320, 512)
    assert "model.layers.16.mlp.down_proj.weight" not in shapes

    model = AutoModelForCausalLM.from_pretrained(model_dir("tiny"))
    new_tokens, _ = greedy(model, printable_prompts(4, 16), 24)
    assert min(len(set(row.tolist())) for row in new_tokens) >= 10


@given(text=st.text())
def test_tokenizer_round_trips_any_text(made: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made / "test-llama")

    ids = tokenizer(text).input_ids

    assert tokenizer.decode(ids) == text
    if not any(special in text for special in tokenizer.all_special_tokens):
        assert ids == list(text.encode())


@pytest.mark.parametrize("preset", TEST_PRESETS)
def test_every_family_gets_a_byte_tokenizer(made: Path, preset: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made / preset)
    text = unicodedata.normalize("NFC", "  héé 日本 😀 don 't \r\n\t\x00 <b> .")  # the class for Qwen2 composes accents

    assert tokenizer(text).input_ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer.eos_token_id == EOS_ID


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    for name, seed in [("a", 3), ("b", 3), ("c", 4)]:
        make_model(tmp_path / name, preset="test-llama", seed=seed)

    digests = {name: hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).digest() for name in "abc"}
    assert digests["a"] == digests["b"] != digests["c"]


def test_a_made_model_is_replaced(tmp_path: Path) -> None:
    make_model(tmp_path / "m", preset="test-llama")
    make_model(tmp_path / "m", preset="test-qwen2")

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").config.model_type == "qwen2"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_an_empty_directory_is_used(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    make_model(tmp_path / "m", preset="test-llama")
    assert (tmp_path / "m" / "config.json").exists()


def test_a_directory_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="did not make"):
        make_model(tmp_path, preset="test-llama")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        make_model(tmp_path / "m", preset="test-llama")


def test_unknown_preset_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'huge'.*tiny.*test-llama"):
        make_model(tmp_path / "m", preset="huge")


def test_negative_seed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--seed -1"):
        make_model(tmp_path / "m", preset="test-llama", seed=-1)


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(tmp_path / "m", preset="test-llama")
    before = (tmp_path / "m" / "model.safetensors").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_maker, "_write_tokenizer", full)
    with pytest.raises(InputError, match="No space left"):
        make_model(tmp_path / "m", preset="test-llama", seed=1)
    with pytest.raises(InputError, match="No space left"):
        make_model(tmp_path / "new", preset="test-llama")

    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
