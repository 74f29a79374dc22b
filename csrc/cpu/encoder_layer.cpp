// A transformer encoder layer in inference, from x to y in one call; see fastattn_encoder_layer.
//
// Shapes: x and y (rows, embed) contiguous; q, k, v and the attention's result (rows, embed); the hidden features never leave the caches.
// Numerics: products as in gemm.cpp (with AMX float32 in three bfloat16 parts from enough rows on, or in one if it may be rounded), sums, norms and the
//   residual stream within a block in float32. q, k and v, and what the attention makes of them, are rounded to the tensors' dtype; bfloat16 operands
//   of a product are rounded as they are packed.
// Algorithm: the weights are packed once, by all threads, in the order in which they are read. Each thread takes a share of the rows, in blocks
//   whose working set stays in the level-2 cache, and sends a block through all products before the next: x to q, k and v; attention over all
//   rows; then out-projection, residual, norm, and chunk by chunk of the hidden features up-projection, activation and down-projection, with
//   the sums of the last kept; then residual and norm. Packed weights come from the shared cache, fetched a strip ahead. Weights that the caller
//   keeps packed are read as they are: a chunk of the hidden features is a range of strips of one, and of every strip of the other.
//   Few rows do not pay for packing: they go through the kernels of the other files one after the other (goes_one_by_one).
// Ladder, ms a layer of MiniLM (384 wide, 12 heads) over 8 x 360 and 32 x 128 rows, and of BERT base over 2 x 512, float32, 2 cores of an AMD EPYC
// (Zen 3, AVX2, VM), 2026-11-26, least of three interleaved runs:
//   73.2, 93.7, 97.5  q, k and v in rows of 3 embed, whose heads share few sets of the caches
//   70.2, 90.7, 94.7  each head's rows behind each other
// Fewer rows, heads of 64, by blocks and one kernel after the other, least of five interleaved runs, 2 cores of an AMD EPYC (Zen 5, VM), 2026-11-27:
//   rows                      64            128           384           768           1,024
//   384 wide, AVX-512         1.15,  0.75   1.77,  1.40    4.40,  4.19   8.21,  8.09   9.84,  9.73
//   384 wide, its AVX2        1.90,  1.33   3.09,  2.56    8.08,  7.65  14.82, 14.80  17.82, 17.84
//   BERT base, AVX-512        4.52,  2.69   6.68,  4.87   15.49, 13.75  29.06, 27.18  38.97, 36.56
//   BERT base, its AVX2       7.36,  4.75  11.41,  9.05   27.84, 25.42  53.79, 50.40  71.80, 68.21
//   BERT base, bfloat16       2.47,  1.48                  8.41,  7.45                21.19, 19.81
//   192 wide, AVX-512         100 rows 0.45, 0.39         256 rows 0.90, 0.90         512 rows 1.64, 1.77
// With AMX, times of torch's nn.TransformerEncoderLayer over ours, float32, calls in turns, medians of two runs each, one core of an Intel Xeon (Emerald
// Rapids, VM) beside other work, 2026-11-29; three parts from 64 rows on, as before, and from 400, as in gemm.cpp:
//   rows               64          96          128         192         256         384         512         1,024
//   384 wide, 64       0.72, 0.76  0.77, 0.79  0.90, 0.95  0.83, 0.89  0.84, 0.91  0.93, 1.00  0.95, 1.08  1.67, 1.71
//   384 wide, 400      1.04, 1.07  1.02, 1.08  1.05, 1.07  1.05, 1.07  1.04, 1.06  1.13, 1.13  0.96, 1.11  1.60, 2.28
//   BERT base, 64      0.57, 0.66  0.80, 0.87  0.63, 0.80  0.68, 0.97  0.94, 1.01  1.11, 1.16  0.76, 1.23  1.01, 1.34
//   BERT base, 400     1.05, 1.09  1.02, 1.02  1.03, 1.06  0.99, 1.00  1.00, 1.00  0.99, 1.05  0.81, 1.24  0.98, 1.48
// The same machine and day, one kernel after the other wherever it is at least as fast; times by blocks over those, then torch's over those:
//   rows                  40          64          128         256         384         512         1,024
//   384 wide, bfloat16    1.51, 1.66  1.37, 1.52  1.12, 1.34  0.98, 1.20  0.92, 1.19  0.99, 1.23  0.85, 1.13
//   768 wide, bfloat16    1.70, 1.62  1.36, 1.28  1.09, 1.17  1.06, 1.11  1.32, 1.07  1.10, 1.07  0.99, 1.11
//   1,024 wide, bfloat16  2.53, 1.70  2.28, 1.59  1.64, 1.31  1.28, 1.09  1.24, 1.10  1.15, 1.07  0.90, 0.96
//   768 wide, float16     1.58, 1.35  1.55, 1.70  1.27, 1.90  1.21, 2.02  1.03, 1.34  0.99, 1.38  1.03, 1.90
//   768 wide, rounded     1.53, 1.29  1.48, 1.34  1.27, 1.28  1.11, 1.26  1.05, 1.46  1.02, 1.39  0.96, 1.39
//   768 wide, float32     (400 rows: three parts from here on)                        1.02, 1.04  1.20, 1.28  1.11, 1.24
#include <omp.h>

#include "activation.h"
#include "kernels.h"
#include "norm.h"
#include "operands.h"
#include "workspace.h"

FASTATTN_NAMESPACE_BEGIN
namespace {

// ---- One kernel after the other --------------------------------------------------------------------------------------------------------

int64_t buffer_floats(const fastattn_encoder_layer &p, int64_t columns) { return Scratch::padded((p.rows * columns * size_of(p.dtype) + 3) / 4); }
int64_t lse_floats(const fastattn_encoder_layer &p) { return Scratch::padded((p.cu_seqlens ? 1 : p.batch) * p.heads * p.len); }

// c (rows, n) = act(a (rows, k) W^T + b), c with a row stride of its own.
int linear(const fastattn_encoder_layer &p, const fastattn_linear &layer, const void *a, int64_t k, void *c, int64_t ldc, int64_t n,
           int32_t activation = FASTATTN_ACT_NONE) {
    fastattn_gemm g{};
    g.dtype = g.bias_dtype = p.dtype;
    g.n_threads = p.n_threads;
    g.m = p.rows, g.n = n, g.k = k;
    g.a = {(void *)a, {k, 1}};
    g.b = {(void *)layer.weight, {1, k}};
    g.c = {c, {ldc}};
    g.bias = layer.bias;
    g.activation = activation;
    g.rounds_float32 = p.rounds_float32;
    g.packed = layer.packed;
    return gemm(g);
}

// y = norm(z) with z = x + residual; x and residual (rows, embed), residual and z may be null.
int norm(const fastattn_encoder_layer &p, const fastattn_layer_norm &layer, const void *x, const void *residual, void *y, void *z = nullptr) {
    fastattn_norm n{};
    n.n_threads = p.n_threads;
    n.rows = p.rows, n.width = p.embed;
    n.x_dtype = n.residual_dtype = n.z_dtype = p.dtype;
    n.weight_dtype = layer.weight_dtype, n.bias_dtype = layer.bias_dtype;
    n.x = x, n.residual = residual;
    n.weight = layer.weight, n.bias = layer.bias;
    n.y = y, n.z = z;
    n.eps = layer.eps;
    return norm_forward(n);
}

constexpr int64_t kManyElements = 1 << 16;  // from here on another thread is worth waking

// target = a + b, element by element.
void add(const fastattn_encoder_layer &p, const void *a, const void *b, void *target) {
    const int64_t elements = p.rows * p.embed;
#pragma omp parallel for num_threads(p.n_threads) schedule(static) if (p.n_threads > 1 && elements >= kManyElements)
    for (int64_t i = 0; i < elements; i += kLanes) {
        const int width = lanes_left(i, elements);
        const vfloat sum = load_any(offset(a, p.dtype, i), p.dtype, width) + load_any(offset(b, p.dtype, i), p.dtype, width);
        store_any(offset(target, p.dtype, i), p.dtype, sum, width);
    }
}

// How q, k and v lie in one buffer: strides between rows, heads, and the three, in elements.
struct Projected {
    int64_t row, head, third;

    int64_t at(int64_t index, int64_t row_index, int64_t column, int64_t dim) const {
        return index * third + row_index * row + column / dim * head + column % dim;
    }
};

Projected side_by_side(const fastattn_encoder_layer &p) { return {3 * p.embed, p.embed / p.heads, p.embed}; }

// out (rows, embed) = attention among q, k and v.
int attend(const fastattn_encoder_layer &p, void *qkv, Projected lie, void *out, float *lse) {
    fastattn_attention a{};
    a.dtype = p.dtype;
    a.n_threads = p.n_threads;
    a.heads_q = a.heads_kv = p.heads;
    a.dim_qk = a.dim_v = p.embed / p.heads;
    a.scale = p.scale;
    a.mask = p.mask;
    a.lse = lse;
    const auto call = [&](int64_t first, int64_t batch, int64_t len) {
        a.batch = batch;
        a.len_q = a.len_k = len;
        const auto third = [&](int64_t index) {
            return fastattn_tensor{offset(qkv, p.dtype, lie.at(index, first, 0, a.dim_qk)), {len * lie.row, lie.head, lie.row, 1}};
        };
        a.q = third(0), a.k = third(1), a.v = third(2);
        a.out = {offset(out, p.dtype, first * p.embed), {len * p.embed, a.dim_qk, p.embed, 1}};
        return attention_forward(a);
    };
    if (!p.cu_seqlens) return call(0, p.batch, p.len);
    int status = FASTATTN_OK;
    for (int64_t b = 0; b < p.batch && status == FASTATTN_OK; b++) status = call(p.cu_seqlens[b], 1, p.cu_seqlens[b + 1] - p.cu_seqlens[b]);
    return status;
}

int one_by_one(const fastattn_encoder_layer &p) {
    const int64_t wide = buffer_floats(p, larger(3 * p.embed, p.hidden)), narrow = buffer_floats(p, p.embed), e = p.embed;
    Scratch scratch(wide + 2 * narrow + lse_floats(p));
    if (scratch.failed()) return FASTATTN_OUT_OF_MEMORY;
    float *qkv = scratch.take(wide), *hidden = qkv, *middle = scratch.take(narrow), *branch = scratch.take(narrow), *lse = scratch.take(0);
    int status = FASTATTN_OK;
    const auto then = [&](auto &&step) { if (status == FASTATTN_OK) status = step(); };
    if (p.norm_first) then([&] { return norm(p, p.norm1, p.x, nullptr, branch); });
    const fastattn_linear *projections[3] = {&p.q, &p.k, &p.v};
    for (int64_t i = 0; i < 3; i++)
        then([&] { return linear(p, *projections[i], p.norm_first ? branch : p.x, e, offset((void *)qkv, p.dtype, i * e), 3 * e, e); });
    then([&] { return attend(p, qkv, side_by_side(p), p.y, lse); });
    then([&] { return linear(p, p.out, p.y, e, branch, e, e); });
    if (p.norm_first) then([&] { return norm(p, p.norm2, branch, p.x, p.y, middle); });
    else then([&] { return norm(p, p.norm1, branch, p.x, middle); });
    then([&] { return linear(p, p.up, p.norm_first ? p.y : middle, e, hidden, p.hidden, p.hidden, p.activation); });
    then([&] { return linear(p, p.down, hidden, p.hidden, branch, e, e); });
    if (p.norm_first) add(p, middle, branch, p.y);
    else then([&] { return norm(p, p.norm2, branch, middle, p.y); });
    return status;
}

// ---- Block by block --------------------------------------------------------------------------------------------------------------------

constexpr int64_t kChunk = 384;                // hidden features at a time, a multiple of every strip's width
constexpr int64_t kBlockRows = 192;            // most rows of a block, a multiple of every tile's
constexpr int64_t kBlockFloats = 400 << 10;    // of a block's working set: most of the level-2 cache, the weights pass through the rest

// Part of a linear layer: out features n over in features k, packed as strips of columns, which begin `strip_floats` apart.
struct Piece {
    const fastattn_linear *layer;
    int64_t in_features;
    Range k, n;
    const float *packed;
    int64_t strip_floats;
    bool is_kept;  // packed before the call
};

// The layer's sizes, and where everything lies in its scratch.
class Plan {
  public:
    Plan(const fastattn_encoder_layer &layer, Form f) : p(layer), form(f) {
        chunks = larger(1, (p.hidden + kChunk - 1) / kChunk);
        ld = round_up(p.embed, form.strip_width());
        const int64_t row_floats = 2 * ld + operand_floats(1, p.embed) + operand_floats(1, kChunk);
        // Rows of one head behind each other: rows 3 embed apart would share few sets of the caches.
        if (const int64_t dim = p.embed / p.heads; dim % kLanes == 0) lie = {dim, p.rows * dim, p.rows * p.embed};
        else lie = side_by_side(p);
        block_rows = larger(kWordRows, smaller(kBlockRows, kBlockFloats / row_floats / kWordRows * kWordRows));
        const fastattn_linear *layers[6] = {&p.q, &p.k, &p.v, &p.out, &p.up, &p.down};
        for (int i = 0; i < 6; i++) {
            linears[i] = layers[i];
            kept[i] = kept_strips(layers[i]->packed, form, p.dtype, i == 5 ? p.hidden : p.embed, i == 4 ? p.hidden : p.embed);
            keeps_all = keeps_all && kept[i];
        }
        square_floats = form.strips(p.embed) * form.right_depth(p.embed);
        up_floats = form.strips(kChunk) * form.right_depth(p.embed);
        down_floats = form.strips(p.embed) * form.right_depth(kChunk);
    }

    // Of A in the micro-kernel's form.
    int64_t operand_floats(int64_t rows, int64_t k) const {
        return rows * (form.parts ? form.parts * round_up(form.depth(k), kLanes) : round_up(k, form.strip_width()));
    }
    int64_t weight_floats() const { return keeps_all ? 0 : 4 * square_floats + chunks * (up_floats + down_floats); }
    int64_t thread_floats() const {
        return Scratch::padded(block_rows * (2 * ld + kChunk)) + operand_floats(block_rows, p.embed) + operand_floats(block_rows, kChunk) + kTileFloats;
    }
    int64_t scratch_floats() const {
        return Scratch::padded(weight_floats()) + buffer_floats(p, 3 * p.embed) + lse_floats(p) + p.n_threads * Scratch::padded(thread_floats());
    }

    // Pieces in the order of their use: q, k, v, out, then up and down of each chunk of the hidden features.
    int64_t pieces() const { return 4 + 2 * chunks; }
    Piece piece(int64_t index) const {
        const int64_t chunk = (index - 4) / 2, embed_floats = form.right_depth(p.embed);
        const Range all{0, p.embed}, hidden{chunk * kChunk, smaller((chunk + 1) * kChunk, p.hidden)};
        const int layer = index < 4 ? (int)index : index % 2 == 0 ? 4 : 5;
        const float *own = weights + (index < 4 ? index * square_floats : 4 * square_floats + chunk * (up_floats + down_floats));
        const float *whole = kept[layer];
        if (layer < 4) return {linears[layer], p.embed, all, all, whole ? whole : own, embed_floats, whole != nullptr};
        if (layer == 4) {
            const float *packed = whole ? whole + hidden.begin / form.strip_width() * embed_floats : own;
            return {&p.up, p.embed, all, hidden, packed, embed_floats, whole != nullptr};
        }
        if (whole) return {&p.down, p.hidden, hidden, all, whole + form.right_depth(hidden.begin), form.right_depth(p.hidden), true};
        return {&p.down, p.hidden, hidden, all, own + up_floats, form.right_depth(hidden.size()), false};
    }

    const fastattn_encoder_layer &p;
    Form form;
    int64_t chunks, block_rows, ld;  // ld: of float32 rows of embed columns
    int64_t square_floats, up_floats, down_floats;
    Projected lie;
    const fastattn_linear *linears[6];
    const float *kept[6];
    bool keeps_all = true;
    float *weights = nullptr, *qkv = nullptr, *lse = nullptr, *threads = nullptr;

    static constexpr int64_t kTileFloats = kWordRows * kTileWidth;
};

// One thread's part of packing and of the rows.
class Worker {
  public:
    Worker(const Plan &plan, int64_t thread)
        : plan_(plan), p_(plan.p), form_(plan.form), rows_(plan.threads + thread * Scratch::padded(plan.thread_floats())),
          sums_(rows_ + plan.block_rows * plan.ld), hidden_rows_(sums_ + plan.block_rows * plan.ld),
          operand_(rows_ + Scratch::padded(plan.block_rows * (2 * plan.ld + kChunk))), hidden_(operand_ + plan.operand_floats(plan.block_rows, p_.embed)),
          tile_(hidden_ + plan.operand_floats(plan.block_rows, kChunk)) {}

    // Whether an element could not be split into words.
    bool nonfinite() const { return nonfinite_; }

    // One of the strips of all pieces that are not packed yet.
    void pack(int64_t strip) {
        for (int64_t i = 0; i < plan_.pieces(); i++) {
            const Piece piece = plan_.piece(i);
            if (piece.is_kept) continue;
            const int64_t strips = form_.strips(piece.n.size());
            if (strip >= strips) {
                strip -= strips;
                continue;
            }
            const Operand b{piece.layer->weight, p_.dtype, 1, piece.in_features};
            const int64_t column = piece.n.begin + strip * form_.strip_width();
            float *target = (float *)piece.packed + strip * piece.strip_floats;
            const Range columns{column, smaller(column + form_.strip_width(), piece.n.end)};
            for (int64_t k = piece.k.begin; k < piece.k.end; k += kDepth)
                nonfinite_ |= pack_strip(form_, b, {k, smaller(k + kDepth, piece.k.end)}, columns, target + form_.right_depth(k - piece.k.begin));
            return;
        }
    }

    // Rows of x to rows of q, k and v.
    void project(Range rows) {
        const int64_t e = p_.embed;
        Operand source{offset(p_.x, p_.dtype, rows.begin * e), p_.dtype, e, 1};
        if (p_.norm_first) {
            float *normal = form_.parts ? sums_ : operand_;
            for (int64_t r = 0; r < rows.size(); r++) {
                float *row = rows_ + r * plan_.ld;
                for (int64_t c = 0; c < e; c += kLanes) store(row + c, load_any(source.at(r, c), p_.dtype, lanes_left(c, e)));
                normalise(p_.norm1, row, normal + r * plan_.ld, FASTATTN_FLOAT32);
            }
            source = {normal, FASTATTN_FLOAT32, plan_.ld, 1};
        }
        const Left left = pack_left(form_, source, {0, rows.size()}, {0, e}, operand_, nonfinite_);
        for (int64_t i = 0; i < 3; i++) {
            const Piece piece = plan_.piece(i);
            by_tiles(piece, left, rows.size(), [&](Range tile, Range columns) {
                const Range stored{rows.begin + tile.begin, rows.begin + tile.end};
                with_dtype(p_.dtype, [&]<int dtype>() { store_projected<dtype>(piece.layer->bias, i, stored, columns); });
            });
        }
    }

    // Rows of the attention's result, which lie in y, to rows of y.
    void finish(Range rows) {
        const int64_t e = p_.embed, count = rows.size();
        const Operand mixed{offset((const void *)p_.y, p_.dtype, rows.begin * e), p_.dtype, e, 1};
        into(rows_, false, plan_.piece(3), pack_left(form_, mixed, {0, count}, {0, e}, operand_, nonfinite_), count);
        // Norm last: what is normalised is also the residual. Norm first: the residual stays in rows_.
        float *normal = !p_.norm_first ? rows_ : form_.parts ? sums_ : operand_;
        for (int64_t r = 0; r < count; r++) {
            float *row = rows_ + r * plan_.ld;
            add_row(row, p_.out.bias, offset(p_.x, p_.dtype, (rows.begin + r) * e), p_.dtype);
            normalise(p_.norm_first ? p_.norm2 : p_.norm1, row, normal + r * plan_.ld, FASTATTN_FLOAT32);
        }
        const Left left = pack_left(form_, {normal, FASTATTN_FLOAT32, plan_.ld, 1}, {0, count}, {0, e}, operand_, nonfinite_);
        for (int64_t chunk = 0; chunk < plan_.chunks; chunk++) {
            const Piece up = plan_.piece(4 + 2 * chunk), down = plan_.piece(5 + 2 * chunk);
            into(sums_, chunk > 0, down, activated(up, left, count), count);
        }
        for (int64_t r = 0; r < count; r++) {
            float *row = sums_ + r * plan_.ld;
            void *target = offset(p_.y, p_.dtype, (rows.begin + r) * e);
            add_row(row, p_.down.bias, rows_ + r * plan_.ld, FASTATTN_FLOAT32);
            if (!p_.norm_first) normalise(p_.norm2, row, target, p_.dtype);
            else for (int64_t c = 0; c < e; c += kLanes) store_any(offset(target, p_.dtype, c), p_.dtype, load(row + c), lanes_left(c, e));
        }
    }

  private:
    // row += bias + other.
    void add_row(float *row, const void *bias, const void *other, int32_t dtype) const {
        for (int64_t c = 0; c < p_.embed; c += kLanes) {
            const int width = lanes_left(c, p_.embed);
            vfloat v = load(row + c) + load_any(offset(other, dtype, c), dtype, width);
            if (bias) v += load_any(offset(bias, p_.dtype, c), p_.dtype, width);
            store(row + c, v);
        }
    }

    void normalise(const fastattn_layer_norm &norm, const float *row, void *target, int32_t dtype) const {
        const float mean = mean_of(row, p_.embed);
        write_normal(row, p_.embed, mean, rstd_of(row, p_.embed, mean, norm.eps), {norm.weight, norm.bias, norm.weight_dtype, norm.bias_dtype, 0.0f}, target, dtype);
    }

    static int64_t vectors(Range columns) { return (columns.size() + kLanes - 1) / kLanes; }

    // The strip after this one comes in while `rows` rows go through this one. Pieces lie behind each other: the next strip may be of the next.
    Ahead next_strip(const float *strip, int64_t strip_floats, int64_t rows) const {
        const int64_t lines = kWordDepth * larger(1, form_.parts) * kWordVectors, tiles = (rows + kWordRows - 1) / kWordRows;
        return {strip + strip_floats, (lines + tiles - 1) / tiles};
    }

    // use(tile of rows, columns of the piece) with the product in tile_.
    template <class Use>
    void by_tiles(const Piece &piece, const Left &left, int64_t rows, Use &&use) {
        const int64_t width = form_.strip_width(), floats = piece.strip_floats, step = form_.tile_rows();
        const float *b = piece.packed;
        for (int64_t c = piece.n.begin; c < piece.n.end; c += width, b += floats) {
            const Range columns{c, smaller(c + width, piece.n.end)};
            Ahead ahead = next_strip(b, floats, rows);
            Left a = left;
            for (int64_t r = 0; r < rows; r += step) {
                const Range tile{r, smaller(r + step, rows)};
                for (int64_t d = 0; d < piece.k.size(); d += kDepth) {
                    const int64_t depth = form_.depth(smaller(kDepth, piece.k.size() - d));
                    Left part = a;
                    part.data += form_.left_depth(d);
                    multiply(tile.size(), vectors(columns), depth, part, b + form_.right_depth(d), width, tile_, width, d > 0, nullptr, ahead);
                    ahead.data += depth / kWordDepth * ahead.lines * 16;
                }
                use(tile, columns);
                a.data += form_.left_rows(a, step);
            }
        }
    }

    // target (rows x ld) = the product, or += with accumulate.
    void into(float *target, bool accumulate, const Piece &piece, const Left &left, int64_t rows) {
        const int64_t width = form_.strip_width(), floats = piece.strip_floats;
        const float *b = piece.packed;
        for (int64_t c = piece.n.begin; c < piece.n.end; c += width, b += floats) {
            Ahead ahead = next_strip(b, floats, rows);
            for (int64_t d = 0; d < piece.k.size(); d += kDepth) {
                const int64_t depth = form_.depth(smaller(kDepth, piece.k.size() - d));
                Left part = left;
                part.data += form_.left_depth(d);
                const int64_t columns = vectors({c, smaller(c + width, piece.n.end)});
                multiply(rows, columns, depth, part, b + form_.right_depth(d), width, target + c, plan_.ld, accumulate || d > 0, nullptr, ahead);
                ahead.data += depth / kWordDepth * ahead.lines * 16 * ((rows + kWordRows - 1) / kWordRows);
            }
        }
    }

    // tile_ + bias to these rows and columns of q, k or v. A vector of columns lies within a head, or heads lie side by side.
    template <int dtype>
    void store_projected(const void *bias, int64_t index, Range rows, Range columns) const {
        const int64_t width = form_.strip_width();
        for (int64_t c = columns.begin; c < columns.end; c += kLanes) {
            const int lanes = lanes_left(c, columns.end);
            const vfloat shift = bias ? load_any(offset(bias, dtype, c), dtype, lanes) : zero();
            const float *source = tile_ + (c - columns.begin);
            int64_t at = plan_.lie.at(index, rows.begin, c, p_.embed / p_.heads);
            for (int64_t r = rows.begin; r < rows.end; r++, source += width, at += plan_.lie.row)
                store_any(offset((void *)plan_.qkv, dtype, at), dtype, load(source) + shift, lanes);
        }
    }

    // act(left W^T + b) of one chunk of the hidden features, as the left operand of the next product.
    Left activated(const Piece &up, const Left &left, int64_t rows) {
#if defined(__AVX512BF16__)
        if (form_.parts && kWordBlocks) {
            const WordsTarget words = left_words(form_, form_.depth(up.n.size()), hidden_);
            with_parts(form_.parts, [&]<int parts>() {
                vfloat poison = zero();
                with_activation(p_.activation, [&]<int activation>() {
                    by_tiles(up, left, rows, [&](Range tile, Range columns) { store_words<parts, activation>(up, tile, columns, words, poison); });
                });
                nonfinite_ |= any((vint)(poison != poison));
                return false;
            });
            return {hidden_, words.block_down, Layout::rows, form_.parts};
        }
#endif
        float *target = form_.parts ? hidden_rows_ : hidden_;
        const int64_t width = form_.strip_width();
        with_activation(p_.activation, [&]<int activation>() {
            by_tiles(up, left, rows, [&](Range tile, Range columns) {
                for (int64_t c = columns.begin; c < columns.end; c += kLanes) {
                    const vfloat bias = up_bias(c, columns);
                    for (int64_t r = tile.begin; r < tile.end; r++)
                        store(target + r * kChunk + c - up.n.begin, activate<activation>(load(tile_ + (r - tile.begin) * width + c - columns.begin) + bias));
                }
            });
        });
        return pack_left(form_, {target, FASTATTN_FLOAT32, kChunk, 1}, {0, rows}, {0, up.n.size()}, hidden_, nonfinite_);
    }

    vfloat up_bias(int64_t c, Range columns) const {
        return p_.up.bias && c < columns.end ? load_any(offset(p_.up.bias, p_.dtype, c), p_.dtype, lanes_left(c, columns.end)) : zero();
    }

#if defined(__AVX512BF16__)
    // act(tile_ + bias) as words; a strip is as wide as a block of words is deep. Past the last hidden feature the activation of 0 is 0.
    template <int parts, int activation>
    void store_words(const Piece &up, Range tile, Range columns, const WordsTarget &words, vfloat &poison) const {
        static_assert(!kWordBlocks || kWordVectors == 2);
        const vfloat low = up_bias(columns.begin, columns), high = up_bias(columns.begin + kLanes, columns);
        const bool has_high = columns.size() > kLanes;
        for (int64_t r = tile.begin; r < tile.end; r++) {
            const float *row = tile_ + (r - tile.begin) * 2 * kLanes;
            const vfloat first = activate<activation>(load(row) + low);
            const vfloat second = has_high ? activate<activation>(load(row + kLanes) + high) : zero();
            const Words<parts> found = words_of<parts>(first, second, poison);
            for (int i = 0; i < parts; i++) store(words.row(i, r, (columns.begin - up.n.begin) / 2), found.part[i]);
        }
    }
#endif

    const Plan &plan_;
    const fastattn_encoder_layer &p_;
    const Form form_;
    float *rows_, *sums_, *hidden_rows_, *operand_, *hidden_, *tile_;
    bool nonfinite_ = false;
};

struct Outcome {
    int status = FASTATTN_OK;
    bool nonfinite = false;
};

Outcome by_blocks(const fastattn_encoder_layer &p, Form form) {
    Plan plan(p, form);
    Workspace scratch(plan.scratch_floats());
    if (scratch.failed()) return {FASTATTN_OUT_OF_MEMORY};
    plan.weights = scratch.take(plan.weight_floats());
    plan.qkv = scratch.take(buffer_floats(p, 3 * p.embed));
    plan.lse = scratch.take(lse_floats(p));
    plan.threads = scratch.take(0);
    int64_t strips = 0;
    for (int64_t i = 0; i < plan.pieces(); i++) strips += plan.piece(i).is_kept ? 0 : form.strips(plan.piece(i).n.size());
    Outcome outcome;
    // step(worker, block of rows) over this thread's share of the rows, in blocks of about one size.
    const auto share = [&](Worker &worker, auto &&step) {
        const Range mine = part(p.rows, form.tile_rows(), omp_get_num_threads(), omp_get_thread_num());
        const int64_t blocks = (mine.size() + plan.block_rows - 1) / plan.block_rows;
        for (int64_t i = 0; i < blocks; i++) {
            const Range block = part(mine.size(), form.tile_rows(), blocks, i);
            step(Range{mine.begin + block.begin, mine.begin + block.end});
        }
        if (worker.nonfinite()) {
#pragma omp atomic write
            outcome.nonfinite = true;
        }
    };
#pragma omp parallel num_threads(p.n_threads) if (p.n_threads > 1)
    {
        const MatrixUnit unit;
        Worker worker(plan, omp_get_thread_num());
#pragma omp for schedule(dynamic)
        for (int64_t strip = 0; strip < strips; strip++) worker.pack(strip);
        share(worker, [&](Range rows) { worker.project(rows); });
    }
    if (outcome.nonfinite && form.parts > 1) return outcome;
    outcome.status = attend(p, plan.qkv, plan.lie, p.y, plan.lse);
    if (outcome.status != FASTATTN_OK) return outcome;
#pragma omp parallel num_threads(p.n_threads) if (p.n_threads > 1)
    {
        const MatrixUnit unit;
        Worker worker(plan, omp_get_thread_num());
        share(worker, [&](Range rows) { worker.finish(rows); });
    }
    return outcome;
}

constexpr int64_t kFewRows = 32;  // up to here packing the weights costs more than it saves

// Whether the layer is done one kernel after the other: rows are so few that packing weights does not pay, or that threads would have none; or they are
// not many beside the weights, and products read them in place or have AMX. A thread then packs and multiplies a few strips at a time, which its own
// cache keeps, while blocks of rows wait until all packed weights have gone out to the shared one.
bool goes_one_by_one(const fastattn_encoder_layer &p, Form form) {
    if (p.rows <= larger(kFewRows, (p.n_threads - 1) * kWordRows)) return true;
    const bool has_matrix_unit = kWordBlocks && form.parts;
    if (has_matrix_unit && form.parts < 3) return p.rows <= larger(192, p.embed * 2 / 3);
    return p.rows <= smaller(kOwnRows, p.embed * 3 / 2) && (form.parts || is_read_in_place(form, {p.x, p.dtype, p.embed, 1}, p.embed));
}

}  // namespace

int encoder_layer_forward(const fastattn_encoder_layer &p) {
    if (p.rows == 0) return FASTATTN_OK;
    const Form form = form_of(p.dtype, p.rounds_float32, p.rows);
    if (goes_one_by_one(p, form)) return one_by_one(p);
    const Outcome outcome = by_blocks(p, form);
    // Infinity and NaN do not split into parts: such a layer, rare as it is, is made again without.
    if (outcome.nonfinite && form.parts > 1) return by_blocks(p, Form{0}).status;
    return outcome.status;
}

// Whether it reads weights that are kept packed: not as float32 in three parts.
int encoder_layer_reads_packed(const fastattn_encoder_layer &p) { return form_of(p.dtype, p.rounds_float32, p.rows).parts < 3; }

FASTATTN_NAMESPACE_END
