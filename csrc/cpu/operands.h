// The operands of a matrix product in the form the micro-kernel reads: B in packed strips of columns, A in blocks of rows.
#pragma once
#include "micro.h"
#include "pack.h"
#include "pairs.h"

FASTATTN_NAMESPACE_BEGIN

constexpr int64_t kDepth = 512;  // k in one block, a multiple of 32
constexpr int64_t kStripsOfRows = 4;  // packed at once, so that a cache line is read once: strips of 24 floats end within one

struct Range {
    int64_t begin, end;
    int64_t size() const { return end - begin; }
};

// Share `index` of `parts` of [0, total), cut at multiples of `step`.
static inline Range part(int64_t total, int64_t step, int64_t parts, int64_t index) {
    const int64_t units = (total + step - 1) / step;
    return {smaller(total, units * index / parts * step), smaller(total, units * (index + 1) / parts * step)};
}

static inline Range depth_block(int64_t k, int64_t index) { return {index * kDepth, smaller((index + 1) * kDepth, k)}; }

// How the operands of one product are held.
struct Form {
    int parts;  // as in Left

    // Elements of the micro-kernel along k, and those of all parts.
    int64_t depth(int64_t k) const { return parts ? round_up((k + 1) / 2, kWordDepth) : k; }
    int64_t elements(int64_t k) const { return depth(k) * larger(1, parts); }
    int64_t tile_rows() const { return parts ? kWordRows : kTileRows; }
    int64_t strip_vectors() const { return parts ? kWordVectors : kTileVectors; }
    int64_t strip_width() const { return strip_vectors() * kLanes; }
    int64_t strips(int64_t n) const { return (n + strip_width() - 1) / strip_width(); }
    // From one row of tiles of A to the next, and along k (a multiple of kDepth or of 32) within A and within a strip of B.
    int64_t left_rows(const Left &left, int64_t rows) const { return left.layout == Layout::columns ? rows : left.stride * (parts && kWordBlocks ? rows / 16 : rows); }
    int64_t left_depth(int64_t k) const { return parts && kWordBlocks ? elements(k) * 16 : depth(k); }
    int64_t right_depth(int64_t k) const { return elements(k) * strip_width(); }
};

constexpr int64_t kSplitRows = 400;  // from here on float32 in three parts is faster (measured at k and n of 384 to 3,072; encoder_layer.cpp)

// Whether operands are rounded to bfloat16 where they may be: where that is faster. Products by vdpbf16ps are almost twice as fast as those of float32 on
// an AMD (Zen 4; gemm.cpp) and half as fast on an Intel (Emerald Rapids).
static inline bool is_rounded(int32_t dtype, bool rounds_float32) {
#if defined(__AVX512BF16__)
    return dtype == FASTATTN_FLOAT32 && rounds_float32 && (kWordBlocks || __builtin_cpu_is("amd"));
#else
    (void)dtype, (void)rounds_float32;
    return false;
#endif
}

// That of a product of so many rows.
static inline Form form_of(int32_t dtype, bool rounds_float32, int64_t rows) {
    if (dtype == FASTATTN_BFLOAT16 || is_rounded(dtype, rounds_float32)) return {kBfloat16Parts};
    if (dtype == FASTATTN_FLOAT16) return {kFloat16Parts};
    return {rows >= kSplitRows ? kFloat32Parts : 0};
}

// Calls f.template operator()<parts>() for words.
template <class F>
static inline bool with_parts(int parts, F &&f) {
    if constexpr (kFloat32Parts > 0) {
        if (parts == 3) return f.template operator()<3>();
    }
    if constexpr (kFloat16Parts > 0) {
        if (parts == 2) return f.template operator()<2>();
    }
    if constexpr (kBfloat16Parts > 0) return f.template operator()<1>();
    return false;
}

// A matrix of a tensor with either stride 1.
struct Operand {
    const void *data;
    int32_t dtype;
    int64_t down, across;  // strides

    const void *at(int64_t row, int64_t column) const { return offset(data, dtype, row * down + column * across); }
};

// What stands before strips that are kept: they are read only as what they are, whatever instruction set packed them.
struct alignas(64) PackedHeader {
    int32_t dtype, parts, strip_width, is_in_blocks;
    int64_t k, n;
};

static inline PackedHeader packed_header(Form form, int32_t dtype, int64_t k, int64_t n) {
    return {dtype, form.parts, (int32_t)form.strip_width(), form.parts && kWordBlocks, k, n};
}

// The strips of all columns, each of all of k, right_depth(k) floats apart; null where `packed` is, or is of another form.
static inline const float *kept_strips(const void *packed, Form form, int32_t dtype, int64_t k, int64_t n) {
    if (!packed) return nullptr;
    const PackedHeader wanted = packed_header(form, dtype, k, n), &found = *(const PackedHeader *)packed;
    const bool fits = found.dtype == wanted.dtype && found.parts == wanted.parts && found.strip_width == wanted.strip_width &&
                      found.is_in_blocks == wanted.is_in_blocks && found.k == k && found.n == n;
    return fits ? (const float *)(&found + 1) : nullptr;
}

#if defined(__AVX512BF16__)
// Where words of a strip of B go.
static inline WordsTarget strip_words(Form form, float *target) {
    return kWordBlocks ? WordsTarget{target, 16, form.parts * kWordVectors * 256, 256, kWordVectors * 256}
                       : WordsTarget{target, kTileWidth, 16 * kTileWidth, 16, 0};
}
#endif

// A strip of B: rows k of it x (up to strip_width) columns, lanes beyond `columns` zero. True when an element does not split.
static inline bool pack_strip([[maybe_unused]] Form form, const Operand &b, Range k, Range columns, float *target) {
    const bool transposed = b.down == 1;
    const Rows source{b.at(k.begin, columns.begin), b.dtype, transposed ? b.across : b.down};
#if defined(__AVX512BF16__)
    if (form.parts)
        return with_parts(form.parts, [&]<int parts>() {
            const int64_t depth = form.depth(k.size());
            return transposed ? pack_words_transposed<parts>(source, columns.size(), k.size(), strip_words(form, target), depth)
                              : pack_words_of_row_pairs<parts>(source, k.size(), columns.size(), strip_words(form, target), depth);
        });
#endif
    if (transposed) pack_transposed(source, columns.size(), k.size(), 1.0f, target, kTileWidth, (columns.size() + kLanes - 1) / kLanes);
    else pack_rows(source, k.size(), columns.size(), 1.0f, target, kTileWidth);
    return false;
}

// Strips that are packed together: about as many columns either way.
static inline int64_t strips_at_once(Form form, const Operand &b) { return b.down == 1 ? 1 : form.parts && kWordBlocks ? kStripsOfRows * 2 : kStripsOfRows; }

// Rows k of strips of B, `strip_floats` apart. Its rows lie far apart, where the hardware does not foresee them: they are fetched ahead. True when an
// element does not split.
static inline bool pack_strips_of_rows([[maybe_unused]] Form form, const Operand &b, Range k, Range columns, float *target, int64_t strip_floats) {
    constexpr int64_t kAhead = 16;
    const auto fetch = [&](int64_t r) {
        for (int64_t c = columns.begin; r < k.end && c < columns.end; c += 64 / size_of(b.dtype)) __builtin_prefetch(b.at(r, c));
    };
#if defined(__AVX512BF16__)
    if (form.parts)
        return with_parts(form.parts, [&]<int parts>() {
            const int64_t width = form.strip_width();
            vfloat poison = zero();
            for (int64_t word = 0; word < form.depth(k.size()); word++) {
                fetch(k.begin + 2 * word + kAhead);
                fetch(k.begin + 2 * word + kAhead + 1);
                for (int64_t c = columns.begin, strip = 0; c < columns.end; c += width, strip++)
                    poison += pack_row_pair<parts>({b.at(k.begin, c), b.dtype, b.down}, k.size(), smaller(width, columns.end - c), word,
                                                   strip_words(form, target + strip * strip_floats));
            }
            return any((vint)(poison != poison));
        });
#endif
    with_dtype(b.dtype, [&]<int dtype>() {
        for (int64_t r = k.begin; r < k.end; r++, target += kTileWidth) {
            fetch(r + kAhead);
            float *strip = target;
            for (int64_t first = columns.begin; first < columns.end; first += kTileWidth, strip += strip_floats) {
                const void *source = b.at(r, first);
                const int64_t width = smaller(kTileWidth, columns.end - first);
#pragma GCC unroll 3
                for (int64_t c = 0; c < kTileWidth; c += kLanes)
                    store(strip + c, c + kLanes <= width ? load_any(offset(source, dtype, c), dtype, kLanes)
                                     : c < width         ? load_any(offset(source, dtype, c), dtype, (int)(width - c))
                                                         : zero());
            }
        }
    });
    return false;
}

#if defined(__AVX512BF16__)
// Where words of A go, rows of `depth` words.
static inline WordsTarget left_words(Form form, int64_t depth, float *target) {
    const int64_t ld = round_up(depth, kLanes);
    return kWordBlocks ? WordsTarget{target, 16, depth * form.parts * 16, form.parts * 256, 256} : WordsTarget{target, ld, 16 * ld, 16, 0};
}
#endif

constexpr int64_t kOwnRows = 1024;  // of A, where it is read in place, by which each thread multiplies strips that it packs for itself (gemm.cpp)

// Whether the micro-kernel reads A where it lies: float32 by rows, and bfloat16 whose pairs along a row are words.
static inline bool is_read_in_place(Form form, const Operand &a, int64_t k) {
    if (a.across != 1) return false;
    if (!form.parts) return a.dtype == FASTATTN_FLOAT32;
    return !kWordBlocks && a.dtype == FASTATTN_BFLOAT16 && k % 2 == 0 && a.down % 2 == 0 && (uintptr_t)a.data % 4 == 0;
}

// A block of A for the micro-kernel: in place when possible, else copied into `scratch`. `nonfinite` is set when an element does not split.
static inline Left pack_left([[maybe_unused]] Form form, const Operand &a, Range rows, Range k, float *scratch, [[maybe_unused]] bool &nonfinite) {
    const bool by_rows = a.across == 1;
    const Rows source{a.at(rows.begin, k.begin), a.dtype, by_rows ? a.down : a.across};
    const int64_t wide_rows = round_up(rows.size(), kLanes);
#if defined(__AVX512BF16__)
    if (form.parts) {
        const int64_t depth = form.depth(k.size());
        if (is_read_in_place(form, a, k.size())) return {(const float *)source.data, a.down / 2, Layout::rows, form.parts};
        const bool columns_kept = !by_rows && !kWordBlocks;
        const WordsTarget words = columns_kept ? WordsTarget{scratch, wide_rows, 16 * wide_rows, 16, 0} : left_words(form, depth, scratch);
        nonfinite |= with_parts(form.parts, [&]<int parts>() {
            if (by_rows) return pack_words_in_rows<parts>(source, rows.size(), k.size(), words, depth);
            if (columns_kept) return pack_words_of_row_pairs<parts>(source, k.size(), rows.size(), words, depth);
            return pack_words_of_columns<parts>(source, k.size(), rows.size(), words, depth);
        });
        return {scratch, kWordBlocks ? words.block_down : words.stride, columns_kept ? Layout::columns : Layout::rows, form.parts};
    }
#endif
    if (!by_rows) {
        pack_rows(source, k.size(), rows.size(), 1.0f, scratch, wide_rows);
        return {scratch, wide_rows, Layout::columns};
    }
    if (is_read_in_place(form, a, k.size())) return {(const float *)source.data, a.down, Layout::rows};
    pack_rows(source, rows.size(), k.size(), 1.0f, scratch, round_up(k.size(), kLanes));
    return {scratch, round_up(k.size(), kLanes), Layout::rows};
}

FASTATTN_NAMESPACE_END
