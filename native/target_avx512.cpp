// AVX-512 (F, BW, DQ, VL), as in processors from Skylake-X and Zen 4 on.

#include "kernels.h"
#include "targets.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

#include <immintrin.h>

#include "exact.h"
#include "feedback.h"

namespace quantmill {
namespace {

#include "x86.inl"

// Codes by five bits of a BF16 magnitude, and the same with the sign.
struct Table {
    alignas(64) std::uint16_t positive[32], negative[32];
};
constexpr Table e2m1_table() {
    Table table = {};
    // index 0x13 is everything up to 0.25; 0.5 begins at 0x14, and so on to 6
    constexpr int begins[8] = {0x1F3, 0x1F4, 0x1FA, 0x1FD, 0x1FF, 0x201, 0x203, 0x205};
    for (int index = 0x1F3; index < 0x1F3 + 32; ++index) {
        int code = 0;
        while (code < 7 && index >= begins[code + 1]) ++code;
        table.positive[index % 32] = static_cast<std::uint16_t>(code);
        table.negative[index % 32] = static_cast<std::uint16_t>(code == 0 ? 0 : code | 8);
    }
    return table;
}
constexpr Table e2m1 = e2m1_table();

struct V {
    static constexpr int lanes = 16;
    using F = __m512;
    using I = __m512i;

    static I load(const void* from) { return _mm512_loadu_si512(from); }
    static void store(void* to, I v) { _mm512_storeu_si512(to, v); }
    static F loadf(const float* from) { return _mm512_loadu_ps(from); }
    static void storef(float* to, F v) { _mm512_storeu_ps(to, v); }
    static F set(float x) { return _mm512_set1_ps(x); }
    static I seti(int x) { return _mm512_set1_epi32(x); }
    static F halves(const float* x) {
        return _mm512_insertf32x8(_mm512_set1_ps(x[0]), _mm256_set1_ps(x[1]), 1);
    }
    static F as_float(I v) { return _mm512_castsi512_ps(v); }
    static I as_int(F v) { return _mm512_castps_si512(v); }

    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F div(F a, F b) { return _mm512_div_ps(a, b); }
    static F min(F a, F b) { return _mm512_min_ps(a, b); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
    static I to_int(F v) {
        return _mm512_cvt_roundps_epi32(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
    static F from_int(I v) { return _mm512_cvtepi32_ps(v); }

    // Lanes of float64: the lower ones and the upper ones.
    struct D {
        __m512d a, b;
    };
    static D widen(F v) {
        return {_mm512_cvtps_pd(_mm512_castps512_ps256(v)),
                _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1))};
    }
    static D load_d(const double* from) {
        return {_mm512_loadu_pd(from), _mm512_loadu_pd(from + 8)};
    }
    static void store_d(double* to, D v) {
        _mm512_storeu_pd(to, v.a);
        _mm512_storeu_pd(to + 8, v.b);
    }
    static D add_d(D v, D w) { return {_mm512_add_pd(v.a, w.a), _mm512_add_pd(v.b, w.b)}; }
    static D mul_d(D v, D w) { return {_mm512_mul_pd(v.a, w.a), _mm512_mul_pd(v.b, w.b)}; }

    static I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
    static I isub(I a, I b) { return _mm512_sub_epi32(a, b); }
    static I iand(I a, I b) { return _mm512_and_si512(a, b); }
    static I ior(I a, I b) { return _mm512_or_si512(a, b); }
    static I ixor(I a, I b) { return _mm512_xor_si512(a, b); }
    template <int n> static I shl(I v) { return _mm512_slli_epi32(v, n); }
    template <int n> static I shr(I v) { return _mm512_srli_epi32(v, n); }
    static I imax(I a, I b) { return _mm512_max_epi32(a, b); }
    static I imin(I a, I b) { return _mm512_min_epi32(a, b); }
    static I add_if_greater(I sum, I a, I b) {
        return _mm512_mask_add_epi32(sum, _mm512_cmpgt_epi32_mask(a, b), sum, seti(1));
    }
    static I select_greater(I a, I b, I yes, I no) {
        return _mm512_mask_blend_epi32(_mm512_cmpgt_epi32_mask(a, b), no, yes);
    }
    static float reduce_min(F v) { return _mm512_reduce_min_ps(v); }
    static float reduce_max(F v) { return _mm512_reduce_max_ps(v); }
    static int reduce_max(I v) { return _mm512_reduce_max_epi32(v); }

    static F load_f16(const void* from) { return _mm512_cvtph_ps(load_256(from)); }
    static void store_f16(void* to, F v) { _mm256_storeu_si256((__m256i*)to, narrow(v)); }
    static F round_f16(F v) { return _mm512_cvtph_ps(narrow(v)); }
    static I load_u8(const void* from) { return _mm512_cvtepu8_epi32(load_128(from)); }
    static I load_u16(const void* from) { return _mm512_cvtepu16_epi32(load_256(from)); }
    static void store_u8(void* to, I v) {
        _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8(v));
    }
    static void store_u16(void* to, I v) {
        _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(v));
    }

    static I set_16(int x) { return _mm512_set1_epi16(static_cast<short>(x)); }
    static I add_16(I a, I b) { return _mm512_add_epi16(a, b); }
    static I sub_16(I a, I b) { return _mm512_sub_epi16(a, b); }
    template <int n> static I shr_16(I v) { return _mm512_srli_epi16(v, n); }
    static I max_16(I a, I b) { return _mm512_max_epi16(a, b); }
    static I min_16(I a, I b) { return _mm512_min_epi16(a, b); }
    static I add_if_greater_16(I sum, I a, I b) {
        return _mm512_mask_add_epi16(sum, _mm512_cmpgt_epi16_mask(a, b), sum, set_16(1));
    }
    static I select_positive_16(I code, I yes) {
        return _mm512_maskz_mov_epi16(_mm512_test_epi16_mask(code, code), yes);
    }

    // Ends of a group of BF16 (kernels in vector.inl say why two orders).
    template <int size>
    static Ends extremes_bf16(const std::uint8_t* weights) {
        I as_signed = load(weights), as_unsigned = as_signed;
        for (int i = 32; i < size; i += 32) {
            const I next = load(weights + 2 * i);
            as_signed = _mm512_max_epi16(as_signed, next);
            as_unsigned = _mm512_max_epu16(as_unsigned, next);
        }
        return ends_of_16(_mm256_max_epi16(low(as_signed), high(as_signed)),
                          _mm256_max_epu16(low(as_unsigned), high(as_unsigned)));
    }
    template <int size>
    static std::uint16_t least_bf16(const std::uint8_t* weights) {
        I least = load(weights);
        for (int i = 32; i < size; i += 32) least = _mm512_min_epu16(least, load(weights + 2 * i));
        return least_of_16(_mm256_min_epu16(low(least), high(least)));
    }
    template <int size>
    static unsigned largest_bf16(const std::uint8_t* weights) {
        const __m256i mask = _mm256_set1_epi16(0x7FFF);
        __m256i top = _mm256_and_si256(load_256(weights), mask);
        for (int i = 16; i < size; i += 16) {
            top = _mm256_max_epi16(top, _mm256_and_si256(load_256(weights + 2 * i), mask));
        }
        return largest_magnitude_of_16(top);
    }

    template <int size, int bits, bool room>
    static void pack(const std::uint8_t* codes, std::uint8_t* out) {
        pack_x86<size, bits, room>(codes, out);
    }
    template <int size, int bits>
    static void unpack(const std::uint8_t* stream, std::uint8_t* codes) {
        unpack_x86<size, bits>(stream, codes);
    }
    // E2M1 codes from a table of 64: all thresholds are multiples of 32, so above 0.25 the next five
    // bits of a magnitude tell them apart, and bit 5 takes the sign. -0 is not among the codes.
    static I e2m1_codes_16(I below, I bits) {
        const I index = shr_16<5>(max_16(below, set_16(0x3E60)));
        const I signs = shr_16<10>(bits);
        const I both = _mm512_ternarylogic_epi32(set_16(0x20), signs, index, 0xCA);
        return _mm512_permutex2var_epi16(load(e2m1.positive), both, load(e2m1.negative));
    }

    // The largest magnitudes of 32 groups, as BF16 widened to 32 bits.
    template <int size>
    static void largest_bf16_of_block(const std::uint8_t* weights, std::uint32_t* largest) {
        const auto magnitudes = [](const void* from) { return iand(load(from), set_16(0x7FFF)); };
        for (int g = 0; g < 32; g += 16) {
            store(largest + g, tree<size>(weights + g * size * 2, magnitudes, max_16));
        }
    }
    // The same for the ends of groups in both orders (see `extremes` in vector.inl).
    template <int size>
    static void ends_bf16_of_block(const std::uint8_t* weights, float* negative, float* positive) {
        const auto larger = [](I a, I b) { return _mm512_max_epu16(a, b); };
        for (int g = 0; g < 32; g += 16) {
            const std::uint8_t* from = weights + g * size * 2;
            store(positive + g, tree<size>(from, load, max_16));
            store(negative + g, tree<size>(from, load, larger));
        }
    }

    template <int size>
    static void unpack_nibbles(const std::uint8_t* stream, std::uint8_t* codes) {
        unpack_nibbles_x86<size>(stream, codes);
    }
    template <int size>
    static void look_up_16(const std::uint16_t* table, const std::uint8_t* codes,
                           std::uint8_t* out) {
        if constexpr (size == 16) {
            look_up_16_x86<size>(table, codes, out);
        } else {
            const I entries = _mm512_castsi256_si512(load_256(table));
            for (int i = 0; i < size; i += 32) {
                const I index = _mm512_cvtepu8_epi16(load_256(codes + i));
                store(out + 2 * i, _mm512_permutexvar_epi16(index, entries));
            }
        }
    }

  private:
    // The largest of each of 16 groups by some order, in the upper half of every lane. Halves of
    // several groups are put side by side, so that every comparison has full vectors to work on.
    template <int size, class Load, class Larger>
    static I tree(const std::uint8_t* weights, Load loaded, Larger larger) {
        I eights[4];  // four groups each, eight numbers of a group
        for (int i = 0; i < 4; ++i) {
            const std::uint8_t* from = weights + 4 * i * size * 2;
            const I first = two_groups<size>(from, loaded, larger);
            const I second = two_groups<size>(from + 2 * size * 2, loaded, larger);
            eights[i] = larger(_mm512_shuffle_i64x2(first, second, 0x88),
                               _mm512_shuffle_i64x2(first, second, 0xDD));
        }
        F fours[2];
        for (int i = 0; i < 2; ++i) {
            const I a = eights[2 * i], b = eights[2 * i + 1];
            fours[i] = as_float(larger(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b)));
        }
        const I twos = larger(as_int(_mm512_shuffle_ps(fours[0], fours[1], 0x88)),
                              as_int(_mm512_shuffle_ps(fours[0], fours[1], 0xDD)));
        const I ones = larger(twos, shl<16>(twos));
        // lane 4k + j holds group 4j + k
        const I order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        return iand(_mm512_permutexvar_epi32(order, ones), seti(~0xFFFF));
    }

    // Two groups, sixteen numbers of each.
    template <int size, class Load, class Larger>
    static I two_groups(const std::uint8_t* weights, Load loaded, Larger larger) {
        if constexpr (size == 16) return loaded(weights);
        I first = loaded(weights), second = loaded(weights + 2 * size);
        for (int i = 32; i < size; i += 32) {
            first = larger(first, loaded(weights + 2 * i));
            second = larger(second, loaded(weights + 2 * (size + i)));
        }
        return larger(_mm512_shuffle_i64x2(first, second, 0x44),
                      _mm512_shuffle_i64x2(first, second, 0xEE));
    }

    static __m256i low(I v) { return _mm512_castsi512_si256(v); }
    static __m256i high(I v) { return _mm512_extracti64x4_epi64(v, 1); }
    static __m256i narrow(F v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
};

#include "decode.inl"
#include "vector.inl"

constexpr int search_lanes = V::lanes;

#include "search.inl"
#include "search_vector.inl"
#include "feedback_vector.inl"

bool supported() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

}  // namespace

const Implementation avx512_implementation = {
    "avx512", "vectors of 512 bits (AVX-512 F, BW, DQ, VL)", supported, quantize, dequantize,
    decode, search, round_columns, carry};

}  // namespace quantmill

#endif
