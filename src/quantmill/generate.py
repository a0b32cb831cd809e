"""Generate text from an open model with mlx-lm, and serve it over HTTP."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from quantmill import mlxlm
from quantmill.errors import BadRequest
from quantmill.model import Model

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of generated text; the last one says why it ended and how fast it was."""

    text: str
    token: int
    finish_reason: str | None
    prompt_tokens: int
    generated_tokens: int
    tokens_per_second: float


class Chat:
    """A model ready to generate: mlx-lm's module and tokenizer, built once from stored weights."""

    def __init__(self, model: Model) -> None:
        mlxlm.require_mlx_lm()
        self.model, self.config = mlxlm.build(model, activation_dtype())
        self.tokenizer = mlxlm.tokenizer_for(model, self.config)

    def prompt_tokens(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a conversation by the chat template, or of its last message without one."""
        if getattr(self.tokenizer, "chat_template", None) is None:
            return list(self.tokenizer.encode(messages[-1]["content"]))
        return list(self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True))

    def stream(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> Iterator[Piece]:
        """Generate an answer to a conversation, piece by piece.

        `temperature` 0 takes the likeliest token each time. `seed` makes sampling repeatable.
        """
        from mlx_lm import stream_generate
        from mlx_lm.sample_utils import make_sampler

        if max_tokens < 1:
            raise BadRequest(f"cannot generate {max_tokens} tokens")
        if seed is not None:
            mx.random.seed(seed)
        tokens = self.prompt_tokens(messages)
        for found in stream_generate(
            self.model,
            self.tokenizer,
            tokens,
            max_tokens=max_tokens,
            sampler=make_sampler(temp=temperature),
        ):
            yield Piece(
                found.text,
                int(found.token),
                found.finish_reason,
                found.prompt_tokens,
                found.generation_tokens,
                found.generation_tps,
            )


def activation_dtype() -> mx.Dtype | None:
    """Float32 on a CPU, where MLX emulates bf16 in software; as stored elsewhere."""
    return mx.float32 if mx.default_device() == mx.Device(mx.cpu) else None


def serve(
    chat: Chat, name: str, *, host: str = "127.0.0.1", port: int = 8080, max_tokens: int = 512
) -> None:
    """Put a model behind mlx-lm's OpenAI-compatible server until interrupted.

    Requests may name the model `name` or leave it out; other names are refused, so that a request
    cannot make the server fetch a model.
    """
    from mlx_lm import server

    class Provider(server.ModelProvider):
        """Serves the one model that is built already."""

        def _load(self, model_path: str, *_: Any) -> None:
            if model_path not in {name, None}:
                raise ValueError(f"only {name} is served here")
            found: Any = self  # its attributes are declared as None
            found.model_key = (model_path, None, None)
            found.model, found.tokenizer = chat.model, chat.tokenizer
            found.processor, found.draft_model = None, None
            found.is_batchable = False

    def models(handler: Any) -> None:
        """The list of models: this one. mlx-lm's own lists the hub's cache, and needs one."""
        handler._set_completion_headers(200)
        handler.end_headers()
        entry = {"id": name, "object": "model", "created": handler.created}
        handler.wfile.write(json.dumps({"object": "list", "data": [entry]}).encode())

    arguments = ["--model", name, "--host", host, "--port", str(port)]
    with (
        _replaced(server, "ModelProvider", Provider),
        _replaced(server.APIHandler, "handle_models_request", models),
        _arguments([*arguments, "--max-tokens", str(max_tokens)]),
    ):
        server.main()


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """mlx-lm's server finds its parts by name; it has no arguments to pass them in."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextmanager
def _arguments(arguments: list[str]) -> Iterator[None]:
    before = sys.argv
    sys.argv = ["mlx_lm.server", *arguments]
    try:
        yield
    finally:
        sys.argv = before
