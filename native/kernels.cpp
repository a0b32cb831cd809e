// The list of implementations, and choosing among them.

#include "kernels.h"

#include "exact.h"
#include "targets.h"

namespace quantmill {

namespace {

const Implementation* const all[] = {
    &exact_implementation,
    &portable_implementation,
#ifdef QUANTMILL_AVX2
    &avx2_implementation,
#endif
#ifdef QUANTMILL_AVX512
    &avx512_implementation,
#endif
#ifdef QUANTMILL_NEON
    &neon_implementation,
#endif
};

template <class T>
Scan scan_dtype(const std::uint8_t* weights, std::size_t count) {
    using Raw = typename T::Raw;
    constexpr std::size_t block = 4096;
    Scan found = {0, 0.0f};
    for (std::size_t start = 0; start < count; start += block) {
        const std::size_t length = count - start < block ? count - start : block;
        Raw raw[block];
        std::memcpy(raw, weights + start * sizeof(Raw), length * sizeof(Raw));
        constexpr Raw infinity = T::dtype == Dtype::f32    ? static_cast<Raw>(infinity_bits)
                                 : T::dtype == Dtype::bf16 ? Raw{0x7F80}
                                                           : Raw{0x7C00};
        constexpr Raw mask = static_cast<Raw>(static_cast<Raw>(~Raw{0}) >> 1);
        Raw largest = 0;
        std::uint32_t non_finite = 0;
        for (std::size_t i = 0; i < length; ++i) {
            const Raw magnitude = raw[i] & mask;
            non_finite += magnitude >= infinity ? 1u : 0u;
            const Raw number = magnitude > infinity ? Raw{0} : magnitude;  // not NaN
            largest = number > largest ? number : largest;
        }
        found.non_finite += non_finite;
        const float value = T::widen(largest);
        found.largest = value > found.largest ? value : found.largest;
    }
    return found;
}

}  // namespace

Implementations implementations() { return {all, sizeof all / sizeof all[0]}; }

const Implementation* find_implementation(std::string_view name) {
    for (const Implementation* one : all) {
        if (one->name == name) return one;
    }
    return nullptr;
}

const Implementation& best_implementation() {
    const Implementation* best = all[0];
    for (const Implementation* one : all) {
        if (one->supported()) best = one;
    }
    return *best;
}

Scan scan(Dtype dtype, const std::uint8_t* weights, std::size_t count) {
    if (dtype == Dtype::bf16) return scan_dtype<Bf16>(weights, count);
    if (dtype == Dtype::f16) return scan_dtype<F16>(weights, count);
    return scan_dtype<F32>(weights, count);
}

}  // namespace quantmill
