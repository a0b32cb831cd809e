// The search one group at a time, in the order of docs/formats.md: what the others are compared with.

#pragma once

#include "search.h"

namespace quantmill {
namespace {

template <class T>
class ExactAffineSearch {
  public:
    ExactAffineSearch(const float* x, const float* h, int size, int bits)
        : x_(x), h_(h), size_(size), top_(static_cast<float>((1 << bits) - 1)) {
        for (int i = 0; i < size; ++i) {
            sum_.h += h[i];
            sum_.x += static_cast<double>(h[i]) * x[i];
        }
    }

    // Replaces MLX's own codes and parameters where something better is found.
    bool improve(std::uint8_t* codes, Line& line) {
        float least = x_[0], largest = x_[0];
        for (int i = 1; i < size_; ++i) {
            least = x_[i] < least ? x_[i] : least;
            largest = x_[i] > largest ? x_[i] : largest;
        }
        if (largest == least) return false;
        lowest_ = error_of(line, [&](int i) { return static_cast<float>(codes[i]); });
        best_ = line;
        try_line(line);
        for (int number = 0; number < cuts * cuts; ++number) {
            try_line(stored_line<T>(cut(number, least, largest, top_)));
        }
        if (!improved_) return false;
        line = best_;
        for (int i = 0; i < size_; ++i) {
            codes[i] = static_cast<std::uint8_t>(code_on(best_, x_[i], top_));
        }
        return true;
    }

  private:
    const float* x_;
    const float* h_;
    int size_;
    float top_;
    Sums sum_ = {};
    Line best_ = no_line;
    double lowest_ = 0.0;
    bool improved_ = false;

    template <class Code>
    double error_of(const Line& line, Code code) const {
        double error = 0.0;
        for (int i = 0; i < size_; ++i) {
            const double off = x_[i] - value_on(line, code(i));
            error += off * off * h_[i];
        }
        return error;
    }
    void try_line(Line line) {
        for (int round = 0; round < rounds && usable_mask<T>(line, top_) != 0; ++round) {
            const double error = error_of(line, [&](int i) { return code_on(line, x_[i], top_); });
            if (error < lowest_) {
                lowest_ = error;
                best_ = line;
                improved_ = true;
            }
            sum_.q = sum_.qq = sum_.qx = 0.0;
            for (int i = 0; i < size_; ++i) {
                const double q = code_on(line, x_[i], top_), weighted = h_[i] * q;
                sum_.q += weighted;
                sum_.qq += weighted * q;
                sum_.qx += weighted * x_[i];
            }
            line = stored_line<T>(fit(sum_));
        }
    }
};

// The same for nvfp4 and mxfp4, whose parameter is one byte.
inline bool exact_improve_bytes(const float* x, const float* h, const Format& format,
                                std::uint8_t* codes, std::uint8_t& scale_byte) {
    const int size = format.group_size, own = scale_byte;
    const auto error_of = [&](float scale, auto magnitude) {
        double error = 0.0;
        for (int i = 0; i < size; ++i) {
            const double off = absolute(x[i]) - magnitude(i) * scale;
            error += off * off * h[i];
        }
        return error;
    };
    double lowest = error_of(scale_of_byte(format.mode, own),
                             [&](int i) { return e2m1_values[codes[i] & 7]; });
    for (int number = 0; number < tried_bytes(format.mode); ++number) {
        const int byte = tried_byte(format.mode, own, number);
        if (byte < 0) continue;
        const float scale = scale_of_byte(format.mode, byte), inverse = 1.0f / scale;
        const double error = error_of(
            scale, [&](int i) { return nearest_e2m1_magnitude(absolute(x[i]) * inverse); });
        if (!(error < lowest)) continue;
        lowest = error;
        scale_byte = static_cast<std::uint8_t>(byte);
    }
    if (scale_byte == own) return false;
    const float inverse = 1.0f / scale_of_byte(format.mode, scale_byte);
    for (int i = 0; i < size; ++i) {
        codes[i] = e2m1_code(nearest_e2m1_magnitude(absolute(x[i]) * inverse), x[i]);
    }
    return true;
}

template <class T>
void exact_search_group(const SearchTask& task, std::size_t index, const OwnGroups& own,
                        std::size_t place) {
    using Raw = typename T::Raw;
    const Format& format = task.format;
    const int size = format.group_size;
    float x[longest_group], h[longest_group];
    const std::size_t count = static_cast<std::size_t>(size);
    widen_weights(task.dtype, task.weights + index * count * dtype_bytes(task.dtype), count, x);
    if (!all_finite(x, size)) return;
    importance_of(task, index, h);
    std::uint8_t codes[longest_group];
    unpack(own.codes + place * code_bytes(format), size, format.bits, codes);
    std::uint8_t* packed = task.codes + index * code_bytes(format);
    if (format.mode != Mode::affine) {
        if (exact_improve_bytes(x, h, format, codes, task.scales[index])) {
            pack(codes, size, format.bits, packed);
        }
        return;
    }
    Line line = stored_line<T>({own.number(own.scales, task.dtype, place),
                                own.number(own.biases, task.dtype, place)});
    if (!is_finite(line.scale) || !is_finite(line.bias)) return;
    if (!ExactAffineSearch<T>(x, h, size, format.bits).improve(codes, line)) return;
    pack(codes, size, format.bits, packed);
    store_as<Raw>(task.scales + index * sizeof(Raw), T::narrow(line.scale));
    store_as<Raw>(task.biases + index * sizeof(Raw), T::narrow(line.bias));
}

template <class T>
Outcome exact_search(const SearchTask& task, Outcome (*quantize)(const QuantizeTask&)) {
    Outcome outcome;
    for (std::size_t start = 0; start < task.groups; start += own_groups) {
        const std::size_t left = task.groups - start;
        const std::size_t count = left < own_groups ? left : own_groups;
        const OwnGroups own(task, start, count, quantize);
        outcome.non_finite += own.outcome.non_finite;
        outcome.overflows += own.outcome.overflows + keep_own<T>(task, start, count, own);
        if (task.format.mode == Mode::mxfp8) continue;  // nothing to choose
        for (std::size_t g = 0; g < count; ++g) exact_search_group<T>(task, start + g, own, g);
    }
    return outcome;
}

}  // namespace
}  // namespace quantmill
