"""Text to tokens and back. What takes long is done beside the event loop, so that nobody else waits for it."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from helixbench.reference_server.http.detokenizer import Detokenizer
from helixbench.reference_server.http.openai.errors import ProtocolError
from helixbench.reference_server.http.openai.requests import Conversation, Prompt

ResultT = TypeVar("ResultT")

SHORT_CHARACTERS = 2**16  # a batch of texts to tokenise; longer ones wait for each other in a lane of their own
KNOWN_TOKEN_TEXTS = 2**16
ANCHOR = "a"


class TokenizerLike(Protocol):
    """What is used of transformers' tokenizers."""

    backend_tokenizer: Any  # tokenizers.Tokenizer
    chat_template: str | None

    def apply_chat_template(self, conversation: Sequence[dict[str, str]], *, tokenize: bool, **arguments: Any) -> Any:
        """The conversation as one text."""
        ...


class Text:
    """The tokenizer of a model.

    Args:
        tokenizer: transformers' own.
        max_tokens: of a prompt; texts that cannot be that few are refused before they are tokenised.
    """

    def __init__(self, tokenizer: TokenizerLike, *, max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()  # a tokenizer file may say to cut or fill up
        self._backend.no_padding()
        self.vocab_size: int = self._backend.get_vocab_size()
        longest_token = max(len(token) for token in self._backend.get_vocab())
        self.max_characters = max_tokens * longest_token
        # Two lanes of one thread each: a short prompt never waits for a long one to be tokenised.
        self._short = ThreadPoolExecutor(1, thread_name_prefix="tokenise-short")
        self._long = ThreadPoolExecutor(1, thread_name_prefix="tokenise-long")
        # Arguments of transformers' own method, which the template does not see.
        self._reserved = frozenset(inspect.signature(tokenizer.apply_chat_template).parameters)
        self._anchor: list[int] = self._backend.encode(ANCHOR, add_special_tokens=False).ids[-1:]
        self._anchor_text = self.decode(self._anchor, skip_special_tokens=False)
        self.token_text = functools.lru_cache(KNOWN_TOKEN_TEXTS)(self._token_text)

    def close(self) -> None:
        """End the threads."""
        self._short.shutdown(cancel_futures=True)
        self._long.shutdown(cancel_futures=True)

    async def aside(self, work: Callable[[], ResultT], size: int) -> ResultT:
        """The result of ``work`` on input of that many bytes or characters; in another thread where it is large."""
        if size <= SHORT_CHARACTERS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._long, work)

    async def encode(self, prompts: Sequence[Prompt], *, add_special_tokens: bool) -> list[tuple[int, ...]]:
        """Token ids of each prompt.

        Texts go to the threads in small batches, one after the other, so that another request's get their turn.

        Raises:
            ProtocolError: 400, a text that is too long for any context, or a conversation that the template refuses.
        """
        texts = [await self._render(one) if isinstance(one, Conversation) else one for one in prompts]
        tokens: list[tuple[int, ...]] = []
        batch: list[str] = []
        for text in texts:
            if not isinstance(text, str):
                tokens.append(text)
                continue
            self._require_possible(text)
            tokens.append(())
            batch.append(text)
        encoded: list[tuple[int, ...]] = []
        start = 0
        while start < len(batch):
            end, size = start, 0
            while end < len(batch) and (end == start or size + len(batch[end]) <= SHORT_CHARACTERS):
                size += len(batch[end])
                end += 1
            encode = functools.partial(self._encode, batch[start:end], add_special_tokens)
            lane = self._short if size <= SHORT_CHARACTERS else self._long
            encoded += await asyncio.get_running_loop().run_in_executor(lane, encode)
            start = end
        of_texts = iter(encoded)
        return [next(of_texts) if isinstance(text, str) else ids for text, ids in zip(texts, tokens, strict=True)]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of token ids; those that the tokenizer does not have give none."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def detokenizer(self, prompt: Sequence[int], *, skip_special_tokens: bool) -> Detokenizer:
        """Decodes an output that continues ``prompt``."""
        return Detokenizer(self._backend, prompt, skip_special_tokens=skip_special_tokens)

    def _token_text(self, token: int) -> str:
        """Text of one token inside a text: some decoders take the space off a text's beginning."""
        text = self.decode([*self._anchor, token], skip_special_tokens=False)
        return text[len(self._anchor_text) :] if text.startswith(self._anchor_text) else text

    def _encode(self, texts: list[str], add_special_tokens: bool) -> list[tuple[int, ...]]:
        # Of the ways to encode this one lets other threads run meanwhile, and spares the offsets.
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return [tuple(encoding.ids) for encoding in encodings]

    async def _render(self, conversation: Conversation) -> str:
        if self._tokenizer.chat_template is None:
            message = "this model's tokenizer has no chat template; use /v1/completions"
            raise ProtocolError(400, message, param="messages", code="no_chat_template")
        size = sum(len(text) for message in conversation.messages for text in message.values())
        return await self.aside(functools.partial(self._apply_template, conversation), size)

    def _apply_template(self, conversation: Conversation) -> str:
        arguments = conversation.template_arguments
        reserved = self._reserved & set(arguments)
        if reserved:
            message = f"chat_template_kwargs: {min(reserved)} is not for the template"
            raise ProtocolError(400, message, param="chat_template_kwargs")
        try:
            rendered: str = self._tokenizer.apply_chat_template(
                list(conversation.messages),
                tokenize=False,
                add_generation_prompt=conversation.add_generation_prompt,
                continue_final_message=conversation.continue_final_message,
                **arguments,
            )
        except Exception as error:  # templates raise what they like, in the model's author's words
            raise ProtocolError(400, f"messages: the chat template refuses them: {error}", param="messages") from error
        return rendered

    def _require_possible(self, text: str) -> None:
        if len(text) > self.max_characters:
            raise ProtocolError(
                400,
                f"prompt of {len(text)} characters; {self._max_tokens} tokens, which this server takes at most, have "
                f"{self.max_characters} at most",
                param="prompt",
                code="context_length_exceeded",
            )
