"""Processes that write to one store and remove from it at once, each in a loop of its own.

Two create, one pulls, one prunes; each of the writers looks whether its model is whole after every
command that ended well, and removes it now and then. What is busy says so; nothing else may fail.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from quantmill.cli import run
from quantmill.creation import create
from quantmill.names import parse_name
from quantmill.pruning import prune, remove
from quantmill.pushing import push
from quantmill.store import Store
from quantmill.verification import verify
from registries import real_registry

REMOVED = 0.5
"""How often a model that was made is removed before it is made again."""

LONGEST_PAUSE = 0.02


def work_together(
    folder: Path, sources: Sequence[tuple[Path, str]], seconds: float, *, pulling: bool = True
) -> Counter[str]:
    """Two creates, a pull and a prune for so long; how often each got done."""
    with contextlib.ExitStack() as stack:
        store = Store(folder / "store")
        loops = [["create", f"m{n}", str(c), q] for n, (c, q) in enumerate(sources)]
        if pulling:
            registry = stack.enter_context(real_registry(folder / "registry"))
            name = f"{registry.host}/team/m:1"
            checkpoint, quantize = sources[0]
            create(name, checkpoint, store=Store(folder / "pushed"), quantize=quantize)
            push(name, store=folder / "pushed", find=lambda _: None)
            loops.append(["pull", name])
        loops.append(["prune"])
        children = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, __file__, str(store.root), str(seconds), *loop],
                    stdout=subprocess.PIPE,
                )
            )
            for loop in loops
        ]
        done = Counter[str]()
        for child in children:
            printed, _ = child.communicate()
            assert child.returncode == 0, child.args
            done.update(json.loads(printed))
    found = verify(store)
    assert not found.damage, found.damage
    names = [stored.name for stored in store.list_names()]
    if names:
        remove(store, names)
    prune(store, 0)
    assert not store.list_blobs()
    return done


def told(done: Counter[str]) -> str:
    """The counts, for people."""
    return ", ".join(f"{count} {what}" for what, count in sorted(done.items()))


def call(*arguments: str) -> tuple[int, str]:
    """A command in this process: its exit code, and the kind of its error."""
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        code = run([*arguments, "--json"])
    text = errors.getvalue()
    return code, json.loads(text[text.index("{") :])["error"]["kind"] if code else ""


def loop(root: str, seconds: float, command: list[str]) -> Counter[str]:
    """Run a command for so long, and until it got done once; how often it did, and was busy."""
    chance, store, done = random.Random(repr(command)), Store(root), Counter[str]()
    where = ("--store", root)
    end = time.monotonic() + seconds
    once: Callable[[], tuple[int, str]]
    match command:
        case ["create", name, source, quantize]:
            once = lambda: call("create", name, source, "-q", quantize, *where)  # noqa: E731
        case _:
            older = ("--older-than", "0") if command == ["prune"] else ()
            once = lambda: call(*command, *older, *where)  # noqa: E731
    while time.monotonic() < end or not done[command[0]]:
        code, kind = once()
        if code:
            assert (code, kind) == (1, "busy"), (command, code, kind)
            done[f"{command[0]} busy"] += 1
            time.sleep(chance.uniform(0, LONGEST_PAUSE))
            continue
        done[command[0]] += 1
        if command == ["prune"]:
            time.sleep(chance.uniform(0, LONGEST_PAUSE))
            continue
        damage = verify(store, [parse_name(command[1])]).damage
        assert not damage, (command, damage)
        if chance.random() < REMOVED:
            code, kind = call("rm", command[1], *where)
            assert code == 0, (command, code, kind)
            done["rm"] += 1
    return done


if __name__ == "__main__":
    print(json.dumps(loop(sys.argv[1], float(sys.argv[2]), sys.argv[3:])))
