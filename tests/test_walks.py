"""Random walks: commands in any order, harm in between, compared with a model of the store."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from checkpoints import write_checkpoint
from quantmill.creation import create
from quantmill.digests import Digest
from quantmill.errors import Corrupt, NotFound
from quantmill.pruning import copy, prune, remove
from quantmill.rebuilding import FromSource
from quantmill.repairing import plan_repair, repair
from quantmill.store import Store
from quantmill.verification import verify

NAMES = st.sampled_from(["a", "b", "B", "ns/c:tag"])
SOURCES: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {
    "one": {"model.layers.0.mlp.up_proj.weight": ("BF16", (4, 64))},
    "two": {"model.layers.0.mlp.up_proj.weight": ("BF16", (4, 64)),
            "model.norm.weight": ("BF16", (64,))},
}  # fmt: skip
FORMATS = st.sampled_from([None, "int4", "int8"])


class Walk(RuleBasedStateMachine):
    """The model: names with their manifests and sources, blobs there, blobs that were harmed."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="quantmill-walk-"))
        self.sources = {n: write_checkpoint(self.folder / n, t) for n, t in SOURCES.items()}
        self.store = Store(self.folder / "store")
        self.names: dict[str, tuple[bytes, frozenset[Digest], str]] = {}
        self.blobs: set[Digest] = set()
        self.harmed: set[Digest] = set()

    def teardown(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def needed(self) -> set[Digest]:
        return {digest for _, digests, _ in self.names.values() for digest in digests}

    @rule(name=NAMES, source=st.sampled_from(sorted(SOURCES)), quantize=FORMATS)
    def create(self, name: str, source: str, quantize: str | None) -> None:
        """What it makes is whole, whatever was harmed before."""
        made = create(name, self.sources[source], store=self.store, quantize=quantize, workers=1)
        manifest = self.store.get_manifest(made.name)
        digests = frozenset(ref.digest for ref in manifest.all_refs())
        self.names[name.lower()] = manifest.raw, digests, source
        self.blobs |= digests
        self.harmed -= digests

    @rule(name=NAMES, other=NAMES)
    def copy(self, name: str, other: str) -> None:
        """A second name for what has all its blobs, in their size."""
        found = self.names.get(name.lower())
        if found is None:
            with pytest.raises(NotFound):
                copy(self.store, name, other)
        elif name.lower() == other.lower() or found[1] <= self.blobs:
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
        _, digests, _ = self.names.pop(name.lower())
        gone = digests - self.needed()
        self.blobs -= gone
        self.harmed -= gone

    @rule()
    def prune(self) -> None:
        """What no manifest names goes."""
        prune(self.store, 0)
        self.blobs &= self.needed()
        self.harmed &= self.blobs

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

    @rule(source=st.sampled_from([None, *sorted(SOURCES)]))
    def repair(self, source: str | None) -> None:
        """What the source has is whole again, what is harmed still is put aside."""
        provider = FromSource(str(self.sources[source])) if source else None
        steps = repair(self.store, plan_repair(self.store, verify(self.store), provider), provider)
        made = {step.digest for step in steps if step.action == "rebuild" and step.digest}
        if source is not None:
            of_source = {d for _, digests, s in self.names.values() if s == source for d in digests}
            assert made >= of_source & (self.harmed | (self.needed() - self.blobs))
        self.blobs |= made
        self.blobs -= self.harmed - made
        self.harmed.clear()
        there = {b.digest for b in self.store.list_blobs() if b.digest}
        assert there >= self.blobs
        self.blobs = there  # the source may have given blobs that nobody wants

    @invariant()
    def store_is_as_expected(self) -> None:
        """Names, blobs and damage are those of the model; nothing unfinished lies about."""
        if not hasattr(self, "store"):
            return
        found = {s.name.display: s.name for s in self.store.list_names()}
        shown = {n.lower().removesuffix(":latest") for n in found}
        assert shown == set(self.names)
        for display, name in found.items():
            key = display.lower().removesuffix(":latest")
            assert self.store.get_manifest(name).raw == self.names[key][0]
        assert {b.digest for b in self.store.list_blobs()} == self.blobs
        damage = {d.digest for d in verify(self.store, workers=1).damage}
        assert damage == self.harmed | (self.needed() - self.blobs)


TestWalk = Walk.TestCase
TestWalk.settings = settings(max_examples=25, stateful_step_count=20)
