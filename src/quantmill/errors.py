"""Every error quantmill raises on purpose.

    QuantmillError            exit 1   message, optional hint, machine-readable kind
    ├─ BadName                exit 2   text is not a model name or a digest
    ├─ BadRequest             exit 2   an option is unknown, or options contradict each other
    ├─ BadModelfile           exit 3   the Modelfile cannot be understood
    ├─ BadSource              exit 3   the checkpoint is missing, incomplete or contradictory
    │   ├─ BadTensorFile      exit 3   a tensor file lies about its content
    │   └─ BadWeights         exit 3   weight values that no format can hold (NaN, infinity)
    ├─ BadPlan                exit 3   request, source and format do not fit together
    ├─ OverBudget             exit 4   the memory budget is too small
    ├─ RegistryError          exit 1   a registry refuses, lies or cannot be reached
    └─ StoreError             exit 1   the store cannot do what was asked
        ├─ NotFound           exit 1   no such model or blob
        ├─ Corrupt            exit 1   bytes do not match their digest or their description
        ├─ Busy               exit 1   another process holds the lock
        └─ NoSpace            exit 4   the file system is full

Mistakes of a programmer stay TypeError, ValueError and AssertionError.
"""

from __future__ import annotations


class QuantmillError(Exception):
    """Base of all errors raised on purpose.

    `kind` is a stable snake_case word for programs; `hint` says what to do next.
    """

    exit_code = 1
    default_kind = "error"

    def __init__(self, message: str, *, kind: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.kind = kind or self.default_kind
        self.hint = hint


class BadName(QuantmillError):
    """Text that is not a model name or a digest."""

    exit_code = 2
    default_kind = "invalid_model_name"


class BadRequest(QuantmillError):
    """An option that is unknown, or options that contradict each other."""

    exit_code = 2
    default_kind = "bad_request"


class BadModelfile(QuantmillError):
    """A Modelfile that cannot be understood."""

    exit_code = 3
    default_kind = "bad_modelfile"


class BadSource(QuantmillError):
    """A checkpoint that is missing, incomplete or contradictory."""

    exit_code = 3
    default_kind = "bad_source"


class BadTensorFile(BadSource):
    """A tensor file whose header does not describe its bytes."""

    default_kind = "unreadable_shard"


class BadWeights(BadSource):
    """Weight values that the chosen format cannot hold."""

    default_kind = "non_finite"


class BadPlan(QuantmillError):
    """A request that does not fit the source."""

    exit_code = 3
    default_kind = "bad_plan"


class OverBudget(QuantmillError):
    """A memory budget that the work does not fit into."""

    exit_code = 4
    default_kind = "over_budget"


class RegistryError(QuantmillError):
    """A registry that refuses, lies or cannot be reached."""

    default_kind = "registry"


class StoreError(QuantmillError):
    """The store cannot do what was asked."""

    default_kind = "store"


class NotFound(StoreError):
    """No such model or blob."""

    default_kind = "not_found"


class Corrupt(StoreError):
    """Stored bytes that do not match their digest or their description."""

    default_kind = "corrupt"


class Busy(StoreError):
    """Another process holds the lock."""

    default_kind = "busy"


class NoSpace(StoreError):
    """The file system is full."""

    exit_code = 4
    default_kind = "no_space"
