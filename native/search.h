// What every search for scales and biases shares: the candidates and the rules for using one
// (docs/formats.md, Search). The implementations differ in how they measure.

#pragma once

#include "exact.h"

namespace quantmill {
namespace {

// How much of a group's range a candidate leaves out, in twentieths: below, and in all.
constexpr int cuts = 3;
constexpr float cut_below[cuts] = {0.0f, 0.05f, 0.1f};
constexpr float kept_range[2 * cuts - 1] = {1.0f, 0.95f, 0.9f, 0.85f, 0.8f};

// Rounds of one candidate: as it is, and after two fits to the codes it gave.
constexpr int rounds = 3;

// nvfp4: scale bytes around MLX's own.
constexpr int bytes_below = 3, bytes_above = 7, least_byte = 1, largest_byte = 126;

// A scale and a bias before they are stored.
struct Fit {
    float scale, bias;
};

// A scale and a bias as stored, and the scale's reciprocal in float32.
struct Line {
    float scale, bias, inverse;
};

// What lanes without a candidate are measured with, to no effect.
constexpr Line no_line = {1.0f, 0.0f, 1.0f};

// The number that a code stands for: never NaN, as scale and bias are finite.
inline float value_on(const Line& line, float code) { return code * line.scale + line.bias; }

// All ones where it can be used: no scale of 0, and finite up to the value of the last code, also
// when that is rounded to T.
template <class T>
inline std::uint32_t usable_mask(const Line& line, float top) {
    const std::uint32_t scale = (bits_of(line.scale) & ~sign_bit) - 1u;  // 0 becomes the largest
    const std::uint32_t bias = bits_of(line.bias) & ~sign_bit;
    const std::uint32_t inverse = bits_of(line.inverse) & ~sign_bit;
    const std::uint32_t last = bits_of(T::round(value_on(line, top))) & ~sign_bit;
    const std::uint32_t outer = last > bias ? last : bias;
    const std::uint32_t largest = outer > inverse ? outer : inverse;
    return scale < infinity_bits - 1u ? (largest < infinity_bits ? ~0u : 0u) : 0u;
}

template <class T>
inline Line stored_line(const Fit& exact) {
    const float scale = T::round(exact.scale);
    return {scale, T::round(exact.bias), 1.0f / scale};
}

// Candidate `number` of a group that reaches from `least` to `largest`.
inline Fit cut(int number, float least, float largest, float top) {
    const int below = number / cuts, above = number % cuts;
    const float range = largest - least;
    return {kept_range[below + above] * range / top, least + cut_below[below] * range};
}

// Sums over a group, h the importance, x the weight, q its code.
struct Sums {
    double h, x, q, qq, qx;
};

// The line nearest to the weights for these codes: weighted least squares. Its scale is 0, which is
// not usable, where codes are all alike.
inline Fit fit(const Sums& sum) {
    const double determinant = sum.h * sum.qq - sum.q * sum.q;
    const double scale = (sum.h * sum.qx - sum.q * sum.x) / determinant;
    const double bias = (sum.qq * sum.x - sum.q * sum.qx) / determinant;
    return {static_cast<float>(determinant > 0.0 ? scale : 0.0), static_cast<float>(bias)};
}

// The code of a weight as a number: never NaN, as lines are usable and weights finite. Floats that are
// not negative order like their bits; compilers would make branches of float comparisons.
inline float code_on(const Line& line, float x, float top) {
    const auto step = static_cast<std::int32_t>(bits_of((x - line.bias) * line.inverse));
    const auto most = static_cast<std::int32_t>(bits_of(top));
    const std::int32_t beyond = (step & ~(step >> 31)) - most;  // of 0 where negative
    return round_even(float_of(static_cast<std::uint32_t>(most + (beyond & (beyond >> 31)))));
}

// The nearest E2M1 magnitude of a magnitude, the even code on a tie: adding a power of two whose last
// digit is worth what a code is apart from the next.
inline float nearest_e2m1_magnitude(float magnitude) {
    const float size = magnitude < 6.0f ? magnitude : 6.0f;
    const std::uint32_t exponent = bits_of(size) & infinity_bits;
    const std::uint32_t unit = exponent > 0x3F800000u ? exponent : 0x3F800000u;
    const float aligning = float_of(unit + (22u << 23));
    return (size + aligning) - aligning;
}

// The code of such a magnitude with the sign of `x`, never -0.
inline std::uint8_t e2m1_code(float magnitude, float x) {
    const std::uint32_t code = to_e2m1(magnitude);
    return static_cast<std::uint8_t>(code != 0 ? code | ((bits_of(x) >> 28) & 8u) : 0u);
}

inline float scale_of_byte(Mode mode, int byte) {
    return mode == Mode::nvfp4 ? from_e4m3(static_cast<std::uint32_t>(byte))
                               : power_of_two(byte - 127);
}

// The next scale byte to try after MLX's own, by its number from 0; -1 where there is none.
inline int tried_byte(Mode mode, int own, int number) {
    if (mode == Mode::mxfp4) return own - 1;  // -1 where the own one is the least
    const int byte = own - bytes_below + number + (number >= bytes_below ? 1 : 0);
    return byte >= least_byte && byte <= largest_byte ? byte : -1;
}
constexpr int tried_bytes(Mode mode) {
    return mode == Mode::mxfp4 ? 1 : mode == Mode::nvfp4 ? bytes_below + bytes_above : 0;
}

// -- tasks ----------------------------------------------------------------------------------------

inline void widen_weights(Dtype dtype, const std::uint8_t* raw, std::size_t count, float* out) {
    if (dtype == Dtype::f32) {
        std::memcpy(out, raw, count * sizeof(float));
    } else if (dtype == Dtype::bf16) {
        for (std::size_t i = 0; i < count; ++i) {
            out[i] = Bf16::widen(load_as<std::uint16_t>(raw + 2 * i));
        }
    } else {
        for (std::size_t i = 0; i < count; ++i) {
            out[i] = F16::widen(load_as<std::uint16_t>(raw + 2 * i));
        }
    }
}

inline float widen_one(Dtype dtype, const std::uint8_t* raw) {
    float value;
    widen_weights(dtype, raw, 1, &value);
    return value;
}

// Importance of a group's columns; 1 everywhere where all of it is 0.
inline void importance_of(const SearchTask& task, std::size_t group, float* out) {
    const auto size = static_cast<std::size_t>(task.format.group_size);
    const std::size_t column = (task.first + group * size) % task.columns;
    std::memcpy(out, task.importance + column * sizeof(float), size * sizeof(float));
    std::uint32_t any = 0;
    for (std::size_t i = 0; i < size; ++i) any |= bits_of(out[i]) & ~sign_bit;
    if (any != 0) return;
    for (std::size_t i = 0; i < size; ++i) out[i] = 1.0f;
}

// Some groups as MLX has them, with scales and biases in the weights' own dtype.
constexpr std::size_t own_groups = 32;

struct OwnGroups {
    std::uint8_t codes[own_groups * longest_group];
    std::uint8_t scales[own_groups * sizeof(float)], biases[own_groups * sizeof(float)];
    Outcome outcome;

    OwnGroups(const SearchTask& task, std::size_t start, std::size_t count,
              Outcome (*quantize)(const QuantizeTask&)) {
        const std::size_t group_bytes =
            dtype_bytes(task.dtype) * static_cast<std::size_t>(task.format.group_size);
        outcome = quantize({task.dtype, task.format, count, task.weights + start * group_bytes,
                            1.0f, codes, scales, biases});
    }
    float number(const std::uint8_t* parameters, Dtype dtype, std::size_t group) const {
        return widen_one(dtype, parameters + group * dtype_bytes(dtype));
    }
};

inline bool all_finite(const float* x, int size) {
    std::uint32_t largest = 0;
    for (int i = 0; i < size; ++i) {
        const std::uint32_t magnitude = bits_of(x[i]) & ~sign_bit;
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest < infinity_bits;
}

// MLX's own result of groups from `start` on, copied to where results go. Scales and biases of
// float32 that are stored in another dtype are rounded to it; returns how many groups of finite
// weights overflow by that.
template <class T>
inline std::size_t keep_own(const SearchTask& task, std::size_t start, std::size_t count,
                            const OwnGroups& own) {
    using Raw = typename T::Raw;
    const std::size_t stride = code_bytes(task.format);
    std::memcpy(task.codes + start * stride, own.codes, count * stride);
    if (task.format.mode != Mode::affine) {
        std::memcpy(task.scales + start, own.scales, count);
        return 0;
    }
    std::uint8_t* scales = task.scales + start * sizeof(Raw);
    std::uint8_t* biases = task.biases + start * sizeof(Raw);
    if (task.dtype == T::dtype) {  // NaN keeps its bits
        std::memcpy(scales, own.scales, count * sizeof(Raw));
        std::memcpy(biases, own.biases, count * sizeof(Raw));
        return 0;
    }
    std::size_t overflows = 0;
    for (std::size_t g = 0; g < count; ++g) {
        const float scale = own.number(own.scales, task.dtype, g);
        const float bias = own.number(own.biases, task.dtype, g);
        store_as<Raw>(scales + g * sizeof(Raw), T::narrow(scale));
        store_as<Raw>(biases + g * sizeof(Raw), T::narrow(bias));
        const bool finite = is_finite(T::round(scale)) && is_finite(T::round(bias));
        overflows += !finite && is_finite(scale) && is_finite(bias) ? 1 : 0;
    }
    return overflows;
}

}  // namespace
}  // namespace quantmill
