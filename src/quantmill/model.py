"""An open model: its weights under one name each, with their companions and parameters.

Names, shapes and parameters are there at once; arrays are read from the mapped files when they are
used. load.py opens one (docs/loading.md).
"""

from __future__ import annotations

import mmap
import resource
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmill.companions import Orphan, Role, Weight, canonicalise, gather
from quantmill.errors import BadRequest, Corrupt, NotFound
from quantmill.files import translated
from quantmill.formats import FLOAT_DTYPES, Format
from quantmill.quantconfig import QuantConfig, Written
from quantmill.quantparams import Params, recorded, resolve
from quantmill.weights import MAX_SCALE

if TYPE_CHECKING:
    import mlx.core as mx
    import numpy as np
    import numpy.typing as npt

    from quantmill.decode import Decoded

# MLX keeps a file open until its arrays are evaluated; macOS allows 256 open files at first.
_FEWEST_OPEN = 64

# What a mapped tensor looks like to NumPy, which has neither bf16 nor 8-bit floats: their bits.
_NUMPY = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4",
    "U64": "<u8", "I64": "<i8", "F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8",
    "C64": "<c8", "F8_E4M3": "u1", "F8_E4M3FN": "u1", "F8_E5M2": "u1", "F8_E5M2FNUZ": "u1",
    "F8_E8M0": "u1",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Located:
    """A tensor as it lies in a file: `key` is its name there, `start` its first byte."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    nbytes: int
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Parts:
    """A weight as MLX arrays. Only `weight` is set for tensors that are not quantized.

    `global_scale` multiplies what the codes decode to.
    """

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    global_scale: mx.array | None = None
    params: Params | None = None

    def at(self, index: int | slice) -> Parts:
        """One element of the first axis, an expert of a stack, a row of a matrix; or some."""
        count = self.weight.shape[0]
        if isinstance(index, int) and not -count <= index < count:  # MLX reads beyond the end
            raise IndexError(f"index {index} of {count}")

        def one(array: mx.array | None) -> mx.array | None:
            return None if array is None else array[index]

        scale = self.global_scale
        if scale is not None and scale.size > 1:
            scale = scale[index]
        return Parts(self.weight[index], one(self.scales), one(self.biases), scale, self.params)


class Model:
    """An open model. Names, shapes and parameters are there at once; arrays are read when used.

    `where` names the model in errors. Use as a context manager, or call `release`.
    """

    def __init__(
        self,
        where: str,
        tensors: Mapping[str, Located],
        config: Mapping[str, Any],
        read_file: Callable[[str], bytes],
        files: Sequence[str],
        quant_config: QuantConfig | None,
    ) -> None:
        self.where = where
        self.config = config
        self.files = tuple(sorted(files))
        self._read_file = read_file
        self._tensors = tensors
        self._weights, orphans = gather(tensors)
        if orphans:
            raise _orphaned(where, orphans[0])
        default = _recorded_elsewhere(tensors)
        self._params = {
            name: _resolved(where, weight, tensors, quant_config, default)
            for name, weight in self._weights.items()
        }
        self._arrays: dict[str, mx.array] | None = {}
        self._open: dict[Path, dict[str, mx.array]] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        self.conflicts = self._conflicts()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    # -- what is there -----------------------------------------------------------------------------

    def __iter__(self) -> Iterator[str]:
        """Names of all weights, sorted; scales and other companions are not names of their own."""
        return iter(sorted(self._weights))

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __len__(self) -> int:
        return len(self._weights)

    def dtype(self, name: str) -> str:
        """Dtype tag as stored: U32 for packed codes. Raises NotFound."""
        return self._tensors[self._weight(name).codes].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape: codes count, not words. Raises NotFound."""
        stored = self._tensors[self._weight(name).codes].shape
        params = self._params[name]
        return stored if params is None else (*stored[:-1], params.format.columns(stored[-1]))

    def scale_dtype(self, name: str) -> str:
        """Dtype tag of a quantized weight's scales. Raises NotFound."""
        scale = self._weight(name).scale
        if scale is None:
            raise NotFound(f"{self.where}: tensor {name!r} has no scales", kind="not_quantized")
        return self._tensors[scale].dtype

    def params(self, name: str) -> Params | None:
        """Quantization parameters and where they come from; None for plain tensors."""
        self._weight(name)
        return self._params[name]

    def located(self, name: str) -> tuple[Located, ...]:
        """Where a weight and its companions lie, the codes first. Raises NotFound."""
        weight = self._weight(name)
        return tuple(self._tensors[raw] for raw in (weight.codes, *weight.companions))

    @property
    def format(self) -> Format | None:
        """The format that most quantized weights have (by stored bytes), None if there are none."""
        sizes: dict[Format, int] = {}
        for name, params in self._params.items():
            if params is not None:
                size = self._tensors[self._weights[name].codes].nbytes
                sizes[params.format] = sizes.get(params.format, 0) + size
        return max(sorted(sizes), key=lambda f: sizes[f]) if sizes else None

    @property
    def quantization(self) -> str:
        """Name of `format`, "" for a model that is not quantized."""
        return self.format.name if self.format else ""

    @property
    def group_size(self) -> int:
        """Group size of `format`, 0 for a model that is not quantized."""
        return self.format.group_size if self.format else 0

    # -- arrays ------------------------------------------------------------------------------------

    def get(self, name: str) -> mx.array | None:
        """The array of a weight, None when there is no such weight."""
        return self[name] if name in self._weights else None

    def __getitem__(self, name: str) -> mx.array:
        """The array of a weight as stored (packed codes where it is quantized), read when used."""
        return self._array(self._weight(name).codes)

    def parts(self, name: str) -> Parts:
        """A weight with its scales, biases, global scale and parameters. Raises NotFound."""
        weight = self._weight(name)
        scale = self._optional(weight.global_scale)
        if scale is not None and weight.reciprocal:
            scale = scale.reciprocal()
        if scale is not None and weight.is_mlx_global:
            scale = scale / MAX_SCALE
        return Parts(
            self._array(weight.codes),
            self._optional(weight.scale),
            self._optional(weight.bias),
            scale,
            self._params[name],
        )

    def load(self, dtype: mx.Dtype | None = None) -> dict[str, mx.array]:
        """All weights as stored, evaluated in one batch.

        `dtype` converts floating-point tensors that are neither quantized nor companions.
        """
        import mlx.core as mx

        found = {name: self[name] for name in self}
        if dtype is not None:
            for name, array in found.items():
                plain = self._params[name] is None and self.dtype(name) in FLOAT_DTYPES
                found[name] = array.astype(dtype) if plain else array
        mx.eval(found)
        return found

    def dequantize(self, name: str, index: int | None = None) -> mx.array:
        """The weight as floats: BF16 for float formats, the scales' dtype for affine ones.

        Plain tensors come as they are; `index` gives one element of the first axis, such as one
        expert of a stack. The values are those of MLX on a CPU. Raises NotFound.
        """
        if self.params(name) is None:
            parts = self.parts(name)
            return (parts if index is None else parts.at(index)).weight
        found = self._decoded(name, index)
        if found is None:
            return self.dequantize_lazily(name, index)
        import mlx.core as mx

        array = mx.array(found.array)
        return array.view(mx.bfloat16) if found.dtype == "BF16" else array

    def decode(
        self, name: str, index: int | None = None, rows: slice | None = None
    ) -> npt.NDArray[Any]:
        """What `dequantize` gives, as a NumPy array; BF16 as the integers of its bits.

        `rows` gives some elements of the first axis that is left, such as rows of a matrix. Many
        times faster where the native kernels work, since nothing passes through MLX.
        """
        if self.params(name) is None:
            view = self.view(name)
            view = view if index is None else view[index]
            return view if rows is None else view[rows]
        found = self._decoded(name, index, rows)
        if found is not None:
            return found.array
        import mlx.core as mx
        import numpy as np

        array = self.dequantize_lazily(name, index, rows)
        return np.asarray(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)

    def decoded_dtype(self, name: str) -> str:
        """Dtype tag of what `decode` gives; the stored one for tensors that are not quantized."""
        params = self.params(name)
        if params is None:
            return self.dtype(name)
        return self.scale_dtype(name) if params.format.has_bias else "BF16"

    def _decoded(self, name: str, index: int | None, rows: slice | None = None) -> Decoded | None:
        """A quantized weight by the native kernels, straight from the mapped files."""
        from quantmill.decode import Packed, decode

        weight, params = self._weight(name), self._params[name]
        assert params is not None
        assert weight.scale is not None
        packed = Packed(
            self._view(weight.codes),
            self._view(weight.scale),
            self._view(weight.bias) if weight.bias else None,
            self._factor(weight),
            weight.reciprocal,
            [self._tensors[raw].dtype for raw in (weight.scale, weight.bias) if raw],
        )
        for choice in (index, rows):
            packed = packed if choice is None else packed.at(choice)
        return decode(packed, params.format)

    def _factor(self, weight: Weight) -> npt.NDArray[Any] | None:
        """The global scale, as a factor or its reciprocal."""
        if weight.global_scale is None:
            return None
        found = self._view(weight.global_scale)
        return found / found.dtype.type(MAX_SCALE) if weight.is_mlx_global else found

    def dequantize_lazily(
        self, name: str, index: int | None = None, rows: slice | None = None
    ) -> mx.array:
        """What `dequantize` gives, not computed yet: nothing is read before it is used.

        MLX does the work, also for parameters that the kernels have no code for. The weight must be
        quantized. Raises NotFound.
        """
        import mlx.core as mx

        parts = self.parts(name)
        for choice in (index, rows):
            parts = parts if choice is None else parts.at(choice)
        assert parts.params is not None
        assert parts.scales is not None
        fmt, row = parts.params.format, parts.weight.ndim == 1
        with mx.stream(mx.cpu):  # the same values whatever device is the default
            found = mx.dequantize(
                parts.weight[None] if row else parts.weight,
                parts.scales[None] if row else parts.scales,
                parts.biases[None] if row and parts.biases is not None else parts.biases,
                group_size=fmt.group_size,
                bits=fmt.bits,
                mode=fmt.mode,
            )
            found = found[0] if row else found
            scale = parts.global_scale
            if scale is None:
                return found
            # one for all, or one for each row, or for each expert of a stack
            shape = (*scale.shape, *([1] * (found.ndim - scale.ndim))) if scale.size > 1 else ()
            return (found * scale.reshape(shape)).astype(found.dtype)

    def view(self, name: str) -> npt.NDArray[Any]:
        """The stored bytes as a read-only NumPy array over the mapped file, nothing copied.

        BF16 and 8-bit floats come as unsigned integers of their width: NumPy does not know them.
        """
        return self._view(self._weight(name).codes)

    def _view(self, raw: str) -> npt.NDArray[Any]:
        import numpy as np

        located = self._tensors[raw]
        buffer = self._map(located.path)
        kind: np.dtype[Any] = np.dtype(_NUMPY[located.dtype])
        count = located.nbytes // kind.itemsize
        flat = np.frombuffer(buffer, kind, count, located.start) if count else np.empty(0, kind)
        return flat.reshape(located.shape)

    def read_file(self, name: str) -> bytes:
        """A file beside the weights, such as `tokenizer.json`. Raises NotFound."""
        if name not in self.files:
            raise NotFound(f"{self.where} has no file {name!r}", kind="config_not_found")
        return self._read_file(name)

    def forget(self) -> None:
        """Keep no arrays: those handed out stay valid, others are read again when they are used."""
        if self._arrays is not None:
            self._arrays = {}
        self._open.clear()
        self._unmap()

    def release(self) -> None:
        """Let go of arrays and mappings; names and parameters stay, arrays can no longer be had."""
        self._arrays = None
        self._open.clear()
        self._unmap()

    def _unmap(self) -> None:
        while self._maps:
            _, mapped = self._maps.popitem()
            with suppress(BufferError):  # a view is still in use: the mapping goes with it
                mapped.close()

    def _conflicts(self) -> tuple[str, ...]:
        """Companions given twice under two spellings, with contents that differ: what was ignored.

        The winner does not depend on the order of files (docs/loading.md); a warning tells of each.
        """
        used = sum(1 + len(weight.companions) for weight in self._weights.values())
        if used == len(self._tensors):
            return ()
        found = []
        for loser, winner in sorted(canonicalise(self._tensors).dropped.items()):
            if self._view(loser).tobytes() != self._view(winner).tobytes():
                found.append(f"{self.where}: {loser!r} is ignored, {winner!r} says something else")
                warnings.warn(found[-1], stacklevel=4)
        return tuple(found)

    # -- inside ------------------------------------------------------------------------------------

    def _weight(self, name: str) -> Weight:
        try:
            return self._weights[name]
        except KeyError:
            raise NotFound(
                f"{self.where} has no tensor {name!r}", kind="tensor_not_found"
            ) from None

    def _optional(self, raw: str | None) -> mx.array | None:
        return None if raw is None else self._array(raw)

    def _array(self, raw: str) -> mx.array:
        if self._arrays is None:
            raise BadRequest(f"{self.where} was released", hint="open the model again")
        if raw not in self._arrays:
            located = self._tensors[raw]
            self._arrays[raw] = self._file(located.path)[located.key]
        return self._arrays[raw]

    def _file(self, path: Path) -> dict[str, mx.array]:
        """The arrays of a file, not read yet; read now are those in use of too many open files."""
        import mlx.core as mx

        if path not in self._open:
            if len(self._open) >= max(_FEWEST_OPEN, _allowed_files() // 2):
                mx.eval(self._arrays)
                self._open.clear()
            try:
                found = mx.load(str(path), format="safetensors")
            except RuntimeError as error:
                raise Corrupt(f"{path.name}: {error}", kind="unreadable_shard") from None
            assert isinstance(found, dict)
            self._open[path] = found
        return self._open[path]

    def _map(self, path: Path) -> mmap.mmap:
        if self._arrays is None:
            raise BadRequest(f"{self.where} was released", hint="open the model again")
        if path not in self._maps:
            with translated(path), path.open("rb") as file:
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[path]


def _allowed_files() -> int:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def _recorded_elsewhere(tensors: Mapping[str, Located]) -> Written | None:
    """What the first blob that records a type says; early blobs may record nothing."""
    for name in sorted(tensors):
        if tensors[name].metadata.get("quant_type"):
            return recorded("", tensors[name].metadata)[0]
    return None


def _resolved(
    where: str,
    weight: Weight,
    tensors: Mapping[str, Located],
    config: QuantConfig | None,
    default: Written | None,
) -> Params | None:
    """Parameters of a weight, None for a plain tensor; raises Corrupt for codes without scales."""
    codes = tensors[weight.codes]
    if weight.scale is None:
        if codes.dtype == "U32" and len(codes.shape) > 1:
            raise Corrupt(
                f"{where}: tensor {weight.name!r} holds packed codes, and no scales are there",
                kind="missing_scales",
            )
        return None
    bias = tensors[weight.bias] if weight.bias else None
    try:
        found = resolve(
            weight.name, codes, tensors[weight.scale], bias, codes.metadata, config, default
        )
        if weight.global_scale:
            _check_global_scale(codes, tensors[weight.global_scale], found.format)
    except Corrupt as error:
        raise Corrupt(f"{where}: {error.message}", kind=error.kind, hint=error.hint) from None
    return found


def _check_global_scale(codes: Located, scale: Located, fmt: Format) -> None:
    """One number, or one for each element of the first axes: of a stack, of its rows."""
    leading = (*codes.shape[:-1], 1)
    fits = len(scale.shape) <= len(leading) and all(
        own in {1, n} for own, n in zip(scale.shape, leading, strict=False)
    )
    if fmt.mode != "nvfp4" or scale.dtype != "F32" or not fits:
        raise Corrupt(
            f"global scale {scale.key!r} ({scale.dtype} {list(scale.shape)}) does not fit "
            f"{fmt.name} codes {list(codes.shape)}",
            kind="bad_relation",
        )


def _orphaned(where: str, orphan: Orphan) -> Corrupt:
    what = "weight" if orphan.missing is Role.CODES else "scale"
    return Corrupt(
        f"{where}: {orphan.role.value} {orphan.name!r} has no {what} (of {orphan.weight!r})",
        kind="orphaned_companion",
        hint="a file is missing, or the tensors were renamed",
    )
