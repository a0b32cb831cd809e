"""Push and pull of a model, with skopeo in turn where it is installed, against docker-registry.

A synthetic checkpoint is imported as it is. In each turn a fresh registry on a loopback port gets
the model from quantmill and gives it back into an empty store; then the same with skopeo, which
keeps images in a folder and wants an OCI manifest around the same blobs. The table gives medians of
whole processes; the registry's own work is outside of it, though on the same processors. Results
also go to bench-results/registry.json.

    python benchmarks/bench_registry.py [--gigabytes 1] [--runs 3]
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from results import Row, keep, measure, medians, print_table
from synthetic import make

from quantmill.mediatypes import CONFIG, MANIFEST, OCI_MANIFEST
from quantmill.names import parse_name
from quantmill.store import Store

OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
QUANTMILL = [sys.executable, "-m", "quantmill"]


@contextmanager
def registry(folder: Path) -> Iterator[str]:
    """A registry with nothing in it; gives its host."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "config.yml").write_text(
        f"version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n"
        f"storage: {{filesystem: {{rootdirectory: {folder / 'data'}}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}', secret: bench}}\n"
    )
    command = ["docker-registry", "serve", str(folder / "config.yml")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        try:
            for _ in range(200):
                with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.05)
            yield f"127.0.0.1:{port}"
        finally:
            child.kill()
    shutil.rmtree(folder)


def turn(work: Path, store: Path) -> dict[str, Row]:
    """One push and one pull with each."""
    found = {}
    with registry(work / "registry") as host:
        name = f"{host}/bench/m:1"
        quiet = ["--store", str(store), "--quiet"]
        found["quantmill push"] = measure([*QUANTMILL, "push", "m", name, *quiet])
        quiet[1] = str(work / "pulled")
        found["quantmill pull"] = measure([*QUANTMILL, "pull", name, *quiet])
        shutil.rmtree(work / "pulled")
        if shutil.which("skopeo") is None:
            return found
        folder = f"dir:{work / 'folder'}"
        copy = ["skopeo", "copy", "--quiet", "--insecure-policy", "--preserve-digests"]
        plain = ["--src-tls-verify=false", "--dest-tls-verify=false"]
        measure([*QUANTMILL, "push", "oci", f"{host}/bench/oci:1", "--store", str(store)])
        found["skopeo pull"] = measure([*copy, *plain, f"docker://{host}/bench/oci:1", folder])
    with registry(work / "registry") as host:
        target = f"docker://{host}/bench/m:1"
        found["skopeo push"] = measure([*copy, *plain, folder, target])
        shutil.rmtree(work / "folder")
    return found


def main() -> None:
    """Make the model, let both move it in turn, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        size = make(work / "checkpoint", options.gigabytes)
        store = work / "store"
        measure([*QUANTMILL, "create", "m", str(work / "checkpoint"), "--store", str(store),
                 "--quiet"])  # fmt: skip
        shutil.rmtree(work / "checkpoint")
        raw = Store(store).get_manifest(parse_name("m")).raw
        for docker, oci in ((MANIFEST, OCI_MANIFEST), (CONFIG, OCI_CONFIG)):
            raw = raw.replace(docker.encode(), oci.encode())
        Store(store).put_manifest(parse_name("oci"), raw)
        turns = [turn(work, store) for _ in range(options.runs)]
    rows = {what: medians([t[what] for t in turns]) for what in sorted(turns[0])}
    print_table(f"{size / 1e6:.0f} MB, median of {options.runs}", rows)
    keep("registry", {"bytes": size, "turns": turns, "medians": rows})


if __name__ == "__main__":
    main()
