"""Plans, and what `create` made of them, as JSON values (docs/cli.md) and as text lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from quantmill.calibration import OF_FILE
from quantmill.plans import CODES, IMATRIX, MIXED, RANDOM, RECODE, RTN, ZERO
from quantmill.report import Row, bytes_text, format_json, plural, shape_text

if TYPE_CHECKING:
    from quantmill.creation import Created
    from quantmill.plans import Calibration, Plan, TensorSpec

# -- plan ------------------------------------------------------------------------------------------


def plan_json(plan: Plan, free_bytes: int | None = None) -> dict[str, Any]:
    """Totals for programs, one object per tensor, and under `plan` the whole plan."""
    from quantmill.plans import plan_to_json

    return {
        "source_bytes": plan.source_bytes,
        "stored_bytes": plan.blob_bytes,
        "needed_bytes": plan.needed_bytes,
        "free_bytes": free_bytes,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "auto": asdict(plan.options.automatic) if plan.options.automatic else None,
        "tensors": [_spec_json(spec) for spec in plan.tensors],
        "plan": plan_to_json(plan),
    }


def _spec_json(spec: TensorSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "sources": len(spec.sources),
        "transform": spec.transform,
        "dtype": spec.dtype,
        "shape": list(spec.shape),
        "format": format_json(spec.format or spec.keeps),
        "scheme": spec.scheme or None,
        "rule": spec.rule,
        "reason": spec.reason,
        "stored_bytes": spec.nbytes,
    }


PLAN_COLUMNS: Row = ("tensor", "shape", "source", "becomes", "bytes", "why")


def plan_rows(plan: Plan) -> list[Row]:
    """One row for each weight, as PLAN_COLUMNS names them; scales and biases count with theirs."""
    return [_plan_row(weight) for weight in _weights(plan)]


def _weights(plan: Plan) -> list[list[TensorSpec]]:
    """Specs weight by weight: the codes or numbers first, then what is copied with them."""
    found: list[list[TensorSpec]] = []
    for spec in plan.tensors:
        if spec.role == CODES:
            found.append([])
        found[-1].append(spec)
    return found


def _plan_row(specs: list[TensorSpec]) -> Row:
    main = specs[0]
    fmt, shape = main.format or main.keeps, main.shape
    if main.keeps:
        shape = (*shape[:-1], main.keeps.columns(shape[-1]))
    members = len(main.sources) // (len(main.coding.roles) if main.coding else 1)
    return (
        main.name,
        shape_text(shape),
        main.scheme or main.dtype,
        fmt.label if fmt else main.dtype if main.scheme else "keep",
        bytes_text(sum(spec.nbytes for spec in specs)),
        main.reason + (f"; {members} stacked" if members > 1 else ""),
    )


def plan_summary(plan: Plan, free_bytes: int | None = None) -> list[str]:
    """What the plan comes to."""
    rows = plan_rows(plan)
    counts = Counter(row[3] for row in rows)
    parts = ", ".join(f"{n} {label}" for label, n in sorted(counts.items(), key=lambda c: -c[1]))
    lines = [
        f"{plural(len(rows), 'tensor')} ({parts}); policy {plan.policy}",
        f"{bytes_text(plan.source_bytes)} -> {bytes_text(plan.blob_bytes)}, "
        f"{plan.bits_per_weight:.2f} bits per weight",
        f"disk space needed: {bytes_text(plan.needed_bytes)}"
        + (f", free: {bytes_text(free_bytes)}" if free_bytes is not None else ""),
    ]
    lines += [f"method {_method(plan)}"] if plan.options.method != RTN else []
    lines += automatic_lines(plan)
    lines += scheme_lines(plan)
    lines += _dropped_lines(plan)
    lines += [f"left out: file {f.name} ({f.reason})" for f in plan.files if not f.media_type]
    return lines


def automatic_lines(plan: Plan) -> list[str]:
    """What `auto` was asked for, predicted and measured."""
    found = plan.options.automatic
    if found is None:
        return []
    line = (
        f"auto for {found.reader}, {found.target}: KL per token predicted {found.predicted:.4f}, "
        f"measured {found.measured:.4f}"
    )
    if found.uniform_measured is not None:
        line += f" ({found.uniform} for all {found.uniform_measured:.4f})"
    more = ["auto: a larger target would change nothing"] if found.exhausted else []
    return [line, *more]


def _method(plan: Plan) -> str:
    """What the method is, and how many tensors it is used for and weighs."""
    quantized = [spec for spec in plan.tensors if spec.format]
    used = [spec for spec in quantized if spec.method != RTN]
    what = f"{plan.options.method} for {len(used)} of {plural(len(quantized), 'quantized tensor')}"
    if plan.calibration is not None:
        return f"{what}, {_evidence(plan.calibration)}"
    return f"{what}, columns weighed in {sum(bool(spec.weightings) for spec in used)}"


def _evidence(found: Calibration) -> str:
    """What a model is calibrated with."""
    if found.kind == IMATRIX:
        return f"weighed by {found.file}"
    each = f"{found.windows} x {found.length}"
    parts = [f"{each} random tokens (seed {found.seed})"] if found.kind in {RANDOM, MIXED} else []
    parts += [f"{each} tokens of Python's documentation"] if found.kind == MIXED else []
    if found.file:
        count = OF_FILE[found.kind] * found.windows
        parts.append(f"up to {count} x {found.length} tokens of {found.file}")
    return f"calibrated with {', '.join(parts)}"


def scheme_lines(plan: Plan) -> list[str]:
    """What becomes of weights that were quantized already, and what that costs."""
    counts: Counter[str] = Counter()
    for spec in plan.tensors:
        if spec.scheme and spec.role == CODES:
            counts[_cost(spec)] += 1
    return [f"{plural(n, 'weight')}: {what}" for what, n in sorted(counts.items())]


def _cost(spec: TensorSpec) -> str:
    if spec.transform == RECODE:
        assert spec.coding is not None
        rounded = f", zero points rounded to {spec.dtype}" if ZERO in spec.coding.roles else ""
        return f"{spec.scheme}, codes and scales kept{rounded}"
    if not spec.is_decoded:
        return f"{spec.scheme}, copied without loss"
    if spec.format is None:
        return f"{spec.scheme}, decoded to {spec.dtype}"
    return (
        f"{spec.scheme}, decoded and quantized again to {spec.format.label}: a second rounding, of "
        f"up to half a step of {spec.format.name}, on top of the first"
    )


def _dropped_lines(plan: Plan) -> list[str]:
    """What is left out: a line for each reason, with the first name."""
    names: dict[str, list[str]] = {}
    for dropped in plan.dropped:
        names.setdefault(dropped.reason, []).append(dropped.name)
    return [
        f"left out: tensor {found[0]}"
        + (f" and {len(found) - 1} more" if len(found) > 1 else "")
        + f" ({reason})"
        for reason, found in names.items()
    ]


# -- create ----------------------------------------------------------------------------------------


def created_json(created: Created, ignored: Sequence[str] = ()) -> dict[str, Any]:
    """The result of `create`; `ignored` are lines of the Modelfile without effect."""
    plan = created.plan
    return {
        "name": created.name.display,
        "base": created.base.display if created.base else None,
        "digest": str(created.digest),
        "size": created.size,
        "entries": created.entries,
        "new_blobs": created.new_blobs,
        "resumed": created.resumed,
        "profile": plan.options.profile,
        "method": plan.options.method,
        "auto": asdict(plan.options.automatic) if plan.options.automatic else None,
        "unmeasured": list(created.unmeasured),
        "unused": list(created.unused),
        "tensors": len(plan.tensors),
        "source_bytes": plan.source_bytes,
        "stored_bytes": plan.blob_bytes,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "format": plan.format.name if plan.format else None,
        "policy": plan.policy,
        "left_out": [f.name for f in plan.files if not f.media_type],
        "dropped_tensors": [d.name for d in plan.dropped],
        "non_finite": dict(created.non_finite),
        "ignored": list(ignored),
    }


def created_lines(created: Created, seconds: float) -> list[str]:
    """The result of `create` for people."""
    plan = created.plan
    fmt = plan.format.label if plan.format else "source precision"
    rate = f", {bytes_text(plan.source_bytes / seconds)}/s" if seconds > 0.5 else ""
    if created.base:
        fmt = f"{created.base.display} with a draft model in {fmt}"
    rounded = plan.options.method == RTN
    how = f"rounding {plan.options.profile}" if rounded else f"method {_method(plan)}"
    resumed = f", {created.resumed} from an earlier run" if created.resumed else ""
    return [
        f"created {created.name.display} ({fmt}): {plural(len(plan.tensors), 'tensor')}, "
        f"{bytes_text(plan.source_bytes)} -> {bytes_text(plan.blob_bytes)}, "
        f"{plan.bits_per_weight:.2f} bits per weight, {seconds:.1f} s{rate}",
        f"{plural(created.entries, 'entry').replace('entrys', 'entries')}, "
        f"{created.new_blobs} new tensor blobs{resumed}, {how}, "
        f"manifest {created.digest.short}",
        *automatic_lines(plan),
    ]


def created_warnings(created: Created) -> list[str]:
    """What a user should know about a `create` that went through."""
    lines = [
        f"tensor {name!r} holds {count} NaN or infinite values, quantized as asked"
        for name, count in created.non_finite
    ]
    plan = created.plan
    lines += [
        f"tensor {name!r} was given nothing in the calibration: its columns are weighed by norms, "
        "or it is rounded"
        for name in created.unmeasured
    ]
    if created.unused:
        lines.append(
            f"the imatrix says of {plural(len(created.unused), 'other weight')} too, the first "
            f"being {created.unused[0]!r}: these are not of this model"
        )
    if any(s.is_decoded for s in plan.tensors):
        lines += scheme_lines(plan)
    lines += _dropped_lines(plan)
    files = [f.name for f in created.plan.files if not f.media_type]
    return [*lines, f"left out: {', '.join(files)}"] if files else lines
