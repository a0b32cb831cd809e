// The search for many groups at once, each in a lane of its own, so that every sum runs in the order
// of the weights whatever the number of lanes. A file that includes this inside its unnamed namespace
// defines `search_lanes` before, and after it what measures a candidate of every lane. Lanes that have
// no candidate go along with `no_line`, and what they get is not looked at.

struct alignas(64) SearchLanes {
    // weight i of lane l lies at [i * search_lanes + l]
    float x[longest_group * search_lanes];
    float own[longest_group * search_lanes];  // MLX's codes as numbers, or E2M1 magnitudes
    double h[longest_group * search_lanes];
    int size;
    float top;
};

// A candidate of every lane, and what was measured of it.
struct alignas(64) Candidates {
    float scale[search_lanes], bias[search_lanes], inverse[search_lanes];
    double error[search_lanes], q[search_lanes], qq[search_lanes], qx[search_lanes];

    void set(int lane, const Line& line) {
        scale[lane] = line.scale;
        bias[lane] = line.bias;
        inverse[lane] = line.inverse;
    }
    Line line(int lane) const { return {scale[lane], bias[lane], inverse[lane]}; }
};

// What is measured once, with MLX's own codes.
struct alignas(64) Survey {
    float least[search_lanes], largest[search_lanes];
    double error[search_lanes], h[search_lanes], x[search_lanes];
};

void survey(const SearchLanes& lanes, const Candidates& own, Survey& found);
template <bool sums>
void measure(const SearchLanes& lanes, Candidates& tried);
void measure_bytes(const SearchLanes& lanes, Candidates& tried);
void survey_bytes(const SearchLanes& lanes, Candidates& own);

// The best of every lane so far; what is none of a lane's candidates is barred by an infinite error.
// Loops over lanes are written without branches, each over numbers of one width, so that compilers
// make vectors of them: a quarter of the time would go into them otherwise.
struct alignas(64) Best {
    double error[search_lanes], barred[search_lanes];
    float scale[search_lanes], bias[search_lanes], inverse[search_lanes];
    std::int32_t byte[search_lanes], improved[search_lanes], better[search_lanes];

    void keep_better(const Candidates& tried) {
        alignas(64) std::int64_t found[search_lanes];
        for (int l = 0; l < search_lanes; ++l) {
            const double own = tried.error[l] + barred[l];
            found[l] = own < error[l] ? -1 : 0;
            error[l] = own < error[l] ? own : error[l];
        }
        for (int l = 0; l < search_lanes; ++l) better[l] = static_cast<std::int32_t>(found[l]);
        for (int l = 0; l < search_lanes; ++l) {
            scale[l] = better[l] != 0 ? tried.scale[l] : scale[l];
            bias[l] = better[l] != 0 ? tried.bias[l] : bias[l];
            inverse[l] = better[l] != 0 ? tried.inverse[l] : inverse[l];
            improved[l] |= better[l];
        }
    }
    Line line(int lane) const { return {scale[lane], bias[lane], inverse[lane]}; }
};

constexpr double no_error = __builtin_huge_val();

template <class T>
class AffineSearch {
  public:
    AffineSearch(const SearchLanes& lanes, const Candidates& own, const bool* open, Best& best)
        : lanes_(lanes), best_(best) {
        survey(lanes, own, survey_);
        for (int l = 0; l < search_lanes; ++l) {
            best.error[l] = survey_.error[l];
            open_[l] = open[l] && survey_.largest[l] != survey_.least[l] ? ~0u : 0u;
        }
        try_lines([&](int l) { return Fit{own.scale[l], own.bias[l]}; });
        for (int number = 0; number < cuts * cuts; ++number) {
            try_lines([&](int l) {
                return cut(number, survey_.least[l], survey_.largest[l], lanes.top);
            });
        }
    }

  private:
    const SearchLanes& lanes_;
    Best& best_;
    Survey survey_;
    Candidates tried_;
    alignas(64) std::uint32_t open_[search_lanes], trying_[search_lanes];

    template <class Exact>
    void propose(Exact exact) {
        alignas(64) float scales[search_lanes], biases[search_lanes];
        for (int l = 0; l < search_lanes; ++l) {
            const Fit found = exact(l);
            scales[l] = found.scale;
            biases[l] = found.bias;
        }
        for (int l = 0; l < search_lanes; ++l) {
            const Line line = stored_line<T>({scales[l], biases[l]});
            trying_[l] &= usable_mask<T>(line, lanes_.top);  // where that is 0, `no_line`
            const std::uint32_t mask = trying_[l], one = bits_of(1.0f) & ~mask;
            tried_.scale[l] = float_of((bits_of(line.scale) & mask) | one);
            tried_.bias[l] = float_of(bits_of(line.bias) & mask);
            tried_.inverse[l] = float_of((bits_of(line.inverse) & mask) | one);
        }
        for (int l = 0; l < search_lanes; ++l) best_.barred[l] = trying_[l] != 0 ? 0.0 : no_error;
    }
    template <class First>
    void try_lines(First first) {
        std::memcpy(trying_, open_, sizeof open_);
        propose(first);
        for (int round = 1; round < rounds; ++round) {
            measure<true>(lanes_, tried_);
            best_.keep_better(tried_);
            propose([&](int l) {
                return fit({survey_.h[l], survey_.x[l], tried_.q[l], tried_.qq[l], tried_.qx[l]});
            });
        }
        measure<false>(lanes_, tried_);
        best_.keep_better(tried_);
    }
};

inline void search_bytes(const SearchLanes& lanes, Mode mode, const int* own, const bool* open,
                         Best& best) {
    Candidates tried;
    for (int l = 0; l < search_lanes; ++l) tried.set(l, {scale_of_byte(mode, own[l]), 0.0f, 0.0f});
    survey_bytes(lanes, tried);
    std::memcpy(best.error, tried.error, sizeof best.error);
    for (int number = 0; number < tried_bytes(mode); ++number) {
        alignas(64) std::int32_t byte[search_lanes];
        for (int l = 0; l < search_lanes; ++l) byte[l] = tried_byte(mode, own[l], number);
        for (int l = 0; l < search_lanes; ++l) {
            best.barred[l] = open[l] && byte[l] >= 0 ? 0.0 : no_error;
            tried.scale[l] = byte[l] < 0 ? 1.0f : scale_of_byte(mode, byte[l]);
        }
        for (int l = 0; l < search_lanes; ++l) tried.inverse[l] = 1.0f / tried.scale[l];
        measure_bytes(lanes, tried);
        best.keep_better(tried);
        for (int l = 0; l < search_lanes; ++l) {
            best.byte[l] = best.better[l] != 0 ? byte[l] : best.byte[l];
        }
    }
}

// Codes of one group on the line that was found, or with the scale.
void codes_on_line(const float* x, int size, const Line& line, float top, std::uint8_t* codes);
void codes_of_scale(const float* x, int size, float inverse, std::uint8_t* codes);

// Groups of a task, not more than there are lanes.
template <class T>
class LanesOfTask {
  public:
    LanesOfTask(const SearchTask& task, std::size_t start, int count, const OwnGroups& own,
                std::size_t place)
        : task_(task), start_(start), count_(count) {
        lanes_.size = task.format.group_size;
        lanes_.top = static_cast<float>((1 << task.format.bits) - 1);
        if (count < search_lanes) {
            std::memset(lanes_.x, 0, sizeof lanes_.x);
            std::memset(lanes_.own, 0, sizeof lanes_.own);
            std::memset(lanes_.h, 0, sizeof lanes_.h);
        }
        for (int l = 0; l < search_lanes; ++l) {
            best_.improved[l] = 0;
            open_[l] = l < count && fill(l, own, place + static_cast<std::size_t>(l));
            if (!open_[l]) {
                own_.set(l, no_line);
                byte_[l] = 127;
            }
        }
    }
    void search() {
        const Mode mode = task_.format.mode;
        if (mode == Mode::affine) AffineSearch<T>(lanes_, own_, open_, best_);
        else search_bytes(lanes_, mode, byte_, open_, best_);
        for (int l = 0; l < count_; ++l) {
            if (best_.improved[l] != 0) write(l);
        }
    }

  private:
    using Raw = typename T::Raw;
    const SearchTask& task_;
    std::size_t start_;
    int count_;
    SearchLanes lanes_;
    float rows_[search_lanes * longest_group];
    Candidates own_;
    int byte_[search_lanes];
    bool open_[search_lanes];
    Best best_;

    // Whether there is something to search; groups with NaN or infinities become zeros.
    bool fill(int lane, const OwnGroups& own, std::size_t place) {
        const Format& format = task_.format;
        const int size = format.group_size;
        const auto count = static_cast<std::size_t>(size);
        const std::size_t group = start_ + static_cast<std::size_t>(lane);
        float* const row = rows_ + lane * size;
        widen_weights(task_.dtype,
                      task_.weights + group * count * dtype_bytes(task_.dtype), count, row);
        const bool finite = all_finite(row, size);
        if (!finite) std::memset(row, 0, count * sizeof(float));
        float h[longest_group];
        importance_of(task_, group, h);
        std::uint8_t codes[longest_group];
        unpack(own.codes + place * code_bytes(format), size, format.bits, codes);
        const bool affine = format.mode == Mode::affine;
        const std::uint32_t kept = affine ? ~0u : ~sign_bit;
        for (int i = 0; i < size; ++i) {
            lanes_.x[i * search_lanes + lane] = float_of(bits_of(row[i]) & kept);
            lanes_.h[i * search_lanes + lane] = h[i];
            lanes_.own[i * search_lanes + lane] =
                affine ? static_cast<float>(codes[i]) : from_e2m1(codes[i] & 7u);
        }
        if (!affine) {
            byte_[lane] = own.scales[place];
            return finite;
        }
        const Line line = stored_line<T>({own.number(own.scales, task_.dtype, place),
                                          own.number(own.biases, task_.dtype, place)});
        own_.set(lane, line);
        return finite && is_finite(line.scale) && is_finite(line.bias);
    }
    void write(int lane) const {
        const Format& format = task_.format;
        const std::size_t group = start_ + static_cast<std::size_t>(lane);
        const Line line = best_.line(lane);
        const float* const row = rows_ + lane * format.group_size;
        std::uint8_t codes[longest_group];
        if (format.mode == Mode::affine) {
            codes_on_line(row, format.group_size, line, lanes_.top, codes);
            store_as<Raw>(task_.scales + group * sizeof(Raw), T::narrow(line.scale));
            store_as<Raw>(task_.biases + group * sizeof(Raw), T::narrow(line.bias));
        } else {
            codes_of_scale(row, format.group_size, line.inverse, codes);
            task_.scales[group] = static_cast<std::uint8_t>(best_.byte[lane]);
        }
        pack(codes, format.group_size, format.bits, task_.codes + group * code_bytes(format));
    }
};

template <class T>
Outcome search_stored(const SearchTask& task, Outcome (*quantize)(const QuantizeTask&)) {
    Outcome outcome;
    for (std::size_t start = 0; start < task.groups; start += own_groups) {
        const std::size_t left = task.groups - start;
        const std::size_t count = left < own_groups ? left : own_groups;
        const OwnGroups own(task, start, count, quantize);
        outcome.non_finite += own.outcome.non_finite;
        outcome.overflows += own.outcome.overflows + keep_own<T>(task, start, count, own);
        if (task.format.mode == Mode::mxfp8) continue;  // nothing to choose
        for (std::size_t g = 0; g < count; g += search_lanes) {
            const std::size_t here = count - g < search_lanes ? count - g : search_lanes;
            LanesOfTask<T>(task, start + g, static_cast<int>(here), own, g).search();
        }
    }
    return outcome;
}
