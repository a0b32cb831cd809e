"""Names and parameters of formats: the peers' vectors, and the packing arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from departures import DEPARTURES
from quantmill.errors import BadRequest
from quantmill.formats import (
    AFFINE_BITS,
    AFFINE_GROUPS,
    FORMAT_NAMES,
    MXFP4,
    MXFP8,
    NVFP4,
    Format,
    dtype_bytes,
    eight_bit,
    is_valid,
    mode_default,
    parse_format,
    parse_request,
    recorded_format,
)
from vectors import cases

FORMATS = st.sampled_from([NVFP4, MXFP4, MXFP8]) | st.builds(
    Format, st.just("affine"), st.sampled_from(AFFINE_BITS), st.sampled_from(AFFINE_GROUPS)
)


def name_of(fmt: Format | None) -> str | None:
    return fmt.name if fmt else None


@cases("quant_names", "describe")
def test_names_mean_their_parameters(case: dict[str, Any]) -> None:
    """A name in any spelling has one canonical name, mode, width, group and packing."""
    fmt, expect = parse_format(case["input"]["name"]), case["expect"]
    assert fmt.name == expect["canonical"]
    assert fmt.mode == expect["mode"]
    assert fmt.bits == expect["bits"] == expect["strict_bits"]
    assert fmt.group_size == expect["group_size"]
    assert fmt.columns(1) == expect["pack_factor"]


@cases("quant_names", "describe", odd=True)
def test_unknown_names_are_refused(case: dict[str, Any]) -> None:
    """A name that no format has is refused, which departs from the reference."""
    assert case["id"] in DEPARTURES
    with pytest.raises(BadRequest) as caught:
        parse_format(case["input"]["name"])
    assert caught.value.kind == "unsupported_quantize_type"


@cases("quant_names", "request")
def test_requests_equal_the_vectors(case: dict[str, Any]) -> None:
    """A user's text is no request, a format, or refused."""
    text, expect = case["input"]["value"], case["expect"]
    if "error" in expect:
        with pytest.raises(BadRequest) as caught:
            parse_request(text)
        assert caught.value.kind == expect["error"]["kind"]
    else:
        assert name_of(parse_request(text)) == expect["quant"]


@cases("quant_names", "source_type")
def test_recorded_widths_name_a_format(case: dict[str, Any]) -> None:
    """A mode and width in a config name a canonical format or none."""
    assert name_of(recorded_format(**case["input"])) == case["expect"]["quant"]


@cases("quant_names", "source_type", odd=True)
def test_recorded_widths_count_for_affine_only(case: dict[str, Any]) -> None:
    """A mode that has one width keeps it, whatever width the config gives."""
    assert name_of(recorded_format(**case["input"])) == case["expect"]["quant"]


@cases("quant_names", "eight_bit")
def test_eight_bit_formats_stay_in_the_family(case: dict[str, Any]) -> None:
    """Affine formats become int8 and float formats mxfp8."""
    assert eight_bit(parse_format(case["input"]["value"])).name == case["expect"]["quant"]


def test_eight_bit_keeps_the_affine_group_size() -> None:
    """An affine format's 8-bit relative has the same groups."""
    assert eight_bit(Format("affine", 4, 32)) == Format("affine", 8, 32)


@cases("quant_names", "dtype_size")
def test_dtype_sizes_equal_the_vectors(case: dict[str, Any]) -> None:
    """A dtype that transforms handle has a size, any other is refused."""
    dtype, expect = case["input"]["value"], case["expect"]
    if "error" in expect:
        with pytest.raises(BadRequest) as caught:
            dtype_bytes(dtype)
        assert caught.value.kind == expect["error"]["kind"]
    else:
        assert dtype_bytes(dtype) == expect["bytes"]


@cases("quant_names", "mode_default")
def test_modes_have_mlx_defaults(case: dict[str, Any]) -> None:
    """A mode alone means the width and group size that mlx-lm takes."""
    fmt = mode_default(case["input"]["mode"])
    assert {"bits": fmt.bits, "group_size": fmt.group_size} == case["expect"]


@cases("quant_names", "mode_valid")
def test_tested_parameters_are_valid(case: dict[str, Any]) -> None:
    """Parameters are valid where MLX's own tests say so."""
    assert is_valid(**case["input"]) == case["expect"]["valid"]


@cases("quant_numeric", "params_valid")
def test_accepted_parameters_are_valid(case: dict[str, Any]) -> None:
    """Parameters are valid where MLX's quantizer takes them."""
    assert is_valid(**case["input"]) == case["expect"]["valid"]


@cases("quant_numeric", "params_valid", odd=True)
def test_untested_parameters_are_not_valid(case: dict[str, Any]) -> None:
    """Parameters that MLX takes but does not test are not offered, which departs from it."""
    assert case["id"] in DEPARTURES
    assert not is_valid(**case["input"])


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_every_listed_name_is_its_own_canonical_name(name: str) -> None:
    """The names offered to users are understood and not aliases."""
    assert parse_format(name).name == name


@pytest.mark.parametrize(("name", "group"), [("int4", 16), ("int8", 0), ("nvfp4", 32)])
def test_unknown_group_sizes_are_refused(name: str, group: int) -> None:
    """A group size that the format does not have is refused."""
    with pytest.raises(BadRequest) as caught:
        parse_format(name, group)
    assert caught.value.kind == "unsupported_group_size"


@given(FORMATS, st.integers(1, 10_000))
def test_packing_a_whole_number_of_groups_loses_nothing(fmt: Format, groups: int) -> None:
    """Whole groups fill whole words, from which the column count comes back."""
    columns = groups * fmt.group_size
    assert fmt.columns(fmt.packed_columns(columns)) == columns


@given(FORMATS)
def test_recorded_metadata_names_the_format_without_doubt(fmt: Format) -> None:
    """Mode or name, group size and, where needed, width in a blob's metadata give the format."""
    metadata = fmt.metadata()
    if "bits" in metadata:
        found = (metadata["quant_type"], int(metadata["bits"]), int(metadata["group_size"]))
        assert Format(*found) == fmt
    else:
        assert parse_format(metadata["quant_type"], int(metadata["group_size"])) == fmt
