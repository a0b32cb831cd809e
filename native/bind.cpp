// The Python module: checks of sizes, the interpreter's lock let go, and a call. Nothing is computed
// here.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include "kernels.h"

namespace nb = nanobind;
using namespace quantmill;

namespace {

using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Room = nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

Dtype dtype_of(std::string_view name) {
    if (name == "BF16") return Dtype::bf16;
    if (name == "F16") return Dtype::f16;
    if (name == "F32") return Dtype::f32;
    throw nb::value_error("unknown dtype");
}

// Only combinations that the kernels have code for get through.
Format format_of(std::string_view mode, int bits, int group_size) {
    if (mode == "affine") {
        const bool known_bits = (bits >= 2 && bits <= 6) || bits == 8;
        const bool known_size = group_size == 32 || group_size == 64 || group_size == 128;
        if (known_bits && known_size) return {Mode::affine, bits, group_size};
    }
    if (mode == "mxfp4" && bits == 4 && group_size == 32) return {Mode::mxfp4, bits, group_size};
    if (mode == "mxfp8" && bits == 8 && group_size == 32) return {Mode::mxfp8, bits, group_size};
    if (mode == "nvfp4" && bits == 4 && group_size == 16) return {Mode::nvfp4, bits, group_size};
    throw nb::value_error("unknown format");
}

const Implementation& implementation_of(std::string_view name) {
    const Implementation* found = find_implementation(name);
    if (found == nullptr) throw nb::value_error("no implementation of that name");
    if (!found->supported()) throw nb::value_error("this processor does not support it");
    return *found;
}

void require(bool holds, const char* what) {
    if (!holds) throw nb::value_error(what);
}

std::size_t group_count(std::size_t nbytes, std::size_t group_bytes) {
    require(nbytes % group_bytes == 0, "not a whole number of groups");
    return nbytes / group_bytes;
}

nb::tuple quantize(Bytes weights, const std::string& dtype_name, const std::string& mode, int bits,
                   int group_size, float encode, Room codes, Room scales, Room biases,
                   const std::string& implementation) {
    const Dtype dtype = dtype_of(dtype_name);
    const Format format = format_of(mode, bits, group_size);
    const Implementation& with = implementation_of(implementation);
    const std::size_t group_bytes = dtype_bytes(dtype) * static_cast<std::size_t>(group_size);
    const std::size_t groups = group_count(weights.size(), group_bytes);
    const std::size_t bias_bytes = format.mode == Mode::affine ? dtype_bytes(dtype) : 0;
    require(codes.size() == groups * code_bytes(format), "wrong room for codes");
    require(scales.size() == groups * scale_bytes(format, dtype), "wrong room for scales");
    require(biases.size() == groups * bias_bytes, "wrong room for biases");
    const QuantizeTask task = {dtype,        format,        groups,       weights.data(), encode,
                               codes.data(), scales.data(), biases.data()};
    Outcome outcome;
    {
        nb::gil_scoped_release unlocked;
        outcome = with.quantize(task);
    }
    return nb::make_tuple(outcome.non_finite, outcome.overflows);
}

void dequantize(Bytes codes, Bytes scales, Bytes biases, const std::string& dtype_name,
                const std::string& mode, int bits, int group_size, Room values,
                const std::string& implementation) {
    const Dtype dtype = dtype_of(dtype_name);
    const Format format = format_of(mode, bits, group_size);
    const Implementation& with = implementation_of(implementation);
    require(format.mode == Mode::affine || dtype == Dtype::bf16, "float formats give BF16");
    const std::size_t groups = group_count(codes.size(), code_bytes(format));
    const std::size_t bias_bytes = format.mode == Mode::affine ? dtype_bytes(dtype) : 0;
    const std::size_t value_bytes = dtype_bytes(dtype) * static_cast<std::size_t>(group_size);
    require(scales.size() == groups * scale_bytes(format, dtype), "wrong number of scales");
    require(biases.size() == groups * bias_bytes, "wrong number of biases");
    require(values.size() == groups * value_bytes, "wrong room for values");
    const DequantizeTask task = {dtype,         format,        groups,       codes.data(),
                                 scales.data(), biases.data(), values.data()};
    nb::gil_scoped_release unlocked;
    with.dequantize(task);
}

Element element_of(std::string_view name) {
    if (name == "uint") return Element::integer;
    if (name == "e2m1") return Element::e2m1;
    if (name == "e4m3") return Element::e4m3;
    throw nb::value_error("unknown element");
}

// Null where there are none, which an empty array says.
const std::uint8_t* parameters(const Bytes& part, const DecodeTask& task, const char* wrong) {
    if (part.size() == 0 && task.rows != 0) return nullptr;
    require(part.size() == task.rows * groups_in_row(task) * sizeof(float), wrong);
    return part.data();
}

void decode(Bytes codes, Bytes scales, Bytes zeros, Bytes biases, const std::string& element,
            const std::string& dtype_name, std::size_t columns, std::size_t group_columns,
            Room values, const std::string& implementation) {
    const Implementation& with = implementation_of(implementation);
    require(columns != 0 && group_columns != 0, "no columns");
    require(codes.size() % columns == 0, "not a whole number of rows");
    DecodeTask task = {element_of(element), dtype_of(dtype_name), codes.size() / columns, columns,
                       group_columns};
    require(values.size() == codes.size() * dtype_bytes(task.dtype), "wrong room for values");
    task.codes = codes.data();
    task.scales = parameters(scales, task, "wrong number of scales");
    task.zeros = parameters(zeros, task, "wrong number of zeros");
    task.biases = parameters(biases, task, "wrong number of biases");
    task.values = values.data();
    require(task.scales != nullptr || task.rows == 0, "wrong number of scales");
    nb::gil_scoped_release unlocked;
    with.decode(task);
}

nb::tuple search(Bytes weights, const std::string& dtype_name, const std::string& stored_name,
                 const std::string& mode, int bits, int group_size, Bytes importance,
                 std::size_t first, Room codes, Room scales, Room biases,
                 const std::string& implementation) {
    const Dtype dtype = dtype_of(dtype_name), stored = dtype_of(stored_name);
    const Format format = format_of(mode, bits, group_size);
    const Implementation& with = implementation_of(implementation);
    const auto size = static_cast<std::size_t>(group_size);
    const std::size_t groups = group_count(weights.size(), dtype_bytes(dtype) * size);
    const std::size_t columns = importance.size() / sizeof(float);
    const std::size_t bias_bytes = format.mode == Mode::affine ? dtype_bytes(stored) : 0;
    require(dtype == stored || dtype == Dtype::f32, "other weights than F32 store their own dtype");
    require(importance.size() % (size * sizeof(float)) == 0 && columns != 0,
            "importance of no whole groups");
    require(first % size == 0 && first < columns, "no group begins at that column");
    require(codes.size() == groups * code_bytes(format), "wrong room for codes");
    require(scales.size() == groups * scale_bytes(format, stored), "wrong room for scales");
    require(biases.size() == groups * bias_bytes, "wrong room for biases");
    const SearchTask task = {dtype,           stored,  format,        groups,
                             weights.data(),  importance.data(), columns, first,
                             codes.data(),    scales.data(),     biases.data()};
    Outcome outcome;
    {
        nb::gil_scoped_release unlocked;
        outcome = with.search(task);
    }
    return nb::make_tuple(outcome.non_finite, outcome.overflows);
}

using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using FloatRoom = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Tiles in arrays of this size; the factors and the other tiles must fit to them.
std::size_t tiles_in(std::size_t size, std::size_t columns, const Floats& factors,
                     std::size_t others) {
    require(columns != 0 && size % (columns * tile_rows) == 0, "not a whole number of tiles");
    require(factors.size() / columns == columns && factors.size() % columns == 0,
            "wrong number of factors");
    require(size == others, "errors and current weights differ in number");
    return size / (columns * tile_rows);
}

void round_columns(const std::string& mode, int bits, int group_size, std::size_t columns,
                   std::size_t first, std::size_t group, Bytes places, Floats scales, Floats biases,
                   Floats factors, FloatRoom errors, FloatRoom current, Room codes,
                   const std::string& implementation) {
    const Format format = format_of(mode, bits, group_size);
    const Implementation& with = implementation_of(implementation);
    const std::size_t tiles = tiles_in(errors.size(), columns, factors, current.size());
    const auto size = static_cast<std::size_t>(group_size);
    require(columns % size == 0 && first % size == 0 && first < columns, "no group begins there");
    require(group % size == 0 && group < columns, "no group for the codes");
    require(places.size() == size, "wrong number of places");
    for (std::size_t k = 0; k < size; ++k) require(places.data()[k] < size, "no such place");
    require(scales.size() == tiles * tile_rows, "wrong number of scales");
    require(biases.size() == tiles * tile_rows, "wrong number of biases");
    require(codes.size() == tiles * tile_rows * (columns / size) * code_bytes(format),
            "wrong room for codes");
    const RoundTask task = {format,         tiles,         columns,        first,
                            group,          places.data(), scales.data(),  biases.data(),
                            factors.data(), errors.data(), current.data(), codes.data()};
    nb::gil_scoped_release unlocked;
    with.round_columns(task);
}

void carry(std::size_t columns, std::size_t first, std::size_t last, std::size_t to_first,
           std::size_t to_last, Floats factors, Floats errors, FloatRoom current,
           const std::string& implementation) {
    const Implementation& with = implementation_of(implementation);
    const std::size_t tiles = tiles_in(errors.size(), columns, factors, current.size());
    require(first <= last && last <= columns, "no such columns");
    require(to_first <= to_last && to_last <= columns, "no such columns");
    require((to_last - to_first) % carry_step == 0, "a number of columns that is no multiple");
    const CarryTask task = {tiles,          columns,       first,         last, to_first, to_last,
                            factors.data(), errors.data(), current.data()};
    nb::gil_scoped_release unlocked;
    with.carry(task);
}

nb::tuple scan_weights(Bytes weights, const std::string& dtype_name) {
    const Dtype dtype = dtype_of(dtype_name);
    const std::size_t count = group_count(weights.size(), dtype_bytes(dtype));
    Scan found;
    {
        nb::gil_scoped_release unlocked;
        found = scan(dtype, weights.data(), count);
    }
    return nb::make_tuple(found.non_finite, found.largest);
}

nb::list list_implementations() {
    nb::list found;
    const Implementations all = implementations();
    for (std::size_t i = 0; i < all.count; ++i) {
        const Implementation& one = *all.first[i];
        found.append(nb::make_tuple(nb::str(one.name.data(), one.name.size()),
                                    nb::str(one.what.data(), one.what.size()), one.supported()));
    }
    return found;
}

}  // namespace

NB_MODULE(_native, module) {
    module.def("implementations", list_implementations);
    module.def("best", [] { return nb::str(best_implementation().name.data()); });
    module.def("quantize", quantize, nb::arg("weights"), nb::arg("dtype"), nb::arg("mode"),
               nb::arg("bits"), nb::arg("group_size"), nb::arg("encode"), nb::arg("codes"),
               nb::arg("scales"), nb::arg("biases"), nb::arg("implementation"));
    module.def("dequantize", dequantize, nb::arg("codes"), nb::arg("scales"), nb::arg("biases"),
               nb::arg("dtype"), nb::arg("mode"), nb::arg("bits"), nb::arg("group_size"),
               nb::arg("values"), nb::arg("implementation"));
    module.def("decode", decode, nb::arg("codes"), nb::arg("scales"), nb::arg("zeros"),
               nb::arg("biases"), nb::arg("element"), nb::arg("dtype"), nb::arg("columns"),
               nb::arg("group_columns"), nb::arg("values"), nb::arg("implementation"));
    module.def("search", search, nb::arg("weights"), nb::arg("dtype"), nb::arg("stored"),
               nb::arg("mode"), nb::arg("bits"), nb::arg("group_size"), nb::arg("importance"),
               nb::arg("first"), nb::arg("codes"), nb::arg("scales"), nb::arg("biases"),
               nb::arg("implementation"));
    module.def("round_columns", round_columns, nb::arg("mode"), nb::arg("bits"),
               nb::arg("group_size"), nb::arg("columns"), nb::arg("first"), nb::arg("group"),
               nb::arg("places"), nb::arg("scales"), nb::arg("biases"), nb::arg("factors"),
               nb::arg("errors"), nb::arg("current"), nb::arg("codes"), nb::arg("implementation"));
    module.def("carry", carry, nb::arg("columns"), nb::arg("first"), nb::arg("last"),
               nb::arg("to_first"), nb::arg("to_last"), nb::arg("factors"), nb::arg("errors"),
               nb::arg("current"), nb::arg("implementation"));
    module.def("scan", scan_weights, nb::arg("weights"), nb::arg("dtype"));
}
