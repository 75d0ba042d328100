"""The commands ``cluster status`` and ``cluster drain``: the nodes of a running server."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Annotated, Any

import typer

from helixbench.errors import InputError, MeasurementError
from helixbench.options import AsJson
from helixbench.reference_server.http.options import API_KEY_VARIABLE

TIMEOUT_S = 10.0

Url = Annotated[str, typer.Option("--url", help="of the server, as `serve` printed it")]
ApiKey = Annotated[str, typer.Option("--api-key", envvar=API_KEY_VARIABLE, help="where the server requires one")]


def status(url: Url = "http://127.0.0.1:8000", api_key: ApiKey = "", as_json: AsJson = False) -> None:
    """Show how the nodes of a running server stand. Exit code 1 where it serves no requests."""
    health = _ask(url, "GET", "/health", api_key)
    if as_json:
        print(json.dumps(health))
    else:
        for node, at in health["nodes"].items():
            age = "" if at["progress_age_s"] is None else f", last iteration {at['progress_age_s']:.1f} s ago"
            safe = ": safe to remove" if at["state"] == "drained" else ""
            print(f"{node:<16} {at['state']:<12} {at['ratio']:.2f} of the predicted time{age}{safe}")
        print(health["status"] + (f": {health['detail']}" if health["detail"] else ""))
    if health["status"] != "ready":
        raise typer.Exit(1)


def drain(
    node: Annotated[str, typer.Argument(help="the node that is to take no new requests")],
    url: Url = "http://127.0.0.1:8000",
    api_key: ApiKey = "",
    as_json: AsJson = False,
) -> None:
    """Have a node of a running server take no new requests, so that it can be removed once it has none."""
    answer = _ask(url, "POST", f"/cluster/drain/{node}", api_key)
    if as_json:
        print(json.dumps(answer))
    else:
        print(f"{node}: {answer['state']}; `helixbench cluster status --url {url}` says when it is safe to remove")


def _ask(url: str, method: str, path: str, api_key: str) -> dict[str, Any]:
    """The JSON object of the answer.

    Raises:
        InputError: the server refuses.
        MeasurementError: nothing answers there.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    request = urllib.request.Request(url.rstrip("/") + path, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            body: dict[str, Any] = json.load(answer)
            return body
    except urllib.error.HTTPError as error:
        body = json.load(error)
        if "nodes" in body:  # a server that is down says so with 503
            return body
        raise InputError(f"{url}: {body['error']['message']}") from error
    except (OSError, ValueError) as error:
        raise MeasurementError(f"{url}: no helixbench server answers there ({error}); is it started?") from error
