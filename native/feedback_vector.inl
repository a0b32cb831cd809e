// Error feedback over the operations of an instruction set: the loops of feedback.h with a row in
// every lane. Included after search_vector.inl.

inline F number_or_zero(F v) {
    const I bits = V::as_int(v);
    return V::as_float(V::select_greater(magnitude(bits), V::seti(0x7F800000), V::seti(0), bits));
}

struct VectorColumns {
    template <class Round>
    static void each(const TileRule& rule, const float* current, float* errors,
                     std::uint8_t* codes, Round round) {
        for (std::size_t l = 0; l < tile_rows; l += V::lanes) {
            I code;
            const F value = round(V::loadf(current + l), V::loadf(rule.scale + l),
                                  V::loadf(rule.bias + l), V::loadf(rule.inverse + l), code);
            const I off = V::as_int(V::sub(V::loadf(errors + l), value));
            const I finite =
                V::select_greater(magnitude(off), V::seti(0x7F7FFFFF), V::seti(0), off);
            V::storef(errors + l, V::as_float(finite));
            V::store_u8(codes + l, code);
        }
    }
    static void line(const TileRule& rule, const float* current, float* errors,
                     std::uint8_t* codes) {
        const F top = V::set(rule.top), aligning = V::set(12582912.0f);
        each(rule, current, errors, codes, [&](F x, F scale, F bias, F inverse, I& code) {
            const F step = number_or_zero(V::mul(V::sub(x, bias), inverse));
            const F inside = V::min(V::max(step, V::set(0.0f)), top);
            const F found = V::sub(V::add(inside, aligning), aligning);
            code = V::to_int(found);
            return values_on(scale, bias, found);
        });
    }
    static void e2m1(const TileRule& rule, const float* current, float* errors,
                     std::uint8_t* codes) {
        each(rule, current, errors, codes, [&](F x, F scale, F, F inverse, I& code) {
            const I bits = V::as_int(x);
            const F y = number_or_zero(V::mul(V::as_float(magnitude(bits)), inverse));
            const I found = V::as_int(nearest_magnitudes(y));
            const I sign = V::iand(bits, V::seti(~0x7FFFFFFF));  // of what is not 0
            const I signed_ = V::select_greater(found, V::seti(0), V::ior(found, sign), found);
            const F size = V::as_float(signed_);
            // the tie rule of e2m1_codes does not matter for what is such a number already
            code = e2m1_codes(size);
            return V::mul(size, scale);
        });
    }
    static void e4m3(const TileRule& rule, const float* current, float* errors,
                     std::uint8_t* codes) {
        each(rule, current, errors, codes, [&](F x, F scale, F, F inverse, I& code) {
            const I bits = V::as_int(x);
            const F y = number_or_zero(V::mul(V::as_float(magnitude(bits)), inverse));
            const I size = e4m3_codes(V::min(y, V::set(448.0f)));  // not for infinity
            const I sign = V::iand(V::shr<24>(bits), V::seti(0x80));
            code = V::select_greater(size, V::seti(0), V::ior(size, sign), size);
            return V::mul(e4m3_values(code), scale);
        });
    }
    static void add(const float* errors, float factor, float* current) {
        const F times = V::set(factor);
        for (std::size_t l = 0; l < tile_rows; l += V::lanes) {
            const F more = V::mul(V::loadf(errors + l), times);
            V::storef(current + l, V::add(V::loadf(current + l), more));
        }
    }
};

void round_columns(const RoundTask& task) { round_with<VectorColumns>(task); }

// Columns that take over errors at a time, and vectors of rows: as many sums as there are registers.
constexpr std::size_t sums_across = 4;
constexpr std::size_t sums_along = V::lanes == 8 ? 2 : 4;

inline void carry_block(const float* errors, std::size_t count, const float* factors,
                        std::size_t stride, float* current) {
    for (std::size_t l = 0; l < tile_rows; l += sums_along * V::lanes) {
        F sums[sums_across][sums_along];
        for (std::size_t j = 0; j < sums_across; ++j) {
            for (std::size_t i = 0; i < sums_along; ++i) {
                sums[j][i] = V::loadf(current + j * tile_rows + l + i * V::lanes);
            }
        }
        for (std::size_t k = 0; k < count; ++k) {
            F lost[sums_along];
            for (std::size_t i = 0; i < sums_along; ++i) {
                lost[i] = V::loadf(errors + k * tile_rows + l + i * V::lanes);
            }
            for (std::size_t j = 0; j < sums_across; ++j) {
                const F factor = V::set(factors[k * stride + j]);
                for (std::size_t i = 0; i < sums_along; ++i) {
                    sums[j][i] = V::add(sums[j][i], V::mul(lost[i], factor));
                }
            }
        }
        for (std::size_t j = 0; j < sums_across; ++j) {
            for (std::size_t i = 0; i < sums_along; ++i) {
                V::storef(current + j * tile_rows + l + i * V::lanes, sums[j][i]);
            }
        }
    }
}

void carry(const CarryTask& task) {
    constexpr std::size_t deep = 128, wide = carry_step;
    for (std::size_t k = task.first; k < task.last; k += deep) {
        const std::size_t count = task.last - k < deep ? task.last - k : deep;
        for (std::size_t j = task.to_first; j < task.to_last; j += wide) {
            // side by side: rows of the matrix may lie a power of two apart, which caches dislike
            alignas(64) float factors[deep * wide];
            for (std::size_t i = 0; i < count; ++i) {
                std::memcpy(factors + i * wide, task.factors + (k + i) * task.columns + j,
                            wide * sizeof(float));
            }
            for (std::size_t tile = 0; tile < task.tiles; ++tile) {
                const std::size_t start = tile * task.columns;
                for (std::size_t part = 0; part < wide; part += sums_across) {
                    carry_block(task.errors + (start + k) * tile_rows, count, factors + part, wide,
                                task.current + (start + j + part) * tile_rows);
                }
            }
        }
    }
}
