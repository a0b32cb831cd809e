// One group at a time, any input, nothing clever: docs/formats.md as code. This is the slow path of
// every implementation for groups that are out of the ordinary, and an implementation of its own.

#pragma once

#include "numbers.h"

namespace quantmill {
namespace {

constexpr int longest_group = 128;

// Weights of a group as float32, and how many of them are NaN or infinite.
template <class T>
struct Group {
    float w[longest_group];
    int size;
    std::size_t non_finite = 0;

    Group(const std::uint8_t* weights, int group_size) : size(group_size) {
        for (int i = 0; i < size; ++i) {
            w[i] = T::widen(load_as<typename T::Raw>(weights + sizeof(typename T::Raw) * i));
            non_finite += is_finite(w[i]) ? 0 : 1;
        }
    }
    float largest_magnitude() const {
        float largest = 0.0f;
        for (int i = 0; i < size; ++i) {
            if (absolute(w[i]) > largest) largest = absolute(w[i]);
        }
        return largest;
    }
};

// Codes of a group as a stream of bits, the lowest bit of the first code first.
inline void pack(const std::uint8_t* codes, int size, int bits, std::uint8_t* out) {
    for (int i = 0; i < size; i += 8, out += bits) {
        const std::uint64_t stream = squeeze(load_as<std::uint64_t>(codes + i), bits);
        std::memcpy(out, &stream, static_cast<std::size_t>(bits));
    }
}

inline void unpack(const std::uint8_t* stream, int size, int bits, std::uint8_t* codes) {
    for (int i = 0; i < size; i += 8, stream += bits) {
        std::uint64_t eight = 0;
        std::memcpy(&eight, stream, static_cast<std::size_t>(bits));
        store_as(codes + i, spread(eight, bits));
    }
}

// -- affine ---------------------------------------------------------------------------------------

// Step numbers are those of docs/formats.md. Returns whether the scale is not finite.
template <class T>
bool exact_affine(const Group<T>& group, int bits, std::uint8_t* codes, std::uint8_t* scale_out,
                  std::uint8_t* bias_out) {
    using Raw = typename T::Raw;
    float least = float_of(infinity_bits), largest = -least;  // 1; a comparison with NaN is false
    for (int i = 0; i < group.size; ++i) {
        least = group.w[i] < least ? group.w[i] : least;
        largest = largest < group.w[i] ? group.w[i] : largest;
    }
    const bool negative = absolute(least) > absolute(largest);
    const float edge = negative ? least : largest;  // 3
    if (group.non_finite != 0 && !is_finite(edge)) {
        // NaN for a scale; its sign is that of x86 arithmetic
        store_as<Raw>(scale_out, least == largest ? T::positive_nan : T::negative_nan);
        store_as<Raw>(bias_out, T::narrow(edge));
        std::memset(codes, 0, static_cast<std::size_t>(group.size * bits / 8));
        return true;
    }
    const float top = static_cast<float>((1 << bits) - 1);
    const float range = (largest - least) / top;
    float scale = range < 1e-7f ? 1e-7f : range;  // 2
    if (!negative) scale = -scale;
    const float steps = round_even(edge / scale);  // 4
    if (steps != 0.0f) scale = edge / steps;
    const float bias = steps != 0.0f ? edge : 0.0f;
    std::uint8_t unpacked[longest_group];
    for (int i = 0; i < group.size; ++i) {  // 5
        const float step = round_even((group.w[i] - bias) / scale);
        const float code = step > 0.0f ? (step < top ? step : top) : 0.0f;  // NaN: 0
        unpacked[i] = static_cast<std::uint8_t>(code);
    }
    pack(unpacked, group.size, bits, codes);  // 6
    const Raw scale_stored = T::narrow(scale), bias_stored = T::narrow(bias);
    store_as<Raw>(scale_out, scale_stored);
    store_as<Raw>(bias_out, bias_stored);
    return !is_finite(T::widen(scale_stored)) || !is_finite(T::widen(bias_stored));
}

// -- float formats --------------------------------------------------------------------------------

// The first of the nearest E2M1 values by distances in float32, which are all alike for values that
// are large enough, and for infinities: then it is 0.
inline std::uint32_t nearest_e2m1(float value) {
    std::uint32_t code = 0;
    float nearest = absolute(value);
    for (std::uint32_t i = 0; i < 16; ++i) {
        const float entry = i < 8 ? e2m1_values[i] : -e2m1_values[i - 8];
        const float distance = absolute(value - entry);
        if (distance < nearest) {
            code = i;
            nearest = distance;
        }
    }
    return code;
}

inline void pack_nibbles(const std::uint32_t* codes, int size, std::uint8_t* out) {
    for (int i = 0; i < size; i += 2) {
        out[i / 2] = static_cast<std::uint8_t>(codes[i] | codes[i + 1] << 4);
    }
}

template <class T>
void exact_nvfp4(const Group<T>& group, float encode, std::uint8_t* codes, std::uint8_t* scale) {
    const float ratio = T::round(group.largest_magnitude() / e2m1_largest) * encode;
    // 0 times an infinite factor is NaN; its sign is that of x86 arithmetic
    const std::uint8_t byte = ratio == ratio ? to_e4m3(ratio) : std::uint8_t{0xFE};
    *scale = group.non_finite != 0 ? e4m3_largest : byte;
    const float divisor = from_e4m3(*scale);
    std::uint32_t found[longest_group];
    for (int i = 0; i < group.size; ++i) {
        found[i] = nearest_e2m1(T::round(group.w[i] / divisor) * encode);  // NaN, inf: 0
    }
    pack_nibbles(found, group.size, codes);
}

// A group with NaN or infinities has no usable scale in an mx format; this is what MLX stores.
template <class T>
void exact_mx_non_finite(const Group<T>& group, const Format& format, std::uint8_t* codes,
                         std::uint8_t* scale) {
    *scale = T::dtype == Dtype::f32 ? 128 : 0;
    if (format.mode == Mode::mxfp4) {
        std::memset(codes, 0, code_bytes(format));
        return;
    }
    constexpr bool bf16 = T::dtype == Dtype::bf16;
    for (int i = 0; i < group.size; ++i) {
        // every weight is divided by 0; NaN comes out positive in BF16, and 0/0 negative elsewhere
        const bool nan = group.w[i] != group.w[i], zero = group.w[i] == 0.0f;
        const std::uint32_t own = (bits_of(group.w[i]) >> 24) & 0x80u;
        const std::uint32_t sign = bf16 && (nan || zero) ? 0u : zero ? 0x80u : own;
        codes[i] = static_cast<std::uint8_t>(e4m3_largest | sign);
    }
}

template <class T>
void exact_mx(const Group<T>& group, const Format& format, std::uint8_t* codes,
              std::uint8_t* scale) {
    if (group.non_finite != 0) return exact_mx_non_finite(group, format, codes, scale);
    const float target = format.mode == Mode::mxfp4 ? e2m1_largest : 448.0f;
    const int exponent = ceil_log2(T::round(group.largest_magnitude() / target));
    const float divisor = power_of_two(exponent);
    *scale = static_cast<std::uint8_t>(exponent + 127);
    if (format.mode == Mode::mxfp8) {
        for (int i = 0; i < group.size; ++i) codes[i] = to_e4m3(T::round(group.w[i] / divisor));
        return;
    }
    std::uint32_t found[longest_group];
    for (int i = 0; i < group.size; ++i) found[i] = to_e2m1(T::round(group.w[i] / divisor));
    pack_nibbles(found, group.size, codes);
}

// -- any format -----------------------------------------------------------------------------------

// One group of a task.
template <class T>
void exact_group(const QuantizeTask& task, std::size_t index, Outcome& outcome) {
    const Format& format = task.format;
    const std::size_t weight_bytes = sizeof(typename T::Raw) * format.group_size;
    const Group<T> group(task.weights + index * weight_bytes, format.group_size);
    std::uint8_t* codes = task.codes + index * code_bytes(format);
    std::uint8_t* scale = task.scales + index * scale_bytes(format, T::dtype);
    outcome.non_finite += group.non_finite;
    if (format.mode == Mode::affine) {
        std::uint8_t* bias = task.biases + index * sizeof(typename T::Raw);
        const bool broken = exact_affine(group, format.bits, codes, scale, bias);
        outcome.overflows += broken && group.non_finite == 0 ? 1 : 0;
    } else if (format.mode == Mode::nvfp4) {
        exact_nvfp4(group, task.encode, codes, scale);
    } else {
        exact_mx(group, format, codes, scale);
    }
}

template <class T>
void exact_values(const DequantizeTask& task, std::size_t index) {
    using Raw = typename T::Raw;
    const Format& format = task.format;
    const int size = format.group_size;
    const std::uint8_t* stream = task.codes + index * code_bytes(format);
    std::uint8_t* values = task.values + index * sizeof(Raw) * static_cast<std::size_t>(size);
    std::uint8_t codes[longest_group];
    unpack(stream, size, format.bits, codes);
    float element[longest_group], scale, bias = 0.0f;
    if (format.mode == Mode::affine) {
        scale = T::widen(load_as<Raw>(task.scales + index * sizeof(Raw)));
        bias = T::widen(load_as<Raw>(task.biases + index * sizeof(Raw)));
    } else {
        const std::uint8_t byte = task.scales[index];
        const float power = byte == 255 ? float_of(infinity_bits) : power_of_two(byte - 127);
        scale = format.mode == Mode::nvfp4 ? from_e4m3(byte) : power;
    }
    for (int i = 0; i < size; ++i) {
        const float fp4 = e2m1_values[codes[i] & 7];
        element[i] = format.mode == Mode::affine   ? static_cast<float>(codes[i])
                     : format.mode == Mode::mxfp8 ? from_e4m3(codes[i])
                                                  : (codes[i] & 8 ? -fp4 : fp4);
    }
    for (int i = 0; i < size; ++i) {
        float value = element[i] * scale;
        if (format.mode == Mode::affine) value = T::round(value) + bias;
        store_as<Raw>(values + sizeof(Raw) * i, T::narrow(value));
    }
}

// -- codes of other quantizers --------------------------------------------------------------------

// A group's value: 0 and -0 where there is none, which change no number.
inline float of_group(const std::uint8_t* values, std::size_t group, float none) {
    return values != nullptr ? load_as<float>(values + group * sizeof(float)) : none;
}

template <class T>
void exact_decode(const DecodeTask& task) {
    using Raw = typename T::Raw;
    for (std::size_t i = 0; i < task.rows * task.columns; ++i) {
        const std::size_t row = i / task.columns, column = i % task.columns;
        const std::size_t group = row * groups_in_row(task) + column / task.group_columns;
        const std::uint8_t code = task.codes[i];
        const float fp4 = e2m1_values[code & 7];
        const float element = task.element == Element::e4m3   ? from_e4m3(code)
                              : task.element == Element::e2m1 ? (code & 8 ? -fp4 : fp4)
                                                              : static_cast<float>(code);
        float value = element - of_group(task.zeros, group, 0.0f);
        value = value * of_group(task.scales, group, 1.0f);
        value = value + of_group(task.biases, group, -0.0f);
        if (value != value) value = float_of(quiet_nan_bits);
        store_as<Raw>(task.values + i * sizeof(Raw), T::narrow(value));
    }
}

}  // namespace
}  // namespace quantmill
