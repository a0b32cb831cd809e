// What the kernels promise: groups of weights in; packed codes, scales and biases out, and back.
// Plain pointers and sizes; no Python. docs/formats.md describes the arithmetic bit for bit.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace quantmill {

enum class Dtype { bf16, f16, f32 };
enum class Mode { affine, mxfp4, mxfp8, nvfp4 };

struct Format {
    Mode mode;
    int bits;
    int group_size;
};

// Consecutive groups of weights and where their codes, scales and biases go. Nothing needs to be
// aligned. Codes take bits * group_size / 8 bytes a group. Affine scales and biases have the
// weights' dtype; float formats have one byte a group and no biases.
struct QuantizeTask {
    Dtype dtype;
    Format format;
    std::size_t groups;
    const std::uint8_t* weights;
    float encode;  // nvfp4 only: 2688 / global maximum, or 1
    std::uint8_t* codes;
    std::uint8_t* scales;
    std::uint8_t* biases;
};

// What the caller may want to refuse. Both are counted over all groups of the task.
struct Outcome {
    std::size_t non_finite = 0;  // weights that are NaN or infinite
    std::size_t overflows = 0;   // groups of finite weights whose affine scale is not finite
};

// The way back. `dtype` is that of affine scales and biases and of the values; float formats give
// BF16.
struct DequantizeTask {
    Dtype dtype;
    Format format;
    std::size_t groups;
    const std::uint8_t* codes;
    const std::uint8_t* scales;
    const std::uint8_t* biases;
    std::uint8_t* values;
};

// What a byte of another quantizer's weights stands for: an unsigned integer, E2M1 in its lower
// half, or E4M3.
enum class Element { integer, e2m1, e4m3 };

// Rows of such bytes as numbers: (element - zero) * scale + bias, every operation rounded to
// float32 and the result to `dtype`; NaN is quiet and positive, whatever processors make of it.
// `group_columns` of a row, or fewer at its end, share a float32 of `scales`, `zeros` and `biases`,
// of which the last two may be null. Nothing needs to be aligned.
struct DecodeTask {
    Element element;
    Dtype dtype;
    std::size_t rows, columns, group_columns;
    const std::uint8_t* codes = nullptr;
    const std::uint8_t* scales = nullptr;
    const std::uint8_t* zeros = nullptr;
    const std::uint8_t* biases = nullptr;
    std::uint8_t* values = nullptr;

};

// Groups whose scales and biases are searched for, by the error of every weight times the importance
// of its column (docs/formats.md, Search). Groups follow each other along rows of `columns`, the
// first begins at column `first`; both are whole groups. `importance` is one float32, finite and not
// negative, for each column. `stored` is the dtype of affine scales and biases: that of the weights, or
// another one for weights of float32.
struct SearchTask {
    Dtype dtype, stored;
    Format format;
    std::size_t groups;
    const std::uint8_t* weights;
    const std::uint8_t* importance;
    std::size_t columns, first;
    std::uint8_t* codes;
    std::uint8_t* scales;
    std::uint8_t* biases;
};

// Error feedback (docs/formats.md). Matrices lie in tiles of 64 rows, [tiles][columns][64] floats;
// `factors` is [columns][columns]. Nothing needs to be aligned but to floats.
constexpr std::size_t tile_rows = 64;

// One group of columns, from `first` on, is rounded column by column, and its later columns take over
// the errors. `errors` has the weights, and in these columns then what rounding took from them;
// `current` the weights with what earlier columns gave. Scales and biases are numbers, one for each
// row. Columns may lie in another order than their codes: these are packed side by side,
// [tiles * 64][columns * bits / 8], the group's from column `group` on, where column `first` + k has
// place `places[k]`. Other groups' codes are left alone.
struct RoundTask {
    Format format;
    std::size_t tiles, columns, first, group;
    const std::uint8_t* places;
    const float* scales;
    const float* biases;
    const float* factors;
    float* errors;
    float* current;
    std::uint8_t* codes;
};

// Errors of columns `first` to `last`, times their factors, are added to the current weights of
// columns `to_first` to `to_last`, of which there is a multiple of `carry_step`, in their order.
constexpr std::size_t carry_step = 16;
struct CarryTask {
    std::size_t tiles, columns, first, last, to_first, to_last;
    const float* factors;
    const float* errors;
    float* current;
};

// One way to compute, the same bytes as every other.
struct Implementation {
    std::string_view name;
    std::string_view what;
    bool (*supported)();  // by this processor and its operating system
    Outcome (*quantize)(const QuantizeTask&);
    void (*dequantize)(const DequantizeTask&);
    void (*decode)(const DecodeTask&);
    Outcome (*search)(const SearchTask&);
    void (*round_columns)(const RoundTask&);
    void (*carry)(const CarryTask&);
};

struct Implementations {
    const Implementation* const* first;
    std::size_t count;
};

// All that were compiled, the plainest first, the fastest last.
Implementations implementations();

// The implementation of that name, or null.
const Implementation* find_implementation(std::string_view name);

// The last supported one.
const Implementation& best_implementation();

// Count of NaN and infinities, and the largest magnitude (NaN ignored), of `count` elements.
struct Scan {
    std::size_t non_finite;
    float largest;
};
Scan scan(Dtype dtype, const std::uint8_t* weights, std::size_t count);

// static: see numbers.h on sharing between instruction sets
static constexpr std::size_t dtype_bytes(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }
static constexpr std::size_t scale_bytes(const Format& format, Dtype dtype) {
    return format.mode == Mode::affine ? dtype_bytes(dtype) : 1;
}
static constexpr std::size_t groups_in_row(const DecodeTask& task) {
    return task.columns / task.group_columns + (task.columns % task.group_columns != 0 ? 1 : 0);
}
static constexpr std::size_t code_bytes(const Format& format) {
    return static_cast<std::size_t>(format.bits) * static_cast<std::size_t>(format.group_size) / 8;
}

}  // namespace quantmill
