"""What a model's files say about its quantization: config.json and those beside it, as values.

Three readers' rules meet here. mlx-lm takes a module's entry by itself, what it leaves out being
the mode's default; mlx-native fills it up from the section and knows affine only; Ollama names a
type in model_index.json. quantparams decides, by the packed shapes, which of them is right.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from quantmill import strictjson
from quantmill.errors import BadRequest, BadSource
from quantmill.formats import MXFP4, NVFP4, Format, mode_default, parse_format


@dataclass(frozen=True, slots=True)
class Written:
    """Parameters as somebody wrote them; None where nothing is written."""

    mode: str | None = None
    bits: int | None = None
    group_size: int | None = None

    def __str__(self) -> str:
        if self.mode and self.bits and self.group_size:
            return label(Format(self.mode, self.bits, self.group_size))
        return f"{self.mode or 'some mode'}, {self.bits or '?'} bits, g{self.group_size or '?'}"

    def narrow(self, formats: Iterable[Format]) -> list[Format]:
        """The formats that agree with everything that is written."""
        return [
            f
            for f in formats
            if self.mode in {None, f.mode}
            and self.bits in {None, f.bits}
            and self.group_size in {None, f.group_size}
        ]


def label(fmt: Format) -> str:
    """Name and group size, for messages that tell formats apart."""
    return f"{fmt.name} g{fmt.group_size}"


# mlx-native's defaults for what its configs leave out
_NATIVE_BITS, _NATIVE_GROUP = 4, 64
_PREFIX = "language_model."
_SUFFIXES = (".weight", ".scales", ".biases")
_METHOD = "quant_method"


@dataclass(frozen=True, slots=True)
class Section:
    """One config's quantization object: parameters of the model and entries for its modules.

    An entry is parameters, False (not quantized) or True (quantized as the model).
    """

    default: Written
    entries: Mapping[str, Written | bool] = field(default_factory=dict)

    def module(self, path: str, has_scales: bool) -> Written | None:
        """What mlx-lm makes of the module at `path`: None for one that is not quantized.

        An entry stands alone: without a mode it is affine, and what else it leaves out is the
        mode's default, never the model's value.
        """
        entry = self.entries.get(path, has_scales)
        if isinstance(entry, bool):
            return self.model_wide if entry else None
        mode = entry.mode or "affine"
        try:
            known = mode_default(mode)
        except BadRequest:
            return replace(entry, mode=mode)
        return Written(mode, entry.bits or known.bits, entry.group_size or known.group_size)

    @property
    def model_wide(self) -> Written:
        """The parameters of the model; a missing mode is affine, as older files of mlx-lm mean."""
        return replace(self.default, mode=self.default.mode or "affine")

    def required(self) -> Format:
        """The model-wide format of a section that must be complete, as mlx-lm needs it.

        Raises BadSource when bits or group size are missing.
        """
        found = self.model_wide
        if found.bits is None or found.group_size is None:
            lack = "bits" if found.bits is None else "group_size"
            raise BadSource(f"the quantization section has no {lack}", kind=f"missing_{lack}")
        return Format(found.mode or "affine", found.bits, found.group_size)

    def overrides(self) -> dict[str, Written]:
        """The entries that mlx-native sees: those with bits. All are affine to it."""
        group = self.default.group_size or _NATIVE_GROUP
        return {
            key: Written("affine", entry.bits, entry.group_size or group)
            for key, entry in self.entries.items()
            if not isinstance(entry, bool) and entry.bits is not None
        }

    def lookup(self, name: str) -> Written:
        """mlx-native's parameters for the tensor `name`: of its entry, else of the section."""
        found = self.overrides()
        key = next((k for k in lookup_keys(name) if k in found), None)
        if key is not None:
            return found[key]
        bits, group = self.default.bits, self.default.group_size
        return Written(
            "affine",
            _NATIVE_BITS if bits is None else bits,
            _NATIVE_GROUP if group is None else group,
        )


@dataclass(frozen=True, slots=True)
class QuantConfig:
    """What a model's files say about its quantization, the section that counts more first."""

    sections: tuple[Section, ...] = ()
    model_index: Written | None = None


def lookup_keys(name: str) -> Iterator[str]:
    """The keys under which a config may hold an entry for the tensor `name`, in order.

    The name, then without its ending; then the same with `language_model.` taken away, or added.
    """
    ending = next((s for s in _SUFFIXES if name.endswith(s)), "")
    bare = name.removesuffix(ending)
    other = _PREFIX + name if not name.startswith(_PREFIX) else name.removeprefix(_PREFIX)
    yield from dict.fromkeys((name, bare, other, other.removesuffix(ending)))


def read_quant_config(
    config: Mapping[str, Any],
    quantization_config: Mapping[str, Any] | None = None,
    model_index: Mapping[str, Any] | None = None,
) -> QuantConfig | None:
    """What config.json, quantization_config.json and model_index.json say; None for nothing.

    `per_tensor` entries of quantization_config.json count more than config.json. Raises BadSource
    for sections of the wrong type.
    """
    sections = []
    if quantization_config:
        sections.append(per_tensor_section(quantization_config))
    found = model_section(config)
    if found is not None:
        sections.append(found)
    index = index_default(model_index or {})
    return QuantConfig(tuple(sections), index) if sections or index else None


def per_tensor_section(document: Mapping[str, Any]) -> Section:
    """The section that quantization_config.json is (mlx-native's own form).

    Raises BadSource when a value is not a number or an entry lacks bits or group size.
    """
    entries = document.get("per_tensor", {})
    if not isinstance(entries, dict):
        raise _bad_config("per_tensor is not an object")
    default = _strict("quantization_config", document)
    found = {}
    for key, value in entries.items():
        found[key] = _strict(key, value)
        if found[key].bits is None or found[key].group_size is None:
            raise _bad_config(f"per_tensor entry {key!r} needs bits and group_size")
    return Section(
        Written("affine", default.bits or _NATIVE_BITS, default.group_size or _NATIVE_GROUP), found
    )


def _strict(key: str, value: Any) -> Written:
    if not isinstance(value, dict):
        raise _bad_config(f"{key!r} is not an object")
    for name in ("bits", "group_size"):
        if name in value and _count(value[name]) is None:
            raise _bad_config(f"{key!r}: {name} is {value[name]!r}, not a number")
    return Written("affine", _count(value.get("bits")), _count(value.get("group_size")))


def model_section(config: Mapping[str, Any]) -> Section | None:
    """The quantization section of config.json, or of its text_config; None without one.

    `quantization` is mlx-lm's key; `quantization_config` holds the same, or a method by name.
    Raises BadSource for a section that is no object, and for methods that cannot be read.
    """
    nested = config.get("text_config")
    for place in (config, nested if isinstance(nested, dict) else {}):
        for key in ("quantization", "quantization_config"):
            value = place.get(key)
            if not value:
                continue
            if not isinstance(value, dict):
                raise BadSource(f"config.json: {key} is not an object", kind="section_not_object")
            if _METHOD not in value or key == "quantization":
                return _section(value)
            legacy = legacy_format(value)
            return Section(Written(legacy.mode, legacy.bits, legacy.group_size)) if legacy else None
    return None


def _section(value: Mapping[str, Any]) -> Section:
    entries: dict[str, Written | bool] = {
        key: entry if isinstance(entry, bool) else _lenient(entry)
        for key, entry in value.items()
        if isinstance(entry, dict | bool) and key not in {_METHOD, "bits", "group_size", "mode"}
    }
    return Section(_lenient(value), entries)


def _lenient(value: Mapping[str, Any]) -> Written:
    """Parameters of a config.json, whose readers take what is no number for absent."""
    mode = value.get("mode")
    return Written(
        mode.lower() if isinstance(mode, str) and mode else None,
        _count(value.get("bits")),
        _count(value.get("group_size")),
    )


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 2**32 else None


def without_foreign(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without sections on packings that only other tools read."""
    return {
        key: value
        for key, value in config.items()
        if not (isinstance(value, dict) and value.get(_METHOD) in {"awq", "gptq"})
    }


def legacy_format(section: Mapping[str, Any]) -> Format | None:
    """The format that mlx-lm reads out of a `quant_method`, None for one that has none.

    Raises BadSource for AWQ and GPTQ weights of another width than four bits.
    """
    method = section.get(_METHOD)
    if method == "mxfp4":
        return MXFP4
    if method == "compressed-tensors":
        nvfp4 = section.get("format") == "nvfp4-pack-quantized"
        return NVFP4 if nvfp4 else Format("affine", 4, 32)
    if method in {"awq", "gptq"}:
        bits = section.get("bits", 4)
        if bits != 4:
            raise BadSource(f"{method} weights of {bits} bits", kind="unsupported_bits")
        return Format("affine", 4, _count(section.get("group_size")) or 128)
    return None


def index_default(model_index: Mapping[str, Any]) -> Written | None:
    """The parameters that model_index.json names; None where it names none (`BF16`)."""
    kind = model_index.get("quantization")
    # the group size that a type stands for has changed over time, so only a written one counts
    group = _count(model_index.get("group_size")) or None
    try:
        known = parse_format(kind) if isinstance(kind, str) else None
    except BadRequest:
        known = None
    if known is None:
        return Written(group_size=group) if group else None
    return Written(known.mode, known.bits, group)


def parse_quantization_config(text: bytes) -> Section:
    """The section that the text of quantization_config.json holds; raises BadSource."""
    return per_tensor_section(_document(text))


def parse_model_config(text: bytes) -> Section:
    """The quantization section of the text of config.json; raises BadSource also without one."""
    found = model_section(_document(text))
    if found is None:
        raise BadSource("config.json has no quantization section", kind="missing_section")
    return found


def _document(text: bytes) -> dict[str, Any]:
    try:
        return strictjson.parse_object(text, constants=True)
    except strictjson.BadJson as error:
        raise _bad_config(f"cannot parse: {error}") from None


def _bad_config(what: str) -> BadSource:
    return BadSource(f"quantization config: {what}", kind="bad_config")
