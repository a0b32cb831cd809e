// Codes of other quantizers as numbers, in plain loops, one stage after the other: element,
// parameters of its group, dtype. Compilers turn each into vectors of the instruction set that an
// implementation is compiled for; included inside its unnamed namespace.

constexpr std::size_t decode_block = 512;

template <Element element>
inline float element_of(std::uint32_t code) {
    if constexpr (element == Element::e4m3) return from_e4m3(code);
    if constexpr (element == Element::e2m1) return from_e2m1(code);
    return static_cast<float>(static_cast<std::int32_t>(code));
}

// Zeros, scales and biases of `count` columns from `start` on; a loop of its own where every column
// has its own, as columns in an order of their own do.
inline void apply_groups(const DecodeTask& task, std::size_t row, std::size_t start,
                         std::size_t count, float* __restrict value) {
    std::size_t group = row * groups_in_row(task) + start / task.group_columns;
    if (task.group_columns == 1) {
        for (std::size_t i = 0; i < count; ++i) {
            const float zero = of_group(task.zeros, group + i, 0.0f);
            const float scale = of_group(task.scales, group + i, 1.0f);
            value[i] = (value[i] - zero) * scale + of_group(task.biases, group + i, -0.0f);
        }
        return;
    }
    std::size_t left = task.group_columns - start % task.group_columns;  // of this group
    for (std::size_t i = 0; i < count; ++group, left = task.group_columns) {
        const std::size_t end = left < count - i ? i + left : count;
        const float zero = of_group(task.zeros, group, 0.0f);
        const float scale = of_group(task.scales, group, 1.0f);
        const float bias = of_group(task.biases, group, -0.0f);
        for (; i < end; ++i) value[i] = (value[i] - zero) * scale + bias;
    }
}

inline float with_one_nan(float value) {
    const std::uint32_t bits = bits_of(value);  // compilers branch on comparisons of floats
    return float_of((bits & ~sign_bit) > infinity_bits ? quiet_nan_bits : bits);
}

// The part of a row from column `start` on, `count` of them.
template <class T, Element element>
void decode_part(const DecodeTask& task, std::size_t row, std::size_t start, std::size_t count) {
    using Raw = typename T::Raw;
    const std::size_t first = row * task.columns + start;
    const std::uint8_t* const __restrict codes = task.codes + first;
    float value[decode_block];
    for (std::size_t i = 0; i < count; ++i) value[i] = element_of<element>(codes[i]);
    apply_groups(task, row, start, count, value);
    Raw raw[decode_block];
    for (std::size_t i = 0; i < count; ++i) {
        raw[i] = T::narrow(with_one_nan(value[i]));
    }
    std::memcpy(task.values + first * sizeof(Raw), raw, count * sizeof(Raw));
}

template <class T, Element element>
void decode_rows(const DecodeTask& task) {
    for (std::size_t row = 0; row < task.rows; ++row) {
        for (std::size_t start = 0; start < task.columns; start += decode_block) {
            const std::size_t left = task.columns - start;
            decode_part<T, element>(task, row, start, left < decode_block ? left : decode_block);
        }
    }
}

template <class T>
void decode_dtype(const DecodeTask& task) {
    switch (task.element) {
        case Element::integer: return decode_rows<T, Element::integer>(task);
        case Element::e2m1: return decode_rows<T, Element::e2m1>(task);
        case Element::e4m3: return decode_rows<T, Element::e4m3>(task);
    }
}

void decode(const DecodeTask& task) {
    if (task.dtype == Dtype::bf16) decode_dtype<Bf16>(task);
    else if (task.dtype == Dtype::f16) decode_dtype<F16>(task);
    else decode_dtype<F32>(task);
}
