/* llaisys: CPU kernels for LLM inference, and a Qwen2 engine built from them.
 *
 * The C ABI, all of it: nothing else in the library is visible. The header is C11 and C++; the library needs no
 * initialisation. Python calls it through ctypes.
 *
 * Errors. A function that returns int32_t returns LLAISYS_OK (0) or a negative status; a function that returns a handle
 * or a text returns NULL on an error, and llaisysLastStatus() has the status. Nothing throws, aborts or exits.
 * llaisysLastError() says what went wrong: it names the operator, the argument, what was expected and what was found.
 * Status and text belong to the calling thread.
 *
 * Threads. Every function may be called from any thread. Two threads may use one model at once if each has a session of
 * its own; calls on one session must not overlap (one that does is refused with LLAISYS_ERROR_STATE).
 *
 * Results. For one instruction set the bits of a result depend on the inputs only: neither on the number of threads,
 * nor on how many rows are computed together, nor on how a prompt was split.
 */
#ifndef LLAISYS_H
#define LLAISYS_H

#include <stddef.h>
#include <stdint.h>

#if defined(LLAISYS_BUILD)
#define LLAISYS_API __attribute__((visibility("default")))
#else
#define LLAISYS_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---------------------------------------------------------------- library */

/* Changes when a caller must be recompiled. Compare it with what the loaded library says. */
#define LLAISYS_ABI_VERSION 1

enum {
    LLAISYS_OK = 0,
    LLAISYS_ERROR_INVALID_ARGUMENT = -1, /* a NULL, a number out of range */
    LLAISYS_ERROR_SHAPE = -2,            /* number of axes or their sizes */
    LLAISYS_ERROR_DTYPE = -3,            /* element types */
    LLAISYS_ERROR_STRIDE = -4,           /* a layout that the operator does not take; see each operator */
    LLAISYS_ERROR_ALIAS = -5,            /* an output overlaps an argument in a way that is not allowed */
    LLAISYS_ERROR_INDEX = -6,            /* an index or token outside its range */
    LLAISYS_ERROR_HANDLE = -7,           /* a handle that is freed, foreign or NULL */
    LLAISYS_ERROR_STATE = -8,            /* not now: weights missing, a session in use */
    LLAISYS_ERROR_OUT_OF_MEMORY = -9,
    LLAISYS_ERROR_UNSUPPORTED = -10, /* the machine or this build lacks it */
    LLAISYS_ERROR_INTERRUPTED = -11, /* the interrupt callback asked to stop; outputs are incomplete */
    LLAISYS_ERROR_INTERNAL = -12     /* a defect of the library */
};

/* LLAISYS_ABI_VERSION at the time the library was compiled. */
LLAISYS_API int32_t llaisysAbiVersion(void);
/* Version of the package, "0.1.0". */
LLAISYS_API const char *llaisysVersion(void);
/* Hash of the sources that the library was compiled from, in hex. */
LLAISYS_API const char *llaisysBuildHash(void);
/* Text of the last error on this thread, "" if there was none; valid until the next call on this thread. */
LLAISYS_API const char *llaisysLastError(void);
/* Status of the last error on this thread, LLAISYS_OK if there was none. */
LLAISYS_API int32_t llaisysLastStatus(void);
/* "SHAPE" for LLAISYS_ERROR_SHAPE, "OK" for 0, "UNKNOWN" for what is no status. */
LLAISYS_API const char *llaisysStatusName(int32_t status);

/* ---------------------------------------------------------------- machine */

/* Instruction set tiers: "scalar", "avx2" (with FMA and F16C), "avx512" (F, BW, DQ, VL), "amx" (TILE, BF16, with
 * avx512). The best one that the machine has is used, unless the environment variable LLAISYS_ISA or this call says
 * otherwise. UNSUPPORTED if the machine or the build lacks it, INVALID_ARGUMENT if there is no such tier. */
LLAISYS_API int32_t llaisysSetIsa(const char *name);
/* The tier in use; NULL if LLAISYS_ISA asks for one that can not be had (every operator then returns that error). */
LLAISYS_API const char *llaisysIsa(void);
/* 1 if the machine and the build have the tier, 0 if not, INVALID_ARGUMENT if there is no such tier. */
LLAISYS_API int32_t llaisysHasIsa(const char *name);

/* Threads that an operator uses, the calling one among them: 1 to 1024. The default is LLAISYS_NUM_THREADS, else the
 * physical cores that the process may use. */
LLAISYS_API int32_t llaisysSetNumThreads(int32_t count);
LLAISYS_API int32_t llaisysNumThreads(void);
/* Computes the items [begin, end) of something; it must not throw. */
typedef void (*LlaisysPart)(void *context, int64_t begin, int64_t end);
/* For kernels of one's own: calls body(context, begin, end) on parts of [0, count) that together cover it once, each of
 * `grain` items at most (less than 1 counts as 1), on the threads in use, the calling one among them; in that one alone
 * inside of a body, or while another call has the threads. What it computes must not depend on how the range is cut.
 * INTERRUPTED as operators are; INVALID_ARGUMENT if `body` is NULL. */
LLAISYS_API int32_t llaisysParallelFor(int64_t count, int64_t grain, LlaisysPart body, void *context);

/* What this machine does per second at best, on the threads in use, measured in about `seconds` (0 to 60; a tenth will
 * do) with nothing else running: "read": bytes read from memory, from end to end; floating-point operations on
 * registers alone (a product and a sum are two): "scalar_f32", "avx2_f32", "avx512_f32" (the tiers' f32 FMA),
 * "avx512_bf16" (vdpbf16ps), "amx_bf16" (tile products). UNSUPPORTED if the machine lacks it, INVALID_ARGUMENT if there
 * is no such roof. */
LLAISYS_API int32_t llaisysMeasureRoof(const char *roof, double seconds, double *per_second);

/* Called by long calls of this thread, on this thread, about every 50 ms; anything but 0 ends the call with
 * INTERRUPTED. NULL removes it. The callback may make calls of its own, which are not interrupted; STATE if they need
 * the session or the model that the long call is using. */
typedef int32_t (*LlaisysInterrupt)(void *user);
LLAISYS_API int32_t llaisysSetInterrupt(LlaisysInterrupt callback, void *user);

/* ---------------------------------------------------------------- tensors */

/* Numbered as in the LLAISYS course. The operators take F16, F32 and BF16 values and I64 indices. */
typedef enum {
    LLAISYS_DTYPE_INVALID = 0,
    LLAISYS_DTYPE_BYTE = 1,
    LLAISYS_DTYPE_BOOL = 2,
    LLAISYS_DTYPE_I8 = 3,
    LLAISYS_DTYPE_I16 = 4,
    LLAISYS_DTYPE_I32 = 5,
    LLAISYS_DTYPE_I64 = 6,
    LLAISYS_DTYPE_U8 = 7,
    LLAISYS_DTYPE_U16 = 8,
    LLAISYS_DTYPE_U32 = 9,
    LLAISYS_DTYPE_U64 = 10,
    LLAISYS_DTYPE_F8 = 11,
    LLAISYS_DTYPE_F16 = 12,
    LLAISYS_DTYPE_F32 = 13,
    LLAISYS_DTYPE_F64 = 14,
    LLAISYS_DTYPE_C16 = 15,
    LLAISYS_DTYPE_C32 = 16,
    LLAISYS_DTYPE_C64 = 17,
    LLAISYS_DTYPE_C128 = 18,
    LLAISYS_DTYPE_BF16 = 19
} LlaisysDataType;

typedef enum { LLAISYS_DEVICE_CPU = 0, LLAISYS_DEVICE_NVIDIA = 1 } LlaisysDeviceType;

#define LLAISYS_MAX_DIMS 8

/* A view of memory that the caller owns. `data` need not be aligned; it may be NULL if there are no elements. Strides
 * are in elements and may be zero (inputs only) or negative. */
typedef struct LlaisysTensor {
    void *data;
    int32_t dtype; /* LlaisysDataType */
    int32_t ndim;  /* 0 to LLAISYS_MAX_DIMS */
    int64_t shape[LLAISYS_MAX_DIMS];
    int64_t strides[LLAISYS_MAX_DIMS];
} LlaisysTensor;

/* -------------------------------------------------------------- operators
 *
 * Shape letters: T tokens, S cached + new tokens, H query heads, K key/value heads, D head dim, E hidden, F
 * intermediate, N output features, C input features, V vocabulary; "..." are any leading axes, alike in all arguments.
 * All floating tensors of one call have one dtype: F32, F16 or BF16. Sums are carried in f32; r() rounds to the dtype,
 * to nearest even. The last axis of every argument must be contiguous (STRIDE otherwise), the others may have any
 * stride, except where said. No output may overlap an input (ALIAS) except where said. Any size may be 0. */

/* out[...] = r(a + b). out may be a or b. */
LLAISYS_API int32_t llaisysAdd(LlaisysTensor *out, const LlaisysTensor *a, const LlaisysTensor *b);

/* index[...] (I64) and value[...] of the largest x[..., V] along the last axis: the lowest index among equals; the
 * first NaN wins. V must not be 0. For a one-dimensional x, index and value have shape [] or [1]. */
LLAISYS_API int32_t llaisysArgmax(LlaisysTensor *index, LlaisysTensor *value, const LlaisysTensor *x);

/* out[T, E] = weight[index[T], :]; weight is [V, E], index I64. INDEX if one is outside [0, V). */
LLAISYS_API int32_t llaisysEmbedding(LlaisysTensor *out, const LlaisysTensor *index, const LlaisysTensor *weight);

/* out[..., N] = r(x[..., C] weight[N, C]^T + bias[N]); bias may be NULL. */
LLAISYS_API int32_t llaisysLinear(LlaisysTensor *out, const LlaisysTensor *x, const LlaisysTensor *weight,
                                  const LlaisysTensor *bias);

/* out[...] = x[...]: a copy between any two layouts, strides free on every axis, of any dtype. */
LLAISYS_API int32_t llaisysRearrange(LlaisysTensor *out, const LlaisysTensor *x);

/* out[..., E] = r(r(x / sqrt(mean(x^2) + eps)) weight[E]). out may be x. */
LLAISYS_API int32_t llaisysRmsNorm(LlaisysTensor *out, const LlaisysTensor *x, const LlaisysTensor *weight, float eps);

/* sum[..., E] = r(a + b), out[..., E] = rms_norm(sum, weight, eps). sum may be a or b. */
LLAISYS_API int32_t llaisysAddRmsNorm(LlaisysTensor *out, LlaisysTensor *sum, const LlaisysTensor *a,
                                      const LlaisysTensor *b, const LlaisysTensor *weight, float eps);

/* Rotary embedding of x[T, H, D], D even, at the positions pos_ids[T] (I64), the halves of a head rotated against each
 * other: out = (a cos - b sin, b cos + a sin), angle = pos theta^(-2i/D). out may be x. */
LLAISYS_API int32_t llaisysRope(LlaisysTensor *out, const LlaisysTensor *x, const LlaisysTensor *pos_ids, float theta);

/* out[T, H, D] = softmax(scale q k^T + causal mask) v with q[T, H, D], k[S, K, D], v[S, K, D], S >= T, H a multiple of
 * K. Query t sees the keys 0 ... S - T + t (mask aligned bottom-right); query head h reads key/value head h / (H / K).
 */
LLAISYS_API int32_t llaisysSelfAttention(LlaisysTensor *out, const LlaisysTensor *q, const LlaisysTensor *k,
                                         const LlaisysTensor *v, float scale);

/* self_attention(rope(q, pos_ids, theta), k, v, scale) in one pass over q; k holds rotated keys. */
LLAISYS_API int32_t llaisysRopeSelfAttention(LlaisysTensor *out, const LlaisysTensor *q, const LlaisysTensor *pos_ids,
                                             const LlaisysTensor *k, const LlaisysTensor *v, float theta, float scale);

/* out[...] = r(r(gate / (1 + exp(-gate))) up). out may be gate or up. */
LLAISYS_API int32_t llaisysSwiglu(LlaisysTensor *out, const LlaisysTensor *gate, const LlaisysTensor *up);

/* ------------------------------------------------------------------ Qwen2 */

typedef struct LlaisysQwen2Model LlaisysQwen2Model;
typedef struct LlaisysQwen2Session LlaisysQwen2Session;

typedef struct LlaisysQwen2Meta {
    LlaisysDataType dtype;                            /* storage of weights, activations and KV cache */
    size_t nlayer, hs, nh, nkvh, dh, di, maxseq, voc; /* layers, hidden, heads, kv heads, head dim, intermediate, most
                                                         tokens of a sequence, vocabulary */
    float epsilon, theta;                             /* of rms_norm, of rope */
    int64_t end_token;                                /* not used by the engine; for the caller */
} LlaisysQwen2Meta;

/* A model without weights. device must be LLAISYS_DEVICE_CPU; device_ids may be NULL. */
LLAISYS_API LlaisysQwen2Model *llaisysQwen2ModelCreate(const LlaisysQwen2Meta *meta, LlaisysDeviceType device,
                                                       int *device_ids, int ndevice);
/* Frees the model once its last session is gone too. */
LLAISYS_API int32_t llaisysQwen2ModelDestroy(LlaisysQwen2Model *model);

/* Copies one tensor, by its checkpoint name ("model.layers.0.self_attn.q_proj.weight"), converting among F32, F16 and
 * BF16. 1: taken. 0: the model knows no such name. Negative: SHAPE, DTYPE, or STATE if it was loaded before or the
 * model has run. Without "lm_head.weight" the head is tied to the embedding. Without any of the q/k/v biases of a layer
 * that layer has none, but only after llaisysQwen2ModelSetAttentionBias(model, 0). Different threads may load different
 * tensors of one model at the same time. */
LLAISYS_API int32_t llaisysQwen2ModelLoadTensor(LlaisysQwen2Model *model, const char *name, const void *data,
                                                const size_t *shape, size_t ndim, LlaisysDataType dtype);
/* The same for the rows [begin, end) of the first axis, `data` being the first of them and `shape` that of the whole
 * tensor, which is there when each of its rows is (STATE for one that comes twice). It is copied on the calling thread
 * alone, so that several threads can read and load a checkpoint together, a piece each at a time. */
LLAISYS_API int32_t llaisysQwen2ModelLoadRows(LlaisysQwen2Model *model, const char *name, const void *data,
                                              const size_t *shape, size_t ndim, LlaisysDataType dtype, size_t begin,
                                              size_t end);
/* Whether q_proj, k_proj and v_proj have biases (they do, as in Qwen2, unless 0 is said here before loading). */
LLAISYS_API int32_t llaisysQwen2ModelSetAttentionBias(LlaisysQwen2Model *model, int32_t has_bias);

/* Forgets the sequence of llaisysQwen2ModelInfer. */
LLAISYS_API int32_t llaisysQwen2ModelReset(LlaisysQwen2Model *model);
/* Takes the whole sequence so far and returns the next token by argmax, or a negative status. Only what follows the
 * longest prefix shared with the previous call is computed. */
LLAISYS_API int64_t llaisysQwen2ModelInfer(LlaisysQwen2Model *model, int64_t *token_ids, size_t ntoken);
/* Tokens that went through the layers since the model was created, over all its sessions. */
LLAISYS_API int64_t llaisysQwen2ModelTokensComputed(LlaisysQwen2Model *model);

/* A KV cache of its own over the weights of a model. What only a call needs belongs to the model: a set of buffers for
 * each call that was ever under way at once, freed with it. */
LLAISYS_API LlaisysQwen2Session *llaisysQwen2SessionCreate(LlaisysQwen2Model *model);
LLAISYS_API int32_t llaisysQwen2SessionDestroy(LlaisysQwen2Session *session);
/* Appends tokens to the sequence and writes the logits of its last nlogits tokens (0 to ntoken) as f32 [nlogits, voc].
 * On an error the session is as it was before the call. */
LLAISYS_API int32_t llaisysQwen2SessionForward(LlaisysQwen2Session *session, const int64_t *token_ids, size_t ntoken,
                                               float *logits, size_t nlogits);
/* Tokens in the cache, or a negative status. */
LLAISYS_API int64_t llaisysQwen2SessionLength(LlaisysQwen2Session *session);
/* Drops all but the first `length` tokens, and gives memory back that is no longer used, but for 256 KiB of each cache
 * of a layer, for the tokens that come next. */
LLAISYS_API int32_t llaisysQwen2SessionTruncate(LlaisysQwen2Session *session, size_t length);

/* What a tap sees of one node: an operator call of the forward pass, after it ran. The tensors are valid during the
 * call only; `args` are in the order of the operator's C function (NULL for an absent bias), `scalars` likewise. A tap
 * may write to the outputs: the pass goes on with what it wrote. */
typedef struct LlaisysNode {
    const char *site; /* after transformers' module paths: "model.layers.3.self_attn.q_proj" */
    const char *op;   /* "linear" */
    int64_t position; /* of the first row in the sequence */
    int32_t nargs, nscalars;
    const LlaisysTensor *const *args;
    const double *scalars;
} LlaisysNode;
/* Anything but 0 ends the forward pass with INTERRUPTED. */
typedef int32_t (*LlaisysTap)(const LlaisysNode *node, void *user);
/* Calls `tap` after each node of this session's forward passes; NULL removes it. */
LLAISYS_API int32_t llaisysQwen2SessionSetTap(LlaisysQwen2Session *session, LlaisysTap tap, void *user);

#ifdef __cplusplus
}
#endif
#endif
