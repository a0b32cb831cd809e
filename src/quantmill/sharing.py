"""The commands that talk to registries."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from quantmill import terminal
from quantmill.arguments import (
    HostArgument,
    InsecureOption,
    JsonOption,
    NameArgument,
    QuietOption,
    StoreOption,
    store_at,
)

if TYPE_CHECKING:
    from quantmill.credentials import Login
    from quantmill.moving import Moving


def _label(verb: str, event: Moving) -> str:
    return f"{verb} {event.digest.short}, {event.blobs}/{event.blobs_total} blobs"


def pull(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    insecure: InsecureOption = False,
    store: StoreOption = None,
    json_output: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Fetch a model from a registry; what the store holds already is not fetched again."""
    from quantmill import pulling, report

    started = time.monotonic()
    with terminal.progress(not quiet and not json_output) as bar:
        done = pulling.pull(
            name,
            store=store_at(store),
            insecure=insecure,
            progress=bar and (lambda e: bar(e.bytes, e.bytes_total, _label("fetching", e))),
        )
    if json_output:
        terminal.print_json(report.pulled_json(done))
    elif not quiet:
        terminal.print_lines(report.pulled_lines(done, time.monotonic() - started))


def push(
    name: NameArgument,
    target: Annotated[
        str | None, typer.Argument(metavar="[AS]", help="Name in the registry, if another.")
    ] = None,
    insecure: InsecureOption = False,
    store: StoreOption = None,
    json_output: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Send a model to a registry; what the registry holds already is not sent again."""
    from quantmill import pushing, report

    started = time.monotonic()
    with terminal.progress(not quiet and not json_output) as bar:
        done = pushing.push(
            name,
            target,
            store=store_at(store),
            insecure=insecure,
            progress=bar and (lambda e: bar(e.bytes, e.bytes_total, _label("sending", e))),
        )
    if json_output:
        terminal.print_json(report.pushed_json(done))
    elif not quiet:
        terminal.print_lines(report.pushed_lines(done, time.monotonic() - started))


def login(
    host: HostArgument = None,
    username: Annotated[
        str | None, typer.Option("--username", "-u", help="Asked for where it is not given.")
    ] = None,
    password_stdin: Annotated[
        bool, typer.Option("--password-stdin", help="Read the password or token from stdin.")
    ] = False,
    key: Annotated[
        bool, typer.Option("--key", help="Show the registry Ollama's key, made if there is none.")
    ] = False,
    insecure: InsecureOption = False,
    tokens_from: Annotated[
        str | None,
        typer.Option("--tokens-from", metavar="HOST", help="A token server that may see it, too."),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Check a user's password or token with a registry and keep it; for Ollama's, show the key."""
    from quantmill import loggingin
    from quantmill.errors import BadRequest

    if key and (username is not None or password_stdin or tokens_from):
        raise BadRequest("--key takes the place of a user and a password")
    password = username is not None or password_stdin
    if key or (not password and loggingin.takes_key_alone(host)):
        _login_with_key(host, json_output)
        return
    asked = replace(_asked_for(username, password_stdin), token_server=tokens_from)
    where = loggingin.login(host, asked, insecure=insecure)
    if json_output:
        terminal.print_json({"host": where.host, "kept_in": where.kept_in})
    else:
        terminal.print_lines([f"logged in to {where.host}; kept in {where.kept_in}"])


def _login_with_key(host: str | None, json_output: bool) -> None:
    from dataclasses import asdict

    from quantmill import loggingin
    from quantmill.names import DEFAULT_HOST

    shown = loggingin.login_with_key(host)
    if json_output:
        terminal.print_json(asdict(shown))
        return
    where = "at https://ollama.com/settings/keys" if shown.host == DEFAULT_HOST else "there"
    terminal.print_lines(
        [
            f"{'made' if shown.made else 'found'} the key {shown.key_file}; "
            f"{shown.host} is shown what it signs",
            f"add the public key to your account {where}, unless it is there already:",
            shown.public_key,
        ]
    )


def _asked_for(username: str | None, password_stdin: bool) -> Login:
    from quantmill.credentials import Login
    from quantmill.errors import BadRequest

    if password_stdin:
        if username is None:
            raise BadRequest("--password-stdin needs --username")
        password = sys.stdin.readline().rstrip("\r\n")
    elif sys.stdin.isatty():
        username = username or typer.prompt("Username", err=True)
        password = typer.prompt("Password or token", hide_input=True, err=True)
    else:
        raise BadRequest(
            "there is no terminal to ask for the password",
            hint="--username USER --password-stdin reads it from stdin",
        )
    return Login(str(username), password)


def logout(host: HostArgument = None, json_output: JsonOption = False) -> None:
    """Forget the login of a registry that `quantmill login` kept."""
    from quantmill import loggingin

    host, known = loggingin.logout(host)
    if json_output:
        terminal.print_json({"host": host, "removed": known})
    elif known:
        terminal.print_lines([f"logged out of {host}"])
    else:
        terminal.print_lines([f"quantmill keeps no login for {host}"])
