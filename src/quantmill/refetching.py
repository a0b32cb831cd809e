"""Blobs fetched again from a registry that holds the model, and who may have what of a model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from quantmill import provenance
from quantmill.credentials import find_login
from quantmill.errors import QuantmillError
from quantmill.manifest import BlobRef, Manifest
from quantmill.names import ModelName
from quantmill.patience import Patience
from quantmill.pulling import FindLogin, fetch
from quantmill.rebuilding import FromRecipe, FromSource
from quantmill.repairing import BlobProvider
from quantmill.store import Store


@dataclass(frozen=True, slots=True)
class FromRegistry:
    """A repository that holds a model, or did."""

    model: ModelName
    insecure: bool = False
    required: bool = False
    patience: Patience | None = None
    find: FindLogin = find_login

    @property
    def name(self) -> str:
        """The model's full name there."""
        return f"registry {self.model.resolved}"

    def provide(self, store: Store, manifest: Manifest, wanted: Sequence[BlobRef]) -> None:
        """Commit those of the wanted blobs that the repository has; raises RegistryError."""
        del manifest  # blobs have no names there but their digests
        fetch(
            self.model, wanted, store,
            insecure=self.insecure, patience=self.patience, find=self.find,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Known:
    """Who may have the blobs of the models in a store, from what is noted and what users allow.

    `source` is what the user says the model was made from: then nobody else is asked. `pull` adds
    the registry that each name of the model means.
    """

    store: Store
    source: str | None = None
    pull: bool = False
    insecure: bool = False
    patience: Patience | None = None

    def __call__(self, manifest: Manifest) -> Sequence[BlobProvider]:
        """Providers for a model, the best first: what is on this machine before the network."""
        if self.source is not None:
            return (FromSource(self.source),)
        names = provenance.registries(self.store, manifest.digest)
        if self.pull:
            names += [name for name in self._names_of(manifest) if name not in names]
        return (
            *map(FromRecipe, provenance.recipes(self.store, manifest.digest)),
            *(FromRegistry(n, self.insecure, patience=self.patience) for n in names),
        )

    def _names_of(self, manifest: Manifest) -> list[ModelName]:
        found = []
        for stored in self.store.list_names():
            with suppress(QuantmillError):
                if self.store.get_manifest(stored.name).digest == manifest.digest:
                    found.append(stored.name)
        return found
