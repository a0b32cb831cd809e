// The kernels for any vector width. A target file defines `V`, its instruction set's operations on
// lanes of 32 bits, and includes this; both lie in an unnamed namespace there.
//
// Work goes in blocks of groups and, within a block, in stages: extremes of every group, parameters
// of all groups at once, then the codes of every group. Groups that are out of the ordinary (NaN,
// infinities, scales near the ends of float32) go to exact.h.

constexpr int block_groups = 32;

using F = V::F;
using I = V::I;

// -- weights as lanes -----------------------------------------------------------------------------

// Two vectors of consecutive weights. BF16 splits into even and odd ones, where widening is one
// shift or one mask; the others into a first and a second half.
struct Pair {
    F a, b;
};

template <class T>
constexpr bool interleaved = T::dtype == Dtype::bf16;

template <class T>
inline Pair load_pair(const std::uint8_t* from) {
    if constexpr (T::dtype == Dtype::bf16) {
        const I words = V::load(from);
        return {V::as_float(V::shl<16>(words)), V::as_float(V::iand(words, V::seti(~0xFFFF)))};
    } else if constexpr (T::dtype == Dtype::f16) {
        return {V::load_f16(from), V::load_f16(from + 2 * V::lanes)};
    } else {
        return {V::as_float(V::load(from)), V::as_float(V::load(from + 4 * V::lanes))};
    }
}

// The lowest byte of every lane, in the order of the weights.
template <class T>
inline void store_codes(std::uint8_t* to, I a, I b) {
    if constexpr (interleaved<T>) {
        V::store_u16(to, V::ior(a, V::shl<8>(b)));
    } else {
        V::store_u8(to, a);
        V::store_u8(to + V::lanes, b);
    }
}

// Codes of a block on their way out. Bytes, and nibbles of interleaved vectors, go there at once. The
// others wait until the whole block is there: loading what was just stored in smaller parts stalls.
template <class T, int size, int bits>
class Codes {
  public:
    explicit Codes(std::uint8_t* out) : out_(out) {}

    void put(int group, int i, I a, I b) {
        if constexpr (!at_once) {
            store_codes<T>(kept_ + group * size + i, a, b);
            waiting_ |= 1u << group;
        } else if constexpr (bits == 8) {
            store_codes<T>(out_ + group * size + i, a, b);
        } else {
            V::store_u8(out_ + group * stride + i / 2, V::ior(a, V::shl<4>(b)));
        }
    }
    // The same for nibbles that are joined already, in the lowest byte of every lane.
    void put_joined(int group, int i, I nibbles) {
        V::store_u8(out_ + group * stride + i / 2, nibbles);
    }
    void finish() const {
        if constexpr (!at_once) {
            for (int g = 0; g < block_groups; ++g) {
                // what is written beyond a group is written again if the next two come after it
                const std::uint32_t three = waiting_ >> g & 7u;
                const std::uint8_t* codes = kept_ + g * size;
                if (three == 7u) V::template pack<size, bits, true>(codes, out_ + g * stride);
                else if (three & 1u) V::template pack<size, bits, false>(codes, out_ + g * stride);
            }
        }
    }

  private:
    static constexpr bool at_once = bits == 8 || (bits == 4 && interleaved<T>);
    static constexpr int stride = size * bits / 8;
    std::uint8_t* out_;
    std::uint32_t waiting_ = 0;
    std::uint8_t kept_[at_once ? 1 : block_groups * size];
};

inline I magnitude(I bits) { return V::iand(bits, V::seti(0x7FFFFFFF)); }

template <class T>
inline F rounded(F values) {
    if constexpr (T::dtype == Dtype::bf16) {
        const I bits = V::as_int(values);
        const I odd = V::iand(V::shr<16>(bits), V::seti(1));
        const I sum = V::iadd(V::iadd(bits, V::seti(0x7FFF)), odd);
        return V::as_float(V::iand(sum, V::seti(~0xFFFF)));
    } else if constexpr (T::dtype == Dtype::f16) {
        return V::round_f16(values);
    } else {
        return values;
    }
}

// Finite float32 numbers that `rounded` has been applied to, as elements of T.
template <class T>
inline void store_narrow(std::uint8_t* to, F values) {
    if constexpr (T::dtype == Dtype::bf16) {
        V::store_u16(to, V::shr<16>(V::as_int(values)));
    } else if constexpr (T::dtype == Dtype::f16) {
        V::store_f16(to, values);
    } else {
        V::store(to, V::as_int(values));
    }
}

template <class T, int size>
inline const std::uint8_t* weights_of(const QuantizeTask& task, std::size_t group) {
    return task.weights + group * sizeof(typename T::Raw) * size;
}

inline int groups_of_block(const QuantizeTask& task, std::size_t start) {
    const std::size_t left = task.groups - start;
    return static_cast<int>(left < block_groups ? left : block_groups);
}

// -- stage 1: extremes ----------------------------------------------------------------------------

struct Extremes {
    float least, largest;
    bool finite;
};

template <class T, int size>
inline Extremes extremes(const std::uint8_t* weights) {
    if constexpr (T::dtype == Dtype::bf16) {
        // As signed integers the largest is the largest positive number, as unsigned ones it is the
        // most negative. Groups of one sign take a second look.
        const auto [positive, negative] = V::template extremes_bf16<size>(weights);
        const bool finite = positive < 0x7F80 && negative < 0xFF80u;
        float largest = Bf16::widen(static_cast<std::uint16_t>(positive));
        float least = Bf16::widen(static_cast<std::uint16_t>(negative));
        if (positive < 0 || negative < 0x8000u) [[unlikely]] {
            const float nearest_zero = Bf16::widen(V::template least_bf16<size>(weights));
            if (positive < 0) largest = nearest_zero;
            else least = nearest_zero;
        }
        return {least, largest, finite};
    } else {
        Pair pair = load_pair<T>(weights);
        F least = V::min(pair.a, pair.b), largest = V::max(pair.a, pair.b);
        I top = V::imax(magnitude(V::as_int(pair.a)), magnitude(V::as_int(pair.b)));
        for (int i = 2 * V::lanes; i < size; i += 2 * V::lanes) {
            pair = load_pair<T>(weights + sizeof(typename T::Raw) * i);
            least = V::min(least, V::min(pair.a, pair.b));
            largest = V::max(largest, V::max(pair.a, pair.b));
            top = V::imax(top, V::imax(magnitude(V::as_int(pair.a)), magnitude(V::as_int(pair.b))));
        }
        const bool finite = V::reduce_max(top) < static_cast<int>(infinity_bits);
        return {V::reduce_min(least), V::reduce_max(largest), finite};
    }
}

// Bits of the largest magnitude as float32.
template <class T, int size>
inline std::uint32_t largest_bits(const std::uint8_t* weights) {
    if constexpr (T::dtype == Dtype::bf16) {
        return static_cast<std::uint32_t>(V::template largest_bf16<size>(weights)) << 16;
    } else if constexpr (size < 2 * V::lanes) {
        static_assert(size == V::lanes);
        const F one = T::dtype == Dtype::f16 ? V::load_f16(weights) : V::as_float(V::load(weights));
        return static_cast<std::uint32_t>(V::reduce_max(magnitude(V::as_int(one))));
    } else {
        I top = V::seti(0);
        for (int i = 0; i < size; i += 2 * V::lanes) {
            const Pair pair = load_pair<T>(weights + sizeof(typename T::Raw) * i);
            top = V::imax(top, V::imax(magnitude(V::as_int(pair.a)), magnitude(V::as_int(pair.b))));
        }
        return static_cast<std::uint32_t>(V::reduce_max(top));
    }
}

// The same for all groups of a block, `count` of them.
template <class T, int size, class W = V>
inline void largest_of_block(const std::uint8_t* weights, int count, std::uint32_t* largest) {
    constexpr int group_bytes = static_cast<int>(sizeof(typename T::Raw)) * size;
    if constexpr (T::dtype == Dtype::bf16 &&
                  requires { W::template largest_bf16_of_block<size>(weights, largest); }) {
        if (count == block_groups) {
            W::template largest_bf16_of_block<size>(weights, largest);
            return;
        }
    }
    for (int g = 0; g < count; ++g) {
        largest[g] = largest_bits<T, size>(weights + g * group_bytes);
    }
}

// -- affine ---------------------------------------------------------------------------------------

struct AffineBlock {
    alignas(64) float least[block_groups], largest[block_groups];
    alignas(64) float scale[block_groups], bias[block_groups], inverse[block_groups];
};

// Stage 1: the extremes of a block; a bit for each group that is not finite.
template <class T, int size, class W = V>
inline std::uint32_t extremes_of_block(const std::uint8_t* weights, int count, AffineBlock& block) {
    if constexpr (T::dtype == Dtype::bf16 && requires {
                      W::template ends_bf16_of_block<size>(weights, block.least, block.largest);
                  }) {
        if (count == block_groups) {
            W::template ends_bf16_of_block<size>(weights, block.least, block.largest);
            I odd = V::seti(0);  // of one sign, or not finite
            for (int g = 0; g < block_groups; g += V::lanes) {
                const I above = V::as_int(V::loadf(block.largest + g));
                const I below = V::as_int(V::loadf(block.least + g));
                const I ends = V::imax(magnitude(above), magnitude(below));
                const I two_signs = V::iand(V::ixor(above, V::seti(-1)), below);
                odd = V::ior(odd, V::shr<31>(V::ixor(two_signs, V::seti(-1))));
                odd = V::add_if_greater(odd, ends, V::seti(static_cast<int>(infinity_bits) - 1));
            }
            if (V::reduce_max(odd) == 0) return 0;
        }
    }
    std::uint32_t cold = 0;
    for (int g = 0; g < count; ++g) {
        constexpr int group_bytes = static_cast<int>(sizeof(typename T::Raw)) * size;
        const Extremes found = extremes<T, size>(weights + g * group_bytes);
        block.least[g] = found.finite ? found.least : 0.0f;
        block.largest[g] = found.finite ? found.largest : 0.0f;
        cold |= found.finite ? 0u : 1u << g;
    }
    return cold;
}

// Largest |scale| for which `affine_codes` is safe; the least scale is about 1e-8.
constexpr float largest_safe_scale = 0x1p90f;

// Stage 2: steps 2 to 4 of docs/formats.md for all groups of a block. Returns whether every scale is
// safe.
inline bool affine_parameters(AffineBlock& block, float top) {
    I unsafe = V::seti(0);
    const I sign = V::seti(static_cast<int>(sign_bit));
    for (int i = 0; i < block_groups; i += V::lanes) {
        const F least = V::loadf(block.least + i), largest = V::loadf(block.largest + i);
        const F range = V::max(V::div(V::sub(largest, least), V::set(top)), V::set(1e-7f));
        // with |a| > |b| as bits: integers order like magnitudes
        const I below = magnitude(V::as_int(least)), above = magnitude(V::as_int(largest));
        const F plain =
            V::as_float(V::select_greater(below, above, V::as_int(range),
                                          V::ixor(V::as_int(range), sign)));
        const F edge = V::as_float(
            V::select_greater(below, above, V::as_int(least), V::as_int(largest)));
        const F aligning = V::set(12582912.0f);
        const F steps = V::sub(V::add(V::div(edge, plain), aligning), aligning);
        const I some = magnitude(V::as_int(steps)), none = V::seti(0);
        const F scale = V::as_float(V::select_greater(
            some, none, V::as_int(V::div(edge, steps)), V::as_int(plain)));
        const F bias = V::as_float(V::select_greater(some, none, V::as_int(edge), none));
        V::storef(block.scale + i, scale);
        V::storef(block.bias + i, bias);
        V::storef(block.inverse + i, V::div(V::set(1.0f), scale));
        const I limit = V::as_int(V::set(largest_safe_scale));
        unsafe = V::add_if_greater(unsafe, magnitude(V::as_int(scale)), limit);
    }
    return V::reduce_max(unsafe) == 0;
}

// rint((x - bias) / scale): the quotient correctly rounded, by two steps of Markstein's iteration
// from the rounded reciprocal (needs a true fused multiply-add, and |scale| far from the ends of
// float32). No weight lies beyond the edge, so no code is below 0.
inline I affine_codes(F x, F bias, F scale, F inverse, I top) {
    const F d = V::sub(x, bias);
    F q = V::mul(d, inverse);
    q = V::fma(V::fnma(q, scale, d), inverse, q);
    q = V::fma(V::fnma(q, scale, d), inverse, q);
    return V::imin(V::to_int(q), top);
}

template <class T, int size, int bits>
inline void affine_group(const std::uint8_t* weights, const AffineBlock& block, int g,
                         Codes<T, size, bits>& codes) {
    const F bias = V::set(block.bias[g]), scale = V::set(block.scale[g]);
    const F inverse = V::set(block.inverse[g]);
    const I top = V::seti((1 << bits) - 1);
    for (int i = 0; i < size; i += 2 * V::lanes) {
        const Pair pair = load_pair<T>(weights + sizeof(typename T::Raw) * i);
        codes.put(g, i, affine_codes(pair.a, bias, scale, inverse, top),
                  affine_codes(pair.b, bias, scale, inverse, top));
    }
}

template <class T, int size, int bits>
void affine(const QuantizeTask& task, Outcome& outcome) {
    using Raw = typename T::Raw;
    const std::size_t stride = code_bytes(task.format);
    const float top = static_cast<float>((1 << bits) - 1);
    AffineBlock block = {};
    for (std::size_t start = 0; start < task.groups; start += block_groups) {
        const int count = groups_of_block(task, start);
        const std::uint32_t cold =
            extremes_of_block<T, size>(weights_of<T, size>(task, start), count, block);
        const bool safe = affine_parameters(block, top);
        Codes<T, size, bits> codes(task.codes + start * stride);
        if (safe && cold == 0 && count == block_groups) [[likely]] {
            for (int g = 0; g < block_groups; g += V::lanes) {
                const std::size_t at = (start + static_cast<std::size_t>(g)) * sizeof(Raw);
                store_narrow<T>(task.scales + at, rounded<T>(V::loadf(block.scale + g)));
                store_narrow<T>(task.biases + at, rounded<T>(V::loadf(block.bias + g)));
            }
            const std::uint8_t* weights = weights_of<T, size>(task, start);
            for (int g = 0; g < block_groups; ++g) {
                constexpr int group_bytes = static_cast<int>(sizeof(Raw)) * size;
                affine_group<T, size, bits>(weights + g * group_bytes, block, g, codes);
            }
            codes.finish();
            continue;
        }
        for (int g = 0; g < count; ++g) {
            const std::size_t group = start + static_cast<std::size_t>(g);
            const bool fits = absolute(block.scale[g]) <= largest_safe_scale;
            if (!fits || ((cold >> g) & 1u)) [[unlikely]] {
                exact_group<T>(task, group, outcome);
                continue;
            }
            store_as<Raw>(task.scales + group * sizeof(Raw), T::narrow(block.scale[g]));
            store_as<Raw>(task.biases + group * sizeof(Raw), T::narrow(block.bias[g]));
            affine_group<T, size, bits>(weights_of<T, size>(task, group), block, g, codes);
        }
        codes.finish();
    }
}

// -- E2M1 and E4M3 --------------------------------------------------------------------------------

// to_e2m1 of numbers.h.
inline I e2m1_codes(F values) {
    const I bits = V::as_int(values), size = magnitude(bits);
    I below_one = V::add_if_greater(V::seti(0), size, V::seti(0x3E800000));
    below_one = V::add_if_greater(below_one, size, V::seti(0x3F400000));
    const I from_one = V::isub(V::shr<22>(V::iadd(size, V::seti(0x1FFFFF))), V::seti(0xFC));
    const I code = V::imin(V::imax(below_one, from_one), V::seti(7));
    const I sign = V::iand(V::shr<28>(bits), V::seti(8));
    return V::select_greater(code, V::seti(0), V::ior(code, sign), code);
}

// The same for BF16 in lanes of 16 bits: `below` is the magnitude less one, so that a code begins
// where its threshold is reached; `bits` hold the signs. Not for magnitudes of 32 and more.
template <class W = V>
inline I e2m1_codes_16(I below, I bits) {
    if constexpr (requires { W::e2m1_codes_16(below, bits); }) {
        return W::e2m1_codes_16(below, bits);
    }
    I below_one = V::add_if_greater_16(V::seti(0), below, V::set_16(0x3E7F));
    below_one = V::add_if_greater_16(below_one, below, V::set_16(0x3F3F));
    const I from_one = V::sub_16(V::shr_16<6>(V::add_16(below, V::set_16(0x20))), V::set_16(0xFC));
    const I code = V::min_16(V::max_16(below_one, from_one), V::set_16(7));
    const I sign = V::iand(V::shr_16<12>(bits), V::set_16(8));
    return V::select_positive_16(code, V::ior(code, sign));
}

// Two codes of four bits from the halves of every lane of 32.
inline I nibbles_of_halves(I codes) { return V::ior(codes, V::shr<12>(codes)); }

// to_e4m3 of numbers.h for magnitudes up to 448 and the little that rounding adds: adding a power of
// two aligns the last digit that the exponent leaves, so the addition does the rounding.
inline I e4m3_codes(F values) {
    const I bits = V::as_int(values), size = magnitude(bits);
    const I exponent = V::imax(V::iand(size, V::seti(0x7F800000)), V::seti(121 << 23));
    const I aligning = V::iadd(exponent, V::seti(20 << 23));
    const I sum = V::as_int(V::add(V::as_float(size), V::as_float(aligning)));
    const I digits = V::isub(sum, aligning);
    const I code = V::iadd(digits, V::isub(V::shr<20>(exponent), V::seti(121 << 3)));
    const I sign = V::iand(V::shr<24>(bits), V::seti(0x80));
    return V::ior(V::imin(code, V::seti(e4m3_largest)), sign);
}

// Values of E4M3 bytes, as from_e4m3.
inline F e4m3_values(I codes) {
    const I size = V::iand(codes, V::seti(0x7F));
    const I normal = V::iadd(V::shl<20>(size), V::seti(120 << 23));
    const I small = V::as_int(V::mul(V::from_int(size), V::set(0x1p-9f)));
    const I sign = V::shl<24>(V::iand(codes, V::seti(0x80)));
    const I found = V::ior(V::select_greater(size, V::seti(7), normal, small), sign);
    return V::as_float(V::select_greater(size, V::seti(0x7E), V::seti(0x7FC00000), found));
}

// -- mxfp4, mxfp8 ---------------------------------------------------------------------------------

constexpr int mx_size = 32;

// Exponents of maxima between which nothing in a group can overflow or matter and be denormal.
constexpr std::uint32_t least_ordinary = 27u << 23, largest_ordinary = 227u << 23;

// The scale byte of a group whose largest magnitude is ordinary.
template <class T, bool fp4>
inline int mx_scale_byte(std::uint32_t largest) {
    if constexpr (T::dtype == Dtype::bf16) {
        // rounding maximum / 6 (or 448) to BF16 and then up is adding less than one digit
        const int bits = static_cast<int>(largest >> 16);
        return fp4 ? ((bits + 0x3F) >> 7) - 2 : ((bits + 0x1F) >> 7) - 8;
    } else {
        return ceil_log2(T::round(float_of(largest) / (fp4 ? 6.0f : 448.0f))) + 127;
    }
}

template <class T, bool fp4>
inline void mx_group(const std::uint8_t* weights, int byte, int g,
                     Codes<T, mx_size, fp4 ? 4 : 8>& codes) {
    if constexpr (fp4 && T::dtype == Dtype::bf16) {
        // dividing by a power of two is subtracting from the exponent
        const I shift = V::set_16((127 - byte) * 128 - 1);
        for (int i = 0; i < mx_size; i += 2 * V::lanes) {
            const I bits = V::load(weights + 2 * i);
            const I own = V::iand(bits, V::set_16(0x7FFF));
            const I below = V::max_16(V::add_16(own, shift), V::seti(0));
            codes.put_joined(g, i, nibbles_of_halves(e2m1_codes_16(below, bits)));
        }
    } else {
        const F inverse = V::set(power_of_two(127 - byte));
        for (int i = 0; i < mx_size; i += 2 * V::lanes) {
            const Pair pair = load_pair<T>(weights + sizeof(typename T::Raw) * i);
            const F a = V::mul(pair.a, inverse), b = V::mul(pair.b, inverse);
            if constexpr (fp4) codes.put(g, i, e2m1_codes(a), e2m1_codes(b));
            else codes.put(g, i, e4m3_codes(a), e4m3_codes(b));
        }
    }
}

template <class T, bool fp4>
void mx(const QuantizeTask& task, Outcome& outcome) {
    constexpr int stride = fp4 ? mx_size / 2 : mx_size;
    for (std::size_t start = 0; start < task.groups; start += block_groups) {
        const int count = groups_of_block(task, start);
        Codes<T, mx_size, fp4 ? 4 : 8> codes(task.codes + start * stride);
        alignas(64) std::uint32_t maxima[block_groups];
        largest_of_block<T, mx_size>(weights_of<T, mx_size>(task, start), count, maxima);
        for (int g = 0; g < count; ++g) {
            const std::size_t group = start + static_cast<std::size_t>(g);
            const std::uint8_t* weights = weights_of<T, mx_size>(task, group);
            const std::uint32_t largest = maxima[g];
            if (largest < least_ordinary || largest >= largest_ordinary) [[unlikely]] {
                exact_group<T>(task, group, outcome);
                continue;
            }
            const int byte = mx_scale_byte<T, fp4>(largest);
            task.scales[group] = static_cast<std::uint8_t>(byte);
            mx_group<T, fp4>(weights, byte, g, codes);
        }
        codes.finish();
    }
}

// -- nvfp4 ----------------------------------------------------------------------------------------

constexpr int nv_size = 16;

struct NvBlock {
    alignas(64) std::uint32_t largest[block_groups];
    alignas(64) std::uint32_t byte[block_groups];
    alignas(64) float scale[block_groups], inverse[block_groups];
};

// Below this every quotient is far from where distances to the codes become equal.
constexpr std::uint32_t nv_largest_ordinary = (127u + 20u) << 23;

// A group whose scale is 0, or whose maximum a global scale does not cover, has no ordinary quotients.
// Returns whether there is none of these.
template <class T>
inline bool nv_parameters(NvBlock& block, float encode) {
    I odd = V::seti(0);
    for (int g = 0; g < block_groups; g += V::lanes) {
        const F largest = V::as_float(V::load(block.largest + g));
        const F ratio = V::mul(rounded<T>(V::div(largest, V::set(e2m1_largest))), V::set(encode));
        const I code = e4m3_codes(ratio);
        const I beyond = encode == 1.0f ? code : V::seti(0);  // more than 448, or no number
        const I covered = V::select_greater(magnitude(V::as_int(ratio)), V::seti(0x43E00000),
                                            beyond, code);
        const F scale = e4m3_values(covered);
        V::store(block.byte + g, covered);
        V::storef(block.scale + g, scale);
        V::storef(block.inverse + g, V::div(V::set(1.0f), scale));
        odd = V::ior(odd, V::select_greater(covered, V::seti(0), V::seti(0), V::seti(1)));
    }
    return V::reduce_max(odd) == 0;
}

// x / scale rounded to T. A quotient of a BF16 number and an E4M3 one is never near the middle of two
// BF16 numbers (2^-13 away at least), so the reciprocal's error of 2^-23 cannot show. F16 has ties,
// among its denormal numbers.
template <class T>
inline F nv_quotient(F x, F scale, F inverse) {
    if constexpr (T::dtype == Dtype::bf16) return rounded<T>(V::mul(x, inverse));
    else return rounded<T>(V::div(x, scale));
}

// One number for each group that two consecutive vectors of weights reach into: those from weight
// `i` of two groups on.
struct PerGroup {
    F a, b;
};

template <class T>
inline PerGroup per_group(const float* numbers, int i) {
    if constexpr (V::lanes < nv_size) return {V::set(numbers[i / nv_size]), V::set(numbers[i / nv_size])};
    else if constexpr (interleaved<T>) return {V::halves(numbers), V::halves(numbers)};
    else return {V::set(numbers[0]), V::set(numbers[1])};
}

// Two groups: as many weights as the widest vectors take at once.
template <class T>
inline void nv_groups(const std::uint8_t* weights, const NvBlock& block, int g, float encode,
                      Codes<T, 2 * nv_size, 4>& codes) {
    for (int i = 0; i < 2 * nv_size; i += 2 * V::lanes) {
        const Pair pair = load_pair<T>(weights + sizeof(typename T::Raw) * i);
        const auto [first, second] = per_group<T>(block.inverse + g, i);
        if constexpr (T::dtype == Dtype::bf16) {
            if (encode == 1.0f) {
                const I half = V::seti(0x8000);  // no ties: rounding is adding and cutting
                const I a = V::iadd(V::as_int(V::mul(pair.a, first)), half);
                const I b = V::iadd(V::as_int(V::mul(pair.b, second)), half);
                const I bits = V::ior(V::shr<16>(a), V::iand(b, V::seti(~0xFFFF)));
                const I size = V::iand(bits, V::set_16(0x7FFF));
                const I below = V::min_16(V::add_16(size, V::set_16(-1)), V::set_16(0x40FF));
                codes.put_joined(g / 2, i, nibbles_of_halves(e2m1_codes_16(below, bits)));
                continue;
            }
        }
        const auto [s, t] = per_group<T>(block.scale + g, i);
        const F a = V::mul(nv_quotient<T>(pair.a, s, first), V::set(encode));
        const F b = V::mul(nv_quotient<T>(pair.b, t, second), V::set(encode));
        codes.put(g / 2, i, e2m1_codes(a), e2m1_codes(b));
    }
}

template <class T>
void nvfp4(const QuantizeTask& task, Outcome& outcome) {
    NvBlock block = {};
    for (std::size_t start = 0; start < task.groups; start += block_groups) {
        const int count = groups_of_block(task, start);
        largest_of_block<T, nv_size>(weights_of<T, nv_size>(task, start), count, block.largest);
        // beyond the last group of all lies what an earlier block had there, which is harmless
        I largest = V::load(block.largest);
        for (int g = V::lanes; g < block_groups; g += V::lanes) {
            largest = V::imax(largest, V::load(block.largest + g));
        }
        if (V::reduce_max(largest) >= static_cast<int>(nv_largest_ordinary)) [[unlikely]] {
            for (int g = 0; g < count; ++g) exact_group<T>(task, start + g, outcome);
            for (int g = 0; g < block_groups; ++g) block.largest[g] = 0;
            continue;
        }
        const bool ordinary = nv_parameters<T>(block, task.encode);
        Codes<T, 2 * nv_size, 4> codes(task.codes + start * (nv_size / 2));
        for (int g = 0; g < count; g += 2) {
            const std::size_t group = start + static_cast<std::size_t>(g);
            const bool both = block.byte[g] != 0 && block.byte[g + 1] != 0;
            if (g + 1 == count || (!ordinary && !both)) [[unlikely]] {
                exact_group<T>(task, group, outcome);
                if (g + 1 < count) exact_group<T>(task, group + 1, outcome);
                continue;
            }
            task.scales[group] = static_cast<std::uint8_t>(block.byte[g]);
            task.scales[group + 1] = static_cast<std::uint8_t>(block.byte[g + 1]);
            nv_groups<T>(weights_of<T, nv_size>(task, group), block, g, task.encode, codes);
        }
        codes.finish();
    }
}

// -- dequantizing ---------------------------------------------------------------------------------

// What decodes one group's codes. Groups that are out of the ordinary never get here, so all values
// are finite, NaN among E4M3 codes aside.
struct Decoder {
    float scale, bias;
};

template <class T, Mode mode>
inline F decoded(I codes, F scale, F bias) {
    if constexpr (mode == Mode::mxfp8) return rounded<T>(V::mul(e4m3_values(codes), scale));
    const F product = V::mul(V::from_int(codes), scale);
    return rounded<T>(V::add(rounded<T>(product), bias));
}

// The values of all codes of up to four bits, for the formats whose values take 16 bits.
template <class T, Mode mode>
inline void value_table(const Decoder& group, std::uint16_t* table) {
    if constexpr (mode == Mode::affine) {
        static constexpr std::uint8_t codes[16] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                   8, 9, 10, 11, 12, 13, 14, 15};
        for (int i = 0; i < 16; i += V::lanes) {
            const F values = decoded<T, mode>(V::load_u8(codes + i), V::set(group.scale),
                                              V::set(group.bias));
            store_narrow<T>(reinterpret_cast<std::uint8_t*>(table + i), values);
        }
    } else {
        alignas(64) static constexpr float elements[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,
                                                           4.0f,  6.0f,  -0.0f, -0.5f, -1.0f, -1.5f,
                                                           -2.0f, -3.0f, -4.0f, -6.0f};
        for (int i = 0; i < 16; i += V::lanes) {
            const F values = V::mul(V::loadf(elements + i), V::set(group.scale));
            store_narrow<T>(reinterpret_cast<std::uint8_t*>(table + i), rounded<T>(values));
        }
    }
}

template <class T, Mode mode, int size, int bits>
inline void group_values(const std::uint8_t* stream, const Decoder& group, std::uint8_t* out) {
    alignas(64) std::uint8_t unpacked[size];
    const std::uint8_t* codes = bits == 8 ? stream : unpacked;
    if constexpr (bits == 4) V::template unpack_nibbles<size>(stream, unpacked);
    else if constexpr (bits != 8) V::template unpack<size, bits>(stream, unpacked);
    if constexpr (bits <= 4 && sizeof(typename T::Raw) == 2) {
        alignas(64) std::uint16_t table[16];
        value_table<T, mode>(group, table);
        V::template look_up_16<size>(table, codes, out);
    } else {
        const F scale = V::set(group.scale), bias = V::set(group.bias);
        for (int i = 0; i < size; i += 2 * V::lanes) {
            if constexpr (T::dtype == Dtype::bf16) {  // even and odd ones, as in load_pair
                const I pairs = V::load_u16(codes + i);
                const F a = decoded<T, mode>(V::iand(pairs, V::seti(0xFF)), scale, bias);
                const F b = decoded<T, mode>(V::shr<8>(pairs), scale, bias);
                V::store(out + 2 * i, V::ior(V::shr<16>(V::as_int(a)), V::as_int(b)));
            } else {
                const F a = decoded<T, mode>(V::load_u8(codes + i), scale, bias);
                const F b = decoded<T, mode>(V::load_u8(codes + i + V::lanes), scale, bias);
                store_narrow<T>(out + sizeof(typename T::Raw) * i, a);
                store_narrow<T>(out + sizeof(typename T::Raw) * (i + V::lanes), b);
            }
        }
    }
}

template <class T, Mode mode, int size, int bits>
void dequantize_groups(const DequantizeTask& task) {
    using Raw = typename T::Raw;
    constexpr std::size_t stride = static_cast<std::size_t>(size) * bits / 8;
    for (std::size_t group = 0; group < task.groups; ++group) {
        Decoder decoder = {0.0f, 0.0f};
        bool ordinary;
        if constexpr (mode == Mode::affine) {
            decoder.scale = T::widen(load_as<Raw>(task.scales + group * sizeof(Raw)));
            decoder.bias = T::widen(load_as<Raw>(task.biases + group * sizeof(Raw)));
            // products and sums stay in the range of T
            constexpr bool f16 = T::dtype == Dtype::f16;
            ordinary = absolute(decoder.scale) < (f16 ? 60.0f : 0x1p100f) &&
                       absolute(decoder.bias) < (f16 ? 3e4f : 0x1p100f);
        } else {
            const std::uint8_t byte = task.scales[group];
            decoder.scale = mode == Mode::nvfp4 ? from_e4m3(byte) : power_of_two(byte - 127);
            ordinary = mode == Mode::nvfp4 ? (byte & 0x7F) != 0x7F : byte >= 8 && byte < 240;
        }
        if (!ordinary) [[unlikely]] {
            exact_values<T>(task, group);
            continue;
        }
        group_values<T, mode, size, bits>(task.codes + group * stride, decoder,
                                          task.values + group * sizeof(Raw) * size);
    }
}

// -- choosing -------------------------------------------------------------------------------------

template <class T, int size>
void affine_of_size(const QuantizeTask& task, Outcome& outcome) {
    switch (task.format.bits) {
        case 2: return affine<T, size, 2>(task, outcome);
        case 3: return affine<T, size, 3>(task, outcome);
        case 4: return affine<T, size, 4>(task, outcome);
        case 5: return affine<T, size, 5>(task, outcome);
        case 6: return affine<T, size, 6>(task, outcome);
        default: return affine<T, size, 8>(task, outcome);
    }
}

template <class T>
void quantize_dtype(const QuantizeTask& task, Outcome& outcome) {
    switch (task.format.mode) {
        case Mode::affine:
            if (task.format.group_size == 32) return affine_of_size<T, 32>(task, outcome);
            if (task.format.group_size == 64) return affine_of_size<T, 64>(task, outcome);
            return affine_of_size<T, 128>(task, outcome);
        case Mode::mxfp4: return mx<T, true>(task, outcome);
        case Mode::mxfp8: return mx<T, false>(task, outcome);
        case Mode::nvfp4: return nvfp4<T>(task, outcome);
    }
}

template <class T, int size>
void dequantize_of_size(const DequantizeTask& task) {
    switch (task.format.bits) {
        case 2: return dequantize_groups<T, Mode::affine, size, 2>(task);
        case 3: return dequantize_groups<T, Mode::affine, size, 3>(task);
        case 4: return dequantize_groups<T, Mode::affine, size, 4>(task);
        case 5: return dequantize_groups<T, Mode::affine, size, 5>(task);
        case 6: return dequantize_groups<T, Mode::affine, size, 6>(task);
        default: return dequantize_groups<T, Mode::affine, size, 8>(task);
    }
}

template <class T>
void dequantize_affine(const DequantizeTask& task) {
    if (task.format.group_size == 32) return dequantize_of_size<T, 32>(task);
    if (task.format.group_size == 64) return dequantize_of_size<T, 64>(task);
    return dequantize_of_size<T, 128>(task);
}

Outcome quantize(const QuantizeTask& task) {
    Outcome outcome;
    if (task.dtype == Dtype::bf16) quantize_dtype<Bf16>(task, outcome);
    else if (task.dtype == Dtype::f16) quantize_dtype<F16>(task, outcome);
    else quantize_dtype<F32>(task, outcome);
    return outcome;
}

void dequantize(const DequantizeTask& task) {
    switch (task.format.mode) {
        case Mode::affine:
            if (task.dtype == Dtype::bf16) return dequantize_affine<Bf16>(task);
            if (task.dtype == Dtype::f16) return dequantize_affine<F16>(task);
            return dequantize_affine<F32>(task);
        case Mode::mxfp4: return dequantize_groups<Bf16, Mode::mxfp4, mx_size, 4>(task);
        case Mode::mxfp8: return dequantize_groups<Bf16, Mode::mxfp8, mx_size, 8>(task);
        case Mode::nvfp4: return dequantize_groups<Bf16, Mode::nvfp4, nv_size, 4>(task);
    }
}
