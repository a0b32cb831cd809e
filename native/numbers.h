// Numbers bit by bit: the dtypes of weights, E4M3 and E2M1, with IEEE rounding to nearest, ties to
// even, everywhere. Written without the processor's own conversions, so every machine agrees.
//
// Everything lies in an unnamed namespace, and nothing inline of the standard library is called: files
// that include this are compiled for different instruction sets, and of a shared copy the linker could
// keep the one that this processor lacks.

#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace quantmill {
namespace {

inline std::uint32_t bits_of(float value) { return __builtin_bit_cast(std::uint32_t, value); }
inline float float_of(std::uint32_t bits) { return __builtin_bit_cast(float, bits); }

constexpr std::uint32_t sign_bit = 0x80000000u;
constexpr std::uint32_t infinity_bits = 0x7F800000u;
constexpr std::uint32_t quiet_nan_bits = 0x7FC00000u;

inline float absolute(float value) { return float_of(bits_of(value) & ~sign_bit); }
inline bool is_finite(float value) { return (bits_of(value) & infinity_bits) != infinity_bits; }

template <class T>
inline T load_as(const std::uint8_t* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

template <class T>
inline void store_as(std::uint8_t* to, T value) {
    std::memcpy(to, &value, sizeof value);
}

// To the nearest integer, ties to even, for magnitudes below 2^22; larger ones stay as large.
inline float round_even(float value) {
    constexpr float aligning = 12582912.0f;  // 1.5 * 2^23: its last digit is worth 1
    return (value + aligning) - aligning;
}

// -- dtypes of weights ----------------------------------------------------------------------------
// widen: exact. narrow: rounded. nan: what a scale gets that is no number, as MLX on x86 has it.

struct Bf16 {
    using Raw = std::uint16_t;
    static constexpr Dtype dtype = Dtype::bf16;
    static constexpr Raw negative_nan = 0x7FC0, positive_nan = 0x7FC0;
    static float widen(Raw raw) { return float_of(static_cast<std::uint32_t>(raw) << 16); }
    static Raw narrow(float value) {
        const std::uint32_t bits = bits_of(value);
        const std::uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
        return static_cast<Raw>((bits & ~sign_bit) > infinity_bits ? 0x7FC0u : rounded);
    }
    static float round(float value) { return widen(narrow(value)); }
};

struct F16 {
    using Raw = std::uint16_t;
    static constexpr Dtype dtype = Dtype::f16;
    static constexpr Raw negative_nan = 0xFD00, positive_nan = 0x7D00;
    static float widen(Raw raw) {
        const std::uint32_t sign = static_cast<std::uint32_t>(raw & 0x8000u) << 16;
        const std::uint32_t shifted = static_cast<std::uint32_t>(raw & 0x7FFFu) << 13;
        const float scaled = float_of(shifted) * 0x1p112f;  // exponents from bias 15 to bias 127
        const std::uint32_t special = shifted >= 0x0F800000u ? infinity_bits : 0u;
        return float_of(bits_of(scaled) | special | sign);
    }
    static Raw narrow(float value) {
        const std::uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000u;
        const std::uint32_t magnitude = bits & ~sign_bit;
        // below 2^-14 the addition aligns the last digit with 2^-24
        const std::uint32_t small = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
        const std::uint32_t odd = (magnitude >> 13) & 1u;
        const std::uint32_t normal = (magnitude - (112u << 23) + 0xFFFu + odd) >> 13;
        std::uint32_t found = magnitude < (113u << 23) ? small : normal;
        found = magnitude >= 0x477FF000u ? 0x7C00u : found;  // 65520 and more
        found = magnitude > infinity_bits ? 0x7E00u : found;
        return static_cast<Raw>(sign | found);
    }
    static float round(float value) { return widen(narrow(value)); }
};

struct F32 {
    using Raw = std::uint32_t;
    static constexpr Dtype dtype = Dtype::f32;
    static constexpr Raw negative_nan = 0xFFC00000u, positive_nan = 0x7FC00000u;
    static float widen(Raw raw) { return float_of(raw); }
    static Raw narrow(float value) { return bits_of(value); }
    static float round(float value) { return value; }
};

// -- E4M3 and E2M1 --------------------------------------------------------------------------------

constexpr std::uint8_t e4m3_largest = 0x7E;  // 448

// The nearest E4M3 magnitude, ties to even, 448 from there on and for NaN; the sign kept.
inline std::uint8_t to_e4m3(float value) {
    const std::uint32_t bits = bits_of(value), magnitude = bits & ~sign_bit;
    const std::uint32_t normal = ((magnitude + 0x7FFFFu + ((magnitude >> 20) & 1u)) >> 20) - 0x3C0u;
    // below 2^-6 the addition aligns the last digit with 2^-9
    const std::uint32_t small = bits_of(float_of(magnitude) + 16384.0f) - bits_of(16384.0f);
    std::uint32_t found = magnitude < (121u << 23) ? small : normal;
    found = magnitude >= 0x43E00000u ? e4m3_largest : found;
    return static_cast<std::uint8_t>(found | ((bits >> 24) & 0x80u));
}

// The value of an E4M3 byte; 0x7F and 0xFF are no numbers.
inline float from_e4m3(std::uint32_t code) {
    const std::uint32_t magnitude = code & 0x7Fu;
    const std::uint32_t normal = (magnitude << 20) + (120u << 23);
    const std::uint32_t small = bits_of(static_cast<float>(magnitude) * 0x1p-9f);
    std::uint32_t found = magnitude < 8u ? small : normal;
    found = magnitude == 0x7Fu ? 0x7FC00000u : found;
    return float_of(found | (code & 0x80u) << 24);
}

constexpr float e2m1_values[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
constexpr float e2m1_largest = 6.0f;

// The value of an E2M1 code, without a table, so that compilers make vectors of it.
inline float from_e2m1(std::uint32_t code) {
    const std::uint32_t magnitude = code & 7u;
    const std::uint32_t normal = (magnitude << 22) + (126u << 23);
    const std::uint32_t found = magnitude >= 2u ? normal : magnitude == 1u ? 0x3F000000u : 0u;
    return float_of(found | (code & 8u) << 28);
}

// Code of the nearest E2M1 value, the smaller magnitude on a tie, never -0. Not for magnitudes of
// 2^20 and more, nor for NaN.
inline std::uint32_t to_e2m1(float value) {
    const std::uint32_t bits = bits_of(value), magnitude = bits & ~sign_bit;
    const float size = float_of(magnitude);
    const std::uint32_t below_one = (size > 0.25f ? 1u : 0u) + (size > 0.75f ? 1u : 0u);
    // from 1 on two codes to a power of two: round away all but one digit, half down
    const std::uint32_t rounded = (magnitude + 0x1FFFFFu) >> 22;
    const std::uint32_t from_one = rounded > 0xFCu ? rounded - 0xFCu : 0u;
    std::uint32_t code = from_one > below_one ? from_one : below_one;
    code = code > 7u ? 7u : code;
    return code != 0 ? code | ((bits >> 28) & 8u) : 0u;
}

// The power of two that a scale byte of the mx formats stands for: 2^(byte - 127).
inline float power_of_two(int exponent) {
    if (exponent >= -126) return float_of(static_cast<std::uint32_t>(exponent + 127) << 23);
    return exponent == -127 ? 0x1p-127f : 0.0f;
}

// The smallest n with 2^n >= value, at least -127, for positive finite values; 0 for 0.
inline int ceil_log2(float value) {
    const std::uint32_t bits = bits_of(value);
    if (bits == 0) return 0;
    if (bits <= 0x00400000u) return -127;  // 2^-127 and less: the least exponent there is
    return static_cast<int>(bits >> 23) - 127 + ((bits & 0x7FFFFFu) != 0 ? 1 : 0);
}

// -- bit streams ----------------------------------------------------------------------------------

// Eight codes, a byte each, as the lowest 8 * bits bits.
inline std::uint64_t squeeze(std::uint64_t codes, int bits) {
    const int gap = 8 - bits;
    const std::uint64_t ones = (1u << bits) - 1u;
    const std::uint64_t twos = (1u << (2 * bits)) - 1u;
    const std::uint64_t fours = (std::uint64_t{1} << (4 * bits)) - 1u;
    codes = (codes & (ones * 0x0001000100010001u)) |
            ((codes & (ones * 0x0100010001000100u)) >> gap);
    codes = (codes & (twos * 0x0000000100000001u)) |
            ((codes & (twos * 0x0001000000010000u)) >> (2 * gap));
    return (codes & fours) | ((codes >> 32) << (4 * bits));
}

// The way back.
inline std::uint64_t spread(std::uint64_t stream, int bits) {
    const int gap = 8 - bits;
    const std::uint64_t ones = (1u << bits) - 1u;
    const std::uint64_t twos = (1u << (2 * bits)) - 1u;
    const std::uint64_t fours = (std::uint64_t{1} << (4 * bits)) - 1u;
    stream = (stream & fours) | ((stream << (4 * gap)) & (fours << 32));
    stream = (stream & (twos * 0x0000000100000001u)) |
             ((stream << (2 * gap)) & (twos * 0x0001000000010000u));
    return (stream & (ones * 0x0001000100010001u)) |
           ((stream << gap) & (ones * 0x0100010001000100u));
}

}  // namespace
}  // namespace quantmill
