// The online softmax of a tile's queries (Milakov & Gimelshein 2018), whose scores lie as (key, lane).
//
// Sums are kept against a base that follows the maximum only where this has passed it by 2^kSlack: terms are then at most 2^kSlack, which float32
// sums hold as exactly as those up to 1, and after the first blocks of keys hardly any tile has to multiply what it has summed (the idea is
// FlashAttention-4's).
#pragma once
#include "../pairs.h"
#include "tile.h"

FASTATTN_NAMESPACE_BEGIN

class Softmax {
  public:
    // Terms are e^(factor (score - base)).
    explicit Softmax(float factor) : factor_(factor), rate_(factor * kLog2e) {
        for (int v = 0; v < kMaxVectors; v++) base_[v] = broadcast(-kInf), total_[v] = zero();
    }

    // scores -> terms. True where what was summed before must be multiplied with `correction`.
    bool step(float *scores, int64_t count, int64_t vectors, vfloat (&correction)[kMaxVectors]) {
        return with_vectors(vectors, [&]<int Vectors>() {
            const bool raised = raise<Vectors>(scores, count, correction);
            terms<Vectors>(scores, count);
            return raised;
        });
    }

#if defined(__AVX512BF16__)
    // The same into words(i, lane) = the terms of keys 2i and 2i + 1, multiplied with `keep` (key, lane) if given, in the place of the scores; zeros up to
    // words_of_elements(count).
    bool step_of_pairs(float *scores, const float *keep, int64_t count, int64_t vectors, vfloat (&correction)[kMaxVectors]) {
        return with_vectors(vectors, [&]<int Vectors>() {
            const bool raised = raise<Vectors>(scores, count, correction);
            if (keep) terms_of_pairs<Vectors, true>(scores, keep, count);
            else terms_of_pairs<Vectors, false>(scores, keep, count);
            return raised;
        });
    }
#else
    bool step_of_pairs(float *, const float *, int64_t, int64_t, vfloat (&)[kMaxVectors]) { return false; }
#endif

    vfloat base(int64_t v) const { return base_[v] * factor_; }  // of scores times the factor
    vfloat total(int64_t v) const { return total_[v]; }

  private:
    static constexpr float kSlack = 8;  // of the exponent of 2

    template <class F>
    static bool with_vectors(int64_t vectors, F &&f) {
        if (vectors == 1) return f.template operator()<1>();
        if (vectors == 2) return f.template operator()<2>();
        if (vectors == 3) return f.template operator()<3>();
        return f.template operator()<4>();
    }

    // Rows outermost, here and below: the vectors of a row are independent, so that neither max nor exp2 waits for the one before.
    template <int Vectors>
    bool raise(const float *scores, int64_t count, vfloat (&correction)[kMaxVectors]) {
        vfloat highest[2][Vectors];
        vint raised[Vectors], any_raised = {};
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; v++) highest[0][v] = highest[1][v] = base_[v];
        for (int64_t row = 0; row < count; row += 2) {
            const float *even = scores + row * Vectors * kLanes, *odd = row + 1 < count ? even + Vectors * kLanes : even;
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; v++) {
                highest[0][v] = max(highest[0][v], load(even + v * kLanes));
                highest[1][v] = max(highest[1][v], load(odd + v * kLanes));
            }
        }
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; v++) {
            highest[0][v] = max(highest[0][v], highest[1][v]);
            raised[v] = (vint)((highest[0][v] - base_[v]) * rate_ > kSlack);  // not where both are -inf
            any_raised |= raised[v];
        }
        if (!any(any_raised)) return false;
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; v++) {
            const vfloat next = select(raised[v], highest[0][v], base_[v]);
            correction[v] = softmax_term(base_[v], softmax_base(next), rate_);
            total_[v] *= correction[v];
            base_[v] = next;
        }
        return true;
    }

    template <int Vectors>
    void terms(float *scores, int64_t count) {
        vfloat base[Vectors], block[Vectors];
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; v++) base[v] = softmax_base(base_[v]), block[v] = zero();
        for (int64_t row = 0; row < count; row++)
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; v++) {
                float *target = scores + (row * Vectors + v) * kLanes;
                const vfloat term = softmax_term(load(target), base[v], rate_);
                block[v] += term;
                store(target, term);
            }
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; v++) total_[v] += block[v];
    }

#if defined(__AVX512BF16__)
    template <int Vectors, bool keeps>
    void terms_of_pairs(float *scores, const float *keep, int64_t count) {
        vfloat base[Vectors], block[Vectors];
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; v++) base[v] = softmax_base(base_[v]), block[v] = zero();
        const auto term = [&](int64_t row, int v) {
            const int64_t at = (row * Vectors + v) * kLanes;
            const vfloat e = exp2_of_term((load(scores + at) - base[v]) * rate_);
            block[v] += e;
            return keeps ? e * load(keep + at) : e;
        };
        int64_t row = 0;
        for (; row + 2 <= count; row += 2)
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; v++) store(scores + (row / 2 * Vectors + v) * kLanes, row_pair(term(row, v), term(row + 1, v)));
        if (row < count)
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; v++) store(scores + (row / 2 * Vectors + v) * kLanes, row_pair(term(row, v), zero()));
        const int64_t words = (count + 1) / 2;
        memset(scores + words * Vectors * kLanes, 0, (size_t)((words_of_elements(count) - words) * Vectors * kLanes) * 4);
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; v++) total_[v] += block[v];
    }
#endif

    const float factor_, rate_;  // rate: of exponents of 2
    vfloat base_[kMaxVectors], total_[kMaxVectors];
};

FASTATTN_NAMESPACE_END
