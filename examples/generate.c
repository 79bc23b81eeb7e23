/* Generates tokens with llaisys from C: creates a model, loads its weights from a file, and prints what it continues
 * token ids with.
 *
 *     python -m llaisys.export tiny tiny.bin
 *     cc -std=c11 generate.c $(python -m llaisys --cflags --libs) -o generate
 *     ./generate tiny.bin 32 517 301 44        # 32 new tokens after these three
 *
 * The file is what llaisys/export.py writes; see there for its layout.
 */
#include <llaisys.h>

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failed(const char *what) {
    fprintf(stderr, "generate: %s\n", what);
    return 1;
}

/* A number from 0 to INT64_MAX, and nothing behind it. */
static int read_number(const char *text, int64_t *number) {
    char *end;
    errno = 0;
    const long long value = strtoll(text, &end, 10);
    *number = value;
    return end != text && !*end && !errno && value >= 0;
}

static int read_exactly(FILE *file, void *data, size_t bytes) { return fread(data, 1, bytes, file) == bytes; }

/* The fields of the meta data are 64-bit each in the file. */
static int read_meta(FILE *file, LlaisysQwen2Meta *meta, int32_t *attention_bias, uint64_t *tensors) {
    char magic[8];
    int64_t whole[10], end_token;
    double real[2];
    uint64_t count;
    if (!read_exactly(file, magic, sizeof magic) || memcmp(magic, "LLAISYS2", sizeof magic) != 0 ||
        !read_exactly(file, whole, sizeof whole) || !read_exactly(file, real, sizeof real) ||
        !read_exactly(file, &end_token, sizeof end_token) || !read_exactly(file, &count, sizeof count))
        return 0;
    *meta = (LlaisysQwen2Meta){.dtype = (LlaisysDataType)whole[0],
                               .nlayer = (size_t)whole[1],
                               .hs = (size_t)whole[2],
                               .nh = (size_t)whole[3],
                               .nkvh = (size_t)whole[4],
                               .dh = (size_t)whole[5],
                               .di = (size_t)whole[6],
                               .maxseq = (size_t)whole[7],
                               .voc = (size_t)whole[8],
                               .epsilon = (float)real[0],
                               .theta = (float)real[1],
                               .end_token = end_token};
    *attention_bias = whole[9] != 0;
    *tensors = count;
    return 1;
}

/* One tensor: name, dtype, shape and data. Returns the status of the library, or 0 if the file is not as it should be.
 */
static int32_t load_tensor(FILE *file, LlaisysQwen2Model *model) {
    uint64_t name_bytes, dtype, ndim, shape[LLAISYS_MAX_DIMS], data_bytes;
    char name[256];
    if (!read_exactly(file, &name_bytes, 8) || name_bytes >= sizeof name || !read_exactly(file, name, name_bytes) ||
        !read_exactly(file, &dtype, 8) || !read_exactly(file, &ndim, 8) || ndim > LLAISYS_MAX_DIMS ||
        !read_exactly(file, shape, ndim * 8) || !read_exactly(file, &data_bytes, 8) || data_bytes > SIZE_MAX / 2)
        return 0;
    name[name_bytes] = 0;
    size_t sizes[LLAISYS_MAX_DIMS], wanted = dtype == LLAISYS_DTYPE_F32 ? 4 : 2;
    for (uint64_t i = 0; i < ndim; ++i) wanted *= sizes[i] = (size_t)shape[i];
    if (wanted != data_bytes) return 0; /* the library reads as many bytes as the shape says */
    void *data = malloc(data_bytes ? data_bytes : 1);
    int32_t status = 0;
    if (data && read_exactly(file, data, data_bytes))
        status = llaisysQwen2ModelLoadTensor(model, name, data, sizes, ndim, (LlaisysDataType)dtype);
    free(data);
    return status;
}

static int load_tensors(FILE *file, LlaisysQwen2Model *model, uint64_t tensors) {
    int32_t status = 1;
    for (uint64_t i = 0; i < tensors && status == 1; ++i)
        if ((status = load_tensor(file, model)) != 1)
            failed(status ? llaisysLastError() : "a tensor that the model does not know, or a truncated file");
    return status == 1;
}

/* The tokens of the prompt, with room for more behind them. NULL if one is none, or without memory. */
static int64_t *read_tokens(char **texts, size_t count, size_t room) {
    int64_t *tokens = room < SIZE_MAX / sizeof *tokens - count ? malloc((count + room) * sizeof *tokens) : NULL;
    for (size_t i = 0; tokens && i < count; ++i)
        if (!read_number(texts[i], &tokens[i])) {
            free(tokens);
            tokens = NULL;
        }
    return tokens;
}

/* Appends up to `most` tokens to the sequence, printing each; stops at the end token. */
static int generate(LlaisysQwen2Model *model, const LlaisysQwen2Meta *meta, int64_t *tokens, size_t count,
                    int64_t most) {
    for (int64_t i = 0; i < most && count < meta->maxseq; ++i) {
        /* The whole sequence goes in; only the token that is new since the last call is computed. */
        const int64_t next = llaisysQwen2ModelInfer(model, tokens, count);
        if (next < 0) return failed(llaisysLastError());
        printf("%s%" PRId64, i ? " " : "", next);
        fflush(stdout);
        tokens[count++] = next;
        if (next == meta->end_token) break;
    }
    printf("\n");
    return 0;
}

int main(int argc, char **argv) {
    if (argc < 4) return failed("usage: generate WEIGHTS NEW_TOKENS TOKEN [TOKEN ...]");
    if (llaisysAbiVersion() != LLAISYS_ABI_VERSION) return failed("the library is not the one of this header");
    const size_t count = (size_t)argc - 3;
    int64_t most;
    if (!read_number(argv[2], &most)) return failed("NEW_TOKENS: expected a whole number of at least 0");
    FILE *file = fopen(argv[1], "rb");
    if (!file) return failed("can not open the weights");

    LlaisysQwen2Meta meta;
    int32_t attention_bias = 1;
    uint64_t tensors = 0;
    int64_t *tokens = NULL;
    LlaisysQwen2Model *model = NULL;
    int result = 1;
    if (!read_meta(file, &meta, &attention_bias, &tensors))
        failed("the weights are not a file of llaisys.export");
    else if (!(tokens = read_tokens(argv + 3, count, (uint64_t)most < meta.maxseq ? (size_t)most : meta.maxseq)))
        failed("TOKEN: expected whole numbers of at least 0, and memory for them and those that follow");
    else if (!(model = llaisysQwen2ModelCreate(&meta, LLAISYS_DEVICE_CPU, NULL, 0)) ||
             llaisysQwen2ModelSetAttentionBias(model, attention_bias) < 0)
        failed(llaisysLastError());
    else if (load_tensors(file, model, tensors))
        result = generate(model, &meta, tokens, count, most);
    fclose(file);
    free(tokens);
    if (model) llaisysQwen2ModelDestroy(model);
    return result;
}
