// NEON, which every 64-bit Arm processor has.

#include "kernels.h"
#include "targets.h"

#if defined(__aarch64__)

#include <arm_neon.h>

#include "exact.h"
#include "feedback.h"

namespace quantmill {
namespace {

struct Ends {
    int positive;
    unsigned negative;
};

struct V {
    static constexpr int lanes = 4;
    using F = float32x4_t;
    using I = int32x4_t;

    static const std::uint8_t* bytes(const void* from) {
        return static_cast<const std::uint8_t*>(from);
    }
    static I load(const void* from) { return vreinterpretq_s32_u8(vld1q_u8(bytes(from))); }
    static void store(void* to, I v) {
        vst1q_u8(static_cast<std::uint8_t*>(to), vreinterpretq_u8_s32(v));
    }
    static F loadf(const float* from) { return vld1q_f32(from); }
    static void storef(float* to, F v) { vst1q_f32(to, v); }
    static F set(float x) { return vdupq_n_f32(x); }
    static I seti(int x) { return vdupq_n_s32(x); }
    static F halves(const float* x) { return set(x[0]); }  // a vector reaches into one group only
    static F as_float(I v) { return vreinterpretq_f32_s32(v); }
    static I as_int(F v) { return vreinterpretq_s32_f32(v); }

    static F add(F a, F b) { return vaddq_f32(a, b); }
    static F sub(F a, F b) { return vsubq_f32(a, b); }
    static F mul(F a, F b) { return vmulq_f32(a, b); }
    static F div(F a, F b) { return vdivq_f32(a, b); }
    static F min(F a, F b) { return vminq_f32(a, b); }
    static F max(F a, F b) { return vmaxq_f32(a, b); }
    static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
    static F fnma(F a, F b, F c) { return vfmsq_f32(c, a, b); }
    static I to_int(F v) { return vcvtnq_s32_f32(v); }
    static F from_int(I v) { return vcvtq_f32_s32(v); }

    // Lanes of float64: the lower ones and the upper ones.
    struct D {
        float64x2_t a, b;
    };
    static D widen(F v) { return {vcvt_f64_f32(vget_low_f32(v)), vcvt_high_f64_f32(v)}; }
    static D load_d(const double* from) { return {vld1q_f64(from), vld1q_f64(from + 2)}; }
    static void store_d(double* to, D v) {
        vst1q_f64(to, v.a);
        vst1q_f64(to + 2, v.b);
    }
    static D add_d(D v, D w) { return {vaddq_f64(v.a, w.a), vaddq_f64(v.b, w.b)}; }
    static D mul_d(D v, D w) { return {vmulq_f64(v.a, w.a), vmulq_f64(v.b, w.b)}; }

    static I iadd(I a, I b) { return vaddq_s32(a, b); }
    static I isub(I a, I b) { return vsubq_s32(a, b); }
    static I iand(I a, I b) { return vandq_s32(a, b); }
    static I ior(I a, I b) { return vorrq_s32(a, b); }
    static I ixor(I a, I b) { return veorq_s32(a, b); }
    template <int n> static I shl(I v) { return vshlq_n_s32(v, n); }
    template <int n> static I shr(I v) {
        return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(v), n));
    }
    static I imax(I a, I b) { return vmaxq_s32(a, b); }
    static I imin(I a, I b) { return vminq_s32(a, b); }
    static I add_if_greater(I sum, I a, I b) {
        return vsubq_s32(sum, vreinterpretq_s32_u32(vcgtq_s32(a, b)));
    }
    static I select_greater(I a, I b, I yes, I no) { return vbslq_s32(vcgtq_s32(a, b), yes, no); }
    static float reduce_min(F v) { return vminvq_f32(v); }
    static float reduce_max(F v) { return vmaxvq_f32(v); }
    static int reduce_max(I v) { return vmaxvq_s32(v); }

    static F load_f16(const void* from) {
        return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(bytes(from))));
    }
    static void store_f16(void* to, F v) {
        vst1_u8(static_cast<std::uint8_t*>(to), vreinterpret_u8_f16(vcvt_f16_f32(v)));
    }
    static F round_f16(F v) { return vcvt_f32_f16(vcvt_f16_f32(v)); }
    static I load_u8(const void* from) {
        std::uint32_t four;
        std::memcpy(&four, from, 4);
        const uint8x8_t loaded = vreinterpret_u8_u32(vdup_n_u32(four));
        return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(loaded))));
    }
    static I load_u16(const void* from) {
        return vreinterpretq_s32_u32(vmovl_u16(vreinterpret_u16_u8(vld1_u8(bytes(from)))));
    }
    static void store_u8(void* to, I v) {
        const uint16x4_t words = vmovn_u32(vreinterpretq_u32_s32(v));
        const uint8x8_t narrow = vmovn_u16(vcombine_u16(words, words));
        const std::uint32_t four = vget_lane_u32(vreinterpret_u32_u8(narrow), 0);
        std::memcpy(to, &four, 4);
    }
    static void store_u16(void* to, I v) {
        vst1_u8(static_cast<std::uint8_t*>(to),
                vreinterpret_u8_u16(vmovn_u32(vreinterpretq_u32_s32(v))));
    }

    static int16x8_t h(I v) { return vreinterpretq_s16_s32(v); }
    static I i(int16x8_t v) { return vreinterpretq_s32_s16(v); }
    static I set_16(int x) { return i(vdupq_n_s16(static_cast<std::int16_t>(x))); }
    static I add_16(I a, I b) { return i(vaddq_s16(h(a), h(b))); }
    static I sub_16(I a, I b) { return i(vsubq_s16(h(a), h(b))); }
    template <int n> static I shr_16(I v) {
        return vreinterpretq_s32_u16(vshrq_n_u16(vreinterpretq_u16_s32(v), n));
    }
    static I max_16(I a, I b) { return i(vmaxq_s16(h(a), h(b))); }
    static I min_16(I a, I b) { return i(vminq_s16(h(a), h(b))); }
    static I add_if_greater_16(I sum, I a, I b) {
        return i(vsubq_s16(h(sum), vreinterpretq_s16_u16(vcgtq_s16(h(a), h(b)))));
    }
    static I select_positive_16(I code, I yes) {
        return iand(yes, vreinterpretq_s32_u16(vcgtq_s16(h(code), vdupq_n_s16(0))));
    }

    // Ends of a group of BF16 (kernels in vector.inl say why two orders).
    template <int size>
    static Ends extremes_bf16(const std::uint8_t* weights) {
        I as_signed = load(weights);
        uint16x8_t as_unsigned = vreinterpretq_u16_s32(as_signed);
        for (int k = 8; k < size; k += 8) {
            const I next = load(weights + 2 * k);
            as_signed = max_16(as_signed, next);
            as_unsigned = vmaxq_u16(as_unsigned, vreinterpretq_u16_s32(next));
        }
        return {vmaxvq_s16(h(as_signed)), vmaxvq_u16(as_unsigned)};
    }
    template <int size>
    static std::uint16_t least_bf16(const std::uint8_t* weights) {
        uint16x8_t least = vreinterpretq_u16_s32(load(weights));
        for (int k = 8; k < size; k += 8) {
            least = vminq_u16(least, vreinterpretq_u16_s32(load(weights + 2 * k)));
        }
        return vminvq_u16(least);
    }
    template <int size>
    static unsigned largest_bf16(const std::uint8_t* weights) {
        const I mask = set_16(0x7FFF);
        I top = iand(load(weights), mask);
        for (int k = 8; k < size; k += 8) top = max_16(top, iand(load(weights + 2 * k), mask));
        return static_cast<unsigned>(vmaxvq_s16(h(top)));
    }

    template <int size, int bits, bool>
    static void pack(const std::uint8_t* codes, std::uint8_t* out) {
        quantmill::pack(codes, size, bits, out);
    }
    template <int size, int bits>
    static void unpack(const std::uint8_t* stream, std::uint8_t* codes) {
        quantmill::unpack(stream, size, bits, codes);
    }
    template <int size>
    static void unpack_nibbles(const std::uint8_t* stream, std::uint8_t* codes) {
        for (int k = 0; k < size; k += 16) {
            const uint8x8_t pairs = vld1_u8(stream + k / 2);
            const uint8x8x2_t both = {{vand_u8(pairs, vdup_n_u8(15)), vshr_n_u8(pairs, 4)}};
            vst2_u8(codes + k, both);
        }
    }
    template <int size>
    static void look_up_16(const std::uint16_t* table, const std::uint8_t* codes,
                           std::uint8_t* out) {
        const uint8x16_t first = vreinterpretq_u8_u16(vld1q_u16(table));
        const uint8x16_t second = vreinterpretq_u8_u16(vld1q_u16(table + 8));
        const uint8x16_t lows = vuzp1q_u8(first, second), highs = vuzp2q_u8(first, second);
        for (int k = 0; k < size; k += 16) {
            const uint8x16_t index = vld1q_u8(codes + k);
            const uint8x16x2_t both = {{vqtbl1q_u8(lows, index), vqtbl1q_u8(highs, index)}};
            vst2q_u8(out + 2 * k, both);
        }
    }
};

#include "decode.inl"
#include "vector.inl"

constexpr int search_lanes = V::lanes;

#include "search.inl"
#include "search_vector.inl"
#include "feedback_vector.inl"

bool supported() { return true; }

}  // namespace

const Implementation neon_implementation = {"neon", "vectors of 128 bits (NEON)", supported,
                                            quantize, dequantize, decode, search, round_columns, carry};

}  // namespace quantmill

#endif
