"""Draw bench-results/create.json: time and memory over model size, as docs/create.svg.

python benchmarks/plot_create.py [--to docs/create.svg]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from results import FOLDER

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "quantmill"  # the same drawing is the same file
mpl.rcParams["svg.fonttype"] = "none"

import matplotlib.pyplot as plt  # noqa: E402  (after the choice of what draws)

PANELS = (("wall s", "seconds"), ("peak MB", "peak memory, MB"))


def main() -> None:
    """Two panels: seconds and peak memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=Path("docs/create.svg"))
    options = parser.parse_args()
    document = json.loads((FOLDER / "create.json").read_text())
    scaling: dict[str, dict[str, dict[str, float]]] = document["scaling"]
    sizes = [float(size) for size in scaling]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for axis, (column, label) in zip(axes, PANELS, strict=True):
        for name in next(iter(scaling.values())):
            values = [rows[name][column] for rows in scaling.values()]
            draw(axis, sizes, values, name)
        axis.set_xlabel("checkpoint, GB of BF16")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    about = document["about"]
    figure.suptitle(f"int4, {about['processor']}, {about['cores']} cores", fontsize=9)
    figure.tight_layout()
    figure.savefig(options.to, metadata={"Date": None, "Creator": None})


def draw(axis: Any, sizes: list[float], values: list[float], name: str) -> None:
    """One line: quantmill's filled, others dashed."""
    label = name.replace("create", "quantmill create").replace("1 workers", "1 worker")
    style = "-o" if name.startswith("create") else "--s"
    axis.plot(sizes, values, style, markersize=4, label=label)


if __name__ == "__main__":
    main()
