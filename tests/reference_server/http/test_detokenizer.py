from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from helixbench.profiler.model.synthetic import _byte_alphabet
from helixbench.reference_server.http.detokenizer import BROKEN, Detokenizer, StopStrings

EMOJI = "😀😃😄👩‍👩‍👧é日本"


def byte_level() -> tuple[Callable[[str], list[int]], Callable[[list[int]], str]]:
    """Every byte a token, its id the byte's value: the shape of Llama 3's and Qwen's tokenizers."""
    vocab = {character: byte for byte, character in enumerate(_byte_alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return lambda text: tokenizer.encode(text).ids, tokenizer.decode


def byte_fallback() -> tuple[Callable[[str], list[int]], Callable[[list[int]], str]]:
    """Words with a leading space, unknown characters as bytes: the shape of Llama 2's and Mistral's tokenizers."""
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)} | {"▁": 257, "a": 258, "b": 259}
    vocab |= {"▁a": 260}
    model = models.BPE(vocab=vocab, merges=[("▁", "a")], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return lambda text: tokenizer.encode(text).ids, tokenizer.decode


KINDS = {"byte-level": byte_level(), "byte-fallback": byte_fallback()}


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.one_of(st.text(), st.text(alphabet="ab " + EMOJI)), prompt=st.text(alphabet="ab é😀", max_size=12))
@example(text="😀" * 40 + "a b" * 30, prompt="")
@settings(max_examples=200, deadline=None)
def test_valid_text_comes_out_whole_and_without_broken_characters(kind: str, text: str, prompt: str) -> None:
    encode, decode = KINDS[kind]
    whole = encode(prompt + text)
    start = len(encode(prompt)) if prompt else 0
    detokenizer = Detokenizer(decode, whole[:start])

    pieces = [detokenizer.push(token) for token in whole[start:]]
    end = detokenizer.flush()

    assert decode(whole[:start]) + "".join(pieces) + end == decode(whole)
    if BROKEN not in text:
        assert all(BROKEN not in piece for piece in pieces)
        assert end == ""


@settings(deadline=None)
@given(data=st.binary(max_size=120))
def test_invalid_bytes_come_out_as_the_decoder_marks_them(data: bytes) -> None:
    _, decode = KINDS["byte-level"]
    detokenizer = Detokenizer(decode, [])

    text = "".join([detokenizer.push(token) for token in data]) + detokenizer.flush()

    assert text == data.decode(errors="replace")


def test_a_run_of_bytes_that_never_becomes_text_is_not_held_for_ever() -> None:
    encode, decode = KINDS["byte-fallback"]
    detokenizer = Detokenizer(decode, [])
    emoji = "".join(detokenizer.push(token) for token in encode("a😀"))

    noise = "".join(detokenizer.push(0xFF + 1) for _ in range(100))

    assert emoji == "a😀"
    assert len(noise) > 50
    assert set(noise) == {BROKEN}


def test_the_space_before_the_first_word_is_kept() -> None:
    encode, decode = KINDS["byte-fallback"]
    tokens = encode("b a")
    detokenizer = Detokenizer(decode, tokens[:-1])
    assert detokenizer.push(tokens[-1]) == " a"


def test_the_cost_of_a_token_does_not_grow_with_the_sequence() -> None:
    encode, decode = KINDS["byte-level"]
    longest = 0

    def watched(tokens: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return decode(tokens)

    detokenizer = Detokenizer(watched, encode("x" * 1000))
    for token in encode("日本語 " * 500):
        detokenizer.push(token)

    assert longest < 64


def run_stops(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    """Text given until a stop or the end, and whether it stopped."""
    matcher = StopStrings(stops)
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
    found = [text.find(stop) for stop in stops if stop in text]

    given_text, is_stopped = run_stops(stops, pieces)

    assert is_stopped == bool(found)
    if not found:
        assert given_text == text
    else:
        # The first string that is complete stops; a longer one may have begun before it.
        assert text.startswith(given_text)
        assert min(found) <= len(given_text) <= max(found)
        assert any(text[len(given_text) :].startswith(stop) for stop in stops)


def test_text_that_begins_no_stop_string_is_given_at_once() -> None:
    matcher = StopStrings(["END"])
    assert matcher.push("hello E") == ("hello ", False)
    assert matcher.push("x") == ("Ex", False)
    assert matcher.push("EN") == ("", False)
    assert matcher.push("D!") == ("", True)
