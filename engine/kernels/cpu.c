// Decoding on a CPU, in float32: products of few rows with a packed weight, and attention over paged keys and values where they lie.
// `cpu.py` compiles this file for the machine it runs on. Its loops run on torch's own team of OpenMP threads, where both use one libgomp.

#include <float.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 16, PANEL = 64, WIDE = PANEL / LANES, MOST_ROWS = 4, MOST_DIM = 256, MOST_GROUP = 16, MOST_BLOCK = 32 };
typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4)));  // the same, wherever it lies
typedef int32_t whole __attribute__((vector_size(4 * LANES)));

// ── products ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

// All rows with one panel: each weight is read once, and sums stay in registers because `rows` is known where this is inlined.
static inline __attribute__((always_inline)) void one_panel(
    const int rows, const float *x, int64_t x_stride, const lanes *panel, int64_t in, const float *bias, float *y, int64_t y_stride, int64_t width)
{
    lanes sums[MOST_ROWS][WIDE] = {0};
    for (int64_t k = 0; k < in; k++)
        for (int r = 0; r < rows; r++)
            for (int w = 0; w < WIDE; w++)
                sums[r][w] += x[r * x_stride + k] * panel[k * WIDE + w];
    for (int r = 0; r < rows; r++) {
        const float *sum = (const float *)sums[r];
        for (int64_t j = 0; j < width; j++)
            y[r * y_stride + j] = bias ? sum[j] + bias[j] : sum[j];
    }
}

// y[rows, out] = x[rows, in] @ weight.T + bias. The weight lies in panels of 64 outputs, [ceil(out / 64), depth, 64] with depth >= in,
// at an address divisible by 64; bias may be null; the rows of x lie x_stride floats apart, those of y without gaps.
void penstock_multiply(
    const float *x, int64_t x_stride, const float *weight, int64_t depth, const float *bias, float *y, int64_t rows, int64_t in, int64_t out, int64_t threads)
{
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < (out + PANEL - 1) / PANEL; i++) {
        int64_t first = i * PANEL, width = out - first < PANEL ? out - first : PANEL;
        const lanes *panel = (const lanes *)(weight + first * depth);
        const float *add = bias ? bias + first : 0;
        for (int64_t r = 0; r < rows; r += MOST_ROWS) {
            const float *from = x + r * x_stride;
            float *to = y + r * out + first;
            switch (rows - r) {
            case 1: one_panel(1, from, x_stride, panel, in, add, to, out, width); break;
            case 2: one_panel(2, from, x_stride, panel, in, add, to, out, width); break;
            case 3: one_panel(3, from, x_stride, panel, in, add, to, out, width); break;
            default: one_panel(4, from, x_stride, panel, in, add, to, out, width);
            }
        }
    }
}

// ── attention ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

static inline float total(lanes v)
{
    typedef float eight __attribute__((vector_size(32)));
    typedef float four __attribute__((vector_size(16)));
    eight a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    four b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
    return (b[0] + b[1]) + (b[2] + b[3]);
}

static inline lanes choose(whole where, lanes yes, lanes no)  // lane by lane, as where is all ones or zero
{
    return (lanes)((where & (whole)yes) | (~where & (whole)no));
}

// e^x for x <= 0: 2^n by the exponent's bits, e^f, |f| <= ln(2) / 2, by its Taylor series; ln(2) in two parts, so that f is exact (Cody
// and Waite). Below -87 it stays at 2^-126.
static inline lanes exponential(lanes x)
{
    x = choose(x < -87.0f, (lanes){0} - 87.0f, x);
    whole n = __builtin_convertvector(x * 1.44269504f - 0.5f, whole);
    lanes steps = __builtin_convertvector(n, lanes), f = (x - steps * 0.693145752f) - steps * 1.42860677e-6f;
    lanes sum = 1.0f + f * (1.0f + f * (0.5f + f * (1.6666667e-1f + f * (4.1666668e-2f + f * (8.3333338e-3f + f * 1.3888889e-3f)))));
    return sum * (lanes)((n + 127) << 23);
}

static inline lanes soft_cap(lanes scores, float cap)  // cap * tanh(score / cap)
{
    lanes x = scores * (2.0f / cap), low = choose(x > 0.0f, -x, x);
    lanes e = exponential(low), tanh = (1.0f - e) / (1.0f + e);
    return cap * choose(x > 0.0f, tanh, -tanh);
}

// One layer, and its part of the pool. Keys and values lie as [blocks, kv_heads, size, dim].
typedef struct {
    float *keys, *values;
    int64_t heads, kv_heads, size, dim, window;  // window 0: none
    float scale, cap;                            // cap 0: none
} layer;

// One step: where the keys and values of its tokens go, counted in tokens; and its decode rows, which are the first of these tokens: row r
// stands at position last[r] of a sequence whose blocks are table[r, columns].
typedef struct {
    const int64_t *places;
    const int32_t *table, *last;
    int64_t tokens, rows, columns, threads;
} step;

// Softmax block by block, rescaled when a greater score comes (Milakov and Gimelshein, 2018): the running sums of one query.
typedef struct {
    float most, weight;
    lanes sums[MOST_DIM / LANES];
} state;

// Takes the scores [low, high) of a block into the running maximum and weight, and turns them into weights.
static inline void weigh(const layer *s, state *one, lanes *scores, int low, int high)
{
    const int count = (int)(s->size / LANES);
    float best = one->most;
    if (s->cap > 0.0f)
        for (int w = 0; w < count; w++)
            scores[w] = soft_cap(scores[w], s->cap);
    for (int t = low; t < high; t++)
        best = ((const float *)scores)[t] > best ? ((const float *)scores)[t] : best;
    lanes sum = {0};
    for (int w = 0; w < count; w++) {
        const whole place = (whole){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + w * LANES;
        scores[w] = choose((place >= low) & (place < high), exponential(scores[w] - best), (lanes){0});
        sum += scores[w];
    }
    if (best > one->most) {
        const float shrink = exponential((lanes){0} + (one->most - best))[0];
        one->weight *= shrink;
        for (int w = 0; w < s->dim / LANES; w++)
            one->sums[w] *= shrink;
        one->most = best;
    }
    one->weight += total(sum);
}

// The queries of one row that share a key head, [group, dim], over positions up to `last`. `wide` vectors make a head's dimension; where
// it is known at compile time, sums stay in registers. The next block is fetched while this one is used: blocks lie anywhere, and a
// machine's own prefetching stops at the end of a page.
static inline __attribute__((always_inline)) void one_group(
    const int wide, const layer *s, const float *sinks, const float *q, const int32_t *table, int64_t last, int64_t kv_head, float *out)
{
    const int group = (int)(s->heads / s->kv_heads), dim = wide * LANES;
    const int64_t first = s->window && last >= s->window ? last - s->window + 1 : 0, end = last / s->size;
    lanes scores[MOST_GROUP][MOST_BLOCK / LANES];
    state states[MOST_GROUP];
    for (int h = 0; h < group; h++) {
        states[h].most = sinks ? sinks[kv_head * group + h] : -FLT_MAX;
        states[h].weight = sinks ? 1.0f : 0.0f;
        for (int w = 0; w < wide; w++)
            states[h].sums[w] = (lanes){0};
    }
    for (int64_t block = first / s->size; block <= end; block++) {
        const int64_t base = block * s->size, at = (table[block] * s->kv_heads + kv_head) * s->size;
        const int64_t next = block < end ? (table[block + 1] * s->kv_heads + kv_head) * s->size : at;
        const int low = first > base ? (int)(first - base) : 0, high = last - base < s->size ? (int)(last - base) + 1 : (int)s->size;
        for (int h = 0; h < group; h++)
            for (int w = 0; w < s->size / LANES; w++)
                scores[h][w] = (lanes){0};
        for (int t = low; t < high; t++) {
            const loose *key = (const loose *)(s->keys + (at + t) * dim);
            for (int w = 0; w < wide; w++) {
                __builtin_prefetch(s->keys + (next + t) * dim + w * LANES);
                __builtin_prefetch(s->values + (next + t) * dim + w * LANES);
            }
            for (int h = 0; h < group; h++) {
                const loose *query = (const loose *)(q + h * dim);
                lanes sum = {0};
                for (int w = 0; w < wide; w++)
                    sum += query[w] * key[w];
                ((float *)scores[h])[t] = total(sum) * s->scale;
            }
        }
        for (int h = 0; h < group; h++) {
            weigh(s, &states[h], scores[h], low, high);
            lanes sums[MOST_DIM / LANES];
            for (int w = 0; w < wide; w++)
                sums[w] = states[h].sums[w];
            for (int t = low; t < high; t++) {
                const loose *value = (const loose *)(s->values + (at + t) * dim);
                for (int w = 0; w < wide; w++)
                    sums[w] += ((const float *)scores[h])[t] * value[w];
            }
            for (int w = 0; w < wide; w++)
                states[h].sums[w] = sums[w];
        }
    }
    for (int h = 0; h < group; h++)
        for (int w = 0; w < wide; w++)
            ((loose *)(out + h * dim))[w] = states[h].sums[w] / states[h].weight;
}

static inline void store(const layer *s, float *pool, int64_t place, const float *from)
{
    for (int64_t h = 0; h < s->kv_heads; h++)
        memcpy(pool + ((place / s->size * s->kv_heads + h) * s->size + place % s->size) * s->dim, from + h * s->dim, 4 * s->dim);
}

// Stores k and v [tokens, kv_heads, dim] of all tokens, then attends with q [rows, heads, dim] of the decode rows; sinks [heads] may be
// null. Tokens of q, k and v lie their stride apart, in floats; out [rows, heads, dim] has no gaps.
void penstock_attend(
    const layer *s, const step *at, const float *q, int64_t q_stride, const float *k, int64_t k_stride, const float *v, int64_t v_stride,
    const float *sinks, float *out)
{
    const int64_t width = s->heads / s->kv_heads * s->dim;
#pragma omp parallel num_threads(at->threads)
    {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < at->tokens; t++) {
            store(s, s->keys, at->places[t], k + t * k_stride);
            store(s, s->values, at->places[t], v + t * v_stride);
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < at->rows * s->kv_heads; i++) {
            const int64_t row = i / s->kv_heads, kv_head = i % s->kv_heads;
            const float *from = q + row * q_stride + kv_head * width;
            const int32_t *table = at->table + row * at->columns;
            switch (s->dim) {
            case 64: one_group(4, s, sinks, from, table, at->last[row], kv_head, out + i * width); break;
            case 128: one_group(8, s, sinks, from, table, at->last[row], kv_head, out + i * width); break;
            default: one_group((int)(s->dim / LANES), s, sinks, from, table, at->last[row], kv_head, out + i * width);
            }
        }
    }
}

// ── adapters ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

enum { RANKS = 16, MOST_SLICES = 3 };

typedef struct {  // pages of adapters, page floats apart; used[page * sites + site]: rank rows that are not zero
    const float *data;
    int64_t page;
    const int32_t *used;
    int64_t sites;
} pool;

typedef struct {  // where a group of products lies in a page: A [slices * RANKS, size] at a, each slice's B [RANKS, out] at b
    int64_t a, size, slices, site, b[MOST_SLICES], outs[MOST_SLICES];
} group;

typedef struct {  // token t has the pages [firsts[t], firsts[t] + counts[t]) of pages
    const int32_t *firsts, *counts, *pages;
    int64_t tokens, threads;
} adapted;

static inline float dot(const float *x, const float *y, int64_t size)
{
    lanes sums[2] = {0};
    int64_t k = 0;
    for (; k + 2 * LANES <= size; k += 2 * LANES) {
        sums[0] += *(const loose *)(x + k) * *(const loose *)(y + k);
        sums[1] += *(const loose *)(x + k + LANES) * *(const loose *)(y + k + LANES);
    }
    float sum = total(sums[0] + sums[1]);
    for (; k < size; k++)
        sum += x[k] * y[k];
    return sum;
}

// y[out] += ranks[n] @ b[n, out]
static inline void expand(const float *ranks, int n, const float *b, float *y, int64_t out)
{
    int64_t j = 0;
    for (; j + LANES <= out; j += LANES) {
        lanes sum = *(loose *)(y + j);
        for (int r = 0; r < n; r++)
            sum += ranks[r] * *(const loose *)(b + r * out + j);
        *(loose *)(y + j) = sum;
    }
    for (; j < out; j++)
        for (int r = 0; r < n; r++)
            y[j] += ranks[r] * b[r * out + j];
}

// y[tokens, sum(outs)] += (x @ A.T) @ B, A and B those of each token's pages; rows of x and y lie their stride apart, in floats.
void penstock_adapt(const pool *from, const group *g, const adapted *at, const float *x, int64_t x_stride, float *y, int64_t y_stride)
{
#pragma omp parallel for schedule(dynamic) num_threads(at->threads) if (at->tokens > 1)
    for (int64_t t = 0; t < at->tokens; t++) {
        const int32_t *pages = at->pages + at->firsts[t];
        float *to = y + t * y_stride;
        for (int64_t slice = 0; slice < g->slices; to += g->outs[slice++])
            for (int32_t i = 0; i < at->counts[t]; i++) {
                const float *page = from->data + pages[i] * from->page, *a = page + g->a + slice * RANKS * g->size;
                const int n = from->used[pages[i] * from->sites + g->site + slice];
                float ranks[RANKS];
                for (int r = 0; r < n; r++)
                    ranks[r] = dot(x + t * x_stride, a + r * g->size, g->size);
                if (n)
                    expand(ranks, n, page + g->b[slice], to, g->outs[slice]);
            }
    }
}
