// The C entries of the Qwen2 engine: handles in, status out.
#include "../core/handles.h"
#include "../core/tensor.h"
#include "qwen2.h"

#include <algorithm>

using namespace llaisys;

namespace {

// A session keeps its model alive.
struct OpenSession {
    explicit OpenSession(std::shared_ptr<Model> m) : model(std::move(m)), session(*model) {}
    std::shared_ptr<Model> model;
    Session session;
};

// Never destroyed: a thread may still be inside a call when the process ends.
Handles<Model> &models() {
    static auto &table = *new Handles<Model>("Qwen2 model", 0);
    return table;
}
Handles<OpenSession> &sessions() {
    static auto &table = *new Handles<OpenSession>("Qwen2 session", 1);
    return table;
}

// Bounds a number of tokens, so that it fits the engine's int64.
void check_count(const char *name, size_t count) {
    const auto most = size_t(1) << 31;
    if (count > most) fail(LLAISYS_ERROR_INVALID_ARGUMENT, "%s: expected at most %zu, found %zu", name, most, count);
}

// The lock of a model's Infer. A call of it that an interrupt callback makes in the midst of another one is refused: it
// would wait for itself.
class InferLock {
public:
    explicit InferLock(Model &model) : model_(model), outer_(innermost_) {
        for (const InferLock *lock = outer_; lock; lock = lock->outer_)
            if (&lock->model_ == &model) fail(LLAISYS_ERROR_STATE, "the model is in use by a call of this thread");
        lock_ = std::unique_lock(model.infer_mutex);
        innermost_ = this;
    }
    ~InferLock() { innermost_ = outer_; }
    InferLock(const InferLock &) = delete;
    InferLock &operator=(const InferLock &) = delete;

private:
    Model &model_;
    const InferLock *outer_;
    std::unique_lock<std::mutex> lock_;
    static thread_local const InferLock *innermost_;
};
thread_local const InferLock *InferLock::innermost_ = nullptr;

int64_t infer(Model &model, const int64_t *tokens, size_t count) {
    const InferLock lock(model);
    if (!tokens || count == 0) fail(LLAISYS_ERROR_INVALID_ARGUMENT, "token_ids: expected at least one token");
    check_count("ntoken", count);
    model.seal();
    if (!model.infer_session) model.infer_session = std::make_unique<Session>(model);
    auto &known = model.infer_tokens;
    const auto shared = size_t(std::mismatch(known.begin(), known.end(), tokens, tokens + count).first - known.begin());
    // The last token is always computed: its logits were not kept.
    const size_t kept = std::min(shared, count - 1);
    model.infer_logits.resize(model.meta.voc);
    model.infer_session->truncate(int64_t(kept));
    known.resize(kept);
    model.infer_session->forward(tokens + kept, int64_t(count - kept), model.infer_logits.data(), 1);
    known.assign(tokens, tokens + count);

    LlaisysTensor logits{model.infer_logits.data(), LLAISYS_DTYPE_F32, 1, {int64_t(model.meta.voc)}, {1}};
    int64_t token = 0;
    float value = 0;
    LlaisysTensor index{&token, LLAISYS_DTYPE_I64, 0, {}, {}}, best{&value, LLAISYS_DTYPE_F32, 0, {}, {}};
    const int32_t status = llaisysArgmax(&index, &best, &logits);
    if (status != LLAISYS_OK) fail(status, "%s", llaisysLastError());
    return token;
}

} // namespace

LlaisysQwen2Model *llaisysQwen2ModelCreate(const LlaisysQwen2Meta *meta, LlaisysDeviceType device, int *device_ids,
                                           int ndevice) {
    LlaisysQwen2Model *handle = nullptr;
    guarded("Qwen2ModelCreate", [&] {
        if (!meta) fail(LLAISYS_ERROR_INVALID_ARGUMENT, "meta: is NULL");
        if (device != LLAISYS_DEVICE_CPU)
            fail(LLAISYS_ERROR_UNSUPPORTED, "device: expected CPU (0), found %d", int(device));
        if (ndevice < 0 || ndevice > 1 || (device_ids && ndevice == 1 && device_ids[0] != 0))
            fail(LLAISYS_ERROR_INVALID_ARGUMENT, "device_ids: expected none or the one CPU 0, found %d", ndevice);
        handle = reinterpret_cast<LlaisysQwen2Model *>(models().add(std::make_shared<Model>(*meta)));
    });
    return handle;
}

int32_t llaisysQwen2ModelDestroy(LlaisysQwen2Model *model) {
    return guarded("Qwen2ModelDestroy", [&] { models().remove(model); });
}

int32_t llaisysQwen2ModelLoadTensor(LlaisysQwen2Model *model, const char *name, const void *data, const size_t *shape,
                                    size_t ndim, LlaisysDataType dtype) {
    bool taken = false;
    const int32_t status = guarded("Qwen2ModelLoadTensor", [&] {
        taken = models().get(model)->load({name, data, shape, ndim, dtype, 0, SIZE_MAX, false});
    });
    return status == LLAISYS_OK ? taken : status;
}

int32_t llaisysQwen2ModelLoadRows(LlaisysQwen2Model *model, const char *name, const void *data, const size_t *shape,
                                  size_t ndim, LlaisysDataType dtype, size_t begin, size_t end) {
    bool taken = false;
    const int32_t status = guarded("Qwen2ModelLoadRows", [&] {
        taken = models().get(model)->load({name, data, shape, ndim, dtype, begin, end, true});
    });
    return status == LLAISYS_OK ? taken : status;
}

int32_t llaisysQwen2ModelSetAttentionBias(LlaisysQwen2Model *model, int32_t has_bias) {
    return guarded("Qwen2ModelSetAttentionBias", [&] { models().get(model)->set_attention_bias(has_bias != 0); });
}

int32_t llaisysQwen2ModelReset(LlaisysQwen2Model *model) {
    return guarded("Qwen2ModelReset", [&] {
        const auto m = models().get(model);
        const InferLock lock(*m);
        m->infer_tokens.clear();
        if (m->infer_session) m->infer_session->truncate(0);
    });
}

int64_t llaisysQwen2ModelInfer(LlaisysQwen2Model *model, int64_t *token_ids, size_t ntoken) {
    int64_t token = 0;
    const int32_t status = guarded("Qwen2ModelInfer", [&] { token = infer(*models().get(model), token_ids, ntoken); });
    return status == LLAISYS_OK ? token : status;
}

int64_t llaisysQwen2ModelTokensComputed(LlaisysQwen2Model *model) {
    int64_t count = 0;
    const int32_t status = guarded("Qwen2ModelTokensComputed", [&] { count = models().get(model)->tokens_computed; });
    return status == LLAISYS_OK ? count : status;
}

LlaisysQwen2Session *llaisysQwen2SessionCreate(LlaisysQwen2Model *model) {
    LlaisysQwen2Session *handle = nullptr;
    guarded("Qwen2SessionCreate", [&] {
        handle =
            reinterpret_cast<LlaisysQwen2Session *>(sessions().add(std::make_shared<OpenSession>(models().get(model))));
    });
    return handle;
}

int32_t llaisysQwen2SessionDestroy(LlaisysQwen2Session *session) {
    return guarded("Qwen2SessionDestroy", [&] { sessions().remove(session); });
}

int32_t llaisysQwen2SessionForward(LlaisysQwen2Session *session, const int64_t *token_ids, size_t ntoken, float *logits,
                                   size_t nlogits) {
    return guarded("Qwen2SessionForward", [&] {
        check_count("ntoken", ntoken);
        check_count("nlogits", nlogits);
        sessions().get(session)->session.forward(token_ids, int64_t(ntoken), logits, int64_t(nlogits));
    });
}

int64_t llaisysQwen2SessionLength(LlaisysQwen2Session *session) {
    int64_t length = 0;
    const int32_t status = guarded("Qwen2SessionLength", [&] { length = sessions().get(session)->session.length(); });
    return status == LLAISYS_OK ? length : status;
}

int32_t llaisysQwen2SessionTruncate(LlaisysQwen2Session *session, size_t length) {
    return guarded("Qwen2SessionTruncate",
                   [&] { sessions().get(session)->session.truncate(int64_t(std::min<size_t>(length, INT64_MAX))); });
}

int32_t llaisysQwen2SessionSetTap(LlaisysQwen2Session *session, LlaisysTap tap, void *user) {
    return guarded("Qwen2SessionSetTap", [&] { sessions().get(session)->session.set_tap(tap, user); });
}
