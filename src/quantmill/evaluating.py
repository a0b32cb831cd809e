"""The command that measures a model: `eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantmill import terminal
from quantmill.arguments import JsonOption, NameArgument, QuietOption, StoreOption, store_at


def evaluate_model(
    name: NameArgument,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="SOURCE|NAME",
            help="What it was made from: a checkpoint directory, a GGUF file, a stored model.",
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="Text to predict. Without it, documentation that comes with Python.",
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option("--tokens", min=2, metavar="N", help="Tokens of the text to take.")
    ] = 8192,
    window: Annotated[
        int, typer.Option("--window", min=2, metavar="N", help="Tokens seen together.")
    ] = 512,
    store: StoreOption = None,
    json_output: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure what quantizing did to a model: perplexity, and divergence from what it was."""
    from quantmill import evaluationreport
    from quantmill.evaluation import evaluate

    with terminal.progress(not quiet and not json_output, counted="steps") as bar:
        found = evaluate(
            name,
            against,
            text=text,
            tokens=tokens,
            window=window,
            store=store_at(store),
            progress=bar,
            fetching=bar and (lambda done, total, what: bar(done, total, f"fetching {what}")),
        )
    if json_output:
        terminal.print_json(evaluationreport.evaluation_json(found))
    else:
        terminal.print_lines(evaluationreport.evaluation_lines(found))
