"""Random walks: commands in any order, harm in between, compared with a model of the store."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from checkpoints import write_checkpoint
from quantmill.creation import create
from quantmill.digests import Digest
from quantmill.errors import Corrupt, NotFound, RegistryError
from quantmill.patience import Patience
from quantmill.pruning import copy, prune, remove
from quantmill.pulling import pull
from quantmill.pushing import push
from quantmill.refetching import Known
from quantmill.repairing import plan_repair, repair
from quantmill.store import Store
from quantmill.verification import verify
from registries import Handler, misbehaving, serve_memory

NAMES = st.sampled_from(["a", "b", "B", "ns/c:tag"])
SOURCES: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {
    "one": {"model.layers.0.mlp.up_proj.weight": ("BF16", (4, 64))},
    "two": {"model.layers.0.mlp.up_proj.weight": ("BF16", (4, 64)),
            "model.norm.weight": ("BF16", (64,))},
}  # fmt: skip
FORMATS = st.sampled_from([None, "int4", "int8"])
QUICK = Patience(tries=2, first_delay=0.001, longest_delay=0.001)
REGISTRY = "registry"


@dataclass
class Model:
    """A manifest, its blobs, and what is noted: sources by name, and whether a registry has it."""

    raw: bytes
    blobs: frozenset[Digest]
    origins: set[str] = field(default_factory=set)


class Walk(RuleBasedStateMachine):
    """The model: names, blobs that are there, blobs that were harmed, and what a registry holds."""

    @initialize()
    def begin(self) -> None:
        self.stack = ExitStack()
        self.folder = Path(tempfile.mkdtemp(prefix="quantmill-walk-"))
        self.sources = {n: write_checkpoint(self.folder / n, t) for n, t in SOURCES.items()}
        self.store = Store(self.folder / "store")
        self.models: dict[bytes, Model] = {}
        self.names: dict[str, bytes] = {}
        self.blobs: set[Digest] = set()
        self.harmed: set[Digest] = set()
        self.lost: set[str] = set()
        self.pushed: Model | None = None
        kept: dict[str, bytes] = {}
        good = serve_memory(kept)
        self.kept = kept

        def answer(request: Handler) -> None:
            if REGISTRY in self.lost:
                request.rfile.read(int(request.headers.get("Content-Length", 0)))
                request.reply(404)
            else:
                good(request)

        self.server = self.stack.enter_context(misbehaving(answer))
        self.remote = f"{self.server.host}/ns/r:latest"

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            self.stack.close()
            shutil.rmtree(self.folder, ignore_errors=True)

    def needed(self) -> set[Digest]:
        return {digest for raw in self.names.values() for digest in self.models[raw].blobs}

    def lacking(self) -> set[Digest]:
        return self.needed() - self.blobs

    @rule(name=NAMES, source=st.sampled_from(sorted(SOURCES)), quantize=FORMATS)
    def create(self, name: str, source: str, quantize: str | None) -> None:
        """What it makes is whole, whatever was harmed before."""
        if source in self.lost:
            return
        made = create(name, self.sources[source], store=self.store, quantize=quantize, workers=1)
        manifest = self.store.get_manifest(made.name)
        digests = frozenset(ref.digest for ref in manifest.all_refs())
        self.names[name.lower()] = manifest.raw
        self.models.setdefault(manifest.raw, Model(manifest.raw, digests)).origins.add(source)
        self.blobs |= digests
        self.harmed -= digests

    @rule(name=NAMES, other=NAMES)
    def copy(self, name: str, other: str) -> None:
        """A second name for what has all its blobs, in their size."""
        found = self.names.get(name.lower())
        if found is None:
            with pytest.raises(NotFound):
                copy(self.store, name, other)
        elif name.lower() == other.lower() or self.models[found].blobs <= self.blobs:
            copy(self.store, name, other)
            self.names[other.lower()] = found
        else:
            with pytest.raises((NotFound, Corrupt)):
                copy(self.store, name, other)

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        """The name goes, and the blobs that only it named."""
        if name.lower() not in self.names:
            with pytest.raises(NotFound):
                remove(self.store, name)
            return
        remove(self.store, name)
        gone = self.models[self.names.pop(name.lower())].blobs - self.needed()
        self.blobs -= gone
        self.harmed -= gone

    @rule()
    def prune(self) -> None:
        """What no manifest names goes, notes included."""
        prune(self.store, 0)
        self.blobs &= self.needed()
        self.harmed &= self.blobs
        for raw in set(self.models) - set(self.names.values()):
            self.models[raw].origins.clear()

    @rule(name=NAMES)
    def push(self, name: str) -> None:
        """What is whole arrives; of what is damaged nothing is named there."""
        raw = self.names.get(name.lower())
        if raw is None or REGISTRY in self.lost:
            with pytest.raises((NotFound, RegistryError, Corrupt)):
                push(name, self.remote, store=self.store, patience=QUICK)
            return
        model = self.models[raw]
        held = {d for d in model.blobs if f"/v2/ns/r/blobs/{d}" in self.kept}
        if model.blobs <= self.blobs and not (model.blobs - held) & self.harmed:
            push(name, self.remote, store=self.store, patience=QUICK)
            model.origins.add(REGISTRY)
            self.pushed = model
        else:
            with pytest.raises((NotFound, Corrupt)):
                push(name, self.remote, store=self.store, patience=QUICK)

    @rule()
    def pull(self) -> None:
        """What the registry has gets its name, and is whole, whatever was harmed before."""
        if self.pushed is None or REGISTRY in self.lost:
            with pytest.raises(RegistryError):
                pull(self.remote, store=self.store, patience=QUICK)
            return
        pull(self.remote, store=self.store, patience=QUICK)
        model = self.pushed
        model.origins.add(REGISTRY)
        self.models.setdefault(model.raw, model)
        self.names[self.remote.lower()] = model.raw
        self.blobs |= model.blobs
        self.harmed -= model.blobs

    @rule(choice=st.integers(0, 99), gone=st.booleans())
    def harm(self, choice: int, gone: bool) -> None:
        """A blob loses its last bit, or all."""
        whole = sorted(self.blobs - self.harmed)
        if not whole:
            return
        digest = whole[choice % len(whole)]
        path = self.store.blob_path(digest)
        if gone:
            path.unlink()
            self.blobs.discard(digest)
        else:
            data = path.read_bytes()
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
            self.harmed.add(digest)

    @rule(place=st.sampled_from([*sorted(SOURCES), REGISTRY]))
    def lose(self, place: str) -> None:
        """A source or the registry is away, or back."""
        self.lost ^= {place}
        if place in self.sources:
            source = self.sources[place]
            away = source.with_name(f"{place}-away")
            if place in self.lost:
                source.rename(away)
            else:
                away.rename(source)

    @rule()
    def repair(self) -> None:
        """What a known source has is whole again, what is harmed still is put aside."""
        known = Known(self.store, patience=QUICK)
        steps = repair(self.store, plan_repair(self.store, verify(self.store), known), known)
        made = {step.digest for step in steps if step.action == "rebuild" and step.digest}
        models = [self.models[raw] for raw in self.names.values()]
        there = {d for m in models if m.origins - self.lost for d in m.blobs}
        assert made == there & (self.harmed | self.lacking())
        self.blobs |= made
        self.blobs -= self.harmed - made
        self.harmed.clear()
        found = {b.digest for b in self.store.list_blobs() if b.digest}
        assert found >= self.blobs
        self.blobs = found  # the source may have given blobs that nobody wants

    @invariant()
    def store_is_as_expected(self) -> None:
        """Names, blobs and damage are those of the model; nothing unfinished lies about."""
        if not hasattr(self, "store"):
            return
        found = {s.name.display.lower().removesuffix(":latest"): s.name
                 for s in self.store.list_names()}  # fmt: skip
        expected = {name.removesuffix(":latest"): raw for name, raw in self.names.items()}
        assert set(found) == set(expected)
        for key, name in found.items():
            assert self.store.get_manifest(name).raw == expected[key]
        assert {b.digest for b in self.store.list_blobs()} == self.blobs
        damage = {d.digest for d in verify(self.store, workers=1).damage}
        assert damage == self.harmed | self.lacking()


TestWalk = Walk.TestCase
TestWalk.settings = (
    settings(max_examples=400, stateful_step_count=40)
    if os.environ.get("QUANTMILL_SWEEP")
    else settings(max_examples=25, stateful_step_count=25)
)
