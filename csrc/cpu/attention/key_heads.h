// The KV heads of all batch entries as backward shares them out: many go to threads of their own, some are worked on by all threads together.
#pragma once
#include "sequences.h"

FASTATTN_NAMESPACE_BEGIN

// One KV head of one batch entry, with the query heads that share it.
struct KeyHead {
    Sequence sequence;
    int64_t index, group;  // its number, the number of query heads
    QueryTiles queries;

    int64_t tiles() const { return group * queries.count; }
    // The tiles of its first query head, then of the next one, and so on.
    QueryTile tile(int64_t i) const { return queries.tile(sequence, index * group + i / queries.count, i % queries.count); }
};

// In the order: together() heads for all threads together, then the others, the largest first, each for one thread.
class KeyHeads {
  public:
    explicit KeyHeads(const fastattn_attention &p) : p_(p) {
        if (p.cu_seqlens_q) {
            order_ = (Entry *)malloc((size_t)(p.batch + 1) * sizeof(Entry));
            if (!order_) return;
            for (int64_t b = 0; b < p.batch; b++) {
                const Sequence sequence = sequence_at(p, b);
                order_[b] = {(double)sequence.len_q * (double)sequence.len_k, b};
            }
            qsort(order_, (size_t)p.batch, sizeof(Entry), larger_first);
        }
        if (p.n_threads > 1) together_ = order_ ? most_even() : count() % p.n_threads;
    }
    ~KeyHeads() { free(order_); }
    KeyHeads(const KeyHeads &) = delete;
    KeyHeads &operator=(const KeyHeads &) = delete;

    bool failed() const { return p_.cu_seqlens_q && !order_; }
    int64_t count() const { return p_.batch * p_.heads_kv; }
    int64_t together() const { return together_; }
    int64_t alone() const { return count() - together_; }
    int64_t group() const { return p_.heads_kv ? p_.heads_q / p_.heads_kv : 0; }
    KeyHead at(int64_t i) const {
        const int64_t place = i / p_.heads_kv;
        const Sequence sequence = sequence_at(p_, order_ ? order_[place].batch : place);
        return {sequence, i % p_.heads_kv, group(), QueryTiles(p_, sequence.len_q)};
    }

  private:
    struct Entry {
        double work;
        int64_t batch;
    };
    static int larger_first(const void *a, const void *b) {
        const Entry &x = *(const Entry *)a, &y = *(const Entry *)b;
        if (x.work != y.work) return x.work > y.work ? -1 : 1;
        return x.batch < y.batch ? -1 : 1;
    }
    double work(int64_t i) const { return order_[i / p_.heads_kv].work; }

    // The least number of heads to be worked on together, the largest, with which no thread has to wait long for another at the end.
    int64_t most_even() const {
        const double n = (double)p_.n_threads;
        double total = 0, shared = 0, best_time = 0;
        for (int64_t b = 0; b < p_.batch; b++) total += order_[b].work * (double)p_.heads_kv;
        int64_t best = 0;
        for (int64_t first = 0; first <= smaller(count(), 2 * p_.n_threads); first++) {
            const double time = shared / n + longest(first, (total - shared) / n);
            if (first == 0 || time < best_time) best = first, best_time = time;
            if (best_time <= kEven * total / n) break;
            if (first < count()) shared += work(first);
        }
        return best;
    }

    // What the busiest thread gets when each takes the next head as soon as it is done; `mean` is what they get on average.
    double longest(int64_t first, double mean) const {
        constexpr int64_t kMostThreads = 256;
        double busy[kMostThreads] = {}, most = mean;
        const int64_t threads = smaller(kMostThreads, p_.n_threads);
        for (int64_t i = first; i < smaller(count(), first + 4 * threads); i++) {  // later ones fill gaps
            int64_t idle = 0;
            for (int64_t t = 1; t < threads; t++)
                if (busy[t] < busy[idle]) idle = t;
            busy[idle] += work(i);
            most = busy[idle] > most ? busy[idle] : most;
        }
        return most;
    }

    static constexpr double kEven = 1.05;

    const fastattn_attention &p_;
    Entry *order_ = nullptr;
    int64_t together_ = 0;
};

FASTATTN_NAMESPACE_END
