"""The commands that run a model: `run` and `serve`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantmill import terminal
from quantmill.arguments import JsonOption, NameArgument, StoreOption
from quantmill.errors import BadRequest

if TYPE_CHECKING:
    from quantmill.generate import Chat


def run_model(
    name: NameArgument,
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="Without it, a conversation.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, metavar="N", help="Tokens at most.")
    ] = 256,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 takes the likeliest token each time.")
    ] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    store: StoreOption = None,
    json_output: JsonOption = False,
) -> None:
    """Generate text from a stored model, or from a directory, with mlx-lm."""
    chat = _chat(name, store)
    messages = [{"role": "system", "content": system}] if system else []
    if prompt is not None:
        _answer(chat, [*messages, _user(prompt)], max_tokens, temperature, seed, json_output)
        return
    if json_output:
        raise BadRequest("--json needs a prompt", hint="a conversation is for people")
    for line in terminal.lines_typed():
        messages.append(_user(line))
        text = _answer(chat, messages, max_tokens, temperature, seed, False)
        messages.append({"role": "assistant", "content": text})


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _chat(name: str, store: Path | None) -> Chat:
    from quantmill import blas

    blas.preload()  # before anything loads MLX
    from quantmill.generate import Chat
    from quantmill.load import open_model
    from quantmill.store import Store

    with open_model(name, store=Store(store)) as model:
        return Chat(model)


def _answer(
    chat: Chat,
    messages: list[dict[str, str]],
    max_tokens: int,
    temperature: float,
    seed: int | None,
    json_output: bool,
) -> str:
    text, last = "", None
    for piece in chat.stream(messages, max_tokens=max_tokens, temperature=temperature, seed=seed):
        text, last = text + piece.text, piece
        if not json_output:
            terminal.print_part(piece.text)
    if json_output:
        from quantmill.report import answer_json

        terminal.print_json(answer_json(text, last))
    else:
        terminal.print_part("\n")
    return text


def serve(
    name: NameArgument,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8080,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, metavar="N", help="Tokens at most.")
    ] = 512,
    store: StoreOption = None,
) -> None:
    """Put a model behind mlx-lm's OpenAI-compatible HTTP server."""
    from quantmill import blas

    blas.preload()
    from quantmill import generate
    from quantmill.load import open_model
    from quantmill.store import Store

    with open_model(name, store=Store(store)) as model:
        chat = generate.Chat(model)
    print(f"serving {name} at http://{host}:{port}/v1", file=sys.stderr)
    # mlx-lm's server knows how to stop at an interrupt: a polite kill is to mean the same
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    generate.serve(chat, name, host=host, port=port, max_tokens=max_tokens)
    sys.stderr.flush()
    os._exit(0)  # MLX aborts while its threads are torn down; everything is stopped by now
