#include "qwen2.h"

#include "../core/convert.h"
#include "../core/tensor.h"
#include "../ops/linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace llaisys {

namespace {

// Tokens that go through the layers together: enough to make the weights' way from memory a small part of the work, few
// enough that the activations stay small (37 MiB for 1.5B). Where a prompt is cut does not change a bit of the result,
// and hardly the time: 2048 tokens of 0.5B took as long, within 2 %, in chunks of 512, 1024 and 2048; 256 cost 3 %.
constexpr int64_t CHUNK = 512;
// Bytes of logits that the head computes at once.
constexpr int64_t HEAD_BYTES = 16 << 20;

LlaisysTensor view(void *data, int32_t dtype, std::initializer_list<int64_t> shape) {
    LlaisysTensor t{};
    t.data = data;
    t.dtype = dtype;
    for (const int64_t size : shape) t.shape[t.ndim++] = size;
    int64_t stride = 1;
    for (int32_t i = t.ndim - 1; i >= 0; --i) {
        t.strides[i] = stride;
        stride *= t.shape[i];
    }
    return t;
}

// The rows [begin, end) of the first axis.
LlaisysTensor rows(LlaisysTensor t, int64_t begin, int64_t end) {
    t.data = static_cast<char *>(t.data) + begin * t.strides[0] * dtype_size(t.dtype);
    t.shape[0] = end - begin;
    return t;
}

// [T, heads * D] seen as [T, heads, D]
LlaisysTensor split_heads(const LlaisysTensor &t, int64_t heads) {
    return view(t.data, t.dtype, {t.shape[0], heads, t.shape[1] / heads});
}

void check_meta(const LlaisysQwen2Meta &m) {
    const auto bounded = [](const char *field, size_t value, size_t least, size_t most) {
        if (value < least || value > most)
            fail(LLAISYS_ERROR_INVALID_ARGUMENT, "meta.%s: expected %zu to %zu, found %zu", field, least, most, value);
    };
    if (m.dtype != LLAISYS_DTYPE_F32 && m.dtype != LLAISYS_DTYPE_F16 && m.dtype != LLAISYS_DTYPE_BF16)
        fail(LLAISYS_ERROR_DTYPE, "meta.dtype: expected f32, f16 or bf16, found %s", dtype_name(m.dtype));
    // Far above any model, and low enough that no product of two or three of them overflows.
    bounded("nlayer", m.nlayer, 0, 1 << 16);
    bounded("hs", m.hs, 1, 1 << 20);
    bounded("nh", m.nh, 1, 1 << 16);
    bounded("nkvh", m.nkvh, 1, m.nh);
    bounded("dh", m.dh, 2, 1 << 16);
    bounded("di", m.di, 1, 1 << 24);
    bounded("maxseq", m.maxseq, 1, size_t(1) << 31);
    bounded("voc", m.voc, 1, size_t(1) << 31);
    bounded("nh * dh", m.nh * m.dh, 1, 1 << 24);
    if (m.nh % m.nkvh != 0)
        fail(LLAISYS_ERROR_INVALID_ARGUMENT, "meta.nkvh: expected a divisor of the %zu heads, found %zu", m.nh, m.nkvh);
    if (m.dh % 2 != 0) fail(LLAISYS_ERROR_INVALID_ARGUMENT, "meta.dh: expected an even number, found %zu", m.dh);
    if (!(m.epsilon >= 0) || !std::isfinite(m.epsilon))
        fail(LLAISYS_ERROR_INVALID_ARGUMENT, "meta.epsilon: expected a finite number, not negative, found %g",
             double(m.epsilon));
    if (!(m.theta > 0) || !std::isfinite(m.theta))
        fail(LLAISYS_ERROR_INVALID_ARGUMENT, "meta.theta: expected a finite number above 0, found %g", double(m.theta));
}

const LlaisysQwen2Meta &checked(const LlaisysQwen2Meta &meta) {
    check_meta(meta);
    return meta;
}

} // namespace

Model::Model(const LlaisysQwen2Meta &m) : meta(checked(m)), layers(m.nlayer) {
    const size_t q = m.nh * m.dh, kv = m.nkvh * m.dh;
    declare("model.embed_tokens.weight", embed, {m.voc, m.hs});
    for (size_t i = 0; i < m.nlayer; ++i) {
        const std::string layer = "model.layers." + std::to_string(i) + ".";
        Layer &l = layers[i];
        declare(layer + "input_layernorm.weight", l.input_norm, {m.hs});
        declare(layer + "self_attn.q_proj.weight", l.q, {q, m.hs});
        declare(layer + "self_attn.q_proj.bias", l.q_bias, {q});
        declare(layer + "self_attn.k_proj.weight", l.k, {kv, m.hs});
        declare(layer + "self_attn.k_proj.bias", l.k_bias, {kv});
        declare(layer + "self_attn.v_proj.weight", l.v, {kv, m.hs});
        declare(layer + "self_attn.v_proj.bias", l.v_bias, {kv});
        declare(layer + "self_attn.o_proj.weight", l.o, {m.hs, q});
        declare(layer + "post_attention_layernorm.weight", l.post_norm, {m.hs});
        declare(layer + "mlp.gate_proj.weight", l.gate, {m.di, m.hs});
        declare(layer + "mlp.up_proj.weight", l.up, {m.di, m.hs});
        declare(layer + "mlp.down_proj.weight", l.down, {m.hs, m.di});
    }
    declare("model.norm.weight", norm, {m.hs});
    declare("lm_head.weight", lm_head, {m.voc, m.hs}); // last: its pages are never touched if it is tied
}

void Model::declare(const std::string &name, Weight &weight, std::initializer_list<size_t> shape) {
    weight.tensor = shape.size() == 1
        ? view(nullptr, meta.dtype, {int64_t(*shape.begin())})
        : view(nullptr, meta.dtype, {int64_t(shape.begin()[0]), int64_t(shape.begin()[1])});
    weight.missing = weight.tensor.shape[0];
    weight.offset = bytes_;
    constexpr size_t ALIGN = 256;
    const auto bytes = size_t(numel(weight.tensor) * dtype_size(meta.dtype));
    if (__builtin_add_overflow(bytes_, (bytes + ALIGN - 1) / ALIGN * ALIGN, &bytes_)) bytes_ = SIZE_MAX;
    weights_.emplace(name, &weight);
}

// The weight that `source` is for, nullptr if there is none of that name.
Weight *Model::check(const Source &source) {
    const char *name = source.name;
    if (!name || !source.data || !source.shape)
        fail(LLAISYS_ERROR_INVALID_ARGUMENT, "name, data and shape must not be NULL");
    const auto found = weights_.find(name);
    if (found == weights_.end()) return nullptr;
    const LlaisysTensor &t = found->second->tensor;
    if (source.ndim != size_t(t.ndim))
        fail(LLAISYS_ERROR_SHAPE, "%s: expected shape %s, found %zu axes", name, shape_text(t).c_str(), source.ndim);
    bool same = true;
    std::string text;
    for (size_t i = 0; i < source.ndim; ++i) {
        same = same && source.shape[i] == size_t(t.shape[i]);
        text += (i ? ", " : "") + std::to_string(source.shape[i]);
    }
    if (!same)
        fail(LLAISYS_ERROR_SHAPE, "%s: expected shape %s, found [%s]", name, shape_text(t).c_str(), text.c_str());
    if (source.dtype != LLAISYS_DTYPE_F32 && source.dtype != LLAISYS_DTYPE_F16 && source.dtype != LLAISYS_DTYPE_BF16)
        fail(LLAISYS_ERROR_DTYPE, "%s: expected f32, f16 or bf16, found %s", name, dtype_name(source.dtype));
    if (source.begin > source.end || source.end > size_t(t.shape[0]))
        fail(LLAISYS_ERROR_INVALID_ARGUMENT, "%s: expected rows within 0 to %lld, found %zu to %zu", name,
             (long long)t.shape[0], source.begin, source.end);
    return found->second;
}

// Notes that the calling thread copies these rows. Under the lock.
void Model::take(Weight &weight, const char *name, Weight::Rows rows) {
    if (sealed_) fail(LLAISYS_ERROR_STATE, "%s: the model has run; its weights can not change any more", name);
    if (!attention_bias_ && std::strstr(name, "_proj.bias"))
        fail(LLAISYS_ERROR_STATE, "%s: the model was set to have no attention biases", name);
    for (const auto &other : weight.taken)
        if (rows.begin < other.end && other.begin < rows.end) fail(LLAISYS_ERROR_STATE, "%s: was loaded before", name);
    memory_.reserve(bytes_);
    if (!weight.tensor.data) weight.tensor.data = memory_.data() + weight.offset;
    weight.taken.push_back(rows);
}

bool Model::load(Source source) {
    if (source.end == SIZE_MAX && source.ndim > 0 && source.shape) source.end = source.shape[0];
    Weight *const weight = check(source);
    if (!weight) return false;
    if (source.begin == source.end) return true;
    const LlaisysTensor &t = weight->tensor;
    const Weight::Rows rows{int64_t(source.begin), int64_t(source.end)};
    {
        const std::lock_guard lock(mutex_);
        take(*weight, source.name, rows);
    }
    try {
        const auto convert = source.alone ? convert_elements_alone : convert_elements;
        char *out = static_cast<char *>(t.data) + rows.begin * t.strides[0] * dtype_size(t.dtype);
        convert(out, t.dtype, source.data, source.dtype, (rows.end - rows.begin) * t.strides[0]);
    } catch (...) {
        const std::lock_guard lock(mutex_);
        std::erase_if(weight->taken, [&](const Weight::Rows &other) { return other.begin == rows.begin; });
        throw;
    }
    const std::lock_guard lock(mutex_);
    weight->missing -= rows.end - rows.begin;
    return true;
}

void Model::set_attention_bias(bool has_bias) {
    const std::lock_guard lock(mutex_);
    for (const auto &[name, weight] : weights_)
        if (!weight->taken.empty())
            fail(LLAISYS_ERROR_STATE, "expected a model without weights, found %s loaded", name.c_str());
    attention_bias_ = has_bias;
}

bool Model::optional(const std::string &name) const {
    return name == "lm_head.weight" || (!attention_bias_ && name.ends_with("_proj.bias"));
}

void Model::seal() {
    if (sealed_) return;
    const std::lock_guard lock(mutex_);
    std::string first;
    size_t missing = 0;
    for (const auto &[name, weight] : weights_) {
        if (weight->loaded() || (weight->taken.empty() && optional(name))) continue;
        if (missing++ == 0 || name < first) first = name;
    }
    if (missing > 0)
        fail(LLAISYS_ERROR_STATE, "weights are missing: %s%s", first.c_str(),
             missing > 1 ? (" and " + std::to_string(missing - 1) + " more").c_str() : "");
    sealed_ = true;
}

std::unique_ptr<Workspace> Model::take_workspace() {
    {
        const std::lock_guard lock(workspaces_mutex_);
        if (std::unique_ptr<Workspace> first = std::move(workspaces_)) {
            workspaces_ = std::move(first->next);
            return first;
        }
    }
    return std::make_unique<Workspace>();
}

void Model::give_back(std::unique_ptr<Workspace> workspace) {
    const std::lock_guard lock(workspaces_mutex_);
    workspace->next = std::move(workspaces_);
    workspaces_ = std::move(workspace);
}

// Marks a session as in use, so that a second call at the same time is refused and not computed into the first one's
// cache.
class Use {
public:
    explicit Use(Session &session) : session_(session) {
        if (session_.busy_.exchange(true))
            fail(LLAISYS_ERROR_STATE, "the session is in use by another call; give each thread a session of its own");
    }
    ~Use() { session_.busy_ = false; }
    Use(const Use &) = delete;
    Use &operator=(const Use &) = delete;

private:
    Session &session_;
};

// The workspace of a call, in the session's `place` for it.
class Borrowed {
public:
    Borrowed(Model &model, std::unique_ptr<Workspace> &place) : model_(model), place_(place) {
        place_ = model.take_workspace();
    }
    ~Borrowed() { model_.give_back(std::move(place_)); }
    Borrowed(const Borrowed &) = delete;
    Borrowed &operator=(const Borrowed &) = delete;

private:
    Model &model_;
    std::unique_ptr<Workspace> &place_;
};

Session::Session(Model &model) : model_(model), caches_(model.layers.size()) {}

void Session::set_tap(LlaisysTap tap, void *user) {
    const Use use(*this);
    tap_ = tap;
    tap_user_ = user;
}

void Session::truncate(int64_t length) {
    const Use use(*this);
    if (length < 0 || length > length_)
        fail(LLAISYS_ERROR_INVALID_ARGUMENT, "length: expected 0 to %lld, found %lld", (long long)length_,
             (long long)length);
    length_ = length;
    const size_t row = model_.meta.nkvh * model_.meta.dh * size_t(dtype_size(model_.meta.dtype));
    for (Cache &cache : caches_) {
        cache.k.release_behind(size_t(length) * row);
        cache.v.release_behind(size_t(length) * row);
    }
}

void Session::grow(int64_t length) {
    if (length <= capacity_) return;
    // Room is address space until it is written to, so a step of a factor costs nothing.
    const int64_t wanted =
        std::min<int64_t>(std::max<int64_t>({length, 2 * capacity_, 1024}), int64_t(model_.meta.maxseq));
    const size_t row = model_.meta.nkvh * model_.meta.dh * size_t(dtype_size(model_.meta.dtype));
    for (Cache &cache : caches_) {
        cache.k.reserve(size_t(wanted) * row);
        cache.v.reserve(size_t(wanted) * row);
    }
    capacity_ = wanted;
}

LlaisysTensor Session::buffer(Workspace::Buffer i, std::initializer_list<int64_t> shape) {
    LlaisysTensor t = view(nullptr, model_.meta.dtype, shape);
    work_->buffers[i].reserve(size_t(numel(t) * dtype_size(t.dtype)));
    t.data = work_->buffers[i].data();
    return t;
}

LlaisysTensor Session::cached(const Memory &memory, int64_t begin, int64_t end) const {
    const auto &m = model_.meta;
    const LlaisysTensor all = view(memory.data(), m.dtype, {capacity_, int64_t(m.nkvh), int64_t(m.dh)});
    return rows(all, begin, end);
}

void Session::node(int32_t status, int64_t layer, const char *name, const char *op, int64_t position,
                   std::initializer_list<const LlaisysTensor *> args, std::initializer_list<double> scalars) {
    const auto site = [&] {
        return layer < 0 ? std::string(name) : "model.layers." + std::to_string(layer) + "." + name;
    };
    if (status != LLAISYS_OK) fail(status, "%s: %s", site().c_str(), llaisysLastError());
    if (!tap_) return;
    const std::string path = site();
    const LlaisysNode n{path.c_str(),   op, position, int32_t(args.size()), int32_t(scalars.size()), args.begin(),
                        scalars.begin()};
    if (tap_(&n, tap_user_) != 0) fail(LLAISYS_ERROR_INTERRUPTED, "%s: ended by the tap", path.c_str());
}

void Session::forward(const int64_t *tokens, int64_t count, float *logits, int64_t nlogits) {
    const Use use(*this);
    const auto &m = model_.meta;
    if (count < 0 || (count > 0 && !tokens)) fail(LLAISYS_ERROR_INVALID_ARGUMENT, "token_ids: is NULL");
    if (nlogits < 0 || nlogits > count)
        fail(LLAISYS_ERROR_INVALID_ARGUMENT, "nlogits: expected 0 to %lld, the number of tokens, found %lld",
             (long long)count, (long long)nlogits);
    if (nlogits > 0 && !logits) fail(LLAISYS_ERROR_INVALID_ARGUMENT, "logits: is NULL");
    if (count > int64_t(m.maxseq) - length_)
        fail(LLAISYS_ERROR_INVALID_ARGUMENT, "token_ids: expected at most %lld more tokens (maxseq is %zu), found %lld",
             (long long)(int64_t(m.maxseq) - length_), m.maxseq, (long long)count);
    for (int64_t i = 0; i < count; ++i)
        if (tokens[i] < 0 || tokens[i] >= int64_t(m.voc))
            fail(LLAISYS_ERROR_INDEX, "token_ids: expected 0 to %zu, found %lld at position %lld", m.voc - 1,
                 (long long)tokens[i], (long long)i);
    model_.seal();
    grow(length_ + count);
    const Borrowed workspace(model_, work_);
    for (int64_t begin = 0; begin < count; begin += CHUNK) {
        const int64_t end = std::min(begin + CHUNK, count);
        const int64_t wanted = std::clamp<int64_t>(end - (count - nlogits), 0, end - begin);
        chunk(tokens + begin, end - begin, length_ + begin, logits, wanted);
        if (logits) logits += wanted * int64_t(m.voc);
    }
    length_ += count;
}

void Session::chunk(const int64_t *tokens, int64_t count, int64_t position, float *logits, int64_t nlogits) {
    const auto &m = model_.meta;
    const int64_t hidden = int64_t(m.hs), heads = int64_t(m.nh), kv_heads = int64_t(m.nkvh), dim = int64_t(m.dh);
    const int64_t inner = int64_t(m.di), T = count, S = position + count;
    const float eps = m.epsilon, theta = m.theta, scale = float(1.0 / std::sqrt(double(dim)));

    auto &positions = work_->positions;
    positions.resize(size_t(T));
    for (int64_t t = 0; t < T; ++t) positions[size_t(t)] = position + t;
    const LlaisysTensor index = view(const_cast<int64_t *>(tokens), LLAISYS_DTYPE_I64, {T});
    const LlaisysTensor pos = view(positions.data(), LLAISYS_DTYPE_I64, {T});

    // The residual stream goes back and forth between two buffers.
    using enum Workspace::Buffer;
    LlaisysTensor h = buffer(H0, {T, hidden}), next = buffer(H1, {T, hidden}), x = buffer(X, {T, hidden});
    LlaisysTensor q = buffer(Q, {T, heads * dim}), k = buffer(K, {T, kv_heads * dim});
    LlaisysTensor attn = buffer(ATTN, {T, heads * dim}), o = buffer(O, {T, hidden});
    LlaisysTensor gate = buffer(GATE, {T, inner}), up = buffer(UP, {T, inner}), act = buffer(ACT, {T, inner});
    LlaisysTensor down = buffer(DOWN, {T, hidden});

    node(llaisysEmbedding(&h, &index, &model_.embed.tensor), -1, "model.embed_tokens", "embedding", position,
         {&h, &index, &model_.embed.tensor});
    for (size_t i = 0; i < model_.layers.size(); ++i) {
        const Layer &w = model_.layers[i];
        Cache &cache = caches_[i];
        const auto run = [&](int32_t status, const char *name, const char *op,
                             std::initializer_list<const LlaisysTensor *> args,
                             std::initializer_list<double> scalars = {}) {
            node(status, int64_t(i), name, op, position, args, scalars);
        };
        struct Linear {
            const char *name;
            LlaisysTensor &out;
            const Weight &weight;
            const Weight *bias = nullptr;
            LinearLayer layer() const { return {&out, &weight.tensor, bias ? bias->get() : nullptr}; }
        };
        // Layers of the same input are computed together, but for a tap, which sees each before the next one runs.
        const auto linear = [&](const LlaisysTensor &in, auto... layers) {
            static_assert(sizeof...(layers) <= LINEAR_LAYERS);
            const int32_t together = tap_ ? LLAISYS_OK : linear_layers(&in, {layers.layer()...});
            const auto each = [&](const Linear &l) {
                const LinearLayer own = l.layer();
                run(tap_ ? linear_layers(&in, {own}) : together, l.name, "linear",
                    {own.out, &in, own.weight, own.bias});
            };
            (each(layers), ...);
        };
        const auto add_norm = [&](const char *name, const LlaisysTensor &addend, const Weight &weight) {
            run(llaisysAddRmsNorm(&x, &next, &h, &addend, &weight.tensor, eps), name, "add_rms_norm",
                {&x, &next, &h, &addend, &weight.tensor}, {eps});
            std::swap(h, next);
        };

        if (i == 0)
            run(llaisysRmsNorm(&x, &h, &w.input_norm.tensor, eps), "input_layernorm", "rms_norm",
                {&x, &h, &w.input_norm.tensor}, {eps});
        else
            add_norm("input_layernorm", down, w.input_norm);

        LlaisysTensor new_k = cached(cache.k, position, S), new_v = cached(cache.v, position, S);
        LlaisysTensor flat_v = view(new_v.data, m.dtype, {T, kv_heads * dim});
        linear(x, Linear{"self_attn.q_proj", q, w.q, &w.q_bias}, Linear{"self_attn.k_proj", k, w.k, &w.k_bias},
               Linear{"self_attn.v_proj", flat_v, w.v, &w.v_bias});
        const LlaisysTensor split_k = split_heads(k, kv_heads);
        run(llaisysRope(&new_k, &split_k, &pos, theta), "self_attn.rope_k", "rope", {&new_k, &split_k, &pos}, {theta});
        const LlaisysTensor split_q = split_heads(q, heads);
        const LlaisysTensor all_k = cached(cache.k, 0, S), all_v = cached(cache.v, 0, S);
        LlaisysTensor split_attn = split_heads(attn, heads);
        run(llaisysRopeSelfAttention(&split_attn, &split_q, &pos, &all_k, &all_v, theta, scale), "self_attn.attn",
            "rope_self_attention", {&split_attn, &split_q, &pos, &all_k, &all_v}, {theta, scale});
        linear(attn, Linear{"self_attn.o_proj", o, w.o});

        add_norm("post_attention_layernorm", o, w.post_norm);
        linear(x, Linear{"mlp.gate_proj", gate, w.gate}, Linear{"mlp.up_proj", up, w.up});
        run(llaisysSwiglu(&act, &gate, &up), "mlp.act", "swiglu", {&act, &gate, &up});
        linear(act, Linear{"mlp.down_proj", down, w.down});
    }
    model_.tokens_computed += count;
    if (nlogits == 0) return;

    // Only the rows whose logits are wanted go on.
    const int64_t first = T - nlogits;
    LlaisysTensor y = rows(x, first, T);
    const LlaisysTensor last = rows(h, first, T), *weight = &model_.norm.tensor;
    if (model_.layers.empty()) {
        node(llaisysRmsNorm(&y, &last, weight, eps), -1, "model.norm", "rms_norm", position + first,
             {&y, &last, weight}, {eps});
    } else {
        LlaisysTensor sum = rows(next, first, T);
        const LlaisysTensor addend = rows(down, first, T);
        node(llaisysAddRmsNorm(&y, &sum, &last, &addend, weight, eps), -1, "model.norm", "add_rms_norm",
             position + first, {&y, &sum, &last, &addend, weight}, {eps});
    }
    head(y, position + first, logits);
}

void Session::head(const LlaisysTensor &x, int64_t position, float *logits) {
    const int64_t voc = int64_t(model_.meta.voc), dtype = model_.meta.dtype, count = x.shape[0];
    const int64_t most = std::max<int64_t>(1, HEAD_BYTES / (voc * dtype_size(int32_t(dtype))));
    for (int64_t begin = 0; begin < count; begin += most) {
        const int64_t end = std::min(begin + most, count);
        const LlaisysTensor in = rows(x, begin, end), *weight = model_.head();
        LlaisysTensor out = buffer(Workspace::LOGITS, {end - begin, voc});
        node(llaisysLinear(&out, &in, weight, nullptr), -1, "lm_head", "linear", position + begin,
             {&out, &in, weight, nullptr});
        convert_elements(logits + begin * voc, LLAISYS_DTYPE_F32, out.data, out.dtype, numel(out));
    }
}

} // namespace llaisys
