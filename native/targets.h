// The implementations; which of them exist depends on what the compiler was asked for.

#pragma once

#include "kernels.h"

namespace quantmill {

extern const Implementation exact_implementation;
extern const Implementation portable_implementation;
extern const Implementation avx2_implementation;
extern const Implementation avx512_implementation;
extern const Implementation neon_implementation;

}  // namespace quantmill
