// The native Qwen2: weights, KV cache and the graph, which is a sequence of calls of the operators in llaisys.h; layers
// of one input are one call, see ops/linear.h.
#pragma once

#include "../core/memory.h"
#include "../core/status.h"

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

namespace llaisys {

struct Weight {
    // Rows of the first axis that are there, or that a thread is just copying.
    struct Rows {
        int64_t begin, end;
    };

    LlaisysTensor tensor{};
    size_t offset = 0; // into the memory of all weights
    std::vector<Rows> taken;
    int64_t missing = 0; // rows

    bool loaded() const { return missing == 0; }
    const LlaisysTensor *get() const { return loaded() ? &tensor : nullptr; }
};

struct Layer {
    Weight input_norm, q, q_bias, k, k_bias, v, v_bias, o, post_norm, gate, up, down;
};

// What the graph computes of one chunk of tokens: each result has a buffer of its own, so that a tap finds the inputs
// of a node as the node found them.
struct Workspace {
    enum Buffer : size_t { H0, H1, X, Q, K, ATTN, O, GATE, UP, ACT, DOWN, LOGITS, BUFFERS };
    Memory buffers[BUFFERS];
    std::vector<int64_t> positions;
    std::unique_ptr<Workspace> next; // in the model's list of those that are free
};

class Session;

class Model {
public:
    explicit Model(const LlaisysQwen2Meta &meta);

    // What llaisysQwen2ModelLoadRows takes; `end` SIZE_MAX stands for the last row. `alone`: on the calling thread
    // only.
    struct Source {
        const char *name;
        const void *data;
        const size_t *shape;
        size_t ndim;
        int32_t dtype;
        size_t begin, end;
        bool alone;
    };
    // False if the model knows no such name.
    bool load(Source source);
    void set_attention_bias(bool has_bias);
    // Throws STATE if a weight is missing; no weight can be loaded afterwards.
    void seal();
    // A workspace for a call, which gives it back; all are freed with the model. There are as many as calls were under
    // way at once, and a new session finds pages that were written before: of 2.4 ms that 128 tokens of the embedded
    // model took in a fresh session, the pages of its own buffers were 0.6.
    std::unique_ptr<Workspace> take_workspace();
    void give_back(std::unique_ptr<Workspace> workspace);
    const LlaisysTensor *head() const { return lm_head.get() ? lm_head.get() : embed.get(); }

    const LlaisysQwen2Meta meta;
    Weight embed, norm, lm_head;
    std::vector<Layer> layers;
    std::atomic<int64_t> tokens_computed{0};

    // The session of llaisysQwen2ModelInfer, and the tokens in it.
    std::mutex infer_mutex;
    std::unique_ptr<Session> infer_session;
    std::vector<int64_t> infer_tokens;
    std::vector<float> infer_logits;

private:
    void declare(const std::string &name, Weight &weight, std::initializer_list<size_t> shape);
    Weight *check(const Source &source);
    void take(Weight &weight, const char *name, Weight::Rows rows);
    bool optional(const std::string &name) const;

    std::unordered_map<std::string, Weight *> weights_;
    // One block for all, in the order in which they are used: huge pages then cover everything.
    Memory memory_{Memory::Pages::HUGE};
    size_t bytes_ = 0; // of memory_, SIZE_MAX if they are too many to count
    bool attention_bias_ = true;
    std::atomic<bool> sealed_{false};
    std::mutex mutex_;
    std::mutex workspaces_mutex_;
    std::unique_ptr<Workspace> workspaces_; // free ones
};

class Session {
public:
    explicit Session(Model &model);

    void forward(const int64_t *tokens, int64_t count, float *logits, int64_t nlogits);
    int64_t length() const { return length_; }
    void truncate(int64_t length);
    void set_tap(LlaisysTap tap, void *user);

private:
    struct Cache {
        Memory k, v;
    };
    void grow(int64_t length);
    void chunk(const int64_t *tokens, int64_t count, int64_t position, float *logits, int64_t nlogits);
    void head(const LlaisysTensor &x, int64_t position, float *logits);
    // Ends the pass if `status` says so, else shows the node to the tap.
    void node(int32_t status, int64_t layer, const char *name, const char *op, int64_t position,
              std::initializer_list<const LlaisysTensor *> args, std::initializer_list<double> scalars = {});
    LlaisysTensor buffer(Workspace::Buffer i, std::initializer_list<int64_t> shape);
    LlaisysTensor cached(const Memory &memory, int64_t begin, int64_t end) const;

    Model &model_;
    std::vector<Cache> caches_;
    std::unique_ptr<Workspace> work_; // during a call
    int64_t length_ = 0, capacity_ = 0;
    LlaisysTap tap_ = nullptr;
    void *tap_user_ = nullptr;
    std::atomic<bool> busy_{false};

    friend class Use;
};

} // namespace llaisys
