// AVX2 with FMA and F16C, as in processors from Haswell and Zen on.

#include "kernels.h"
#include "targets.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include <cpuid.h>
#include <immintrin.h>

#include "exact.h"
#include "feedback.h"

namespace quantmill {
namespace {

#include "x86.inl"

struct V {
    static constexpr int lanes = 8;
    using F = __m256;
    using I = __m256i;

    static I load(const void* from) { return load_256(from); }
    static void store(void* to, I v) { _mm256_storeu_si256((__m256i*)to, v); }
    static F loadf(const float* from) { return _mm256_loadu_ps(from); }
    static void storef(float* to, F v) { _mm256_storeu_ps(to, v); }
    static F set(float x) { return _mm256_set1_ps(x); }
    static I seti(int x) { return _mm256_set1_epi32(x); }
    static F halves(const float* x) { return set(x[0]); }  // a vector reaches into one group only
    static F as_float(I v) { return _mm256_castsi256_ps(v); }
    static I as_int(F v) { return _mm256_castps_si256(v); }

    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F div(F a, F b) { return _mm256_div_ps(a, b); }
    static F min(F a, F b) { return _mm256_min_ps(a, b); }
    static F max(F a, F b) { return _mm256_max_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }
    static I to_int(F v) { return _mm256_cvtps_epi32(v); }
    static F from_int(I v) { return _mm256_cvtepi32_ps(v); }

    // Lanes of float64: the lower ones and the upper ones.
    struct D {
        __m256d a, b;
    };
    static D widen(F v) {
        return {_mm256_cvtps_pd(_mm256_castps256_ps128(v)),
                _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1))};
    }
    static D load_d(const double* from) {
        return {_mm256_loadu_pd(from), _mm256_loadu_pd(from + 4)};
    }
    static void store_d(double* to, D v) {
        _mm256_storeu_pd(to, v.a);
        _mm256_storeu_pd(to + 4, v.b);
    }
    static D add_d(D v, D w) { return {_mm256_add_pd(v.a, w.a), _mm256_add_pd(v.b, w.b)}; }
    static D mul_d(D v, D w) { return {_mm256_mul_pd(v.a, w.a), _mm256_mul_pd(v.b, w.b)}; }

    static I iadd(I a, I b) { return _mm256_add_epi32(a, b); }
    static I isub(I a, I b) { return _mm256_sub_epi32(a, b); }
    static I iand(I a, I b) { return _mm256_and_si256(a, b); }
    static I ior(I a, I b) { return _mm256_or_si256(a, b); }
    static I ixor(I a, I b) { return _mm256_xor_si256(a, b); }
    template <int n> static I shl(I v) { return _mm256_slli_epi32(v, n); }
    template <int n> static I shr(I v) { return _mm256_srli_epi32(v, n); }
    static I imax(I a, I b) { return _mm256_max_epi32(a, b); }
    static I imin(I a, I b) { return _mm256_min_epi32(a, b); }
    static I add_if_greater(I sum, I a, I b) { return isub(sum, _mm256_cmpgt_epi32(a, b)); }
    static I select_greater(I a, I b, I yes, I no) {
        return _mm256_blendv_epi8(no, yes, _mm256_cmpgt_epi32(a, b));
    }
    static float reduce_min(F v) {
        const __m128 four = _mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        const __m128 two = _mm_min_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_min_ss(two, _mm_movehdup_ps(two)));
    }
    static float reduce_max(F v) {
        const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
    }
    static int reduce_max(I v) {
        const __m128i four = _mm_max_epi32(low_half(v), high_half(v));
        const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4E));
        return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xB1)));
    }

    static F load_f16(const void* from) { return _mm256_cvtph_ps(load_128(from)); }
    static void store_f16(void* to, F v) { _mm_storeu_si128((__m128i*)to, narrow(v)); }
    static F round_f16(F v) { return _mm256_cvtph_ps(narrow(v)); }
    static I load_u8(const void* from) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
    }
    static I load_u16(const void* from) { return _mm256_cvtepu16_epi32(load_128(from)); }
    static void store_u8(void* to, I v) {
        const I low_bytes = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                             -1, -1, 0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1,
                                             -1, -1, -1, -1);
        const I bytes = _mm256_shuffle_epi8(v, low_bytes);
        _mm_storel_epi64((__m128i*)to, _mm_unpacklo_epi32(low_half(bytes), high_half(bytes)));
    }
    static void store_u16(void* to, I v) {
        const I low_words = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1,
                                             -1, 0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1,
                                             -1, -1);
        const I words = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(v, low_words), 0x08);
        _mm_storeu_si128((__m128i*)to, low_half(words));
    }

    static I set_16(int x) { return _mm256_set1_epi16(static_cast<short>(x)); }
    static I add_16(I a, I b) { return _mm256_add_epi16(a, b); }
    static I sub_16(I a, I b) { return _mm256_sub_epi16(a, b); }
    template <int n> static I shr_16(I v) { return _mm256_srli_epi16(v, n); }
    static I max_16(I a, I b) { return _mm256_max_epi16(a, b); }
    static I min_16(I a, I b) { return _mm256_min_epi16(a, b); }
    static I add_if_greater_16(I sum, I a, I b) { return sub_16(sum, _mm256_cmpgt_epi16(a, b)); }
    static I select_positive_16(I code, I yes) {
        return iand(yes, _mm256_cmpgt_epi16(code, _mm256_setzero_si256()));
    }

    // Ends of a group of BF16 (kernels in vector.inl say why two orders).
    template <int size>
    static Ends extremes_bf16(const std::uint8_t* weights) {
        I as_signed = load(weights), as_unsigned = as_signed;
        for (int i = 16; i < size; i += 16) {
            const I next = load(weights + 2 * i);
            as_signed = _mm256_max_epi16(as_signed, next);
            as_unsigned = _mm256_max_epu16(as_unsigned, next);
        }
        return ends_of_16(as_signed, as_unsigned);
    }
    template <int size>
    static std::uint16_t least_bf16(const std::uint8_t* weights) {
        I least = load(weights);
        for (int i = 16; i < size; i += 16) least = _mm256_min_epu16(least, load(weights + 2 * i));
        return least_of_16(least);
    }
    template <int size>
    static unsigned largest_bf16(const std::uint8_t* weights) {
        const I mask = set_16(0x7FFF);
        I top = iand(load(weights), mask);
        for (int i = 16; i < size; i += 16) top = max_16(top, iand(load(weights + 2 * i), mask));
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
    template <int size>
    static void unpack_nibbles(const std::uint8_t* stream, std::uint8_t* codes) {
        unpack_nibbles_x86<size>(stream, codes);
    }
    template <int size>
    static void look_up_16(const std::uint16_t* table, const std::uint8_t* codes,
                           std::uint8_t* out) {
        look_up_16_x86<size>(table, codes, out);
    }

  private:
    static __m128i narrow(F v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
};

#include "decode.inl"
#include "vector.inl"

constexpr int search_lanes = V::lanes;

#include "search.inl"
#include "search_vector.inl"
#include "feedback_vector.inl"

bool supported() {
    __builtin_cpu_init();
    unsigned a, b, c, d;  // older Clang cannot be asked for F16C by name
    const bool f16c = __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
}

}  // namespace

const Implementation avx2_implementation = {
    "avx2", "vectors of 256 bits (AVX2, FMA, F16C)", supported, quantize, dequantize, decode,
    search, round_columns, carry};

}  // namespace quantmill

#endif
