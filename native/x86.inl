// What the x86 targets share: the ends of reductions and tables of bytes, in vectors of 128 and 256
// bits. Included by target files inside their unnamed namespace.

struct Ends {
    int positive;        // largest as signed 16-bit integers
    unsigned negative;   // largest as unsigned ones
};

// minpos finds the least of eight unsigned 16-bit integers; flipping bits turns orders around.
inline unsigned least_of_8(__m128i values) {
    return static_cast<unsigned>(_mm_extract_epi16(_mm_minpos_epu16(values), 0));
}
inline int largest_signed_of_8(__m128i values) {
    const unsigned least = least_of_8(_mm_xor_si128(values, _mm_set1_epi16(0x7FFF)));
    return static_cast<std::int16_t>(least ^ 0x7FFFu);
}
inline unsigned largest_of_8(__m128i values) {
    return least_of_8(_mm_xor_si128(values, _mm_set1_epi16(-1))) ^ 0xFFFFu;
}
inline __m128i low_half(__m256i values) { return _mm256_castsi256_si128(values); }
inline __m128i high_half(__m256i values) { return _mm256_extracti128_si256(values, 1); }

inline Ends ends_of_16(__m256i as_signed, __m256i as_unsigned) {
    return {largest_signed_of_8(_mm_max_epi16(low_half(as_signed), high_half(as_signed))),
            largest_of_8(_mm_max_epu16(low_half(as_unsigned), high_half(as_unsigned)))};
}
inline std::uint16_t least_of_16(__m256i values) {
    return static_cast<std::uint16_t>(
        least_of_8(_mm_min_epu16(low_half(values), high_half(values))));
}
inline unsigned largest_magnitude_of_16(__m256i magnitudes) {
    return static_cast<unsigned>(
        largest_signed_of_8(_mm_max_epi16(low_half(magnitudes), high_half(magnitudes))));
}

inline __m256i load_256(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
inline __m128i load_128(const void* from) {
    return _mm_loadu_si128(static_cast<const __m128i*>(from));
}

// Bytes of two codes each to bytes of one.
template <int size>
inline void unpack_nibbles_x86(const std::uint8_t* stream, std::uint8_t* codes) {
    if constexpr (size == 16) {
        const __m128i pairs = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)stream));
        const __m128i both = _mm_or_si128(pairs, _mm_slli_epi16(pairs, 4));
        _mm_storeu_si128((__m128i*)codes, _mm_and_si128(both, _mm_set1_epi8(15)));
    } else {
        for (int i = 0; i < size; i += 32) {
            const __m256i pairs = _mm256_cvtepu8_epi16(load_128(stream + i / 2));
            const __m256i both = _mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4));
            _mm256_storeu_si256((__m256i*)(codes + i), _mm256_and_si256(both, _mm256_set1_epi8(15)));
        }
    }
}

// Entries of 16 bits for codes below 16, out of a table as two tables of bytes.
template <int size>
inline void look_up_16_x86(const std::uint16_t* table, const std::uint8_t* codes, std::uint8_t* out) {
    const __m128i first = load_128(table), second = load_128(table + 8);
    const __m128i mask = _mm_set1_epi16(0xFF);
    const __m128i lows = _mm_packus_epi16(_mm_and_si128(first, mask), _mm_and_si128(second, mask));
    const __m128i highs = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8));
    for (int i = 0; i < size; i += 16) {
        const __m128i index = load_128(codes + i);
        const __m128i low = _mm_shuffle_epi8(lows, index), high = _mm_shuffle_epi8(highs, index);
        _mm_storeu_si128((__m128i*)(out + 2 * i), _mm_unpacklo_epi8(low, high));
        _mm_storeu_si128((__m128i*)(out + 2 * i + 16), _mm_unpackhi_epi8(low, high));
    }
}

// Orders of bytes for closing the gaps between eights, and opening them: -1 gives 0.
struct Order {
    alignas(32) char bytes[32];
};
constexpr Order closing_order(int bits) {
    Order order = {};
    for (int i = 0; i < 32; ++i) {
        const int k = i % 16;
        order.bytes[i] = static_cast<char>(k < bits ? k : k < 2 * bits ? k - bits + 8 : -1);
    }
    return order;
}
constexpr Order opening_order(int bits) {
    Order order = {};
    for (int i = 0; i < 32; ++i) {
        const int k = i % 8;
        order.bytes[i] = static_cast<char>(k < bits ? k + (i / 8 % 2) * bits : -1);
    }
    return order;
}

// Codes of 2, 3, 5 or 6 bits, a byte each, as a stream of bits: pairs are joined to twice, four times
// and eight times the bits, then the gaps between the eights are closed. With `room` up to twelve bytes
// beyond the end are written as well.
template <int size, int bits, bool room>
inline void pack_x86(const std::uint8_t* codes, std::uint8_t* out) {
    const __m256i bytes = _mm256_set1_epi16(static_cast<short>(1 | (1 << (8 + bits))));
    const __m256i words = _mm256_set1_epi32(1 | (1 << (16 + 2 * bits)));
    const __m256i low = _mm256_set1_epi64x(0xFFFFFFFF);
    static constexpr Order order = closing_order(bits);
    const __m256i closing = load_256(order.bytes);
    std::uint8_t apart[room ? 1 : size * bits / 8 + 16];
    std::uint8_t* stream = room ? out : apart;
    for (int i = 0; i < size; i += 32) {
        const __m256i twos = _mm256_maddubs_epi16(load_256(codes + i), bytes);
        const __m256i fours = _mm256_madd_epi16(twos, words);
        const __m256i high = _mm256_slli_epi64(_mm256_srli_epi64(fours, 32), 4 * bits);
        const __m256i eights = _mm256_or_si256(_mm256_and_si256(fours, low), high);
        const __m256i closed = _mm256_shuffle_epi8(eights, closing);
        _mm_storeu_si128((__m128i*)(stream + i * bits / 8), low_half(closed));
        _mm_storeu_si128((__m128i*)(stream + (i + 16) * bits / 8), high_half(closed));
    }
    if constexpr (!room) std::memcpy(out, apart, size * bits / 8);
}

// The way back.
template <int size, int bits>
inline void unpack_x86(const std::uint8_t* from, std::uint8_t* codes) {
    static constexpr Order order = opening_order(bits);
    const __m256i opening = load_256(order.bytes);
    const __m256i fours = _mm256_set1_epi64x((1ll << (4 * bits)) - 1);
    const __m256i twos = _mm256_set1_epi32((1 << (2 * bits)) - 1);
    const __m256i ones = _mm256_set1_epi16((1 << bits) - 1);
    std::uint8_t stream[size * bits / 8 + 16];
    std::memcpy(stream, from, size * bits / 8);
    for (int i = 0; i < size; i += 32) {
        const __m256i loaded = _mm256_set_m128i(load_128(stream + (i + 16) * bits / 8),
                                                load_128(stream + i * bits / 8));
        const __m256i eights = _mm256_shuffle_epi8(loaded, opening);
        const __m256i upper = _mm256_slli_epi64(_mm256_srli_epi64(eights, 4 * bits), 32);
        const __m256i four = _mm256_or_si256(_mm256_and_si256(eights, fours), upper);
        const __m256i second = _mm256_slli_epi32(_mm256_srli_epi32(four, 2 * bits), 16);
        const __m256i two = _mm256_or_si256(_mm256_and_si256(four, twos), second);
        const __m256i next = _mm256_slli_epi16(_mm256_srli_epi16(two, bits), 8);
        const __m256i one = _mm256_or_si256(_mm256_and_si256(two, ones), next);
        _mm256_storeu_si256((__m256i*)(codes + i), one);
    }
}
