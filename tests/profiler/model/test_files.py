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
from helixbench.profiler.model.files import ModelFiles, resolve_model
from helixbench.profiler.stage.stage import Stage
from tests.conftest import ModelDir
from tests.greedy import load_whole

CPU = torch.device("cpu")


@pytest.fixture
def copy(model_dir: ModelDir, tmp_path: Path) -> Path:
    """A model of this test's own, to be spoilt."""
    directory = tmp_path / "model"
    shutil.copytree(model_dir("test-llama"), directory)
    return directory


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(directory: Path) -> dict[str, str]:
    """Split the weights over three files with an index, as large models have them."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for number in range(3):
        part = dict(list(tensors.items())[number::3])
        save_file(part, directory / f"part-{number}.safetensors")
        weight_map |= dict.fromkeys(part, f"part-{number}.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def load(files: ModelFiles, names: list[str], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return files.weights.load(names, dtype=dtype, device=CPU)


@pytest.mark.parametrize("preset", ["test-llama", "test-qwen3"])
def test_facts_are_those_of_the_whole_model(model_dir: ModelDir, preset: str) -> None:
    directory = model_dir(preset)
    whole = load_whole(directory)
    config = whole.config

    facts = ModelFiles(str(directory)).facts(dtype="bfloat16")

    assert facts.name == preset
    assert facts.num_layers == 6
    assert facts.activation_bytes_per_token == config.hidden_size * 2
    assert facts.layer_weight_bytes == sum(p.numel() * 2 for p in whole.model.layers[0].parameters())
    assert facts.kv_bytes_per_token_per_layer == 2 * 2 * config.num_key_value_heads * config.head_dim
    assert facts.embedding_bytes == whole.model.embed_tokens.weight.numel() * 2
    assert facts.head_bytes == (whole.lm_head.weight.numel() + whole.model.norm.weight.numel()) * 2
    assert facts.dtype == "bfloat16"
    assert facts.digest == ModelFiles(str(directory)).digest()


@pytest.mark.parametrize("preset", ["test-llama", "test-qwen2"])
@pytest.mark.parametrize(("start", "end"), [(0, 6), (0, 1), (2, 4), (5, 6)])
def test_bytes_of_a_range_are_what_its_stage_holds(model_dir: ModelDir, preset: str, start: int, end: int) -> None:
    files = ModelFiles(str(model_dir(preset)))
    stage = Stage(files, start=start, end=end, kv_capacity_tokens=1, dtype=torch.float32, device=CPU)

    assert files.range_bytes(start, end, dtype="float32") == stage.weight_bytes
    assert files.range_bytes(start, end, dtype="float16") == stage.weight_bytes / 2


@pytest.mark.parametrize(("start", "end"), [(0, 7), (3, 3), (-1, 2)])
def test_a_range_that_is_not_there_has_no_bytes(model_dir: ModelDir, start: int, end: int) -> None:
    with pytest.raises(InputError, match=r"the model has layers \[0,6\)"):
        ModelFiles(str(model_dir("test-llama"))).range_bytes(start, end, dtype="float32")


def test_a_model_in_several_files_is_the_same_model(model_dir: ModelDir, copy: Path) -> None:
    weight_map = shard(copy)
    one, several = ModelFiles(str(model_dir("test-llama"))), ModelFiles(str(copy))
    names = sorted(weight_map)

    loaded, expected = load(several, names), load(one, names)

    assert all(torch.equal(loaded[name], expected[name]) for name in names)
    assert several.digest() == one.digest()
    assert several.range_bytes(0, 6, dtype="float32") == one.range_bytes(0, 6, dtype="float32")


def test_loaded_tensors_own_their_memory_and_have_the_dtype_asked_for(model_dir: ModelDir) -> None:
    files = ModelFiles(str(model_dir("test-llama")))
    name = "model.norm.weight"
    first, second = load(files, [name])[name], load(files, [name])[name]
    first.fill_(7)

    assert not torch.equal(first, second)
    assert load(files, [name], dtype=torch.bfloat16)[name].dtype == torch.bfloat16


def test_saved_rotary_frequencies_are_left_aside(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    digest = ModelFiles(str(copy)).digest()
    save_file(tensors | {"model.layers.3.self_attn.rotary_emb.inv_freq": torch.ones(8)}, copy / "model.safetensors")

    files = ModelFiles(str(copy))

    assert files.digest() == digest
    Stage(files, start=3, end=4, kv_capacity_tokens=1, dtype=torch.float32, device=CPU)


# Digests


def spoil_weights(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {"another.weight": torch.zeros(7, 7)}, directory / "model.safetensors")


def spoil_first_values(directory: Path) -> None:
    path = directory / "model.safetensors"
    raw = bytearray(path.read_bytes())
    header_bytes = 8 + int.from_bytes(raw[:8], "little")
    raw[header_bytes] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "change",
    [lambda directory: change_config(directory, rms_norm_eps=1e-3), spoil_weights, spoil_first_values],
    ids=["config", "shapes", "values"],
)
def test_digest_tells_models_apart(model_dir: ModelDir, copy: Path, change: Callable[[Path], None]) -> None:
    digest = ModelFiles(str(copy)).digest()
    assert digest == ModelFiles(str(model_dir("test-llama"))).digest(), "a copy elsewhere is the same model"

    change(copy)

    assert ModelFiles(str(copy)).digest() != digest


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported: GPT2LMHeadModel has no part named embed_tokens"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\] is not supported"),
        ({"num_hidden_layers": "six"}, "transformers cannot read it"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; need at least 1"),
        ({"num_attention_heads": 7}, "transformers cannot read it"),
        ({"dtype": "float7"}, "transformers cannot read it"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope_type 'dynamic' is not"),
    ],
)
def test_configs_that_cannot_be_run_are_one_message(copy: Path, changes: dict[str, Any], message: str) -> None:
    change_config(copy, **changes)
    with pytest.raises(InputError, match=rf"model/config\.json: {message}"):
        ModelFiles(str(copy))


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"model_type": "llama"'])
def test_a_config_that_is_no_json_object_is_one_message(copy: Path, content: str) -> None:
    (copy / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json: not a readable JSON object"):
        ModelFiles(str(copy))


def test_a_directory_without_a_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json: no such file; need a Hugging Face model directory"):
        ModelFiles(str(tmp_path))


@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, 0.99])
def test_half_written_weights_are_one_message(copy: Path, kept: float) -> None:
    path = copy / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])

    with pytest.raises(InputError, match=r"model\.safetensors: not a complete safetensors file"):
        ModelFiles(str(copy))


def test_missing_weights_are_one_message(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors: no such file; need the model's weights as safetensors"):
        ModelFiles(str(copy))


def test_a_half_written_shard_is_named(copy: Path) -> None:
    name = shard(copy)["lm_head.weight"]
    (copy / name).write_bytes((copy / name).read_bytes()[:-100])

    with pytest.raises(InputError, match=f"{name}: not a complete safetensors file"):
        ModelFiles(str(copy))


def test_a_missing_shard_is_named(copy: Path) -> None:
    shard(copy)
    (copy / "part-1.safetensors").unlink()
    with pytest.raises(InputError, match=r"index\.json: names part-1\.safetensors, which is not beside it"):
        ModelFiles(str(copy))


@pytest.mark.parametrize(
    "content", ["", "[]", '{"weight_map": 3}', "{}", '{"weight_map": {"lm_head.weight": "../x.safetensors"}}']
)
def test_a_broken_index_is_one_message(copy: Path, content: str) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json: (not a safetensors index|names \.\.)"):
        ModelFiles(str(copy))


def test_layers_that_are_missing_are_named(copy: Path) -> None:
    change_config(copy, num_hidden_layers=9)
    with pytest.raises(InputError, match=r"no tensor for model\.layers\.6\.self_attn.* and 26 others"):
        ModelFiles(str(copy))


def test_a_missing_head_is_named_where_it_is_not_tied(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, copy / "model.safetensors")

    with pytest.raises(InputError, match=r"no tensor for lm_head\.weight; the model files are not complete"):
        ModelFiles(str(copy))
    change_config(copy, tie_word_embeddings=True)
    files = ModelFiles(str(copy))
    assert torch.equal(load(files, ["lm_head.weight"])["lm_head.weight"], tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize("model", ["/no/such/place", "./nothing", "nothing", "a/b/c"])
def test_what_is_no_directory_is_not_looked_for_elsewhere(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match="no such directory; give a Hugging Face model directory or a hub id"):
        resolve_model(model)


def test_a_file_is_no_model_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="no such directory"):
        resolve_model(str(tmp_path / "file"))


def test_a_hub_id_that_the_hub_does_not_give_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(
        InputError, match=r"--model some/model: no such directory, and the hub did not give it \(no netw"
    ):
        resolve_model("some/model")


def test_a_hub_id_is_the_directory_that_the_hub_gives(model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot(name: str, *, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(model_dir("test-llama"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)

    assert resolve_model("some/model") == model_dir("test-llama")
    assert asked == {"some/model": ["*.json", "*.safetensors", "tokenizer*", "*.jinja"]}


def test_eos_tokens_are_those_of_the_generation_config(copy: Path) -> None:
    assert ModelFiles(str(copy)).eos_token_ids() == {257}
    path = copy / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [3, 5]}))
    assert ModelFiles(str(copy)).eos_token_ids() == {3, 5}
    path.unlink()
    assert ModelFiles(str(copy)).eos_token_ids() == {257}
    change_config(copy, eos_token_id=None)
    assert ModelFiles(str(copy)).eos_token_ids() == frozenset()
