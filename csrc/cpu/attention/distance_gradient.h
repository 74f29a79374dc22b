// The gradients of distance biases: ds summed over the diagonals of every block, then by table column, then over batch entries (and heads).
//
// A tile leaves the diagonal sums of its blocks, float32 and of a few dozen numbers each, in its record. They are added tile by tile, in order and in
// float64, to one set of sums for each batch entry and query head: the columns that the entry's distances reach, and what its slope gets. The sets
// are added in order at the end. So neither an element's sum nor its rounding depends on the number of threads, and the memory is that of
// one number per query and key.
#pragma once
#include "backward_tile.h"

FASTATTN_NAMESPACE_BEGIN

class DistanceGradient {
  public:
    explicit DistanceGradient(const fastattn_attention &p) : p_(p), bias_(p.distance) {
        if (!wants_gradient(bias_)) return;
        before_ = (int64_t *)malloc((size_t)(p.batch + 1) * sizeof(int64_t));
        if (!before_) return;
        before_[0] = 0;
        for (int64_t b = 0; b < p.batch; b++) before_[b + 1] = before_[b] + p.heads_q * set_size(b);
        sums_ = (double *)malloc((size_t)(before_[p.batch] + 1) * sizeof(double));
    }
    ~DistanceGradient() {
        free(before_);
        free(sums_);
    }
    DistanceGradient(const DistanceGradient &) = delete;
    DistanceGradient &operator=(const DistanceGradient &) = delete;

    bool failed() const { return wants_gradient(bias_) && !sums_; }

    // Starts the sums of all query heads of one KV head.
    void clear(int64_t batch, int64_t head_kv) const {
        if (!sums_) return;
        const int64_t group = p_.heads_q / p_.heads_kv;
        memset(set(batch, head_kv * group), 0, (size_t)(group * set_size(batch)) * sizeof(double));
    }

    void add(const TileRecord &record) const {
        if (!sums_) return;
        double *sums = set(record.tile.batch, record.tile.head), *first_column = sums + 1 - columns(record.tile.batch).begin;
        for (int64_t i = 0; i < record.n_blocks; i++) {
            const KeyBlock &block = record.blocks[i];
            const int64_t distance = top_distance(p_, record.tile, block.begin, block.count), count = block.count + record.tile.lanes() - 1;
            if (bias_.grad_slopes) *sums -= moment(distance, count, record.diagonals(i));
            if (bias_.grad_table) add_columns(first_column, TableSpan<-1>(bias_, distance, count), count, record.diagonals(i));
        }
    }

    // The last step, in parts that do not depend on each other.
    int64_t parts() const { return !sums_ ? 0 : bias_.grad_table ? table_rows() * row_parts() : 1; }
    void finish(int64_t part) const {
        if (bias_.grad_table) finish_columns(part / row_parts(), part % row_parts() * kColumns);
        if (bias_.grad_slopes && part == 0) finish_slopes();
    }

  private:
    static constexpr int64_t kColumns = 256;  // of one part

    // The table's columns that distances of this batch entry reach.
    Span columns(int64_t batch) const {
        if (!bias_.grad_table) return {0, 0};
        const Sequence sequence = sequence_at(p_, batch);
        if (sequence.len_q == 0 || sequence.len_k == 0) return {0, 0};
        const int64_t position = bias_.top_left ? 0 : sequence.offset, last = bias_.table_size - 1;
        const int64_t lowest = -(position + sequence.len_q - 1 + kMaxLanes), highest = sequence.len_k - 1 - position;  // padding lanes included
        return {larger(0, smaller(last, lowest - bias_.table_first)), larger(0, smaller(last, highest - bias_.table_first)) + 1};
    }

    int64_t set_size(int64_t batch) const {
        const Span reached = columns(batch);
        return 1 + reached.end - reached.begin;
    }
    double *set(int64_t batch, int64_t head) const { return sums_ + before_[batch] + head * set_size(batch); }

    // The sum of |distance| times the diagonals distance, distance - 1, ...
    static double moment(int64_t distance, int64_t count, const float *diagonals) {
        double even = 0, odd = 0;
        for (int64_t x = 0; x < count; x += 2) {
            even += (double)(distance < x ? x - distance : distance - x) * diagonals[x];
            if (x + 1 < count) odd += (double)(distance < x + 1 ? x + 1 - distance : distance - x - 1) * diagonals[x + 1];
        }
        return even + odd;
    }

    static void add_columns(double *column, const TableSpan<-1> &span, int64_t count, const float *diagonals) {
        double before = 0, after = 0;
        int64_t x = 0;
        for (; x < span.from; x++) before += diagonals[x];
        for (; x < span.to; x++) column[span.column(x)] += diagonals[x];
        for (; x < count; x++) after += diagonals[x];
        if (span.from > 0) column[span.before] += before;
        if (span.to < count) column[span.after] += after;
    }

    int64_t table_rows() const { return bias_.table_stride ? p_.heads_q : 1; }
    int64_t row_parts() const { return (bias_.table_size + kColumns - 1) / kColumns; }

    void finish_columns(int64_t row, int64_t begin) const {
        const int64_t end = smaller(bias_.table_size, begin + kColumns), heads = bias_.table_stride ? 1 : p_.heads_q;
        double totals[kColumns] = {};
        for (int64_t b = 0; b < p_.batch; b++) {
            const Span reached = columns(b);
            const int64_t from = larger(begin, reached.begin), to = smaller(end, reached.end);
            for (int64_t head = row; head < row + heads; head++) {
                const double *sums = set(b, head) + 1 - reached.begin;
                for (int64_t column = from; column < to; column++) totals[column - begin] += sums[column];
            }
        }
        for (int64_t column = begin; column < end; column++) bias_.grad_table[row * bias_.table_size + column] = (float)totals[column - begin];
    }

    void finish_slopes() const {
        for (int64_t head = 0; head < p_.heads_q; head++) {
            double total = 0;
            for (int64_t b = 0; b < p_.batch; b++) {
                if (bias_.slopes_stride) bias_.grad_slopes[b * p_.heads_q + head] = (float)*set(b, head);
                else total += *set(b, head);
            }
            if (!bias_.slopes_stride) bias_.grad_slopes[head] = (float)total;
        }
    }

    const fastattn_attention &p_;
    const fastattn_distance_bias &bias_;
    int64_t *before_ = nullptr;  // where the sets of a batch entry begin
    double *sums_ = nullptr;     // per batch entry and query head: the slope's sum, then the columns'
};

FASTATTN_NAMESPACE_END
