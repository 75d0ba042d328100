from __future__ import annotations

import gc
import math
import re
import shutil
import weakref
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from helixbench.profiler.model.files import ModelFiles
from helixbench.profiler.stage.stage import Stage
from helixbench.reference_server.node.runtime import NodeRuntime, Outbound
from helixbench.reference_server.node.torch_runner import TorchRunner, tensor_bytes, torch_stage
from helixbench.reference_server.wire.messages import CannotReplay, RequestsFailed, Sampled, Work
from helixbench.solver.problem.plan import Hop
from helixbench.solver.scheduling.gather import WAIT_SHARE
from helixbench.solver.scheduling.work import OpenRequest, SamplingParams, WorkItem, attempt_of
from tests.conftest import GreedyOf, ModelDir
from tests.greedy import load_whole

HIDDEN = 64


def runtime(directory: Path, start: int = 0, end: int = 6, *, kv_capacity_tokens: int = 256) -> NodeRuntime:
    stage = Stage(
        ModelFiles(str(directory)),
        start=start,
        end=end,
        kv_capacity_tokens=kv_capacity_tokens,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    return NodeRuntime("here", TorchRunner(stage), max_batch_tokens=8)


@pytest.fixture
def whole(model_dir: ModelDir) -> NodeRuntime:
    return runtime(model_dir("test-llama"))


@pytest.fixture
def middle(model_dir: ModelDir) -> NodeRuntime:
    return runtime(model_dir("test-llama"), 2, 4)


def opened(request: int, *hops: Hop, kv_tokens: int = 20, sampling: SamplingParams | None = None) -> OpenRequest:
    return OpenRequest(request, hops or (Hop("here", 0, 6),), kv_tokens, sampling or SamplingParams())


def ids(*tokens: int) -> bytes:
    return np.array(tokens, dtype=np.int32).tobytes()


def states(num_tokens: int) -> bytes:
    return np.zeros((num_tokens, HIDDEN), dtype=np.float32).tobytes()


def prompt_item(request: int, num_tokens: int, *, past: int = 0, sample: bool = True) -> WorkItem:
    return WorkItem(request, past, num_tokens, sample=sample, is_decode=False)


def run_all(node: NodeRuntime) -> list[Outbound]:
    outbound = []
    while node.has_work:
        outbound += node.run_batch({True: 0, False: 0})
    return outbound


def generate(node: NodeRuntime, request: int, prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    """Tokens of one request, as a coordinator would have them made."""
    kv_tokens = len(prompt) + num_tokens - 1
    node.accept(
        Work(items=(prompt_item(request, len(prompt)),), opens=(opened(request, kv_tokens=kv_tokens),)), ids(*prompt)
    )
    tokens: list[int] = []
    while len(tokens) < num_tokens:
        for out in run_all(node):
            assert isinstance(out.message, Sampled)
            tokens += [token for _, token in out.message.tokens]
        if len(tokens) < num_tokens:
            past = len(prompt) + len(tokens) - 1
            node.accept(Work(items=(WorkItem(request, past, 1, sample=True, is_decode=True),)), ids(tokens[-1]))
    node.accept(Work(closes=(request,)), None)
    return tokens


def work(*items: WorkItem, **fields: Any) -> Work:
    return Work(items=items, **fields)


# (what is wrong, the work, its payload, the message)
BAD_WORK = [
    (work(prompt_item(1, 3)), ids(40, 41), "need 12 bytes of int32 for 3 tokens, got 8 bytes of int32"),
    (work(prompt_item(1, 3)), ids(40, 41, 42) + b"x", "need 12 bytes .* got 13 bytes"),
    (work(prompt_item(1, 3)), None, "got nothing of int32"),
    (work(prompt_item(1, 3), dtype="float16"), ids(1, 2, 3), "need 768 bytes of float32 .* of float16"),
    (work(prompt_item(1, 3), dtype="pickle"), ids(1, 2, 3), "got 12 bytes of pickle"),
    (work(prompt_item(1, 3), dtype="float32"), states(3), "enters at layer 0, but sends hidden states"),
    (work(prompt_item(1, 2)), ids(40, 320), r"a token id is not in \[0,320\)"),
    (work(prompt_item(1, 2)), ids(-1, 40), r"a token id is not in \[0,320\)"),
    (work(prompt_item(1, 0)), b"", "request 1 sends no possible tokens"),
    (work(prompt_item(1, 3), prompt_item(1, -1)), ids(40, 41), "request 1 sends no possible tokens"),
    (work(prompt_item(1, 1, past=-1)), ids(40), "request 1 sends no possible tokens"),
    (work(WorkItem(1, 3, 2, sample=True, is_decode=True)), ids(40, 41), "request 1 sends no possible tokens"),
    (work(prompt_item(1, 21)), ids(*range(40, 61)), r"sends tokens 0\+21, beyond its 20 KV slots"),
    (work(prompt_item(1, 1, past=20)), ids(40), r"sends tokens 20\+1, beyond its 20 KV slots"),
    (work(opens=(opened(1),)), None, "request 1 has KV slots already"),
    (work(opens=(opened(2, kv_tokens=237),)), None, "request 2 wants 237 KV slots; 236 of 256 are free"),
    (work(opens=(opened(2, kv_tokens=0),)), None, "request 2 wants 0 KV slots"),
    (work(opens=(opened(2, Hop("there", 0, 6)),)), None, "request 2 passes here 0 times"),
    (work(opens=(opened(2, Hop("here", 0, 3), Hop("here", 3, 6)),)), None, "request 2 passes here 2 times"),
    (work(opens=(opened(2, Hop("here", 0, 5)),)), None, r"holds \[0,6\) and cannot run \[0,5\)"),
    (work(opens=(opened(2, Hop("here", 6, 6)),)), None, r"cannot run \[6,6\)"),
    (work(opens=(opened(2, Hop("here", -1, 6)),)), None, r"cannot run \[-1,6\)"),
    (work(opens=(msgspec.structs.replace(opened(2), adopts=7),)), None, "attempt 2 adopts 7, which is not open here"),
]


@pytest.fixture(scope="module")
def one_for_all(model_dir: ModelDir) -> NodeRuntime:
    """A node that is told everything bad, one after the other."""
    return runtime(model_dir("test-llama"))


@pytest.mark.parametrize(("bad", "payload", "message"), BAD_WORK)
def test_bad_work_is_refused_and_others_are_served(
    one_for_all: NodeRuntime, greedy_of: GreedyOf, bad: Work, payload: bytes | None, message: str
) -> None:
    node = one_for_all
    node.accept(Work(opens=(opened(1),)), None)

    (out,) = node.accept(bad, payload)

    assert out.peer is None
    assert isinstance(out.message, RequestsFailed)
    assert set(out.message.attempts) == {item.request for item in bad.items} | {o.request for o in bad.opens}
    assert re.search(message, out.message.message)
    assert not node.has_work
    assert node.runner.kv.used_tokens == 20, "those of request 1"
    reference = next(one for one in greedy_of("test-llama") if len(one.prompt) < 12 and len(one.output) > 3)
    assert generate(node, 5, reference.prompt, 4) == list(reference.output[:4])
    node.accept(Work(closes=(1,)), None)


def test_token_ids_do_not_enter_at_a_later_layer(middle: NodeRuntime) -> None:
    middle.accept(Work(opens=(opened(1, Hop("here", 3, 4), Hop("next", 4, 6)),)), None)

    (out,) = middle.accept(work(prompt_item(1, 2)), ids(40, 41))

    assert out.message == RequestsFailed((1,), "request 1 enters at layer 3, but sends token ids")
    assert not middle.has_work


def test_what_is_late_is_dropped_and_counted(whole: NodeRuntime) -> None:
    """Work of a request that was closed while it waited here, or while it was on its way; a second close."""
    whole.accept(work(prompt_item(1, 12), opens=(opened(1),)), ids(*range(40, 52)))
    whole.accept(Work(closes=(1,)), None)
    assert not whole.has_work

    assert whole.accept(work(prompt_item(1, 2)), ids(40, 41)) == []
    assert whole.accept(Work(closes=(1,)), None) == []

    assert not whole.has_work
    assert whole.num_dropped == 2


def test_a_pipeline_that_ends_too_early_is_refused(middle: NodeRuntime) -> None:
    (out,) = middle.accept(Work(opens=(opened(1, Hop("here", 2, 4)),)), None)

    assert out.message == RequestsFailed((1,), "request 1: its pipeline ends at layer 4, before the model does")
    assert middle.runner.kv.used_tokens == 0


def test_work_that_nobody_opens_is_kept_within_a_bound(middle: NodeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helixbench.reference_server.node.runtime.MAX_EARLY_BYTES", 3 * 2 * HIDDEN * 4)

    going = [middle.accept(work(prompt_item(n, 2, sample=False), dtype="float32"), states(2)) for n in range(4)]

    assert going[:3] == [[], [], []]
    assert going[3][0].message == RequestsFailed((0,), "its work came, and nobody opened it")
    middle.accept(Work(opens=tuple(opened(n, Hop("here", 2, 4), Hop("next", 4, 6)) for n in (1, 2, 3))), None)
    assert {item.request for out in run_all(middle) for item in sent(out)} == {1, 2, 3}


def sent(out: Outbound) -> tuple[WorkItem, ...]:
    assert isinstance(out.message, Work)
    return out.message.items


def test_a_new_attempt_takes_over_cache_and_kept_states(middle: NodeRuntime) -> None:
    """What it replays is what it sent; positions that the next nodes have are not sent again."""
    hidden = torch.randn((5, HIDDEN))
    hops = (Hop("here", 2, 4), Hop("next", 4, 6))
    middle.accept(work(prompt_item(1, 4), opens=(opened(1, *hops),), dtype="float32"), tensor_bytes(hidden[:4]))
    before = [bytes(out.payload or b"") for out in run_all(middle)]
    again, on = attempt_of(1, 1), attempt_of(1, 2)

    (replay,) = middle.accept(Work(opens=(msgspec.structs.replace(opened(again, *hops), adopts=1, replays=4),)), None)
    assert (replay.peer, sent(replay)) == ("next", (WorkItem(again, 0, 4, sample=False, is_decode=False),))
    assert bytes(replay.payload or b"") == b"".join(before)
    assert middle.runner.kv.used_tokens == 20

    (missing,) = middle.accept(Work(opens=(msgspec.structs.replace(opened(on, *hops), adopts=again, replays=5),)), None)
    assert missing.message == CannotReplay(on)

    third = attempt_of(1, 3)
    middle.accept(Work(opens=(msgspec.structs.replace(opened(third, *hops), adopts=on, deliver_from=4),)), None)
    middle.accept(work(prompt_item(third, 5), dtype="float32"), tensor_bytes(hidden))
    (out,) = run_all(middle)
    assert sent(out) == (WorkItem(third, 4, 1, sample=True, is_decode=False),)
    assert len(out.payload or b"") == HIDDEN * 4


def test_work_that_comes_before_its_request_is_opened_waits(middle: NodeRuntime) -> None:
    middle.accept(work(prompt_item(1, 2, sample=False), dtype="float32"), states(2))
    middle.accept(work(prompt_item(1, 3, past=2), dtype="float32"), states(3))
    assert not middle.has_work

    middle.accept(Work(opens=(opened(1, Hop("here", 2, 4), Hop("next", 4, 6)),)), None)

    (out,) = run_all(middle)
    assert out.peer == "next"
    assert isinstance(out.message, Work)
    assert [(item.past, item.num_tokens, item.sample) for item in out.message.items] == [(0, 2, False), (2, 3, True)]


def test_a_batch_is_split_by_the_nodes_that_it_goes_on_to(middle: NodeRuntime) -> None:
    to = {request: f"next-{request % 2}" for request in range(4)}
    middle.accept(
        Work(opens=tuple(opened(n, Hop("here", 2 + n // 2, 4), Hop(node, 4, 6)) for n, node in to.items())), None
    )
    hidden = torch.randn((4, 2, HIDDEN))
    for request in to:
        middle.accept(work(prompt_item(request, 2), dtype="float32"), tensor_bytes(hidden[request]))

    together = {out.peer: out for out in run_all(middle)}

    assert set(together) == {"next-0", "next-1"}
    for peer, out in together.items():
        assert isinstance(out.message, Work)
        assert [to[item.request] for item in out.message.items] == [peer, peer]
        assert out.tokens == 4
        assert out.payload is not None
        rows = torch.frombuffer(bytearray(out.payload), dtype=torch.float32).view(2, 2, HIDDEN)
        for item, row in zip(out.message.items, rows, strict=True):
            alone = runtime_of_one(middle, hidden[item.request], entry=2 + item.request // 2)
            assert torch.allclose(row, alone, atol=1e-5)


def runtime_of_one(node: NodeRuntime, hidden: torch.Tensor, *, entry: int) -> torch.Tensor:
    node.accept(
        work(prompt_item(99, 2), opens=(opened(99, Hop("here", entry, 4), Hop("next", 4, 6)),), dtype="float32"),
        tensor_bytes(hidden),
    )
    (out,) = run_all(node)
    node.accept(Work(closes=(99,)), None)
    assert out.payload is not None
    return torch.frombuffer(bytearray(out.payload), dtype=torch.float32).view(2, HIDDEN)


def test_sampling_repeats_with_its_seed_and_differs_without(whole: NodeRuntime) -> None:
    def first_tokens(seed: int | None) -> list[int]:
        tokens = []
        for request in range(8):
            sampling = SamplingParams(temperature=1.5, seed=seed)
            whole.accept(work(prompt_item(request, 3), opens=(opened(request, sampling=sampling),)), ids(40, 41, 42))
            (out,) = run_all(whole)
            assert isinstance(out.message, Sampled)
            tokens += [token for _, token in out.message.tokens]
            whole.accept(Work(closes=(request,)), None)
        return tokens

    assert len(set(first_tokens(11))) == 1
    assert len(set(first_tokens(None))) > 1, "each request draws with a seed of its own"
    assert first_tokens(None) == first_tokens(None)


def test_stop_tokens_are_not_sampled_before_their_position(whole: NodeRuntime, greedy_of: GreedyOf) -> None:
    reference = next(one for one in greedy_of("test-llama") if len(one.prompt) < 12 and len(one.output) > 3)
    length = len(reference.prompt)

    def first_token(stop_from: int) -> int:
        asked = OpenRequest(1, (Hop("here", 0, 6),), 20, SamplingParams(), stop_from, reference.output[:1])
        whole.accept(work(prompt_item(1, length), opens=(asked,)), ids(*reference.prompt))
        *_, out = run_all(whole)
        assert isinstance(out.message, Sampled)
        whole.accept(Work(closes=(1,)), None)
        return out.message.tokens[0][1]

    assert first_token(length) == reference.output[0]
    assert first_token(length + 1) != reference.output[0]


def test_prompt_and_output_are_scored_as_the_whole_model_scores_them(whole: NodeRuntime, model_dir: ModelDir) -> None:
    """A prompt of three chunks beside one that wants no scores."""
    prompt = tuple(range(40, 59))
    sampling = SamplingParams(num_logprobs=2)
    asked = OpenRequest(1, (Hop("here", 0, 6),), 20, sampling, scored=prompt)
    whole.accept(
        work(prompt_item(2, 5), prompt_item(1, len(prompt)), opens=(opened(2), asked)), ids(*range(60, 65), *prompt)
    )

    sampled = [out.message for out in run_all(whole) if isinstance(out.message, Sampled)]

    assert [message.scores for message in sampled[:-1]] == [()] * (len(sampled) - 1)
    (scores,) = sampled[-1].scores
    (token,) = [token for request, token in sampled[-1].tokens if request == 1]
    with torch.inference_mode():
        expected = load_whole(model_dir("test-llama"))(torch.tensor([prompt])).logits[0].log_softmax(-1)  # [T, V]
    assert [one.logprob for one in (*scores.prompt, scores.output)] == pytest.approx(
        expected[torch.arange(len(prompt)), torch.tensor([*prompt[1:], token])].tolist(), abs=1e-4
    )
    best = expected.topk(2, dim=-1)
    assert [[token for token, _ in one.top] for one in (*scores.prompt, scores.output)] == best.indices.tolist()
    whole.accept(Work(closes=(1, 2)), None)
    assert whole.runner._prompt_scores == {}  # type: ignore[attr-defined]


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=1.0, seed=3)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_end_their_request_alone(
    model_dir: ModelDir, tmp_path: Path, value: float, sampling: SamplingParams
) -> None:
    """One row of the embedding is spoilt; the request with that token runs in one batch with two others."""
    directory = tmp_path / "model"
    shutil.copytree(model_dir("test-llama"), directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.embed_tokens.weight"][200] = value
    save_file(tensors, directory / "model.safetensors")
    prompts = {1: (65, 66), 2: (65, 200, 66), 3: (70,)}

    def first_tokens(numbers: tuple[int, ...]) -> list[Outbound]:
        node = runtime(directory)
        items = tuple(prompt_item(number, len(prompts[number])) for number in numbers)
        opens = tuple(opened(number, sampling=sampling) for number in numbers)
        failed = node.accept(Work(items=items, opens=opens), ids(*(t for number in numbers for t in prompts[number])))
        return failed + run_all(node)

    sampled, failed = first_tokens((1, 2, 3))
    alone = [token for number in (1, 3) for out in first_tokens((number,)) for token in out.message.tokens]

    assert isinstance(sampled.message, Sampled)
    assert list(sampled.message.tokens) == alone
    assert isinstance(failed.message, RequestsFailed)
    assert failed.message.attempts == (2,)
    assert "logits are not finite" in failed.message.message


def test_tokens_are_counted_as_prompt_and_decode(whole: NodeRuntime) -> None:
    counted = {True: 0, False: 0}
    whole.accept(work(prompt_item(1, 11), opens=(opened(1),)), ids(*range(40, 51)))
    while whole.has_work:
        whole.run_batch(counted)
    whole.accept(work(WorkItem(1, 11, 1, sample=True, is_decode=True)), ids(40))
    whole.run_batch(counted)

    assert counted == {True: 1, False: 11}


def test_a_batch_is_waited_for_from_when_it_is_let_go(whole: NodeRuntime) -> None:
    """A share of the whole iteration's time: what it takes here, and for how long an emulated device holds it back."""
    times = iter([100.0, 110.0])  # it begins, and ends
    whole._clock = lambda: next(times)
    whole.accept(work(prompt_item(1, 3), opens=(opened(1),)), ids(40, 41, 42))
    whole.run_batch({True: 0, False: 0})
    whole.ended()

    times = iter([110.0, 110.0 + 0.9 * WAIT_SHARE * 10, 110.0 + 1.1 * WAIT_SHARE * 10])
    assert whole.wait_s() == pytest.approx(WAIT_SHARE * 10)
    assert whole.wait_s() > 0
    assert whole.wait_s() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_raw_bytes_give_the_tensor_back(dtype: torch.dtype) -> None:
    tensor = torch.randn((5, 4)).to(dtype).T  # not contiguous
    raw = tensor_bytes(tensor)
    assert torch.equal(torch.frombuffer(bytearray(raw), dtype=dtype).view(4, 5), tensor)


def test_a_dropped_stage_is_gone(whole: NodeRuntime) -> None:
    generate(whole, 1, (3, 4), 2)
    stage = weakref.ref(torch_stage(whole))
    whole.runner.drop()
    gc.collect()
    assert stage() is None
