"""What `eval` found, as JSON values (docs/cli.md gives their shape) and as text lines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # values only: a report needs none of the machinery that makes them
    from quantmill.evaluation import Divergence, Estimate, Evaluation


def evaluation_json(found: Evaluation) -> dict[str, Any]:
    """The result of `eval`."""
    return {
        "model": found.model,
        "reference": found.reference,
        "text": {"name": found.text, "python": found.python, "digest": found.text_digest},
        "tokens": {
            "windows": found.windows,
            "length": found.length,
            "digest": found.tokens_digest,
        },
        "perplexity": _estimate_json(found.perplexity),
        "reference_perplexity": _estimate_json(found.reference_perplexity),
        "kl": _divergence_json(found.divergence),
        "kl_histogram": _histogram_json(found.divergence),
        "top1_agreement": _estimate_json(found.agreement),
    }


def _estimate_json(found: Estimate | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {"value": round(found.value, 6), "standard_error": _rounded(found.standard_error)}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _divergence_json(found: Divergence | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "mean": round(found.mean.value, 6),
        "standard_error": _rounded(found.mean.standard_error),
        "median": round(found.median, 6),
        "p99": round(found.p99, 6),
        "max": round(found.maximum, 6),
    }


def _histogram_json(found: Divergence | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {"edges": list(found.histogram.edges), "counts": list(found.histogram.counts)}


def evaluation_lines(found: Evaluation) -> list[str]:
    """The result of `eval` for people."""
    python = f" (Python {found.python})" if found.python else ""
    digest = found.tokens_digest.removeprefix("sha256:")[:12]
    rows = [
        ("model", found.model),
        ("reference", found.reference or ""),
        ("text", f"{found.text}{python}"),
        ("tokens", f"{found.windows} x {found.length}, digest {digest}"),
        ("perplexity", _estimate_text(found.perplexity, 1, 3)),
        ("of the reference", _estimate_text(found.reference_perplexity, 1, 3)),
    ]
    if found.divergence is not None:
        kl = found.divergence
        tail = f"median {kl.median:.5f}, p99 {kl.p99:.4f}, max {kl.maximum:.3f}"
        rows += [
            ("KL per token", f"{_estimate_text(kl.mean, 1, 5)} nats; {tail}"),
            ("same top token", f"{_estimate_text(found.agreement, 100, 2)} %"),
        ]
    width = max(len(label) for label, _ in rows)
    return [f"{label.ljust(width)}  {text}" for label, text in rows if text]


def _estimate_text(found: Estimate | None, factor: int, digits: int) -> str:
    if found is None:
        return ""
    text = f"{found.value * factor:.{digits}f}"
    error = found.standard_error
    return text if error is None else f"{text} ± {error * factor:.{digits}f}"
