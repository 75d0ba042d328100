"""What is found, made whole or refused when a model directory is opened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helixbench.errors import InputError
from helixbench.profiler.model.checkpoint import Checkpoint
from helixbench.profiler.model.files import ModelFiles
from tests.conftest import ModelDir
from tests.greedy import load_whole
from tests.profiler.stage.schedules import distances, random_sequences, run_schedule, stage_of, whole_logits

TOLERANCE = 1e-4
Tensors = dict[str, torch.Tensor]
Copy = Callable[[str], Path]


@pytest.fixture
def copy(model_dir: ModelDir, tmp_path: Path) -> Copy:
    """A preset's model of this test's own."""

    def of(preset: str) -> Path:
        directory = tmp_path / "model"
        shutil.copytree(model_dir(preset), directory)
        return directory

    return of


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(directory: Path, change: Callable[[Tensors], Tensors]) -> None:
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def without(tensors: Tensors, *names: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def require_same_model(directory: Path, original: Path) -> None:
    """The stage of the whole model gives the logits that transformers gives for the original."""
    sequences = random_sequences((9, 3))
    found = run_schedule([[(stage_of(directory), 0)]] * 2, sequences, [[(0, 5), (1, 3)], [(0, 4)]])
    assert distances(found, whole_logits(load_whole(original), sequences)).max() < TOLERANCE


# Names


def test_tensors_without_the_prefix_are_found(copy: Copy, model_dir: ModelDir) -> None:
    directory = copy("test-llama")
    change_tensors(directory, lambda all_: {name.removeprefix("model."): tensor for name, tensor in all_.items()})
    require_same_model(directory, model_dir("test-llama"))


@pytest.mark.parametrize("preset", ["test-qwen2", "test-gemma2"])
def test_tied_weights_may_have_the_heads_name_alone(copy: Copy, model_dir: ModelDir, preset: str) -> None:
    directory = copy(preset)
    embedding = "model.embed_tokens.weight"
    change_tensors(directory, lambda all_: without(all_, embedding) | {"lm_head.weight": all_[embedding]})

    files = ModelFiles(str(directory))

    assert files.range_bytes(0, 6, dtype="float32") == ModelFiles(str(model_dir(preset))).range_bytes(
        0, 6, dtype="float32"
    )
    require_same_model(directory, model_dir(preset))


def test_a_head_of_its_own_is_taken_though_the_config_ties_it(copy: Copy) -> None:
    directory = copy("test-qwen2")
    head = torch.randn(320, 64, generator=torch.Generator().manual_seed(1))
    change_tensors(directory, lambda all_: all_ | {"lm_head.weight": head})
    files = ModelFiles(str(directory))

    loaded = files.weights.load(files.architecture.head, dtype=torch.float32, device=torch.device("cpu"))

    assert torch.equal(loaded["lm_head.weight"], head)


def test_experts_come_in_the_order_of_their_numbers(model_dir: ModelDir) -> None:
    """As texts, 10 and 11 would come before 2."""
    directory = model_dir("test-qwen3-moe")
    files = ModelFiles(str(directory))
    (name,) = (name for name in files.architecture.layers[2] if name.endswith("experts.down_proj"))
    stored = load_file(directory / "model.safetensors")

    made = files.weights.load([name], dtype=torch.float32, device=torch.device("cpu"))[name]

    assert made.shape == (12, 64, 48)
    for expert in range(12):
        assert torch.equal(made[expert], stored[f"model.layers.2.mlp.experts.{expert}.down_proj.weight"])


# Files


def test_a_whole_file_is_taken_before_an_index_beside_it(copy: Copy, model_dir: ModelDir) -> None:
    """As transformers does: someone saved a new model over an old one."""
    directory = copy("test-llama")
    old = {name: tensor + 1 for name, tensor in load_file(directory / "model.safetensors").items()}
    save_file(old, directory / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(old, "model-00001-of-00001.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))

    assert ModelFiles(str(directory)).digest() == ModelFiles(str(model_dir("test-llama"))).digest()
    require_same_model(directory, model_dir("test-llama"))


def test_an_index_that_places_a_tensor_in_the_wrong_file_is_refused(copy: Copy) -> None:
    directory = copy("test-llama")
    (directory / "model.safetensors").rename(directory / "part.safetensors")
    index = {"weight_map": {"model.norm.weight": "part.safetensors", "model.nothing": "part.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(InputError, match=r"places model\.nothing in part\.safetensors, which does not have it"):
        ModelFiles(str(directory))


@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_the_digest_samples_every_tensor(copy: Copy, where: float) -> None:
    """Two fine-tunes that differ far behind the first bytes of the file."""
    directory = copy("test-llama")
    before = ModelFiles(str(directory)).digest()

    def change(tensors: Tensors) -> Tensors:
        names = sorted(tensors)
        tensors[names[int(where * (len(names) - 1))]].view(-1)[-1] += 1
        return tensors

    change_tensors(directory, change)

    assert ModelFiles(str(directory)).digest() != before


def test_the_digest_of_a_large_tensor_is_of_both_its_ends_and_between(tmp_path: Path) -> None:
    def digest(at: int | None) -> str:
        tensor = torch.zeros(100_000)
        if at is not None:
            tensor[at] = 1
        save_file({"a": tensor}, tmp_path / "model.safetensors")
        return Checkpoint(tmp_path).digest()

    assert len({digest(at) for at in (None, 0, 33_000, 99_999)}) == 4


# Shapes


@pytest.mark.parametrize(
    ("preset", "changes", "message"),
    [
        ("test-llama", {"vocab_size": 324}, r"the shape \[320, 64\], but config\.json asks for \[324, 64\]"),
        (
            "test-qwen2",
            {"vocab_size": 324},
            r"model\.embed_tokens\.weight has the shape \[320, 64\], but .*\[324, 64\]",
        ),
        ("test-llama", {"hidden_size": 96}, r"the shape \[320, 64\], but config\.json asks for \[320, 96\]"),
        ("test-mixtral", {"num_local_experts": 5}, r"experts.*\[4, .*\], but config\.json asks for \[5, "),
        ("test-qwen3-moe", {"moe_intermediate_size": 32}, r"experts.* has the shape \[12, .* asks for \[12, "),
        ("test-phi3", {"num_key_value_heads": 1}, r"qkv_proj\.weight has the shape \[128, 64\].*\[96, 64\]"),
    ],
)
def test_files_of_another_shape_are_refused_when_opened(
    copy: Copy, preset: str, changes: dict[str, Any], message: str
) -> None:
    directory = copy(preset)
    change_config(directory, **changes)
    with pytest.raises(InputError, match=message):
        ModelFiles(str(directory))


def test_one_expert_that_is_missing_is_noticed(copy: Copy) -> None:
    directory = copy("test-qwen3-moe")
    change_tensors(directory, lambda all_: without(all_, "model.layers.4.mlp.experts.6.up_proj.weight"))
    with pytest.raises(InputError, match=r"model\.layers\.4\.mlp\.experts.* do not make .*gate_up_proj"):
        ModelFiles(str(directory))


def test_memory_of_a_mixture_of_experts_is_that_of_its_largest_layer(model_dir: ModelDir) -> None:
    directory = model_dir("test-qwen3-moe")
    whole = load_whole(directory)
    sizes = [2 * sum(p.numel() for p in layer.parameters()) for layer in whole.model.layers]
    files = ModelFiles(str(directory))

    assert files.facts(dtype="bfloat16").layer_weight_bytes == max(sizes) > sizes[1] == min(sizes)
    assert files.range_bytes(1, 3, dtype="bfloat16") == sizes[1] + sizes[2]
    assert stage_of(directory, 1, 3, dtype=torch.bfloat16).weight_bytes == sizes[1] + sizes[2]


# Quantised weights


def quantise_head(tensors: Tensors) -> Tensors:
    return tensors | {"lm_head.weight": tensors["lm_head.weight"].to(torch.float8_e4m3fn)}


def pack_layer(tensors: Tensors) -> Tensors:
    name = "model.layers.0.mlp.up_proj.weight"
    packed = torch.zeros(64, 16, dtype=torch.int32)
    return without(tensors, name) | {name.replace("weight", "qweight"): packed}


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (quantise_head, {}, r"quantised weights \([\d.]+ MB of F32, [\d.]+ MB of F8_E4M3\) are not served"),
        (
            pack_layer,
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            r"quantised weights \(gptq; .*I32\)",
        ),
        (dict, {"quantization_config": {"quant_method": "fp8"}}, r"quantised weights \(fp8; .* MB of F32\)"),
    ],
)
def test_quantised_weights_are_refused_before_anything_is_loaded(
    copy: Copy,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Tensors], Tensors],
    config: dict[str, Any],
    message: str,
) -> None:
    directory = copy("test-llama")
    change_tensors(directory, change)
    change_config(directory, **config)
    monkeypatch.setattr(Checkpoint, "load", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(InputError, match=message):
        ModelFiles(str(directory))


def test_positions_beside_the_weights_are_left_aside(copy: Copy, model_dir: ModelDir) -> None:
    directory = copy("test-llama")
    change_tensors(directory, lambda all_: all_ | {"model.position_ids": torch.arange(8)})
    require_same_model(directory, model_dir("test-llama"))


# Configs


def test_a_models_own_code_is_not_run(copy: Copy) -> None:
    directory = copy("test-llama")
    change_config(directory, model_type="mine", auto_map={"AutoConfig": "code.MyConfig"})
    (directory / "code.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(InputError, match=r"config\.json: transformers cannot read it .*contains custom code[^\n]*$"):
        ModelFiles(str(directory))


@pytest.mark.parametrize("content", ['{"eos_token_id": 25', "[]", '{"eos_token_id": "two"}'])
def test_a_broken_generation_config_is_refused_when_opened(copy: Copy, content: str) -> None:
    directory = copy("test-llama")
    (directory / "generation_config.json").write_text(content)
    with pytest.raises(InputError, match=r"generation_config\.json: (transformers cannot read it|eos_token_id 'two')"):
        ModelFiles(str(directory))


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 1024),
        ({"rope_type": "yarn", "factor": 4.0}, 4096),
        ({"rope_type": "linear", "factor": 2.0}, 2048),
        ({"rope_type": "default"}, 1024),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            },
            1024,
        ),
    ],
)
def test_scaled_rotary_embeddings_raise_the_limit_of_a_sequence(copy: Copy, rope: dict[str, Any], limit: int) -> None:
    directory = copy("test-llama")
    change_config(directory, rope_parameters={"rope_theta": 10_000.0, **rope})
    assert ModelFiles(str(directory)).max_sequence_tokens == limit


def test_rotary_embeddings_of_several_kinds_leave_the_limit_as_it_is(copy: Copy) -> None:
    directory = copy("test-gemma3")
    rope = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}
    rope |= {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    change_config(directory, rope_parameters=rope)
    assert ModelFiles(str(directory)).max_sequence_tokens == 1024
    require_same_model(directory, directory)


@pytest.mark.parametrize("rope_type", ["yarn", "linear", "llama3"])
def test_scaled_rotary_embeddings_are_transformers_own(copy: Copy, rope_type: str) -> None:
    directory = copy("test-llama")
    rope = {"rope_type": rope_type, "rope_theta": 10_000.0, "factor": 4.0}
    rope |= {"original_max_position_embeddings": 256} if rope_type != "linear" else {}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if rope_type == "llama3" else {}
    change_config(directory, rope_parameters=rope)
    require_same_model(directory, directory)
