"""Options that several commands share, each defined once: name, help, completion, value."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from quantmill.names import ModelName
    from quantmill.store import Store


class Profile(StrEnum):
    """Whose rounding is followed."""

    MLX_CPU = "mlx-cpu"
    GPU = "gpu"


class Device(StrEnum):
    """Where the arithmetic runs."""

    CPU = "cpu"
    GPU = "gpu"


class Method(StrEnum):
    """How codes and scales are chosen."""

    RTN = "rtn"
    SEARCH = "search"
    AWARE = "aware"
    GPTQ = "gptq"


class Rounding(StrEnum):
    """How mx exponents are rounded."""

    CEIL = "ceil"
    NEAREST = "nearest"


# -- options that several commands share -----------------------------------------------------------

_complete_dir: dict[str, Any] = {"file_okay": False, "dir_okay": True}


def _complete_name(incomplete: str) -> list[str]:
    """Names in the store, for shell completion."""
    from quantmill.store import Store

    names = [stored.name.display for stored in Store().list_names()]
    return [name for name in names if name.startswith(incomplete)]


def _complete_format(incomplete: str) -> list[str]:
    from quantmill.formats import FORMAT_NAMES

    return [name for name in FORMAT_NAMES if name.startswith(incomplete)]


StoreOption = Annotated[
    Path | None,
    typer.Option(
        "--store",
        help="Store directory. Else QUANTMILL_STORE, OLLAMA_MODELS, ~/.ollama/models.",
        **_complete_dir,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
SOURCE_HELP = "Checkpoint directory, GGUF file, or org/repo[@revision] on the Hugging Face Hub."
SourceArgument = Annotated[str | None, typer.Argument(metavar="[SOURCE]", help=SOURCE_HELP)]
ModelfileOption = Annotated[
    Path | None,
    typer.Option("--file", "-f", metavar="MODELFILE", help="Modelfile with FROM and more."),
]
LoraOption = Annotated[
    Path | None,
    typer.Option(
        "--merge-lora",
        metavar="DIR",
        help="LoRA adapter to add to the weights before they are quantized.",
        **_complete_dir,
    ),
]
QuantizeOption = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        "-q",
        metavar="FORMAT",
        help="int4, int8, nvfp4, mxfp4, mxfp8 or affine-2, -3, -5, -6; auto with a target: by "
        "measured effect, which takes minutes. Without it weights keep their precision.",
        autocompletion=_complete_format,
    ),
]
RequantizeOption = Annotated[
    str | None,
    typer.Option(
        "--requantize",
        metavar="FORMAT",
        help="For weights that are quantized already: decode them and quantize again, at a cost. "
        "bf16 only decodes.",
        autocompletion=_complete_format,
    ),
]
BpwOption = Annotated[
    float | None,
    typer.Option(
        "--target-bpw", metavar="B", help="For auto: bits per weight, everything stored counted."
    ),
]
SizeOption = Annotated[
    str | None,
    typer.Option("--target-size", metavar="BYTES", help="For auto: size, such as 6GB or 4GiB."),
]
ForOption = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="mlx-lm|ollama",
        help="For auto: use only formats that this program reads (mlx-lm).",
    ),
]
ExportRequantizeOption = Annotated[
    str | None,
    typer.Option(
        "--requantize",
        metavar="FORMAT",
        help="For weights that mlx-lm has no place for; without it they are written decoded.",
        autocompletion=_complete_format,
    ),
]
GroupOption = Annotated[
    int | None,
    typer.Option("--group-size", metavar="N", help="Affine formats: weights per scale (64)."),
]
TensorOption = Annotated[
    list[str] | None,
    typer.Option(
        "--tensor",
        metavar="PATTERN=FORMAT",
        help="Format of tensors whose name fits the pattern; `keep` means source precision. "
        "May be given more than once, the last fitting rule wins.",
    ),
]
MethodOption = Annotated[
    Method, typer.Option("--method", help="How codes and scales are chosen (docs/fidelity.md).")
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        help="Text that aware and gptq calibrate with. Without it random tokens, and for gptq also "
        "documentation that comes with Python.",
    ),
]
ImatrixOption = Annotated[
    Path | None,
    typer.Option("--imatrix", metavar="FILE", help="llama.cpp's importance matrix, for aware."),
]
RoundingOption = Annotated[
    Rounding, typer.Option("--e8m0", help="Rounding of mxfp4 and mxfp8 scale exponents.")
]
ProfileOption = Annotated[
    Profile, typer.Option("--profile", help="Whose rounding to follow: MLX's on a CPU or a GPU.")
]
DeviceOption = Annotated[
    Device,
    typer.Option("--device", help="gpu: MLX quantizes on Metal or CUDA, with its own rounding."),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(min=1, max=256, help="Threads; results do not depend on it."),
]
MemoryOption = Annotated[
    str | None,
    typer.Option("--memory", metavar="BYTES", help="Most memory to occupy, such as 200MB."),
]
RestartOption = Annotated[
    bool, typer.Option("--restart", help="Compute again what an earlier run finished.")
]
GlobalScaleOption = Annotated[
    bool, typer.Option("--global-scale", help="Give nvfp4 tensors a scale of their own as well.")
]
NonFiniteOption = Annotated[
    bool, typer.Option("--allow-non-finite", help="Quantize weights that hold NaN or infinity.")
]
LinksOption = Annotated[
    bool, typer.Option("--follow-links", help="Read links that lead out of the checkpoint.")
]
DraftOption = Annotated[
    str | None,
    typer.Option(
        "--draft",
        metavar="DIR",
        help="Directory of a draft model to store with it. SOURCE may then name a stored model.",
    ),
]
DraftQuantizeOption = Annotated[
    str | None,
    typer.Option(
        "--draft-quantize",
        metavar="FORMAT",
        help="Format of the draft model.",
        autocompletion=_complete_format,
    ),
]
ComponentOption = Annotated[
    str | None,
    typer.Option(
        "--component",
        metavar="COMPONENT",
        help="One part of a model: text_encoder, transformer, vae, draft.",
    ),
]
InsecureOption = Annotated[
    bool, typer.Option("--insecure", help="Allow plain HTTP to a registry across a network.")
]
RepairOption = Annotated[
    bool, typer.Option("--repair", help="Have damaged blobs again, or put them aside.")
]
FromOption = Annotated[
    str | None,
    typer.Option("--from", metavar="SOURCE", help="What the model was made from, and nobody else."),
]
PullOption = Annotated[
    bool, typer.Option("--pull", help="Fetch from the registry that a model's name says, too.")
]
DryRepairOption = Annotated[
    bool, typer.Option("--dry-run", help="Show what --repair would do, change nothing.")
]
HostArgument = Annotated[
    str | None, typer.Argument(metavar="[HOST]", help="A registry, registry.ollama.ai by default.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", autocompletion=_complete_name)]
OptionalNameArgument = Annotated[
    str | None, typer.Argument(metavar="[NAME]", autocompletion=_complete_name)
]
NamesArgument = Annotated[
    list[str], typer.Argument(metavar="NAME...", autocompletion=_complete_name)
]


# -- what the texts stand for; imports wait, so that --help is quick -------------------------------


def store_at(path: Path | None) -> Store:
    """The store of --store; without a path, that of the environment."""
    from quantmill.store import Store

    return Store(path)


def parse_model_name(text: str) -> ModelName:
    """The model that a NAME stands for; raises BadName."""
    from quantmill.names import parse_name

    return parse_name(text)
