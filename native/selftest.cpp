// Compares every implementation of the kernels with the one named "exact", byte for byte. Needs no
// Python, so it also runs under sanitizers, on emulated processors and from other compilers.
//
//   selftest                   a fixed amount of work: a few seconds in an optimised build
//   selftest SECONDS [SEED]    the same, then rounds of random tasks for so many seconds; 0 seconds
//                              is one round, so the seed that a difference names shows it again
//   selftest --brief           the fixed work with a twentieth of its searches, for emulators
//   selftest --cases FILE      compares every implementation with bytes recorded elsewhere instead
//
// Exits with 0 if all agree, 1 if any differ, 2 if the arguments or the file make no sense. The
// last line has a digest of what "exact" gave for the fixed work: the same on every machine, another
// one for brief work.
//
// A file of cases is little-endian: the eight characters QMCASES1, then until its end (a difference
// gives a case's number, from 0, as its seed)
//
//   u32 dtype        0 bf16, 1 f16, 2 f32
//   u32 mode         0 affine, 1 mxfp4, 2 mxfp8, 3 nvfp4
//   u32 bits
//   u32 group_size
//   u32 groups
//   f32 encode       1 except for nvfp4 with a global scale
//   weights          groups * group_size elements of the dtype
//   codes            groups * group_size * bits / 8 bytes
//   scales           groups elements of the dtype for affine, else as many bytes
//   biases           for affine only: groups elements of the dtype

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <iterator>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "kernels.h"
#include "numbers.h"

static_assert(std::endian::native == std::endian::little);

namespace quantmill {
namespace {

// -- random numbers -------------------------------------------------------------------------------

// splitmix64: a few lines, and the same numbers from every standard library.
class Random {
  public:
    explicit Random(std::uint64_t seed) : state_(seed) {}

    std::uint64_t next() {
        state_ += 0x9E3779B97F4A7C15u;
        std::uint64_t z = state_;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        return z ^ (z >> 31);
    }
    // From 0 up to, not including, `end`.
    std::uint32_t below(std::uint32_t end) {
        return static_cast<std::uint32_t>(((next() >> 32) * end) >> 32);
    }
    int between(int first, int last) {
        return first + static_cast<int>(below(static_cast<std::uint32_t>(last - first + 1)));
    }
    bool one_in(std::uint32_t n) { return below(n) == 0; }
    // From 0 up to, not including, 1.
    float fraction() { return static_cast<float>(next() >> 40) * 0x1p-24f; }
    // Roughly a normal distribution: the sum of four uniform ones.
    float bell() { return fraction() + fraction() + fraction() + fraction() - 2.0f; }

  private:
    std::uint64_t state_;
};

// A seed that depends on all of these.
std::uint64_t seed_of(std::uint64_t a, std::uint64_t b, std::uint64_t c) {
    return Random(Random(Random(a).next() ^ b).next() ^ c).next();
}

// -- elements -------------------------------------------------------------------------------------

// Weights as bit patterns of a dtype.
struct Elements {
    Dtype dtype;
    int digits;              // of the fraction
    std::uint32_t infinity;  // finite magnitudes are the patterns below it

    std::uint32_t sign() const { return dtype == Dtype::f32 ? 0x80000000u : 0x8000u; }
    std::uint32_t magnitude(std::uint32_t raw) const { return raw & (sign() - 1u); }

    // The nearest finite element.
    std::uint32_t nearest(float value) const {
        const std::uint32_t raw = dtype == Dtype::bf16  ? Bf16::narrow(value)
                                  : dtype == Dtype::f16 ? F16::narrow(value)
                                                        : F32::narrow(value);
        if (magnitude(raw) < infinity) return raw;
        return (raw & sign()) | (infinity - 1);
    }
    float value(std::uint32_t raw) const {
        if (dtype == Dtype::f32) return F32::widen(raw);
        const auto half = static_cast<std::uint16_t>(raw);
        return dtype == Dtype::bf16 ? Bf16::widen(half) : F16::widen(half);
    }
    std::uint32_t with_random_sign(Random& random, std::uint32_t magnitude) const {
        return magnitude | (random.one_in(2) ? sign() : 0u);
    }
    std::uint32_t any(Random& random) const {
        return static_cast<std::uint32_t>(random.next()) & (sign() | (sign() - 1u));
    }
    std::uint32_t any_finite(Random& random) const {
        return with_random_sign(random, random.below(infinity));
    }
    // NaN of any payload and sign, or an infinity.
    std::uint32_t any_non_finite(Random& random) const {
        const std::uint32_t payload = random.one_in(2) ? 0 : random.below(1u << digits);
        return with_random_sign(random, infinity + payload);
    }
    // The same, or a finite neighbour.
    std::uint32_t nudged(Random& random, std::uint32_t raw) const {
        const int by = random.between(-1, 1);
        if (by < 0) return magnitude(raw) == 0 ? raw : raw - 1;
        if (by > 0) return magnitude(raw) + 1 >= infinity ? raw : raw + 1;
        return raw;
    }
};

constexpr Elements all_elements[] = {
    {Dtype::bf16, 7, 0x7F80u}, {Dtype::f16, 10, 0x7C00u}, {Dtype::f32, 23, 0x7F800000u}};

const Elements& elements_of(Dtype dtype) { return all_elements[static_cast<int>(dtype)]; }

const char* name_of(Dtype dtype) {
    return dtype == Dtype::bf16 ? "bf16" : dtype == Dtype::f16 ? "f16" : "f32";
}

std::string name_of(const Format& format) {
    if (format.mode == Mode::mxfp4) return "mxfp4";
    if (format.mode == Mode::mxfp8) return "mxfp8";
    if (format.mode == Mode::nvfp4) return "nvfp4";
    return "affine " + std::to_string(format.bits) + "/" + std::to_string(format.group_size);
}

std::vector<Format> all_formats() {
    std::vector<Format> found;
    for (const int bits : {2, 3, 4, 5, 6, 8}) {
        for (const int size : {32, 64, 128}) found.push_back({Mode::affine, bits, size});
    }
    found.push_back({Mode::mxfp4, 4, 32});
    found.push_back({Mode::mxfp8, 8, 32});
    found.push_back({Mode::nvfp4, 4, 16});
    return found;
}

bool is_known(const Format& format) {
    for (const Format& one : all_formats()) {
        const bool same = one.mode == format.mode && one.bits == format.bits;
        if (same && one.group_size == format.group_size) return true;
    }
    return false;
}

std::size_t weight_bytes(const Format& format, Dtype dtype) {
    return static_cast<std::size_t>(format.group_size) * dtype_bytes(dtype);
}

std::size_t bias_bytes(const Format& format, Dtype dtype) {
    return format.mode == Mode::affine ? dtype_bytes(dtype) : 0;
}

// -- data sets ------------------------------------------------------------------------------------

// One group of weights to be filled.
struct Group {
    const Elements& elements;
    const Format& format;
    std::uint32_t* raw;

    int size() const { return format.group_size; }
    std::uint32_t& somewhere(Random& random) const {
        return raw[random.below(static_cast<std::uint32_t>(size()))];
    }
};

void fill_ordinary(Random& random, const Group& group) {
    const float spread = std::ldexp(1.0f, random.between(-12, 4));
    for (int i = 0; i < group.size(); ++i) {
        group.raw[i] = group.elements.nearest(random.bell() * spread);
    }
}

void fill_any_finite(Random& random, const Group& group) {
    for (int i = 0; i < group.size(); ++i) group.raw[i] = group.elements.any_finite(random);
}

void fill_any(Random& random, const Group& group) {
    for (int i = 0; i < group.size(); ++i) group.raw[i] = group.elements.any(random);
}

void fill_with_non_finite(Random& random, const Group& group) {
    fill_ordinary(random, group);
    if (random.one_in(4)) return;  // a good group between bad ones
    const int count = random.one_in(4) ? 4 * group.size() : random.between(1, 3);
    for (int i = 0; i < count; ++i) {
        group.somewhere(random) = group.elements.any_non_finite(random);
    }
}

void fill_infinite(Random& random, const Group& group) {
    const std::uint32_t infinity = group.elements.with_random_sign(random, group.elements.infinity);
    std::fill_n(group.raw, group.size(), infinity);
    if (random.one_in(2)) group.somewhere(random) = group.elements.any(random);
}

void fill_nan(Random& random, const Group& group) {
    const std::uint32_t end = 1u << group.elements.digits;
    for (int i = 0; i < group.size(); ++i) {
        const std::uint32_t payload = std::max(1u, random.below(end));
        group.raw[i] = group.elements.with_random_sign(random, group.elements.infinity + payload);
    }
}

// Magnitudes from `first` on, `count` of them, in a range that differs from group to group.
void fill_range(Random& random, const Group& group, std::uint32_t first, std::uint32_t count) {
    const std::uint32_t end = std::max(1u, count >> random.below(6));
    for (int i = 0; i < group.size(); ++i) {
        group.raw[i] = group.elements.with_random_sign(random, first + random.below(end));
    }
}

void fill_denormal(Random& random, const Group& group) {
    fill_range(random, group, 0, 1u << group.elements.digits);
}

void fill_tiny(Random& random, const Group& group) {
    fill_range(random, group, 0, 8u << group.elements.digits);
}

void fill_huge(Random& random, const Group& group) {
    const std::uint32_t count = static_cast<std::uint32_t>(random.between(1, 3))
                                << group.elements.digits;
    fill_range(random, group, group.elements.infinity - count, count);
    if (random.one_in(2)) group.somewhere(random) = group.elements.infinity - 1;
}

void fill_zero(Random& random, const Group& group) {
    const bool signs = random.one_in(2);
    const std::uint32_t zero = random.one_in(4) ? group.elements.sign() : 0u;
    for (int i = 0; i < group.size(); ++i) {
        group.raw[i] = signs ? group.elements.with_random_sign(random, 0) : zero;
    }
}

void fill_almost_zero(Random& random, const Group& group) {
    fill_zero(random, group);
    group.somewhere(random) = group.elements.any_finite(random);
}

void fill_constant(Random& random, const Group& group) {
    if (random.one_in(2)) fill_ordinary(random, group);
    else fill_any_finite(random, group);
    std::fill_n(group.raw, group.size(), std::uint32_t{group.raw[0]});
}

void fill_with_zeros(Random& random, const Group& group) {
    fill_ordinary(random, group);
    for (int i = 0; i < group.size(); ++i) {
        if (random.one_in(2)) group.raw[i] = group.elements.with_random_sign(random, 0);
    }
}

void fill_positive(Random& random, const Group& group) {
    fill_ordinary(random, group);
    for (int i = 0; i < group.size(); ++i) group.raw[i] = group.elements.magnitude(group.raw[i]);
}

void fill_negative(Random& random, const Group& group) {
    fill_ordinary(random, group);
    for (int i = 0; i < group.size(); ++i) group.raw[i] |= group.elements.sign();
}

// Neighbours of one number: the range is tiny beside the numbers.
void fill_narrow(Random& random, const Group& group) {
    const std::uint32_t width = std::uint32_t{1} << random.below(6);
    const std::uint32_t first = random.below(group.elements.infinity - width);
    const std::uint32_t sign = group.elements.with_random_sign(random, 0);
    for (int i = 0; i < group.size(); ++i) group.raw[i] = sign | (first + random.below(width + 1));
}

// Weights in the middle between two codes, or right beside it, below a largest one.
template <class Middle>
void fill_ties(Random& random, const Group& group, float largest, Middle middle) {
    const bool exactly = random.one_in(2);
    for (int i = 0; i < group.size(); ++i) {
        const std::uint32_t raw = group.elements.nearest(random.one_in(2) ? middle() : -middle());
        group.raw[i] = exactly ? raw : group.elements.nudged(random, raw);
    }
    group.somewhere(random) = group.elements.nearest(random.one_in(2) ? largest : -largest);
}

// With a step that is no power of two the products are rounded: quotients beside the middle, which
// tell a division that is correctly rounded from one that is nearly so.
void fill_affine_ties(Random& random, const Group& group) {
    const float digits = random.one_in(2) ? 1.0f : 1.0f + random.fraction();
    const float step = std::ldexp(digits, random.between(-12, 4));
    const int bits = group.format.mode == Mode::affine ? group.format.bits : 4;
    const int top = (1 << bits) - 1;
    const int halves = random.between(0, 2 * top);  // how many of them lie above 0
    const float least = static_cast<float>(halves / 2 - top) * step;
    for (int i = 0; i < group.size(); ++i) {
        const float half = static_cast<float>(random.between(0, 2 * top)) * 0.5f;
        group.raw[i] = group.elements.nearest(least + half * step);
    }
    group.raw[0] = group.elements.nearest(least);
    group.raw[group.size() - 1] = group.elements.nearest(least + static_cast<float>(top) * step);
}

void fill_e2m1_ties(Random& random, const Group& group) {
    const float power = std::ldexp(1.0f, random.between(-8, 6));
    const float e4m3 = from_e4m3(static_cast<std::uint32_t>(random.between(1, e4m3_largest)));
    const float unit = random.one_in(2) ? power : e4m3;
    fill_ties(random, group, 6.0f * unit, [&] {
        const std::uint32_t code = random.below(7);
        return (e2m1_values[code] + e2m1_values[code + 1]) * 0.5f * unit;
    });
}

float middle_of_e4m3(Random& random) {
    const auto code = static_cast<std::uint32_t>(random.between(0, e4m3_largest - 1));
    return (from_e4m3(code) + from_e4m3(code + 1)) * 0.5f;
}

void fill_e4m3_ties(Random& random, const Group& group) {
    const float unit = std::ldexp(1.0f, random.between(-8, 6));
    fill_ties(random, group, 448.0f * unit, [&] { return middle_of_e4m3(random) * unit; });
}

// The group's own scale is the tie.
void fill_scale_ties(Random& random, const Group& group) {
    const float unit = std::ldexp(1.0f, random.between(-2, 0));
    const float largest = middle_of_e4m3(random) * 6.0f * unit;
    fill_ties(random, group, largest, [&] { return random.fraction() * largest; });
}

struct DataSet {
    const char* name;
    void (*fill)(Random&, const Group&);
};

constexpr DataSet plain_sets[] = {
    {"ordinary", fill_ordinary},
    {"any finite", fill_any_finite},
    {"any bits", fill_any},
    {"with NaN and infinities", fill_with_non_finite},
    {"infinite", fill_infinite},
    {"NaN", fill_nan},
    {"denormal", fill_denormal},
    {"tiny", fill_tiny},
    {"huge", fill_huge},
    {"zero", fill_zero},
    {"almost zero", fill_almost_zero},
    {"constant", fill_constant},
    {"with zeros of both signs", fill_with_zeros},
    {"positive", fill_positive},
    {"negative", fill_negative},
    {"narrow", fill_narrow},
    {"affine ties", fill_affine_ties},
    {"E2M1 ties", fill_e2m1_ties},
    {"E4M3 ties", fill_e4m3_ties},
    {"scale ties", fill_scale_ties},
};

// Groups of all kinds side by side: fast and slow ways within one block.
void fill_mixed(Random& random, const Group& group) {
    const std::uint32_t ordinary = random.below(3);
    if (ordinary != 0) return fill_ordinary(random, group);
    plain_sets[random.below(std::size(plain_sets))].fill(random, group);
}

std::vector<DataSet> all_sets() {
    std::vector<DataSet> sets(std::begin(plain_sets), std::end(plain_sets));
    sets.push_back({"mixed", fill_mixed});
    return sets;
}

// A group whose largest magnitude is that of `largest`; where it stands and the others are random.
void fill_below(Random& random, const Group& group, std::uint32_t largest) {
    const Elements& elements = group.elements;
    const std::uint32_t end = elements.magnitude(largest) + 1;
    const float value = elements.value(elements.magnitude(largest));
    const bool patterns = random.one_in(4);  // of all exponents, or most near the largest
    for (int i = 0; i < group.size(); ++i) {
        const std::uint32_t raw =
            patterns ? random.below(end) : elements.nearest(value * random.fraction());
        group.raw[i] = elements.with_random_sign(random, std::min(raw, end - 1));
    }
    group.somewhere(random) = largest;
}

// -- memory ---------------------------------------------------------------------------------------

// Bytes that end where their memory ends, so that the address sanitizer sees what reads on.
// `offset` takes them away from the aligned address that memory starts at.
class Input {
  public:
    Input(const std::uint8_t* bytes, std::size_t size, std::size_t offset)
        : memory_(new std::uint8_t[offset + size]), offset_(offset) {
        if (size != 0) std::memcpy(memory_.get() + offset, bytes, size);
    }
    const std::uint8_t* data() const { return memory_.get() + offset_; }

  private:
    std::unique_ptr<std::uint8_t[]> memory_;
    std::size_t offset_;
};

// Room for results between guards. `fill` is another one in the run that is compared with: then
// bytes that nobody wrote differ.
class Output {
  public:
    Output(std::size_t size, std::size_t offset, std::uint8_t fill)
        : memory_(guard + offset + size + guard, guard_byte), start_(guard + offset), size_(size) {
        std::fill_n(data(), size, fill);
    }
    std::uint8_t* data() { return memory_.data() + start_; }
    const std::uint8_t* data() const { return memory_.data() + start_; }
    std::size_t size() const { return size_; }
    bool is_intact() const {
        const auto untouched = [](std::uint8_t byte) { return byte == guard_byte; };
        const auto start = memory_.begin() + static_cast<std::ptrdiff_t>(start_);
        return std::all_of(memory_.begin(), start, untouched) &&
               std::all_of(start + static_cast<std::ptrdiff_t>(size_), memory_.end(), untouched);
    }

  private:
    static constexpr std::size_t guard = 64;
    static constexpr std::uint8_t guard_byte = 0x5A;
    std::vector<std::uint8_t> memory_;
    std::size_t start_, size_;
};

constexpr std::uint8_t reference_fill = 0x00, tested_fill = 0xFF;

// -- comparing ------------------------------------------------------------------------------------

// What is quantized or dequantized, and how to make it again.
struct Problem {
    Dtype dtype;
    Format format;
    std::size_t groups;
    float encode;
    std::string set;
    std::uint64_t seed;
    std::size_t offset;  // of every address from an aligned one
};

constexpr int most_differences = 10;

// Says what differs, at once and from any thread; ends the program when that was enough.
void report(const std::string& text) {
    static std::mutex mutex;
    static int reported = 0;
    const std::lock_guard<std::mutex> locked(mutex);
    std::printf("%s\n", text.c_str());
    if (++reported < most_differences) return;
    std::printf("selftest: stopped after %d differences\n", reported);
    std::fflush(stdout);
    std::_Exit(1);  // other threads are still at work
}

// Counts of one piece of work, or of all.
class Tally {
  public:
    std::size_t comparisons = 0, weights = 0, differences = 0;
    std::uint64_t digest = 0xCBF29CE484222325u;
    std::string round;  // says which round of random tasks this is, if it is one

    void differ(const Problem& problem, std::string_view implementation, const std::string& what) {
        char task[160];
        std::snprintf(task, sizeof task, "%zu groups, encode %a, offset %zu, seed %llu",
                      problem.groups, static_cast<double>(problem.encode), problem.offset,
                      static_cast<unsigned long long>(problem.seed));
        report(std::string(implementation) + " differs: " + name_of(problem.format) + ", " +
               name_of(problem.dtype) + ", \"" + problem.set + "\", " + task + round + ": " + what);
        ++differences;
    }
    void add_to_digest(const std::uint8_t* bytes, std::size_t size) {
        for (; size >= 8; bytes += 8, size -= 8) mix(load_as<std::uint64_t>(bytes));
        for (; size != 0; ++bytes, --size) mix(*bytes);
    }
    void add(const Tally& part) {
        comparisons += part.comparisons;
        weights += part.weights;
        differences += part.differences;
        mix(part.digest);
    }

  private:
    void mix(std::uint64_t word) {
        digest = (digest ^ word) * 0x100000001B3u;
        digest ^= digest >> 29;
    }
};

std::string hexadecimal(const std::uint8_t* bytes, std::size_t size) {
    std::string text;
    for (std::size_t i = 0; i < size; ++i) {
        char two[3];
        std::snprintf(two, sizeof two, "%02x", static_cast<unsigned>(bytes[i]));
        text += two;
    }
    return text;
}

// Whether `found` is what was expected; the first group that differs is reported, with its weights
// where there are any.
bool same_bytes(Tally& tally, const Problem& problem, std::string_view implementation,
                const char* what, const std::uint8_t* expected, const Output& found,
                const std::uint8_t* weights) {
    const std::size_t size = found.size();
    if (!found.is_intact()) {
        tally.differ(problem, implementation, std::string(what) + " are written past their ends");
        return false;
    }
    if (size == 0 || std::memcmp(expected, found.data(), size) == 0) return true;
    const std::size_t at = static_cast<std::size_t>(
        std::mismatch(expected, expected + size, found.data()).first - expected);
    const std::size_t each = size / problem.groups, group = at / each;
    std::string text = "group " + std::to_string(group) + ": " + what + " are " +
                       hexadecimal(found.data() + group * each, each) + ", expected " +
                       hexadecimal(expected + group * each, each);
    if (weights != nullptr) {
        const std::size_t bytes = weight_bytes(problem.format, problem.dtype);
        text += ", of weights " + hexadecimal(weights + group * bytes, bytes);
    }
    tally.differ(problem, implementation, text);
    return false;
}

struct Quantized {
    Output codes, scales, biases;
    Outcome outcome;
};

Quantized quantize(const Implementation& with, const Problem& problem, const std::uint8_t* weights,
                   std::uint8_t fill) {
    const Format& format = problem.format;
    const std::size_t groups = problem.groups, offset = problem.offset;
    Quantized out = {Output(groups * code_bytes(format), offset, fill),
                     Output(groups * scale_bytes(format, problem.dtype), offset, fill),
                     Output(groups * bias_bytes(format, problem.dtype), offset, fill),
                     {}};
    out.outcome = with.quantize({problem.dtype, format, groups, weights, problem.encode,
                                 out.codes.data(), out.scales.data(), out.biases.data()});
    return out;
}

// Float formats have values of BF16, whatever the weights were.
Dtype value_dtype(const Problem& problem) {
    return problem.format.mode == Mode::affine ? problem.dtype : Dtype::bf16;
}

struct Coded {
    const std::uint8_t *codes, *scales, *biases;
};

Output dequantize(const Implementation& with, const Problem& problem, const Coded& coded,
                  std::uint8_t fill) {
    const Dtype dtype = value_dtype(problem);
    Output out(problem.groups * weight_bytes(problem.format, dtype), problem.offset, fill);
    with.dequantize({dtype, problem.format, problem.groups, coded.codes, coded.scales, coded.biases,
                     out.data()});
    return out;
}

// Sign and payload of F16's and F32's NaN are the processor's affair. BF16 has one NaN only.
template <class Raw>
void unify_nan_as(std::uint8_t* values, std::size_t size, const Elements& elements) {
    const Raw mask = static_cast<Raw>(elements.sign() - 1);
    const Raw infinity = static_cast<Raw>(elements.infinity);
    const Raw nan = static_cast<Raw>(infinity | 1u << (elements.digits - 1));
    for (std::size_t i = 0; i < size; i += sizeof(Raw)) {
        const Raw raw = load_as<Raw>(values + i);
        store_as<Raw>(values + i, (raw & mask) > infinity ? nan : raw);
    }
}

void unify_nan(Output& values, Dtype dtype) {
    const Elements& elements = elements_of(dtype);
    if (dtype == Dtype::f16) unify_nan_as<std::uint16_t>(values.data(), values.size(), elements);
    if (dtype == Dtype::f32) unify_nan_as<std::uint32_t>(values.data(), values.size(), elements);
}

const Implementation& exact() {
    static const Implementation* const found = find_implementation("exact");
    return *found;
}

template <class Use>
void for_each_other(Use use) {
    const Implementations all = implementations();
    for (std::size_t i = 0; i < all.count; ++i) {
        if (all.first[i] != &exact() && all.first[i]->supported()) use(*all.first[i]);
    }
}

// What the others must give: nothing written beyond it, and part of the digest.
void take_reference(Tally& tally, const Problem& problem, const char* what, const Output& one) {
    same_bytes(tally, problem, "exact", what, one.data(), one, nullptr);
    tally.add_to_digest(one.data(), one.size());
}

// What `run` gives by every implementation; the results of the exact one.
template <class Run>
Quantized compare_quantized(Tally& tally, const Problem& problem, const std::uint8_t* weights,
                            const Run& run) {
    Quantized expected = run(exact(), reference_fill);
    for (const Output* one : {&expected.codes, &expected.scales, &expected.biases}) {
        take_reference(tally, problem, "results", *one);
    }
    for_each_other([&](const Implementation& one) {
        const Quantized found = run(one, tested_fill);
        const auto same = [&](const char* what, const Output& right, const Output& mine) {
            return same_bytes(tally, problem, one.name, what, right.data(), mine, weights);
        };
        // the first that differs says enough
        (void)(same("scales", expected.scales, found.scales) &&
               same("biases", expected.biases, found.biases) &&
               same("codes", expected.codes, found.codes));
        const Outcome &right = expected.outcome, &mine = found.outcome;
        if (right.non_finite != mine.non_finite || right.overflows != mine.overflows) {
            tally.differ(problem, one.name,
                         "counts " + std::to_string(mine.non_finite) + " non-finite, " +
                             std::to_string(mine.overflows) + " overflows, expected " +
                             std::to_string(right.non_finite) + " and " +
                             std::to_string(right.overflows));
        }
        ++tally.comparisons;
    });
    return expected;
}

void check_dequantize(Tally& tally, const Problem& problem, const Coded& coded) {
    const Dtype dtype = value_dtype(problem);
    Output expected = dequantize(exact(), problem, coded, reference_fill);
    unify_nan(expected, dtype);
    take_reference(tally, problem, "values", expected);
    for_each_other([&](const Implementation& one) {
        Output found = dequantize(one, problem, coded, tested_fill);
        unify_nan(found, dtype);
        same_bytes(tally, problem, one.name, "values", expected.data(), found, nullptr);
        ++tally.comparisons;
    });
}

void check_quantize(Tally& tally, const Problem& problem, const std::vector<std::uint8_t>& bytes) {
    const Input weights(bytes.data(), bytes.size(), problem.offset);
    const auto run = [&](const Implementation& with, std::uint8_t fill) {
        return quantize(with, problem, weights.data(), fill);
    };
    const Quantized expected = compare_quantized(tally, problem, weights.data(), run);
    tally.weights += problem.groups * static_cast<std::size_t>(problem.format.group_size);
    const Input codes(expected.codes.data(), expected.codes.size(), problem.offset);
    const Input scales(expected.scales.data(), expected.scales.size(), problem.offset);
    const Input biases(expected.biases.data(), expected.biases.size(), problem.offset);
    check_dequantize(tally, problem, {codes.data(), scales.data(), biases.data()});
}

// -- tasks ----------------------------------------------------------------------------------------

std::vector<std::uint8_t> bytes_of(const std::vector<std::uint32_t>& raw, Dtype dtype) {
    const std::size_t step = dtype_bytes(dtype);
    std::vector<std::uint8_t> bytes(raw.size() * step);
    for (std::size_t i = 0; i < raw.size(); ++i) {
        std::memcpy(bytes.data() + i * step, &raw[i], step);
    }
    return bytes;
}

// The largest magnitude that is a number, and whether all are finite.
Scan scan_plainly(const Elements& elements, const std::vector<std::uint32_t>& raw) {
    Scan found = {0, 0.0f};
    for (const std::uint32_t one : raw) {
        const float value = std::fabs(elements.value(one));
        if (!(value < std::numeric_limits<float>::infinity())) ++found.non_finite;
        if (value > found.largest) found.largest = value;
    }
    return found;
}

// What a global scale can be: one that covers the tensor that this is a part of, and, though nobody
// asks for it, one that covers little of it. Infinite where the maximum is tiny or 0.
float random_encode(Random& random, const Elements& elements,
                    const std::vector<std::uint32_t>& raw) {
    float largest = scan_plainly(elements, raw).largest;
    if (random.one_in(4)) largest *= std::ldexp(1.0f, random.between(-8, 3));
    if (elements.dtype == Dtype::f16) largest = std::min(largest, 65504.0f);
    return 2688.0f / largest;
}

template <class Fill>
void quantize_set(Tally& tally, Problem problem, bool with_encode, Fill fill) {
    const Elements& elements = elements_of(problem.dtype);
    const auto size = static_cast<std::size_t>(problem.format.group_size);
    Random random(problem.seed);
    std::vector<std::uint32_t> raw(problem.groups * size);
    for (std::size_t g = 0; g < problem.groups; ++g) {
        fill(random, Group{elements, problem.format, raw.data() + g * size}, g);
    }
    if (with_encode) problem.encode = random_encode(random, elements, raw);
    check_quantize(tally, problem, bytes_of(raw, problem.dtype));
}

void quantize_data_set(Tally& tally, const Problem& problem, bool with_encode, const DataSet& set) {
    quantize_set(tally, problem, with_encode,
                 [&](Random& random, const Group& group, std::size_t) { set.fill(random, group); });
}

// Every data set with group counts around the sizes of blocks and vectors.
void check_sets(Tally& tally, const Format& format, Dtype dtype) {
    std::uint64_t index = 0;
    for (const DataSet& set : all_sets()) {
        for (const std::size_t groups : {0, 1, 2, 3, 31, 32, 33, 64, 65, 95, 129}) {
            const std::uint64_t seed = seed_of(1, ++index, static_cast<std::uint64_t>(dtype));
            const std::size_t offset = index % 2 == 0 ? 0 : seed % 64;
            const Problem problem = {dtype, format, groups, 1.0f, set.name, seed, offset};
            quantize_data_set(tally, problem, false, set);
            if (format.mode == Mode::nvfp4) quantize_data_set(tally, problem, true, set);
        }
    }
}

// Every finite element as the largest of a group: for F32, those that BF16 has, lower digits added.
void check_every_maximum(Tally& tally, const Format& format, Dtype dtype) {
    const Elements& elements = elements_of(dtype);
    const bool f32 = dtype == Dtype::f32;
    const std::uint32_t count = f32 ? elements.infinity >> 16 : elements.infinity;
    constexpr std::uint32_t at_once = 2047;  // odd, and a block and more for every implementation
    for (std::uint32_t start = 0; start < 2 * count; start += at_once) {
        const std::uint32_t groups = std::min(at_once, 2 * count - start);
        const std::uint64_t seed = seed_of(2, start, static_cast<std::uint64_t>(dtype));
        const Problem problem = {dtype, format, groups, 1.0f, "every maximum", seed, seed % 2};
        const auto fill = [&](Random& random, const Group& group, std::size_t g) {
            const std::uint32_t k = start + static_cast<std::uint32_t>(g);
            std::uint32_t largest = k / 2;
            if (f32) largest = largest << 16 | (random.one_in(2) ? 0 : random.below(0x10000));
            fill_below(random, group, largest | (k % 2 != 0 ? elements.sign() : 0u));
        };
        quantize_set(tally, problem, false, fill);
        if (format.mode == Mode::nvfp4) quantize_set(tally, problem, true, fill);
    }
}

// Codes, scales and biases that no quantizer need have made. `patterns` gives the bits of a group's
// scale and bias.
template <class Patterns>
void dequantize_set(Tally& tally, const Problem& problem, Patterns patterns) {
    Random random(problem.seed);
    std::vector<std::uint8_t> codes(problem.groups * code_bytes(problem.format));
    for (std::uint8_t& byte : codes) byte = static_cast<std::uint8_t>(random.next() >> 56);
    const std::size_t scale_step = scale_bytes(problem.format, problem.dtype);
    const std::size_t bias_step = bias_bytes(problem.format, problem.dtype);
    std::vector<std::uint8_t> scales(problem.groups * scale_step);
    std::vector<std::uint8_t> biases(problem.groups * bias_step);
    for (std::size_t g = 0; g < problem.groups; ++g) {
        std::uint32_t pair[2];
        patterns(random, g, pair);
        std::memcpy(scales.data() + g * scale_step, &pair[0], scale_step);
        if (bias_step != 0) std::memcpy(biases.data() + g * bias_step, &pair[1], bias_step);
    }
    const Input own_codes(codes.data(), codes.size(), problem.offset);
    const Input own_scales(scales.data(), scales.size(), problem.offset);
    const Input own_biases(biases.data(), biases.size(), problem.offset);
    tally.weights += problem.groups * static_cast<std::size_t>(problem.format.group_size);
    check_dequantize(tally, problem, {own_codes.data(), own_scales.data(), own_biases.data()});
}

// Scales and biases of F32, and all there are of 16 bits: a bias is an odd multiple of its scale's
// pattern, so that both go through all 65536. Larger groups get as many weights, so fewer patterns.
void check_affine_values(Tally& tally, const Format& format, Dtype dtype) {
    const auto step = static_cast<std::uint32_t>(format.group_size / 32);
    constexpr std::size_t at_once = 4096;
    for (std::size_t start = 0; start < 65536 / step; start += at_once) {
        const std::uint64_t seed = seed_of(3, start, static_cast<std::uint64_t>(dtype));
        const Problem problem = {dtype, format, at_once, 1.0f, "all scales", seed, seed % 2};
        dequantize_set(tally, problem, [&](Random& random, std::size_t g, std::uint32_t* pair) {
            const auto place = static_cast<std::uint32_t>(start + g);
            const std::uint32_t k = place * step + place % step;
            pair[0] = dtype == Dtype::f32 ? static_cast<std::uint32_t>(random.next()) : k;
            pair[1] = dtype == Dtype::f32 ? static_cast<std::uint32_t>(random.next())
                                          : (k * 40503u + 12345u) & 0xFFFFu;
        });
    }
    // those of real models, where no group goes the slow way
    const Elements& elements = elements_of(dtype);
    const std::uint64_t seed = seed_of(4, 0, static_cast<std::uint64_t>(dtype));
    const Problem problem = {dtype, format, 1023, 1.0f, "ordinary scales", seed, seed % 2};
    dequantize_set(tally, problem, [&](Random& random, std::size_t, std::uint32_t* pair) {
        pair[0] = elements.nearest(random.bell() * 0.01f);
        pair[1] = elements.nearest(random.bell());
    });
}

// Every scale byte with every code, many times.
void check_float_values(Tally& tally, const Format& format) {
    const std::uint64_t seed = seed_of(5, 0, static_cast<std::uint64_t>(format.mode));
    const Problem problem = {Dtype::bf16, format, 256 * 65, 1.0f, "all scales", seed, seed % 2};
    dequantize_set(tally, problem, [&](Random&, std::size_t g, std::uint32_t* pair) {
        pair[0] = static_cast<std::uint32_t>(g % 256);
        pair[1] = 0;
    });
    for (const std::size_t groups : {0, 1, 2, 3, 31, 33, 65}) {
        const std::uint64_t own = seed_of(6, groups, static_cast<std::uint64_t>(format.mode));
        const Problem few = {Dtype::bf16, format, groups, 1.0f, "any scales", own, own % 64};
        dequantize_set(tally, few, [&](Random& random, std::size_t, std::uint32_t* pair) {
            pair[0] = random.below(256);
            pair[1] = 0;
        });
    }
}

void check_scan(Tally& tally, Dtype dtype, const DataSet& set, std::size_t count,
                std::uint64_t seed) {
    const Elements& elements = elements_of(dtype);
    const Format format = {Mode::mxfp8, 8, 32};  // fills take groups
    Random random(seed);
    std::vector<std::uint32_t> raw((count + 31) / 32 * 32);
    for (std::size_t i = 0; i < raw.size(); i += 32) {
        set.fill(random, Group{elements, format, raw.data() + i});
    }
    raw.resize(count);
    const std::vector<std::uint8_t> bytes = bytes_of(raw, dtype);
    const std::size_t offset = seed % 5;
    const Input weights(bytes.data(), bytes.size(), offset);
    const Scan expected = scan_plainly(elements, raw);
    const Scan found = scan(dtype, weights.data(), count);
    ++tally.comparisons;
    tally.weights += count;
    if (found.non_finite == expected.non_finite && found.largest == expected.largest) return;
    const Problem problem = {dtype, format, count / 32, 1.0f, set.name, seed, offset};
    char text[160];
    std::snprintf(text, sizeof text,
                  "%zu elements: %zu non-finite, largest %a, expected %zu and %a", count,
                  found.non_finite, static_cast<double>(found.largest), expected.non_finite,
                  static_cast<double>(expected.largest));
    tally.differ(problem, "scan", text);
}

void check_scans(Tally& tally, Dtype dtype, const DataSet& set) {
    for (const std::size_t count : {0, 1, 2, 3, 100, 4095, 4096, 4097, 10001}) {
        check_scan(tally, dtype, set, count, seed_of(7, count, static_cast<std::uint64_t>(dtype)));
    }
}

// Parameters of groups: usual ones, any bits, and numbers whose products overflow or vanish.
std::vector<std::uint8_t> random_parameters(Random& random, std::size_t count, bool any) {
    const Elements& elements = elements_of(Dtype::f32);
    std::vector<std::uint32_t> raw(count);
    for (std::uint32_t& one : raw) {
        const int exponent = any ? random.between(-150, 127) : -6;
        one = elements.nearest(std::ldexp(random.bell(), exponent));
        if (any && random.one_in(4)) one = elements.any(random);
    }
    return bytes_of(raw, Dtype::f32);
}

void check_decode(Tally& tally, Element element, Dtype dtype, std::uint64_t seed) {
    Random random(seed);
    const std::size_t rows = 1 + random.below(4), columns = 1 + random.below(1400);
    const std::size_t group = random.one_in(4) ? columns : 1 + random.below(200);
    const bool any = random.one_in(2);
    const bool with_zeros = random.one_in(2), with_biases = random.one_in(2);
    DecodeTask task = {element, dtype, rows, columns, group};
    std::vector<std::uint8_t> codes(rows * columns);
    for (std::uint8_t& code : codes) code = static_cast<std::uint8_t>(random.next());
    const std::size_t offset = seed % 5, groups = rows * groups_in_row(task);
    const auto make = [&] { return random_parameters(random, groups, any); };
    const std::vector<std::uint8_t> scales = make(), zeros = make(), biases = make();
    const Input own_codes(codes.data(), codes.size(), offset);
    const Input own_scales(scales.data(), scales.size(), offset);
    const Input own_zeros(zeros.data(), zeros.size(), offset);
    const Input own_biases(biases.data(), biases.size(), offset);
    task.codes = own_codes.data();
    task.scales = own_scales.data();
    task.zeros = with_zeros ? own_zeros.data() : nullptr;
    task.biases = with_biases ? own_biases.data() : nullptr;
    const auto decode = [&](const Implementation& with, std::uint8_t fill) {
        Output out(rows * columns * dtype_bytes(dtype), offset, fill);
        task.values = out.data();
        with.decode(task);
        return out;
    };
    const std::string name = element == Element::e4m3   ? "e4m3"
                             : element == Element::e2m1 ? "e2m1"
                                                        : "integers";
    const std::string what = name + ", " + std::to_string(columns) + " columns in groups of " +
                             std::to_string(group);
    const Format format = {Mode::affine, 8, static_cast<int>(columns)};
    const Problem problem = {dtype, format, rows, 1.0f, what, seed, offset};
    const Output expected = decode(exact(), reference_fill);
    take_reference(tally, problem, "values", expected);
    for_each_other([&](const Implementation& one) {
        const Output found = decode(one, tested_fill);
        same_bytes(tally, problem, one.name, "decoded values", expected.data(), found, nullptr);
        ++tally.comparisons;
    });
    tally.weights += rows * columns;
}

void check_decodes(Tally& tally, Dtype dtype, std::uint64_t seed, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) {
        for (const Element element : {Element::integer, Element::e2m1, Element::e4m3}) {
            const auto number = static_cast<std::uint64_t>(dtype);
            check_decode(tally, element, dtype, seed_of(8, seed + i, number));
        }
    }
}

// Importance of columns: like a model's, of any size, with columns and whole groups that have none.
std::vector<std::uint8_t> random_importance(Random& random, std::size_t columns, std::size_t size) {
    const std::uint32_t kind = random.below(4);
    std::vector<std::uint32_t> raw(columns);
    for (std::uint32_t& one : raw) {
        const int reach = kind == 0 ? 0 : kind == 1 ? 6 : 126;
        const int exponent = random.between(-reach, reach);
        one = bits_of(std::ldexp(1.0f + random.fraction(), exponent));
        if (kind == 2 && random.one_in(2)) one = 0;
    }
    for (std::size_t start = 0; start < columns; start += size) {
        if (random.one_in(4)) std::fill_n(raw.begin() + static_cast<std::ptrdiff_t>(start), size, 0u);
    }
    return bytes_of(raw, Dtype::f32);
}

// Scales and biases that are searched for: `stored` differs from the weights' dtype for F32 only.
void check_search(Tally& tally, const Format& format, Dtype dtype, Dtype stored, std::size_t groups,
                  const DataSet& set, std::uint64_t seed) {
    Random random(seed);
    const auto size = static_cast<std::size_t>(format.group_size);
    const std::size_t offset = seed % 64, row_groups = 1 + random.below(7);
    std::vector<std::uint32_t> raw(groups * size);
    for (std::size_t g = 0; g < groups; ++g) {
        set.fill(random, Group{elements_of(dtype), format, raw.data() + g * size});
    }
    const std::vector<std::uint8_t> bytes = bytes_of(raw, dtype);
    const std::vector<std::uint8_t> counts = random_importance(random, row_groups * size, size);
    const Input weights(bytes.data(), bytes.size(), offset);
    const Input importance(counts.data(), counts.size(), offset);
    const std::size_t first = random.below(static_cast<std::uint32_t>(row_groups)) * size;
    const auto search = [&](const Implementation& with, std::uint8_t fill) {
        Quantized out = {Output(groups * code_bytes(format), offset, fill),
                         Output(groups * scale_bytes(format, stored), offset, fill),
                         Output(groups * bias_bytes(format, stored), offset, fill),
                         {}};
        out.outcome = with.search({dtype, stored, format, groups, weights.data(), importance.data(),
                                   row_groups * size, first, out.codes.data(), out.scales.data(),
                                   out.biases.data()});
        return out;
    };
    const Problem problem = {dtype, format, groups, 1.0f, std::string("search, ") + set.name, seed,
                             offset};
    compare_quantized(tally, problem, weights.data(), search);
    tally.weights += groups * size;
}

// A `brief` check has each data set with one count of groups, turn about.
void check_searches(Tally& tally, const Format& format, Dtype dtype, bool brief) {
    std::uint64_t index = 0, turn = 0;
    for (const DataSet& set : all_sets()) {
        ++turn;
        for (const std::size_t groups : {0, 1, 5, 16, 33, 65}) {
            const std::uint64_t seed = seed_of(9, ++index, static_cast<std::uint64_t>(dtype));
            if (brief && (groups > 16 || index % 4 != turn % 4)) continue;
            const Dtype stored = dtype == Dtype::f32 ? all_elements[seed % 3].dtype : dtype;
            check_search(tally, format, dtype, stored, groups, set, seed);
        }
    }
}

// Tiles, and all of a kernel's results in them.
struct Tiles {
    Output errors, current, codes;

    // NaN comes in several kinds, of which the processor picks one.
    void settle() {
        for (std::size_t i = 0; i < current.size(); i += sizeof(float)) {
            float number;
            std::memcpy(&number, current.data() + i, sizeof number);
            if (number != number) std::memcpy(current.data() + i, &quiet_nan_bits, sizeof number);
        }
    }
};

// Error feedback: two groups are rounded, in places of their own, and their errors carried on.
void check_feedback(Tally& tally, const Format& format, const DataSet& set, std::uint64_t seed) {
    Random random(seed);
    const auto size = static_cast<std::size_t>(format.group_size);
    const std::size_t tiles = 1 + random.below(3), columns = size * (2 + random.below(4));
    const std::size_t weights = tiles * tile_rows * columns;
    std::vector<std::uint32_t> raw(weights);
    for (std::size_t start = 0; start < weights; start += size) {
        set.fill(random, Group{elements_of(Dtype::f32), format, raw.data() + start});
    }
    const bool any = random.one_in(2);
    const auto numbers = [&](std::size_t count) {
        const std::vector<std::uint8_t> bytes = random_parameters(random, count, any);
        std::vector<float> found(count);
        std::memcpy(found.data(), bytes.data(), bytes.size());
        return found;
    };
    std::vector<float> scales = numbers(tiles * tile_rows);
    if (format.mode != Mode::affine) {  // a byte's number has no sign
        for (float& scale : scales) scale = std::fabs(scale);
    }
    const std::vector<float> biases = numbers(tiles * tile_rows);
    const std::vector<float> factors = numbers(columns * columns);
    std::vector<std::uint8_t> places(size);
    for (std::size_t i = 0; i < size; ++i) places[i] = static_cast<std::uint8_t>(i);
    for (std::size_t i = size; i > 1; --i) {
        std::swap(places[i - 1], places[random.below(static_cast<std::uint32_t>(i))]);
    }
    const std::size_t offset = seed % 16 * sizeof(float);
    const std::size_t code_size = weights / size * code_bytes(format);
    const auto run = [&](const Implementation& with, std::uint8_t fill) {
        Tiles out = {Output(weights * sizeof(float), offset, 0),
                     Output(weights * sizeof(float), offset, 0), Output(code_size, offset, fill)};
        std::memcpy(out.errors.data(), raw.data(), out.errors.size());
        std::memcpy(out.current.data(), raw.data(), out.current.size());
        auto* const errors = reinterpret_cast<float*>(out.errors.data());
        auto* const current = reinterpret_cast<float*>(out.current.data());
        for (std::size_t group = 0; group < columns / size; ++group) {
            const std::size_t first = group * size;
            with.round_columns({format, tiles, columns, first, columns - size - first,
                                places.data(), scales.data(), biases.data(), factors.data(), errors,
                                current, out.codes.data()});
            with.carry({tiles, columns, first, first + size, first + size, columns, factors.data(),
                        errors, current});
        }
        out.settle();
        return out;
    };
    const Problem problem = {Dtype::f32, format, tiles * tile_rows, 1.0f,
                             std::string("feedback, ") + set.name, seed, offset};
    const Tiles expected = run(exact(), reference_fill);
    for (const Output* one : {&expected.codes, &expected.errors, &expected.current}) {
        take_reference(tally, problem, "results", *one);
    }
    for_each_other([&](const Implementation& one) {
        const Tiles found = run(one, tested_fill);
        const auto same = [&](const char* what, const Output& right, const Output& mine) {
            return same_bytes(tally, problem, one.name, what, right.data(), mine, nullptr);
        };
        (void)(same("codes", expected.codes, found.codes) &&
               same("errors", expected.errors, found.errors) &&
               same("current weights", expected.current, found.current));
        ++tally.comparisons;
    });
    tally.weights += weights;
}

void check_feedbacks(Tally& tally, const Format& format) {
    std::uint64_t index = 0;
    for (const DataSet& set : all_sets()) {
        check_feedback(tally, format, set, seed_of(10, ++index, 0));
    }
}

// Everything that is the same in each run, in pieces that can be done in any order.
std::vector<std::function<void(Tally&)>> fixed_work(bool brief) {
    std::vector<std::function<void(Tally&)>> work;
    for (const Format& format : all_formats()) {
        for (const Elements& elements : all_elements) {
            const Dtype dtype = elements.dtype;
            work.push_back([=](Tally& tally) { check_sets(tally, format, dtype); });
            work.push_back([=](Tally& tally) { check_every_maximum(tally, format, dtype); });
            work.push_back([=](Tally& tally) { check_searches(tally, format, dtype, brief); });
            if (format.mode != Mode::affine) continue;
            work.push_back([=](Tally& tally) { check_affine_values(tally, format, dtype); });
        }
        work.push_back([=](Tally& tally) { check_feedbacks(tally, format); });
        if (format.mode == Mode::affine) continue;
        work.push_back([=](Tally& tally) { check_float_values(tally, format); });
    }
    for (const Elements& elements : all_elements) {
        const Dtype own = elements.dtype;
        work.push_back([=](Tally& tally) { check_decodes(tally, own, 0, 100); });
        for (const DataSet& set : all_sets()) {
            const Dtype dtype = elements.dtype;
            work.push_back([=](Tally& tally) { check_scans(tally, dtype, set); });
        }
    }
    return work;
}

// One random task for every format and dtype.
void check_round(Tally& tally, std::uint64_t seed) {
    const std::vector<DataSet> sets = all_sets();
    tally.round = " in the round of seed " + std::to_string(seed);
    Random random(seed);
    for (const Elements& elements : all_elements) {
        for (const Format& format : all_formats()) {
            const DataSet& set = sets[random.below(static_cast<std::uint32_t>(sets.size()))];
            const std::size_t groups = random.below(300), offset = random.below(64);
            const Dtype dtype = elements.dtype;
            const Problem problem = {dtype, format, groups, 1.0f, set.name, random.next(), offset};
            quantize_data_set(tally, problem, false, set);
            if (format.mode == Mode::nvfp4) quantize_data_set(tally, problem, true, set);
            const Dtype stored = dtype == Dtype::f32 ? all_elements[random.below(3)].dtype : dtype;
            check_search(tally, format, dtype, stored, random.below(100), set, random.next());
            check_feedback(tally, format, set, random.next());
            if (format.mode != Mode::affine && dtype != Dtype::bf16) continue;  // BF16 only
            const std::uint64_t own_seed = random.next();
            const Problem coded = {dtype, format, groups, 1.0f, "any scales", own_seed, offset};
            dequantize_set(tally, coded, [&](Random& own, std::size_t, std::uint32_t* pair) {
                pair[0] = static_cast<std::uint32_t>(own.next());
                pair[1] = static_cast<std::uint32_t>(own.next());
            });
        }
        const DataSet& set = sets[random.below(static_cast<std::uint32_t>(sets.size()))];
        check_scan(tally, elements.dtype, set, random.below(20000), random.next());
        check_decodes(tally, elements.dtype, random.next(), 4);
    }
}

// -- recorded cases -------------------------------------------------------------------------------

[[noreturn]] void refuse(const std::string& why) {
    std::fprintf(stderr, "selftest: %s\n", why.c_str());
    std::exit(2);
}

// Takes pieces off the front of a file's bytes.
class Reader {
  public:
    explicit Reader(const std::vector<std::uint8_t>& bytes) : bytes_(bytes) {}

    bool at_end() const { return at_ == bytes_.size(); }
    const std::uint8_t* take(std::size_t size) {
        if (size > bytes_.size() - at_) refuse("the file of cases ends too early");
        at_ += size;
        return bytes_.data() + (at_ - size);
    }
    std::uint32_t number() { return load_as<std::uint32_t>(take(4)); }

  private:
    const std::vector<std::uint8_t>& bytes_;
    std::size_t at_ = 0;
};

void check_case(Tally& tally, Reader& file, std::size_t index) {
    const std::uint32_t dtype_number = file.number(), mode = file.number();
    const std::uint32_t bits = file.number(), size = file.number(), groups = file.number();
    const float encode = float_of(file.number());
    if (dtype_number > 2 || mode > 3 || bits > 8 || size > 128) refuse("a case of unknown format");
    const auto dtype = static_cast<Dtype>(dtype_number);
    const Format format = {static_cast<Mode>(mode), static_cast<int>(bits), static_cast<int>(size)};
    if (!is_known(format)) refuse("a case of unknown format");
    const std::size_t bytes = groups * weight_bytes(format, dtype);
    const std::uint8_t* const given = file.take(bytes);
    const std::uint8_t* const codes = file.take(groups * code_bytes(format));
    const std::uint8_t* const scales = file.take(groups * scale_bytes(format, dtype));
    const std::uint8_t* const biases = file.take(groups * bias_bytes(format, dtype));
    const Problem problem = {dtype, format, groups, encode, "case", index, index % 64};
    const Input weights(given, bytes, problem.offset);
    const auto compare = [&](const Implementation& one) {
        const Quantized found = quantize(one, problem, weights.data(), tested_fill);
        const auto same = [&](const char* what, const std::uint8_t* right, const Output& mine) {
            return same_bytes(tally, problem, one.name, what, right, mine, weights.data());
        };
        (void)(same("scales", scales, found.scales) && same("biases", biases, found.biases) &&
               same("codes", codes, found.codes));
        ++tally.comparisons;
    };
    compare(exact());
    for_each_other(compare);
    tally.weights += groups * static_cast<std::size_t>(size);
}

void check_cases(Tally& tally, const char* path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) refuse(std::string("cannot read ") + path);
    const std::vector<std::uint8_t> bytes{std::istreambuf_iterator<char>(file), {}};
    Reader reader(bytes);
    if (std::memcmp(reader.take(8), "QMCASES1", 8) != 0) refuse("not a file of cases");
    for (std::size_t index = 0; !reader.at_end(); ++index) check_case(tally, reader, index);
}

// -- the program ----------------------------------------------------------------------------------

// `use(i, tally)` for every i below `count`, on all processors.
template <class Use>
void in_parallel(Tally& total, std::size_t count, Use use) {
    std::vector<Tally> parts(count);
    std::atomic<std::size_t> next = 0;
    const auto work = [&] {
        for (std::size_t i = next++; i < count; i = next++) use(i, parts[i]);
    };
    std::vector<std::thread> threads(std::max(1u, std::thread::hardware_concurrency()));
    for (std::thread& one : threads) one = std::thread(work);
    for (std::thread& one : threads) one.join();
    for (const Tally& one : parts) total.add(one);
}

// The names of all, those that this processor lacks in brackets.
std::string names() {
    std::string text;
    const Implementations all = implementations();
    for (std::size_t i = 0; i < all.count; ++i) {
        const std::string name(all.first[i]->name);
        text += (i == 0 ? "" : ", ") + (all.first[i]->supported() ? name : "(" + name + ")");
    }
    return text;
}

int conclude(const Tally& tally, std::uint64_t digest) {
    std::printf("selftest: %s: %zu comparisons, %zu weights, ", names().c_str(), tally.comparisons,
                tally.weights);
    if (digest != 0) std::printf("digest %016llx, ", static_cast<unsigned long long>(digest));
    if (tally.differences == 0) std::printf("no difference\n");
    else std::printf("%zu differences\n", tally.differences);
    return tally.differences == 0 ? 0 : 1;
}

[[noreturn]] void refuse_arguments() {
    refuse("usage: selftest [--brief | SECONDS [SEED]] or selftest --cases FILE");
}

int run(int argc, char** argv) {
    Tally tally;
    const std::string first = argc > 1 ? argv[1] : "";
    if (first == "--cases") {
        if (argc != 3) refuse_arguments();
        check_cases(tally, argv[2]);
        return conclude(tally, 0);
    }
    const bool brief = first == "--brief";
    if (brief && argc > 2) refuse_arguments();
    if (brief) argc = 1;
    using Clock = std::chrono::steady_clock;
    auto seed = static_cast<std::uint64_t>(Clock::now().time_since_epoch().count());
    double seconds = 0.0;
    if (argc > 3) refuse_arguments();
    if (argc > 1) {
        char* end = nullptr;
        seconds = std::strtod(argv[1], &end);
        if (end == argv[1] || *end != '\0' || !(seconds >= 0.0)) refuse_arguments();
    }
    if (argc > 2) {
        char* end = nullptr;
        seed = std::strtoull(argv[2], &end, 0);
        if (end == argv[2] || *end != '\0') refuse_arguments();
    }
    const auto fixed = fixed_work(brief);
    in_parallel(tally, fixed.size(), [&](std::size_t i, Tally& own) { fixed[i](own); });
    const std::uint64_t digest = tally.digest;
    const auto end = Clock::now() + std::chrono::duration<double>(seconds);
    const std::size_t rounds = argc == 1 ? 0 : seconds == 0.0 ? 1 : 64;  // at a time
    while (rounds != 0) {
        in_parallel(tally, rounds, [&](std::size_t i, Tally& own) { check_round(own, seed + i); });
        seed += rounds;
        if (Clock::now() >= end) break;
    }
    return conclude(tally, digest);
}

}  // namespace
}  // namespace quantmill

int main(int argc, char** argv) { return quantmill::run(argc, argv); }
