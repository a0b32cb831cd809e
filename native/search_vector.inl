// What the search measures, over the operations of an instruction set: the loops of search.h with a
// group in every lane. Included after vector.inl and search.inl.

using D = V::D;

inline F values_on(F scale, F bias, F codes) { return V::add(V::mul(codes, scale), bias); }

// code_on of search.h, before it is a whole number's bits.
inline F codes_of_steps(F x, F bias, F inverse, F top) {
    const F aligning = V::set(12582912.0f);
    const F step = V::mul(V::sub(x, bias), inverse);
    const F inside = V::min(V::max(step, V::set(0.0f)), top);
    return V::sub(V::add(inside, aligning), aligning);
}

// nearest_e2m1_magnitude of search.h.
inline F nearest_magnitudes(F magnitudes) {
    const F size = V::min(magnitudes, V::set(6.0f));
    const I exponent = V::iand(V::as_int(size), V::seti(0x7F800000));
    const I unit = V::imax(exponent, V::seti(0x3F800000));
    const F aligning = V::as_float(V::iadd(unit, V::seti(22 << 23)));
    return V::sub(V::add(size, aligning), aligning);
}

inline D weighted_square(F off, D h) {
    const D wide = V::widen(off);
    return V::mul_d(V::mul_d(wide, wide), h);
}

void survey(const SearchLanes& lanes, const Candidates& own, Survey& found) {
    const F scale = V::loadf(own.scale), bias = V::loadf(own.bias);
    F least = V::loadf(lanes.x), largest = least;
    D error = V::widen(V::set(0.0f)), sum_h = error, sum_x = error;
    for (int i = 0; i < lanes.size; ++i) {
        const F x = V::loadf(lanes.x + i * search_lanes);
        const D h = V::load_d(lanes.h + i * search_lanes);
        least = V::min(least, x);
        largest = V::max(largest, x);
        const F values = values_on(scale, bias, V::loadf(lanes.own + i * search_lanes));
        error = V::add_d(error, weighted_square(V::sub(x, values), h));
        sum_h = V::add_d(sum_h, h);
        sum_x = V::add_d(sum_x, V::mul_d(h, V::widen(x)));
    }
    V::storef(found.least, least);
    V::storef(found.largest, largest);
    V::store_d(found.error, error);
    V::store_d(found.h, sum_h);
    V::store_d(found.x, sum_x);
}

template <bool sums>
void measure(const SearchLanes& lanes, Candidates& tried) {
    const F scale = V::loadf(tried.scale), bias = V::loadf(tried.bias);
    const F inverse = V::loadf(tried.inverse), top = V::set(lanes.top);
    D error = V::widen(V::set(0.0f)), sum_q = error, sum_qq = error, sum_qx = error;
    for (int i = 0; i < lanes.size; ++i) {
        const F x = V::loadf(lanes.x + i * search_lanes);
        const D h = V::load_d(lanes.h + i * search_lanes);
        const F q = codes_of_steps(x, bias, inverse, top);
        error = V::add_d(error, weighted_square(V::sub(x, values_on(scale, bias, q)), h));
        if constexpr (sums) {
            const D wide = V::widen(q), weighted = V::mul_d(h, wide);
            sum_q = V::add_d(sum_q, weighted);
            sum_qq = V::add_d(sum_qq, V::mul_d(weighted, wide));
            sum_qx = V::add_d(sum_qx, V::mul_d(weighted, V::widen(x)));
        }
    }
    V::store_d(tried.error, error);
    if constexpr (sums) {
        V::store_d(tried.q, sum_q);
        V::store_d(tried.qq, sum_qq);
        V::store_d(tried.qx, sum_qx);
    }
}

inline void survey_bytes(const SearchLanes& lanes, Candidates& own) {
    const F scale = V::loadf(own.scale);
    D error = V::widen(V::set(0.0f));
    for (int i = 0; i < lanes.size; ++i) {
        const F x = V::loadf(lanes.x + i * search_lanes);
        const F values = V::mul(V::loadf(lanes.own + i * search_lanes), scale);
        const D h = V::load_d(lanes.h + i * search_lanes);
        error = V::add_d(error, weighted_square(V::sub(x, values), h));
    }
    V::store_d(own.error, error);
}

inline void measure_bytes(const SearchLanes& lanes, Candidates& tried) {
    const F scale = V::loadf(tried.scale), inverse = V::loadf(tried.inverse);
    D error = V::widen(V::set(0.0f));
    for (int i = 0; i < lanes.size; ++i) {
        const F x = V::loadf(lanes.x + i * search_lanes);
        const F values = V::mul(nearest_magnitudes(V::mul(x, inverse)), scale);
        const D h = V::load_d(lanes.h + i * search_lanes);
        error = V::add_d(error, weighted_square(V::sub(x, values), h));
    }
    V::store_d(tried.error, error);
}

void codes_on_line(const float* x, int size, const Line& line, float top, std::uint8_t* codes) {
    const F bias = V::set(line.bias), inverse = V::set(line.inverse);
    for (int i = 0; i < size; i += V::lanes) {
        const F q = codes_of_steps(V::loadf(x + i), bias, inverse, V::set(top));
        V::store_u8(codes + i, V::to_int(q));
    }
}

void codes_of_scale(const float* x, int size, float inverse, std::uint8_t* codes) {
    for (int i = 0; i < size; i += V::lanes) {
        const I bits = V::as_int(V::loadf(x + i));
        const F sizes = V::mul(V::as_float(magnitude(bits)), V::set(inverse));
        const I found = V::as_int(nearest_magnitudes(sizes));
        // the tie rule of e2m1_codes does not matter for what is such a magnitude already
        V::store_u8(codes + i,
                    e2m1_codes(V::as_float(V::ior(found, V::iand(bits, V::seti(~0x7FFFFFFF))))));
    }
}

Outcome search(const SearchTask& task) {
    if (task.stored == Dtype::bf16) return search_stored<Bf16>(task, quantize);
    if (task.stored == Dtype::f16) return search_stored<F16>(task, quantize);
    return search_stored<F32>(task, quantize);
}
