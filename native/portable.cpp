// Plain loops over blocks of groups, one stage after the other, for any processor. Compilers turn them
// into vectors, which needs what a loop uses in local names: a byte that is written could be anything
// else. Shares numbers with exact.h and nothing with vector.inl, whose oracle it is.

#include "exact_feedback.h"
#include "exact_search.h"
#include "kernels.h"
#include "targets.h"

namespace quantmill {
namespace {

constexpr int block_weights = 2048;

template <class T>
struct Block {
    float w[block_weights];
    std::uint8_t codes[block_weights];
    int groups, size;

    int count() const { return groups * size; }
    const float* group(int g) const { return w + g * size; }

    void widen(const std::uint8_t* weights) {
        typename T::Raw raw[block_weights];
        std::memcpy(raw, weights, sizeof(typename T::Raw) * static_cast<std::size_t>(count()));
        const int weights_read = count();
        for (int i = 0; i < weights_read; ++i) w[i] = T::widen(raw[i]);
    }
    struct Extremes {
        float least, largest;
    };
    // As integers that order like the numbers: compilers keep the order of float comparisons.
    Extremes extremes(int g) const {
        const float* x = group(g);
        std::int32_t least = 0x7FFFFFFF, largest = -0x7FFFFFFF - 1;
        for (int i = 0; i < size; ++i) {
            const std::int32_t key = ordered(static_cast<std::int32_t>(bits_of(x[i])));
            least = key < least ? key : least;
            largest = key > largest ? key : largest;
        }
        return {float_of(static_cast<std::uint32_t>(ordered(least))),
                float_of(static_cast<std::uint32_t>(ordered(largest)))};
    }
    static std::int32_t ordered(std::int32_t bits) { return bits ^ ((bits >> 31) & 0x7FFFFFFF); }
    float largest_magnitude(int g) const {
        const float* x = group(g);
        std::uint32_t largest = 0;  // magnitudes order like their bits, NaN above all
        for (int i = 0; i < size; ++i) {
            const std::uint32_t bits = bits_of(x[i]) & ~sign_bit;
            largest = bits > largest ? bits : largest;
        }
        return float_of(largest);
    }
};

// Step numbers are those of docs/formats.md. `ordinary` says of each group whether it is done.
template <class T>
void affine_block(Block<T>& block, int bits, typename T::Raw* scales, typename T::Raw* biases,
                  bool* ordinary) {
    const int size = block.size;
    const float top = static_cast<float>((1 << bits) - 1);
    float scale[block_weights / 16], bias[block_weights / 16];
    for (int g = 0; g < block.groups; ++g) {
        const auto [least, largest] = block.extremes(g);  // 1
        ordinary[g] = is_finite(block.largest_magnitude(g)) && is_finite(largest - least);
        const bool negative = absolute(least) > absolute(largest);
        const float range = (largest - least) / top;
        const float spread = range > 1e-7f ? range : 1e-7f;  // 2
        const float edge = negative ? least : largest;       // 3
        const float plain = negative ? spread : -spread;
        const float steps = round_even(edge / plain);  // 4
        scale[g] = steps != 0.0f ? edge / steps : plain;
        bias[g] = steps != 0.0f ? edge : 0.0f;
        scales[g] = T::narrow(scale[g]);
        biases[g] = T::narrow(bias[g]);
        ordinary[g] = ordinary[g] && is_finite(T::widen(scales[g]));
    }
    for (int g = 0; g < block.groups; ++g) {
        const float* const __restrict x = block.group(g);
        const float b = bias[g], s = scale[g];
        std::uint8_t* const __restrict codes = block.codes + g * size;
        for (int i = 0; i < size; ++i) {  // 5
            const float step = round_even((x[i] - b) / s);
            const float low = step > 0.0f ? step : 0.0f;
            codes[i] = static_cast<std::uint8_t>(static_cast<int>(low < top ? low : top));
        }
    }
}

template <class T>
void mx_block(Block<T>& block, bool fp4, std::uint8_t* scales, bool* ordinary) {
    const int size = block.size;
    for (int g = 0; g < block.groups; ++g) {
        const float largest = block.largest_magnitude(g);
        ordinary[g] = is_finite(largest);
        const int exponent = ceil_log2(T::round(largest / (fp4 ? e2m1_largest : 448.0f)));
        scales[g] = static_cast<std::uint8_t>(exponent + 127);
        const float divisor = power_of_two(exponent < 127 ? exponent : 127);
        const float* const __restrict x = block.group(g);
        std::uint8_t* const __restrict codes = block.codes + g * size;
        if (fp4) {
            for (int i = 0; i < size; ++i) {
                codes[i] = static_cast<std::uint8_t>(to_e2m1(T::round(x[i] / divisor)));
            }
        } else {
            for (int i = 0; i < size; ++i) codes[i] = to_e4m3(T::round(x[i] / divisor));
        }
    }
}

template <class T>
void nvfp4_block(Block<T>& block, float encode, std::uint8_t* scales, bool* ordinary) {
    const int size = block.size;
    for (int g = 0; g < block.groups; ++g) {
        const float largest = block.largest_magnitude(g);
        const float ratio = T::round(largest / e2m1_largest) * encode;
        scales[g] = to_e4m3(ratio);
        const float divisor = from_e4m3(scales[g]);
        // no quotient so large that distances to the codes become equal
        ordinary[g] = largest < 0x1p20f && (encode == 1.0f || ratio <= 448.0f) && scales[g] != 0;
        const float* const __restrict x = block.group(g);
        std::uint8_t* const __restrict codes = block.codes + g * size;
        for (int i = 0; i < size; ++i) {
            codes[i] = static_cast<std::uint8_t>(to_e2m1(T::round(x[i] / divisor) * encode));
        }
    }
}

template <class T>
void quantize_dtype(const QuantizeTask& task, Outcome& outcome) {
    using Raw = typename T::Raw;
    const Format& format = task.format;
    Block<T> block;
    block.size = format.group_size;
    const std::size_t most = static_cast<std::size_t>(block_weights / block.size);
    const std::size_t stride = code_bytes(format), group_bytes = sizeof(Raw) * block.size;
    for (std::size_t start = 0; start < task.groups; start += most) {
        block.groups = static_cast<int>(task.groups - start < most ? task.groups - start : most);
        block.widen(task.weights + start * group_bytes);
        Raw scales[block_weights / 16], biases[block_weights / 16];
        bool ordinary[block_weights / 16];
        const auto count = static_cast<std::size_t>(block.groups);
        if (format.mode == Mode::affine) {
            affine_block(block, format.bits, scales, biases, ordinary);
            std::memcpy(task.scales + start * sizeof(Raw), scales, sizeof(Raw) * count);
            std::memcpy(task.biases + start * sizeof(Raw), biases, sizeof(Raw) * count);
        } else if (format.mode == Mode::nvfp4) {
            nvfp4_block(block, task.encode, task.scales + start, ordinary);
        } else {
            mx_block(block, format.mode == Mode::mxfp4, task.scales + start, ordinary);
        }
        pack(block.codes, block.count(), format.bits, task.codes + start * stride);
        for (int g = 0; g < block.groups; ++g) {
            if (!ordinary[g]) exact_group<T>(task, start + static_cast<std::size_t>(g), outcome);
        }
    }
}

Outcome quantize(const QuantizeTask& task) {
    Outcome outcome;
    if (task.dtype == Dtype::bf16) quantize_dtype<Bf16>(task, outcome);
    else if (task.dtype == Dtype::f16) quantize_dtype<F16>(task, outcome);
    else quantize_dtype<F32>(task, outcome);
    return outcome;
}

// Dequantizing a group at a time is what exact.h does already.
template <class T>
void all_exact_values(const DequantizeTask& task) {
    for (std::size_t group = 0; group < task.groups; ++group) exact_values<T>(task, group);
}

void dequantize(const DequantizeTask& task) {
    if (task.format.mode != Mode::affine || task.dtype == Dtype::bf16) all_exact_values<Bf16>(task);
    else if (task.dtype == Dtype::f16) all_exact_values<F16>(task);
    else all_exact_values<F32>(task);
}

void decode_exactly(const DecodeTask& task) {
    if (task.dtype == Dtype::bf16) exact_decode<Bf16>(task);
    else if (task.dtype == Dtype::f16) exact_decode<F16>(task);
    else exact_decode<F32>(task);
}

#include "decode.inl"

template <class T>
void all_exact_groups(const QuantizeTask& task, Outcome& outcome) {
    for (std::size_t group = 0; group < task.groups; ++group) exact_group<T>(task, group, outcome);
}

Outcome quantize_exactly(const QuantizeTask& task) {
    Outcome outcome;
    if (task.dtype == Dtype::bf16) all_exact_groups<Bf16>(task, outcome);
    else if (task.dtype == Dtype::f16) all_exact_groups<F16>(task, outcome);
    else all_exact_groups<F32>(task, outcome);
    return outcome;
}

Outcome search_exactly(const SearchTask& task) {
    if (task.stored == Dtype::bf16) return exact_search<Bf16>(task, quantize_exactly);
    if (task.stored == Dtype::f16) return exact_search<F16>(task, quantize_exactly);
    return exact_search<F32>(task, quantize_exactly);
}

// -- search ---------------------------------------------------------------------------------------
// Each step is a loop over the lanes, which compilers make a vector of.

constexpr int search_lanes = 8;

#include "search.inl"

template <class Use>
inline void each_lane(Use use) {
    for (int l = 0; l < search_lanes; ++l) use(l);
}

void survey(const SearchLanes& lanes, const Candidates& own, Survey& found) {
    each_lane([&](int l) {
        found.least[l] = found.largest[l] = lanes.x[l];
        found.error[l] = found.h[l] = found.x[l] = 0.0;
    });
    for (int i = 0; i < lanes.size; ++i) {
        each_lane([&](int l) {
            const int at = i * search_lanes + l;
            const float x = lanes.x[at];
            const double h = lanes.h[at];
            found.least[l] = x < found.least[l] ? x : found.least[l];
            found.largest[l] = x > found.largest[l] ? x : found.largest[l];
            const double off = x - value_on(own.line(l), lanes.own[at]);
            found.error[l] += off * off * h;
            found.h[l] += h;
            found.x[l] += h * x;
        });
    }
}

template <bool sums>
void measure(const SearchLanes& lanes, Candidates& tried) {
    float q[search_lanes], off[search_lanes];
    double error[search_lanes] = {}, sum_q[search_lanes] = {};
    double sum_qq[search_lanes] = {}, sum_qx[search_lanes] = {};
    const Candidates line = tried;
    const float top = lanes.top;
    const int size = lanes.size;
    for (int i = 0; i < size; ++i) {
        const float* const __restrict x = lanes.x + i * search_lanes;
        const double* const __restrict h = lanes.h + i * search_lanes;
        each_lane([&](int l) { q[l] = code_on(line.line(l), x[l], top); });
        each_lane([&](int l) { off[l] = x[l] - value_on(line.line(l), q[l]); });
        each_lane([&](int l) {
            const double wide = off[l];
            error[l] += wide * wide * h[l];
        });
        if constexpr (sums) {
            each_lane([&](int l) {
                const double wide = q[l], weighted = h[l] * wide;
                sum_q[l] += weighted;
                sum_qq[l] += weighted * wide;
                sum_qx[l] += weighted * x[l];
            });
        }
    }
    std::memcpy(tried.error, error, sizeof error);
    if constexpr (sums) {
        std::memcpy(tried.q, sum_q, sizeof sum_q);
        std::memcpy(tried.qq, sum_qq, sizeof sum_qq);
        std::memcpy(tried.qx, sum_qx, sizeof sum_qx);
    }
}

template <class Magnitude>
inline void errors_of_bytes(const SearchLanes& lanes, Candidates& tried, Magnitude magnitude) {
    double error[search_lanes] = {};
    for (int i = 0; i < lanes.size; ++i) {
        each_lane([&](int l) {
            const int at = i * search_lanes + l;
            const double off = lanes.x[at] - magnitude(at, l) * tried.scale[l];
            error[l] += off * off * lanes.h[at];
        });
    }
    std::memcpy(tried.error, error, sizeof error);
}

void survey_bytes(const SearchLanes& lanes, Candidates& own) {
    errors_of_bytes(lanes, own, [&](int at, int) { return lanes.own[at]; });
}

void measure_bytes(const SearchLanes& lanes, Candidates& tried) {
    errors_of_bytes(lanes, tried, [&](int at, int l) {
        return nearest_e2m1_magnitude(lanes.x[at] * tried.inverse[l]);
    });
}

void codes_on_line(const float* __restrict x, int size, const Line& line, float top,
                   std::uint8_t* __restrict codes) {
    const Line own = line;
    for (int i = 0; i < size; ++i) {
        codes[i] = static_cast<std::uint8_t>(static_cast<int>(code_on(own, x[i], top)));
    }
}

void codes_of_scale(const float* x, int size, float inverse, std::uint8_t* codes) {
    for (int i = 0; i < size; ++i) {
        codes[i] = e2m1_code(nearest_e2m1_magnitude(absolute(x[i]) * inverse), x[i]);
    }
}

Outcome search(const SearchTask& task) {
    if (task.stored == Dtype::bf16) return search_stored<Bf16>(task, quantize);
    if (task.stored == Dtype::f16) return search_stored<F16>(task, quantize);
    return search_stored<F32>(task, quantize);
}

void round_columns(const RoundTask& task) { round_with<PlainColumns>(task); }

void carry(const CarryTask& task) {
    for (std::size_t tile = 0; tile < task.tiles; ++tile) {
        const float* const errors = task.errors + tile * task.columns * tile_rows;
        float* const current = task.current + tile * task.columns * tile_rows;
        for (std::size_t j = task.to_first; j < task.to_last; ++j) {
            for (std::size_t k = task.first; k < task.last; ++k) {
                PlainColumns::add(errors + k * tile_rows, task.factors[k * task.columns + j],
                                  current + j * tile_rows);
            }
        }
    }
}

bool supported() { return true; }

}  // namespace

const Implementation exact_implementation = {
    "exact",    "one group at a time, as documented", supported, quantize_exactly,
    dequantize, decode_exactly, search_exactly, round_exactly, carry_exactly};
const Implementation portable_implementation = {
    "portable", "plain loops, for any processor", supported, quantize, dequantize, decode,
    search, round_columns, carry};

}  // namespace quantmill
