"""Serve requests over HTTP: the engine in a thread of its own, the HTTP server in the main one."""

from __future__ import annotations

import gc
import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path

import msgspec

from helixbench.errors import InputError, first_line
from helixbench.profiler.model.hash_model import HashModel
from helixbench.profiler.model.model import Model
from helixbench.reference_server.coordinator.engine import Engine
from helixbench.reference_server.http.app import ServedModel, make_app
from helixbench.reference_server.http.connection import make_server
from helixbench.reference_server.http.engine_thread import EngineThread
from helixbench.reference_server.http.options import HttpOptions
from helixbench.reference_server.http.text import Text, TokenizerLike

FILES_BESIDE_CONNECTIONS = 256


def serve_http(
    engine: Engine,
    model: Model,
    tokenizer: TokenizerLike,
    *,
    socket_fd: int,
    options: HttpOptions,
    on_ready: Callable[[], None],
) -> None:
    """Serve on a listening socket until SIGINT or SIGTERM, or until the engine fails.

    Args:
        engine: with loaded agents.
        model: that it serves.
        tokenizer: of the model.
        socket_fd: file descriptor of the socket.
        options: of the server.
        on_ready: called when all files have been read, just before the first request can come.

    Raises:
        HelixbenchError: what ended the engine.
    """
    largest = engine.coordinator.largest_request_tokens()
    served = ServedModel(
        names=options.model_names or (model.directory.name,),
        max_tokens=min(largest + 1, model.max_sequence_tokens or largest + 1),
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids(),
        is_hash_model=isinstance(model, HashModel),
    )
    text = Text(tokenizer, max_tokens=served.max_tokens)
    running = EngineThread(engine)
    app = make_app(running, text=text, model=served, options=options)
    num_files = _allow_files(options.max_connections + FILES_BESIDE_CONNECTIONS)
    num_connections = min(options.max_connections, num_files - FILES_BESIDE_CONNECTIONS)
    server = make_server(app, msgspec.structs.replace(options, max_connections=max(1, num_connections)))

    def stop_server() -> None:
        server.should_exit = True

    running.on_failure = stop_server
    server.cut_off = running.end_streams
    running.start()
    try:
        # What has been loaded stays: without this a collection walks all of it now and then, and nobody is answered.
        gc.collect()
        gc.freeze()
        on_ready()
        with socket.socket(fileno=os.dup(socket_fd)) as listener:
            server.run(sockets=[listener])
    finally:
        running.stop()
        text.close()
    if running.failure is not None:
        raise running.failure


def load_tokenizer(model: Model) -> TokenizerLike:
    """The model's tokenizer.

    Raises:
        InputError: none that the tokenizers library runs.
    """
    if isinstance(model, HashModel):
        return _number_tokenizer(model.vocab_size)
    from transformers import AutoTokenizer

    directory: Path = model.directory
    try:
        tokenizer: TokenizerLike = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of many kinds, one for each way in which files can be broken
        raise InputError(f"{directory}: transformers cannot load a tokenizer from it ({first_line(error)})") from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise InputError(f"{directory}: its tokenizer has no tokenizer.json, which serving needs; convert it first")
    return tokenizer


def _number_tokenizer(vocab_size: int) -> TokenizerLike:
    """For models without texts: a token is written as its number. Prompts of such a model are token ids, not texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {str(token): token for token in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocab=words, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain: TokenizerLike = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    return plain


def _allow_files(count: int) -> int:
    """Let the process open that many files, or as many as the system allows; how many it may open now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= count:
        return count
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted
