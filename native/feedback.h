// What every implementation of error feedback shares (docs/formats.md, Error feedback): the order of
// columns, and where codes go. Rows lie in tiles: 64 of them side by side, so that every operation runs
// along rows, which are independent.

#pragma once

#include "search.h"

namespace quantmill {
namespace {

// What the rows of a tile round a group's columns with; `inverse` is 0 where a scale that is no line's
// is 0.
struct alignas(64) TileRule {
    float scale[tile_rows], bias[tile_rows], inverse[tile_rows];
    float top;

    TileRule(const RoundTask& task, std::size_t tile) {
        const bool affine = task.format.mode == Mode::affine;
        top = static_cast<float>((1 << task.format.bits) - 1);
        std::memcpy(scale, task.scales + tile * tile_rows, sizeof scale);
        std::memcpy(bias, task.biases + tile * tile_rows, sizeof bias);
        for (std::size_t l = 0; l < tile_rows; ++l) {
            inverse[l] = scale[l] != 0.0f || affine ? 1.0f / scale[l] : 0.0f;
        }
    }
};

inline float number_or_zero(float value) { return value == value ? value : 0.0f; }

// Code of a current weight in row `l` of a tile, and what it decodes to.
inline float round_on_line(const TileRule& rule, std::size_t l, float x, std::uint8_t& code) {
    // NaN may come here, unlike in a search: it gets the code 0
    const float step = (x - rule.bias[l]) * rule.inverse[l];
    const float above = step > 0.0f ? step : 0.0f;
    const float found = round_even(above < rule.top ? above : rule.top);
    code = static_cast<std::uint8_t>(static_cast<int>(found));
    return found * rule.scale[l] + rule.bias[l];
}
inline float round_to_e2m1(const TileRule& rule, std::size_t l, float x, std::uint8_t& code) {
    const float size = nearest_e2m1_magnitude(number_or_zero(absolute(x) * rule.inverse[l]));
    code = e2m1_code(size, x);
    return (code & 8u ? -size : size) * rule.scale[l];
}
inline float round_to_e4m3(const TileRule& rule, std::size_t l, float x, std::uint8_t& code) {
    const std::uint8_t size = to_e4m3(number_or_zero(absolute(x) * rule.inverse[l]));
    code = static_cast<std::uint8_t>(size != 0 ? size | ((bits_of(x) >> 24) & 0x80u) : 0u);
    return from_e4m3(code) * rule.scale[l];
}

// What rounding took from a weight; nothing where that is not finite.
inline float lost(float weight, float value) {
    const float found = weight - value;
    return is_finite(found) ? found : 0.0f;
}

// Codes of a tile's group, column by column, to their places, packed row by row.
inline void pack_tile(const RoundTask& task, std::size_t tile, const std::uint8_t* found) {
    const auto size = static_cast<std::size_t>(task.format.group_size);
    const auto bits = static_cast<std::size_t>(task.format.bits);
    const std::size_t row_bytes = task.columns * bits / 8;
    std::uint8_t* to = task.codes + tile * tile_rows * row_bytes + task.group * bits / 8;
    for (std::size_t l = 0; l < tile_rows; ++l) {
        std::uint8_t codes[longest_group];
        for (std::size_t k = 0; k < size; ++k) codes[task.places[k]] = found[k * tile_rows + l];
        pack(codes, task.format.group_size, task.format.bits, to + l * row_bytes);
    }
}

// `round_column(rule, current, errors, codes)` rounds a column of a tile and leaves its errors;
// `add(errors, factor, current)` adds them times a factor to a later column.
template <class RoundColumn, class Add>
void round_tiles(const RoundTask& task, RoundColumn round_column, Add add) {
    const auto size = static_cast<std::size_t>(task.format.group_size);
    for (std::size_t tile = 0; tile < task.tiles; ++tile) {
        const TileRule rule(task, tile);
        const std::size_t start = (tile * task.columns + task.first) * tile_rows;
        float* const current = task.current + start;
        float* const errors = task.errors + start;
        std::uint8_t codes[longest_group * tile_rows];
        for (std::size_t k = 0; k < size; ++k) {
            round_column(rule, current + k * tile_rows, errors + k * tile_rows,
                         codes + k * tile_rows);
            const float* factors = task.factors + (task.first + k) * task.columns + task.first;
            for (std::size_t j = k + 1; j < size; ++j) {
                add(errors + k * tile_rows, factors[j], current + j * tile_rows);
            }
        }
        pack_tile(task, tile, codes);
    }
}

// By mode, `Columns` having a function for each.
template <class Columns>
void round_with(const RoundTask& task) {
    const auto run = [&](auto round_column) { round_tiles(task, round_column, Columns::add); };
    if (task.format.mode == Mode::mxfp8) run(Columns::e4m3);
    else if (task.format.mode == Mode::affine) run(Columns::line);
    else run(Columns::e2m1);
}

// Plain loops: each row by itself, which compilers make vectors of.
struct PlainColumns {
    template <class Round>
    static void each(const float* __restrict current, float* __restrict errors,
                     std::uint8_t* __restrict codes, Round round) {
        for (std::size_t l = 0; l < tile_rows; ++l) {
            std::uint8_t code;
            errors[l] = lost(errors[l], round(l, current[l], code));
            codes[l] = code;
        }
    }
    static void line(const TileRule& rule, const float* current, float* errors,
                     std::uint8_t* codes) {
        each(current, errors, codes, [&](std::size_t l, float x, std::uint8_t& code) {
            return round_on_line(rule, l, x, code);
        });
    }
    static void e2m1(const TileRule& rule, const float* current, float* errors,
                     std::uint8_t* codes) {
        each(current, errors, codes, [&](std::size_t l, float x, std::uint8_t& code) {
            return round_to_e2m1(rule, l, x, code);
        });
    }
    static void e4m3(const TileRule& rule, const float* current, float* errors,
                     std::uint8_t* codes) {
        each(current, errors, codes, [&](std::size_t l, float x, std::uint8_t& code) {
            return round_to_e4m3(rule, l, x, code);
        });
    }
    static void add(const float* __restrict errors, float factor, float* __restrict current) {
        for (std::size_t l = 0; l < tile_rows; ++l) current[l] += errors[l] * factor;
    }
};

}  // namespace
}  // namespace quantmill
