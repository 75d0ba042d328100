"""Traces in the formats in which they are published."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from helixbench.errors import InputError
from helixbench.solver.problem.traces import Trace, TracedRequest, read_trace
from helixbench.solver.problem.workload import workload_of_trace
from tests.helixbench.words import word_tokenizer

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:47.0,96,9\n"
WITH_OFFSETS = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,216,5
2024-05-10 02:00:00.051000+02:00,64,7
2024-05-10 00:00:01.000000Z,30,2
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,230,1317,Conversation log
118,GPT-4,417,0,417,Conversation log
"""
MOONCAKE = """{"timestamp": 0, "input_length": 6755, "output_length": 500, "hash_ids": [0, 1, 2]}
{"timestamp": 3052, "input_length": 7234, "output_length": 794, "hash_ids": [0, 28]}
"""
SHAREGPT = [
    {
        "id": "a",
        "conversations": [
            {"from": "human", "value": "one two three"},
            {"from": "gpt", "value": "four five"},
            {"from": "human", "value": "six"},
            {"from": "gpt", "value": "seven"},
        ],
    },
    {"id": "b", "conversations": [{"from": "gpt", "value": "no one asked"}]},
]


def read(folder: Path, content: str | bytes, **options: object) -> Trace:
    path = folder / "trace"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_trace(path, **options)  # type: ignore[arg-type]


def test_an_azure_trace_has_arrivals_since_its_first(tmp_path: Path) -> None:
    assert read(tmp_path, AZURE).requests == (TracedRequest(0.0, 374, 44), TracedRequest(0.31941, 96, 9))


def test_times_with_offsets_are_brought_to_one_clock(tmp_path: Path) -> None:
    assert [request.arrival_s for request in read(tmp_path, WITH_OFFSETS).requests] == [0.0, 0.04107, 0.99007]


def test_a_byte_order_mark_and_gzip_change_nothing(tmp_path: Path) -> None:
    plain = read(tmp_path, AZURE)
    assert read(tmp_path, "\ufeff" + AZURE) == plain
    assert read(tmp_path, gzip.compress(("\ufeff" + AZURE).encode())) == plain
    assert read(tmp_path, AZURE.replace("\n", "\r\n")) == plain


def test_lengths_alone_are_a_trace_without_arrivals(tmp_path: Path) -> None:
    trace = read(tmp_path, "ContextTokens,GeneratedTokens\n12,4\n7,2\n")
    assert not trace.has_arrivals
    assert workload_of_trace(trace).lengths == ((12, 4), (7, 2))


def test_failed_requests_of_burstgpt_are_left_out_and_counted(tmp_path: Path) -> None:
    trace = read(tmp_path, BURSTGPT)
    assert trace.requests == (TracedRequest(0.0, 472, 18), TracedRequest(40.0, 1087, 230))
    assert trace.notes == ("trace trace: 1 requests without a prompt or an output left out",)


def test_sessions_of_burstgpt_are_kept(tmp_path: Path) -> None:
    rows = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens\n1,s7,2.0,GPT-4,10,2\n"
    assert read(tmp_path, rows).requests == (TracedRequest(0.0, 10, 2, "s7"),)


def test_a_mooncake_trace_is_in_milliseconds_and_says_what_is_not_modelled(tmp_path: Path) -> None:
    trace = read(tmp_path, MOONCAKE)
    assert trace.requests == (TracedRequest(0.0, 6755, 500), TracedRequest(3.052, 7234, 794))
    assert "prefix reuse is not modelled; 20% of the prompts' blocks" in trace.notes[0]
    assert workload_of_trace(trace).notes == trace.notes


def test_each_reply_of_a_conversation_is_a_request_with_all_before_it(tmp_path: Path) -> None:
    trace = read(tmp_path, json.dumps(SHAREGPT), tokenizer=word_tokenizer(tmp_path))
    assert trace.requests == (TracedRequest(0.0, 3, 2, "0"), TracedRequest(0.0, 6, 1, "0"))
    assert not trace.has_arrivals
    assert [note.partition(": ")[2] for note in trace.notes] == [
        "1 replies without text or prompt left out",
        "prefix reuse is not modelled; 1 of 2 requests continue a conversation",
    ]


def test_texts_need_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has texts, not lengths: give --trace-tokenizer"):
        read(tmp_path, json.dumps(SHAREGPT))


def test_lengths_are_scaled_and_the_source_says_so(tmp_path: Path) -> None:
    trace = read(tmp_path, AZURE, scale=0.1)
    assert workload_of_trace(trace).lengths == ((37, 4), (10, 1))
    assert trace.source == "trace x 0.1"


def test_requests_are_sorted_by_their_arrival(tmp_path: Path) -> None:
    rows = MOONCAKE.splitlines()
    assert read(tmp_path, "\n".join(reversed(rows))).requests == read(tmp_path, MOONCAKE).requests


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (AZURE.replace("374", "-374"), r"trace:2: ContextTokens is '-374': need 0 to"),
        (AZURE.replace(",9\n", ",nine\n"), r"trace:3: GeneratedTokens is 'nine': need a whole number"),
        (AZURE.replace("96", "96.5"), r"trace:3: ContextTokens is '96.5': need a whole number"),
        (AZURE.replace("96", "1e99"), r"trace:3: ContextTokens is '1e99': need 0 to"),
        (AZURE.replace("96", "nan"), r"trace:3: ContextTokens is 'nan': need a whole number"),
        (AZURE.replace("96,9", "96"), r"trace:3: GeneratedTokens is None: need a whole number"),
        (AZURE.replace("2023-11-16 18:15:47.0", "yesterday"), r"trace:3: TIMESTAMP is 'yesterday': need a time like"),
        (AZURE.replace("2023-11-16 18:15:47.0", "2023-13-16 18:15:47"), r"trace:3: TIMESTAMP is '2023-13"),
        (BURSTGPT.replace("45,", "-45,"), r"trace:3: Timestamp is '-45': need a number, at least 0"),
        (MOONCAKE.replace("7234", "true"), r"trace:2: input_length is True: need a whole number"),
        (MOONCAKE.replace('"input_length": 7234, ', ""), r"trace:2: input_length is None"),
        (MOONCAKE + "{", r"trace:3: not a complete JSON document"),
        ("[1]", r"trace\[0\]: need a JSON object for each request"),
        ("[" + json.dumps({"conversations": [{"from": 1}]}) + "]", r"trace\[0\]: conversations\[0\]: need an object"),
        ("", "no requests in it"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no requests in it"),
        (BURSTGPT.replace(",18,", ",0,").replace(",230,", ",0,"), "no request with a prompt and an output"),
        ("a,b\n1,2\n", r"no trace format has the columns a, b: azure has ContextTokens and GeneratedTokens; burstgpt"),
        (b"\x1f\x8bnot gzip", "cannot be read as a trace"),
        (b"\xff\xfe", "cannot be read as a trace"),
    ],
)
def test_what_no_request_can_have_is_an_error_with_its_place(
    tmp_path: Path, content: str | bytes, problem: str
) -> None:
    with pytest.raises(InputError, match=problem):
        read(tmp_path, content, tokenizer=word_tokenizer(tmp_path))


def test_a_format_that_is_named_has_to_be_the_file_s(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a burstgpt trace has Request tokens and Response tokens; this file has"):
        read(tmp_path, AZURE, kind="burstgpt")
    assert read(tmp_path, AZURE, kind="azure") == read(tmp_path, AZURE)


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"--trace-tokenizer .*tokenizer\.json: cannot be read as a tokenizer"):
        read(tmp_path, json.dumps(SHAREGPT), tokenizer=tmp_path)
