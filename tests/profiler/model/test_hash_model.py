from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from helixbench.errors import InputError
from helixbench.profiler.model.files import ModelFiles
from helixbench.profiler.model.hash_model import PUBLISHED_SIZES, HashConfig, HashModel, make_hash_model
from helixbench.profiler.model.model import open_model
from helixbench.records import encode_record
from tests.conftest import ModelDir
from tests.hash_models import SMALL, make_small

# From the models' published number of parameters, in billions
PARAMETERS = {
    "llama1-30b": 32.53,
    "llama2-7b": 6.74,
    "llama2-13b": 13.02,
    "llama2-70b": 68.98,
    "llama3-8b": 8.03,
    "llama3-70b": 70.55,
    "mistral-7b": 7.24,
}


@pytest.mark.parametrize("like", PUBLISHED_SIZES)
def test_weights_are_those_of_the_published_model(tmp_path: Path, like: str) -> None:
    make_hash_model(tmp_path / "m", like=like)
    model = open_model(str(tmp_path / "m"))
    assert model.range_bytes(0, model.num_layers, dtype="float16") / 2e9 == pytest.approx(PARAMETERS[like], abs=0.01)


def test_facts_of_llama2_70b(tmp_path: Path) -> None:
    """As published with the Helix paper, but for a layer's weights: counted, they are 1.71 GB, not 1.53 GB."""
    make_hash_model(tmp_path / "m", like="llama2-70b")
    facts = open_model(str(tmp_path / "m")).facts(dtype="float16")
    assert facts.num_layers == 80
    assert facts.activation_bytes_per_token == 16384
    assert facts.kv_bytes_per_token_per_layer == 4096
    assert facts.layer_weight_bytes == 1_711_308_800
    assert facts.embedding_bytes == 32000 * 8192 * 2
    assert facts.head_bytes == 32001 * 8192 * 2


def test_sizes_are_counted_as_those_of_model_files(model_dir: ModelDir, tmp_path: Path) -> None:
    files = ModelFiles(str(model_dir("test-llama")))
    config = files.config
    model = make_small(
        tmp_path / files.directory.name,
        vocab_size=config.vocab_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
    )
    for dtype in ("float32", "bfloat16"):
        assert msgspec.structs.replace(model.facts(dtype=dtype), digest="") == msgspec.structs.replace(
            files.facts(dtype=dtype), digest=""
        )
        for start, end in ((0, 6), (0, 2), (2, 4), (5, 6)):
            assert model.range_bytes(start, end, dtype=dtype) == files.range_bytes(start, end, dtype=dtype)


def test_a_small_wire_carries_the_word_alone(tmp_path: Path) -> None:
    make_hash_model(tmp_path / "m", like="llama2-70b", wire="small")
    assert open_model(str(tmp_path / "m")).facts(dtype="float16").activation_bytes_per_token == 8


def test_layers_are_as_many_as_asked_for_and_models_are_told_apart(tmp_path: Path) -> None:
    for name, layers in (("all", None), ("some", 12), ("again", 12)):
        make_hash_model(tmp_path / name, like="llama3-8b", num_layers=layers)
    models = {name: open_model(str(tmp_path / name)) for name in ("all", "some", "again")}
    assert [model.num_layers for model in models.values()] == [32, 12, 12]
    assert models["some"].digest() == models["again"].digest() != models["all"].digest()
    assert models["some"].saved_dtype == "bfloat16"


def test_a_made_model_is_replaced_and_other_files_are_not(tmp_path: Path) -> None:
    make_hash_model(tmp_path / "m", like="llama3-8b")
    make_hash_model(tmp_path / "m", like="llama2-7b")
    model = open_model(str(tmp_path / "m"))
    assert isinstance(model, HashModel)
    assert model.config.like == "llama2-7b"

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    with pytest.raises(InputError, match="choose a new or empty directory"):
        make_hash_model(tmp_path / "mine", like="llama3-8b")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"like": "gpt-7"}, "--like gpt-7: sizes not known; known models: llama1-30b, llama2-7b"),
        ({"like": "llama2-7b", "num_layers": 0}, "--layers 0: need at least 1"),
    ],
)
def test_what_cannot_be_made_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_hash_model(tmp_path / "m", **options)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 65}, "hidden_size: need .* a multiple of num_attention_heads"),
        ({"num_hidden_layers": 0}, "need whole numbers >= 1"),
        ({"dtype": "int4"}, "dtype"),
        ({"wire": "wide"}, "wire"),
        ({"experts": 8}, "experts"),
    ],
)
def test_a_broken_config_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = msgspec.json.decode(encode_record(SMALL)) | changes
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(config))
    with pytest.raises(InputError, match=message):
        open_model(str(tmp_path))


def test_layers_that_a_model_does_not_have_are_refused(tmp_path: Path) -> None:
    model = make_small(tmp_path)
    for start, end in ((0, 7), (3, 3), (-1, 2)):
        with pytest.raises(InputError, match=r"the model has layers \[0,6\)"):
            model.range_bytes(start, end, dtype="float32")


def test_other_models_are_opened_as_files(model_dir: ModelDir) -> None:
    assert isinstance(open_model(str(model_dir("test-qwen3"))), ModelFiles)
    assert HashConfig.__struct_config__.tag == "helixbench.hash-model/1"
