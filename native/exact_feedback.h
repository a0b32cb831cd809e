// Error feedback one row after the other, as docs/formats.md says it.

#pragma once

#include "feedback.h"

namespace quantmill {
namespace {

inline float exact_round(const TileRule& rule, Mode mode, std::size_t row, float x,
                         std::uint8_t& code) {
    if (mode == Mode::affine) return round_on_line(rule, row, x, code);
    return mode == Mode::mxfp8 ? round_to_e4m3(rule, row, x, code)
                               : round_to_e2m1(rule, row, x, code);
}

void round_exactly(const RoundTask& task) {
    const auto size = static_cast<std::size_t>(task.format.group_size);
    for (std::size_t tile = 0; tile < task.tiles; ++tile) {
        const TileRule rule(task, tile);
        const std::size_t start = (tile * task.columns + task.first) * tile_rows;
        std::uint8_t codes[longest_group * tile_rows];
        for (std::size_t row = 0; row < tile_rows; ++row) {
            float* const current = task.current + start + row;
            float* const errors = task.errors + start + row;
            for (std::size_t k = 0; k < size; ++k) {
                float& error = errors[k * tile_rows];
                error = lost(error, exact_round(rule, task.format.mode, row, current[k * tile_rows],
                                                codes[k * tile_rows + row]));
                const float* factors = task.factors + (task.first + k) * task.columns + task.first;
                for (std::size_t j = k + 1; j < size; ++j) {
                    current[j * tile_rows] += error * factors[j];
                }
            }
        }
        pack_tile(task, tile, codes);
    }
}

void carry_exactly(const CarryTask& task) {
    for (std::size_t tile = 0; tile < task.tiles; ++tile) {
        const std::size_t start = tile * task.columns;
        for (std::size_t k = task.first; k < task.last; ++k) {
            const float* const factors = task.factors + k * task.columns;
            for (std::size_t j = task.to_first; j < task.to_last; ++j) {
                for (std::size_t row = 0; row < tile_rows; ++row) {
                    task.current[(start + j) * tile_rows + row] +=
                        task.errors[(start + k) * tile_rows + row] * factors[j];
                }
            }
        }
    }
}

}  // namespace
}  // namespace quantmill
