from __future__ import annotations

import contextlib
import types
import typing
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixbench.errors import MeasurementError
from helixbench.profiler.cluster import Device
from helixbench.profiler.cost.model import StageCost
from helixbench.profiler.emulated_device import Roofline
from helixbench.reference_server.wire import messages
from helixbench.reference_server.wire.messages import (
    MAX_HEADER_BYTES,
    Answer,
    Command,
    Describe,
    Done,
    Work,
    decode_answer,
    decode_command,
    encode,
)
from helixbench.solver.scheduling.work import MAX_LOGPROBS, MAX_SEED, MIN_SEED, SamplingParams
from tests.solver.clusters import model

COMMANDS: tuple[type[Any], ...] = typing.get_args(Command)
ANSWERS: tuple[type[Any], ...] = typing.get_args(Answer)

CHECKED: dict[type[Any], st.SearchStrategy[Any]] = {  # types that take only some values
    Device: st.builds(
        Device,
        kind=st.sampled_from(("cuda", "cpu")),
        name=st.text(max_size=8),
        memory_bytes=st.floats(1, 1e15),
        facts=st.dictionaries(
            st.text(max_size=4), st.one_of(st.text(max_size=4), st.floats(allow_nan=False)), max_size=2
        ),
    ),
    SamplingParams: st.builds(
        SamplingParams,
        temperature=st.floats(0, 2),
        top_p=st.floats(0.01, 1),
        seed=st.one_of(st.none(), st.integers(MIN_SEED, MAX_SEED)),
        top_k=st.integers(0, 100),
        min_p=st.floats(0, 1),
        num_logprobs=st.one_of(st.none(), st.integers(0, MAX_LOGPROBS)),
    ),
}
STAGE = Roofline(flops=1e12, memory_bandwidth_bytes_per_s=1e11, launch_s=1e-5).stage_cost(model(4))
CHECKED[StageCost] = st.builds(msgspec.structs.replace, st.just(STAGE), step_s=st.floats(0, 1))
PLAIN: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(-(2**63), 2**63 - 1),
    float: st.floats(allow_nan=False),
    str: st.text(max_size=12),
    bool: st.booleans(),
    type(None): st.none(),
}


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Any value of a type that stands in a message."""
    if kind in PLAIN:
        return PLAIN[kind]
    if kind in CHECKED:
        return CHECKED[kind]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return st.one_of(*(values_of(argument) for argument in arguments))
    if origin is tuple and arguments[-1] is Ellipsis:
        return st.lists(values_of(arguments[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*(values_of(argument) for argument in arguments))
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is dict:
        return st.dictionaries(*(values_of(argument) for argument in arguments), max_size=3)
    assert issubclass(kind, msgspec.Struct), f"the test knows no values of {kind}"
    return st.builds(kind, **{name: values_of(hint) for name, hint in typing.get_type_hints(kind).items()})


@pytest.mark.parametrize("kind", COMMANDS, ids=lambda kind: kind.__name__)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_command_arrives_as_it_was_sent(kind: type[Any], data: st.DataObject) -> None:
    message = data.draw(values_of(kind))
    assert decode_command(encode(message)) == message


@pytest.mark.parametrize("kind", ANSWERS, ids=lambda kind: kind.__name__)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_answer_arrives_as_it_was_sent(kind: type[Any], data: st.DataObject) -> None:
    message = data.draw(values_of(kind))
    assert decode_answer(encode(message)) == message


def test_every_message_type_is_a_command_or_an_answer() -> None:
    tagged = {
        kind
        for kind in vars(messages).values()
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind.__struct_config__.tag is not None
    }
    assert tagged == {*COMMANDS, *ANSWERS}
    assert len({kind.__struct_config__.tag for kind in tagged}) == len(tagged)


def test_commands_are_no_answers_and_answers_no_commands() -> None:
    with pytest.raises(MeasurementError, match="an answer was received that is not understood"):
        decode_answer(encode(Describe()))
    with pytest.raises(MeasurementError, match="a command was received that is not understood"):
        decode_command(encode(Done()))


@given(header=st.binary(max_size=200))
def test_any_bytes_give_a_message_or_one_kind_of_error(header: bytes) -> None:
    for decode in (decode_command, decode_answer):
        with contextlib.suppress(MeasurementError):
            assert isinstance(decode(header), msgspec.Struct)


@given(data=st.data(), at=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_a_changed_byte_gives_a_message_or_one_kind_of_error(data: st.DataObject, at: int, byte: int) -> None:
    header = bytearray(encode(data.draw(values_of(Work))))
    header[at % len(header)] = byte
    with contextlib.suppress(MeasurementError):
        assert isinstance(decode_command(bytes(header)), COMMANDS)


ENCODE = msgspec.msgpack.encode


@pytest.mark.parametrize(
    "header",
    [
        b"",
        ENCODE(None),
        ENCODE({"type": "unheard-of"}),
        ENCODE({"type": "load"}),
        ENCODE({"type": "work", "items": [[1, "past", 1, True, False]]}),
        ENCODE({"type": "work", "opens": [[1, [["n", 0, 1]], 5, {"temperature": 9.0}]]}),
        encode(Describe()) + b"\x00",
        encode(Describe())[:-1],
        b"\x82\xa4type\xa4load\xa5model\xa2\xff\xfe",
        b"\x82\xa4type\xa8describe\xa1x" + b"\x91" * 100_000 + b"\x00",
    ],
    ids=[
        "empty",
        "nil",
        "unknown",
        "fields missing",
        "wrong type",
        "temperature 9",
        "longer",
        "shorter",
        "utf-8",
        "deep",
    ],
)
def test_what_is_no_command_is_refused(header: bytes) -> None:
    with pytest.raises(MeasurementError, match="a command was received that is not understood"):
        decode_command(header)


def test_an_overlong_header_is_refused_unread() -> None:
    with pytest.raises(MeasurementError, match=f"at most {MAX_HEADER_BYTES} are allowed"):
        decode_command(bytes(MAX_HEADER_BYTES + 1))
