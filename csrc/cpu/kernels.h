// The kernels that every instruction set's namespace offers to library.cpp: int name(const Problem &), 0 or a fastattn_status; or the answer to a question.
#pragma once
#include "../common/problem.h"

#define FASTATTN_KERNELS(apply)                              \
    apply(gemm, fastattn_gemm)                               \
    apply(gemm_is_rounded, fastattn_gemm)                    \
    apply(packed_bytes, fastattn_packing)                    \
    apply(pack, fastattn_packing)                            \
    apply(activation_backward, fastattn_activation_backward) \
    apply(norm_forward, fastattn_norm)                       \
    apply(norm_backward, fastattn_norm)                      \
    apply(attention_forward, fastattn_attention)             \
    apply(attention_backward, fastattn_attention)            \
    apply(attention_decode, fastattn_decode)                 \
    apply(encoder_layer_forward, fastattn_encoder_layer)     \
    apply(encoder_layer_reads_packed, fastattn_encoder_layer)

#ifdef FASTATTN_ISA
#define FASTATTN_DECLARE(name, Problem) int name(const Problem &problem);
namespace fastattn_cpu {
namespace FASTATTN_ISA {
FASTATTN_KERNELS(FASTATTN_DECLARE)
}
}
#undef FASTATTN_DECLARE
#endif
