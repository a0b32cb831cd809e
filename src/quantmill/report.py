"""Plans, models and findings as JSON values (docs/cli.md gives their shapes) and as text lines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # values only: a report needs none of the machinery that makes them
    from quantmill.errors import QuantmillError
    from quantmill.export import Exported
    from quantmill.facts import DraftFacts, FormatShare, Listed, ModelFacts
    from quantmill.formats import Format
    from quantmill.generate import Piece
    from quantmill.kernels import Kernels
    from quantmill.pruning import PrunePlan, Removed
    from quantmill.pulling import Pulled
    from quantmill.pushing import Pushed
    from quantmill.repairing import Step
    from quantmill.store import BlobFile
    from quantmill.stored import StoredTensor
    from quantmill.verification import Verified

Row = tuple[str, ...]


def bytes_text(count: float) -> str:
    """A byte count for people, in units of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def shape_text(shape: Sequence[int]) -> str:
    """A shape for people: 4096 x 1024."""
    return " x ".join(map(str, shape)) or "scalar"


def plural(count: int, noun: str) -> str:
    """A count with its noun."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def error_json(error: QuantmillError) -> dict[str, Any]:
    """The error object that `--json` commands print on stderr."""
    return {
        "error": {
            "kind": error.kind,
            "message": error.message,
            "hint": error.hint,
            "exit_code": error.exit_code,
        }
    }


def format_json(fmt: Format | None) -> dict[str, Any] | None:
    """A format as its four words and numbers, null for none."""
    if fmt is None:
        return None
    return {"name": fmt.name, "mode": fmt.mode, "bits": fmt.bits, "group_size": fmt.group_size}


# -- list and show ---------------------------------------------------------------------------------

LIST_COLUMNS: Row = ("name", "id", "size", "format", "modified")


def list_json(models: Iterable[Listed]) -> list[dict[str, Any]]:
    """The result of `list`."""
    return [
        {
            "name": m.name.display,
            "digest": f"sha256:{m.digest}" if m.digest else None,
            "size": m.size,
            "format": m.format or None,
            "modified": m.modified.isoformat(timespec="seconds"),
            "problem": m.problem,
        }
        for m in models
    ]


def list_rows(models: Iterable[Listed]) -> list[Row]:
    """One row for each model, as LIST_COLUMNS names them."""
    return [
        (
            m.name.display,
            m.digest[:12] or "unreadable",
            bytes_text(m.size),
            m.format or "-",
            f"{m.modified.astimezone():%Y-%m-%d %H:%M}",
        )
        for m in models
    ]


def show_json(facts: ModelFacts, *, tensors: bool) -> dict[str, Any]:
    """The result of `show`; `tensors` adds one object per tensor."""
    found = {
        "name": facts.name.display,
        "digest": f"sha256:{facts.digest}",
        "size": facts.size,
        "modified": facts.modified.isoformat(timespec="seconds"),
        "format": facts.format or None,
        "weights": facts.weights,
        "bits_per_weight": round(facts.bits_per_weight, 4),
        "capabilities": list(facts.capabilities),
        "parser": facts.parser or None,
        "renderer": facts.renderer or None,
        "requires": facts.requires or None,
        "draft": _draft_json(facts.draft),
        "recorded": dict(facts.recorded),
        "info": dict(facts.info),
        "formats": [share_json(share) for share in facts.shares],
        "files": [{"name": name, "size": size} for name, size in facts.files],
    }
    return found | ({"tensors": [_tensor_json(t) for t in facts.tensors]} if tensors else {})


def _draft_json(draft: DraftFacts | None) -> dict[str, Any] | None:
    if draft is None:
        return None
    return {
        "architecture": draft.architecture or None,
        "tensors": draft.tensors,
        "weights": draft.weights,
        "bytes": draft.nbytes,
    }


def _draft_text(draft: DraftFacts | None) -> str:
    if draft is None:
        return ""
    counts = f"{plural(draft.tensors, 'tensor')}, {draft.weights:,} weights"
    return f"{draft.architecture}, {counts}, {bytes_text(draft.nbytes)}"


def share_json(share: FormatShare) -> dict[str, Any]:
    """What one format has of a model."""
    return {
        "label": share.label,
        "tensors": share.tensors,
        "weights": share.weights,
        "bytes": share.nbytes,
    }


def _tensor_json(tensor: StoredTensor) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "format": format_json(tensor.format),
        "bytes": tensor.nbytes,
    }


TENSOR_COLUMNS: Row = ("tensor", "format", "group size", "shape", "bytes")


def tensor_rows(facts: ModelFacts) -> list[Row]:
    """One row for each tensor, as TENSOR_COLUMNS names them."""
    return [
        (
            t.name,
            t.format.name if t.format else t.dtype,
            str(t.format.group_size) if t.format else "-",
            shape_text(t.shape),
            bytes_text(t.nbytes),
        )
        for t in facts.tensors
    ]


def show_rows(facts: ModelFacts) -> list[Row]:
    """The summary as pairs of label and text."""
    rows = [
        ("name", facts.name.display),
        ("digest", f"sha256:{facts.digest}"),
        ("size", bytes_text(facts.size)),
        ("modified", f"{facts.modified.astimezone():%Y-%m-%d %H:%M}"),
        ("format", facts.format or "source precision"),
        ("weights", f"{facts.weights:,}"),
        ("bits per weight", f"{facts.bits_per_weight:.2f}"),
        ("capabilities", ", ".join(facts.capabilities)),
        ("parser", facts.parser),
        ("renderer", facts.renderer),
        ("needs Ollama", facts.requires),
        ("draft model", _draft_text(facts.draft)),
        *((f"recorded {key}", str(value)) for key, value in facts.recorded.items()),
        *((key, str(value)) for key, value in facts.info.items()),
    ]
    rows += [
        (
            f"in {share.label}",
            f"{plural(share.tensors, 'tensor')}, {share.weights:,} weights, "
            f"{bytes_text(share.nbytes)}",
        )
        for share in facts.shares
    ]
    rows.append(("files", ", ".join(name for name, _ in facts.files)))
    return [row for row in rows if row[1]]


# -- verify, rm, prune -----------------------------------------------------------------------------


def verified_json(found: Verified, repaired: Sequence[Step] | None = None) -> dict[str, Any]:
    """The result of `verify`, and of `--repair` where it was asked for."""
    return {
        "ok": not found.damage,
        "models": found.models,
        "blobs": found.blobs,
        "bytes": found.nbytes,
        "damage": [
            {
                "kind": d.kind,
                "message": d.message,
                "digest": str(d.digest) if d.digest else None,
                "models": list(d.models),
            }
            for d in found.damage
        ],
        "repair": None if repaired is None else [_step_json(step) for step in repaired],
    }


def _step_json(step: Step) -> dict[str, Any]:
    return {
        "digest": str(step.digest) if step.digest else None,
        "models": list(step.models),
        "action": step.action,
        "detail": step.detail,
        "done": step.done,
    }


def repair_lines(steps: Iterable[Step], *, planned: bool) -> list[str]:
    """The steps of a repair for people, before or after they are taken."""
    lines = []
    for step in steps:
        what = f"blob {step.digest.short}" if step.digest else step.message
        if step.action == "report":
            lines.append(f"left: {what}: {step.detail}")
        else:
            state = "would" if planned else "did" if step.done else "not whole"
            lines.append(f"{state}: {step.action} {what} {step.detail}")
    return lines


def damage_lines(found: Verified) -> list[str]:
    """What `verify` found for people, a line each."""
    lines = []
    for d in found.damage:
        hurt = f"hurts {', '.join(d.models)}" if d.models else "no model uses it"
        lines.append(f"damaged: {d.message} ({hurt})")
    return lines


def verified_line(found: Verified, repaired: Sequence[Step] | None = None) -> str:
    """The result of `verify` for people, and of its repair where steps were taken."""
    state = "all good" if not found.damage else f"{len(found.damage)} damaged"
    if repaired:
        state += f", {sum(step.done for step in repaired)} of them put right"
    checked = f"{plural(found.models, 'model')}, {plural(found.blobs, 'blob')}"
    return f"checked {checked}, {bytes_text(found.nbytes)}: {state}"


def answer_json(text: str, last: Piece | None) -> dict[str, Any]:
    """The result of `run` with a prompt."""
    return {
        "text": text,
        "finish_reason": last.finish_reason if last else None,
        "prompt_tokens": last.prompt_tokens if last else 0,
        "generated_tokens": last.generated_tokens if last else 0,
        "tokens_per_second": round(last.tokens_per_second, 2) if last else 0.0,
    }


def exported_json(exported: Exported) -> dict[str, Any]:
    """The result of `export`."""
    return {
        "folder": str(exported.folder),
        "shards": list(exported.shards),
        "tensors": exported.tensors,
        "bytes": exported.nbytes,
        "decoded": list(exported.decoded),
    }


def exported_warnings(exported: Exported) -> list[str]:
    """What a user should know about an `export` that went through."""
    names = exported.decoded
    if not names:
        return []
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [
        f"mlx-lm cannot hold the codes of {names[0]}{more}: written decoded to BF16 (or, "
        "where only a global scale is in the way, in the format of --requantize)"
    ]


def exported_lines(exported: Exported) -> list[str]:
    """The result of `export` for people."""
    shards = plural(len(exported.shards), "file")
    return [
        f"wrote {plural(exported.tensors, 'tensor')}, {bytes_text(exported.nbytes)}, "
        f"in {shards} to {exported.folder}"
    ]


def doctor_lines(facts: dict[str, Any]) -> list[str]:
    """The result of `doctor` for people."""
    flat = {k: ", ".join(v) if isinstance(v, list) else str(v) for k, v in facts.items()}
    width = max(map(len, flat))
    return [f"{key.replace('_', ' ').ljust(width)}  {text}" for key, text in flat.items()]


KERNEL_COLUMNS: Row = ("name", "supported", "used", "what")


def kernels_json(found: Sequence[Kernels]) -> list[dict[str, Any]]:
    """The implementations of the arithmetic."""
    return [
        {"name": k.name, "supported": k.supported, "used": k.used, "what": k.what} for k in found
    ]


def kernel_rows(found: Sequence[Kernels]) -> list[Row]:
    """The same for people."""
    words = {True: "yes", False: "no"}
    return [(k.name, words[k.supported], "yes" if k.used else "", k.what) for k in found]


def pulled_json(pulled: Pulled) -> dict[str, Any]:
    """What `pull` did."""
    return {
        "name": pulled.name.display,
        "digest": str(pulled.digest),
        "size": pulled.size,
        "blobs": pulled.blobs,
        "fetched_blobs": pulled.fetched,
        "fetched_bytes": pulled.fetched_bytes,
        "resumed_bytes": pulled.resumed,
    }


def pulled_lines(pulled: Pulled, seconds: float) -> list[str]:
    """What `pull` did, for people."""
    moved = f"{pulled.fetched} of {plural(pulled.blobs, 'blob')} fetched"
    amount = f"{bytes_text(pulled.fetched_bytes)} of {bytes_text(pulled.size)}"
    return [
        f"pulled {pulled.name.display}: {moved}, {amount}, {seconds:.1f} s",
        f"manifest {pulled.digest.short}",
    ]


def pushed_json(pushed: Pushed) -> dict[str, Any]:
    """What `push` did."""
    return {
        "name": str(pushed.name),
        "digest": str(pushed.digest),
        "size": pushed.size,
        "blobs": pushed.blobs,
        "sent_blobs": pushed.sent,
        "sent_bytes": pushed.sent_bytes,
        "mounted_blobs": pushed.mounted,
    }


def pushed_lines(pushed: Pushed, seconds: float) -> list[str]:
    """What `push` did, for people."""
    moved = f"{pushed.sent} of {plural(pushed.blobs, 'blob')} sent, {pushed.mounted} mounted"
    amount = f"{bytes_text(pushed.sent_bytes)} of {bytes_text(pushed.size)}"
    return [
        f"pushed {pushed.name}: {moved}, {amount}, {seconds:.1f} s",
        f"manifest {pushed.digest.short}",
    ]


def removed_json(removed: Removed) -> dict[str, Any]:
    """The result of `rm`."""
    return {
        "removed": [n.display for n in removed.names],
        "blobs": removed.blobs,
        "bytes": removed.nbytes,
        "left_for_prune": removed.left,
    }


def removed_lines(removed: Removed) -> list[str]:
    """The result of `rm` for people."""
    lines = [f"removed {name.display}" for name in removed.names]
    if removed.left:
        return [*lines, f"{plural(removed.left, 'blob')} left for `quantmill prune`"]
    return [*lines, f"{plural(removed.blobs, 'blob')}, {bytes_text(removed.nbytes)} freed"]


def prune_json(plan: PrunePlan, *, dry_run: bool) -> dict[str, Any]:
    """The result of `prune`."""
    return {
        "dry_run": dry_run,
        "blobs": [_file_json(f) for f in plan.blobs],
        "leftovers": [_file_json(f) for f in plan.leftovers],
        "bytes": plan.nbytes,
        "too_young": plan.young,
    }


def _file_json(file: BlobFile) -> dict[str, Any]:
    return {"file": file.path.name, "size": file.size}


def prune_lines(plan: PrunePlan, *, dry_run: bool) -> list[str]:
    """The result of `prune` for people."""
    verb = "would remove" if dry_run else "removed"
    lines = [f"{verb} {f.path.name} ({bytes_text(f.size)})" for f in (*plan.blobs, *plan.leftovers)]
    lines.append(
        f"{verb} {plural(len(plan.blobs), 'blob')} and "
        f"{plural(len(plan.leftovers), 'temporary file')}, {bytes_text(plan.nbytes)}"
    )
    if plan.young:
        lines.append(
            f"{plural(plan.young, 'unreferenced file')} younger than the age limit kept; "
            "--older-than 0 removes them too"
        )
    return lines
