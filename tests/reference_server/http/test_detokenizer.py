from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from helixbench.profiler.model.synthetic import _byte_alphabet
from helixbench.reference_server.http.detokenizer import BROKEN, Detokenizer, StopMatcher, StopStrings

EMOJI = "😀😃😄👩‍👩‍👧é日本"


def byte_level() -> Any:
    """Every byte a token, its id the byte's value: the shape of Llama 3's and Qwen's tokenizers."""
    vocab = {character: byte for byte, character in enumerate(_byte_alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback() -> Any:
    """Words with a leading space, unknown characters as bytes: the shape of Llama 2's and Mistral's tokenizers."""
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)} | {"▁": 257, "a": 258, "b": 259}
    vocab |= {"▁a": 260}
    model = models.BPE(vocab=vocab, merges=[("▁", "a")], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


KINDS = {"byte-level": byte_level(), "byte-fallback": byte_fallback()}


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.one_of(st.text(), st.text(alphabet="ab " + EMOJI)), prompt=st.text(alphabet="ab é😀", max_size=12))
@example(text="😀" * 40 + "a b" * 30, prompt="")
@settings(max_examples=200, deadline=None)
def test_valid_text_comes_out_whole_and_without_broken_characters(kind: str, text: str, prompt: str) -> None:
    tokenizer = KINDS[kind]
    whole = tokenizer.encode(prompt + text).ids
    start = len(tokenizer.encode(prompt).ids) if prompt else 0
    detokenizer = Detokenizer(tokenizer, whole[:start])

    pieces = [detokenizer.push(token) for token in whole[start:]]
    end = detokenizer.flush()

    assert tokenizer.decode(whole[:start]) + "".join(pieces) + end == tokenizer.decode(whole)
    if BROKEN not in text:
        assert all(BROKEN not in piece for piece in pieces)
        assert end == ""


@settings(deadline=None)
@given(data=st.binary(max_size=120))
def test_invalid_bytes_come_out_as_the_decoder_marks_them(data: bytes) -> None:
    detokenizer = Detokenizer(KINDS["byte-level"], [])

    text = "".join([detokenizer.push(token) for token in data]) + detokenizer.flush()

    assert text == data.decode(errors="replace")


def test_a_run_of_bytes_that_never_becomes_text_is_not_held_for_ever() -> None:
    tokenizer = KINDS["byte-fallback"]
    detokenizer = Detokenizer(tokenizer, [])
    emoji = "".join(detokenizer.push(token) for token in tokenizer.encode("a😀").ids)

    noise = "".join(detokenizer.push(0xFF + 1) for _ in range(100))

    assert emoji == "a😀"
    assert len(noise) > 50
    assert set(noise) == {BROKEN}


def test_the_space_before_the_first_word_is_kept() -> None:
    tokenizer = KINDS["byte-fallback"]
    tokens = tokenizer.encode("b a").ids
    detokenizer = Detokenizer(tokenizer, tokens[:-1])
    assert detokenizer.push(tokens[-1]) == " a"


def test_a_text_that_changes_what_came_before_goes_on() -> None:
    """A broken byte after others makes all of them broken; the library gives up such a stream with an exception."""
    detokenizer = Detokenizer(KINDS["byte-fallback"], [])
    pieces = [detokenizer.push(token) for token in (0x06 + 1, 0xFD + 1, 260, 259)]
    assert pieces[0] == "\x06"
    assert pieces[2].endswith("a")
    assert pieces[3] == "b"


def test_special_tokens_give_text_where_they_are_not_skipped() -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<|end|>"])
    for skips, expected in ((True, "ab"), (False, "a<|end|>b")):
        detokenizer = Detokenizer(tokenizer, [], skip_special_tokens=skips)
        assert "".join(detokenizer.push(token) for token in (97, 256, 98)) + detokenizer.flush() == expected


def run_stops(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    """Text given until a stop or the end, and whether it stopped."""
    matcher = StopMatcher(StopStrings(stops))
    given_text = ""
    for piece in pieces:
        text, is_stopped = matcher.push(piece)
        given_text += text
        if is_stopped:
            return given_text, True
    return given_text + matcher.flush(), False


@given(
    text=st.text(alphabet="ab", max_size=30),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=6),
)
def test_stop_strings_end_the_text_wherever_it_is_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]
    ends = {stop: text.find(stop) + len(stop) for stop in stops if stop in text}

    given_text, is_stopped = run_stops(stops, pieces)

    assert is_stopped == bool(ends)
    # The first string that is complete stops; of several that end there the one that began first.
    end = min(ends.values(), default=len(text))
    assert given_text == text[: end - max((len(stop) for stop in stops if ends.get(stop) == end), default=0)]


def test_text_that_begins_no_stop_string_is_given_at_once() -> None:
    matcher = StopMatcher(StopStrings(["END"]))
    assert matcher.push("hello E") == ("hello ", False)
    assert matcher.push("x") == ("Ex", False)
    assert matcher.push("EN") == ("", False)
    assert matcher.push("D!") == ("", True)
