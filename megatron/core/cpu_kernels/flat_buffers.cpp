/* What an optimizer step does to flat buffers, each in one pass over memory: AdamW with the rounding
   of weights to bf16, the sum of squares, zeros.

   Threads share the blocks. An element's result depends on nothing but that element, so buffers may be cut anywhere; compiled
   without contraction to fused multiply-add, it is the same bits on every processor. Sums are taken
   in fp64, row by row, in one order. The passes wait for memory: what comes is asked for early, and
   what is only written goes past the cache. */

#include <cstdint>
#include <cstring>
#include <vector>

#include "parallel.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define BF16 /* what weights are rounded to */
#include "registers.h"

typedef float half_wide __attribute__((vector_size(2 * LANES)));
typedef double doubles __attribute__((vector_size(4 * LANES)));

static const int64_t BLOCK = 1 << 16; /* numbers: what threads share is cut between them */
static const int64_t AHEAD = 512; /* numbers: two of the pages that a processor fetches by itself */

extern "C" {

/* Numbers of one step; see torch.optim.AdamW for their names. */
struct Constants {
    float grad_factor;     /* 1 / what gradients are divided by */
    float kept;            /* of a weight: 1 - lr * weight_decay */
    float new_share1;      /* 1 - beta1 */
    float beta2;
    float new_share2;      /* 1 - beta2 */
    float root_factor;     /* 1 / sqrt(1 - beta2^step) */
    float eps;
    float step_size;       /* lr / (1 - beta1^step) */
};
}

namespace {

WITHIN wide load(const float *from)
{
    wide x;
    memcpy(&x, from, sizeof x);
    return x;
}

WITHIN void store(float *to, wide x) { memcpy(to, &x, sizeof x); }

WITHIN wide root(wide x)
{
#if LANES == 16
    return (wide)_mm512_sqrt_ps((__m512)x);
#elif LANES == 8
    return (wide)_mm256_sqrt_ps((__m256)x);
#else
    wide y;
    for (int i = 0; i < LANES; i++)
        y[i] = __builtin_sqrtf(x[i]);
    return y;
#endif
}

/* Write past the cache, to an address that is a multiple of the size. */
template <typename Vector> WITHIN void stream(void *to, Vector x)
{
#if defined(__AVX__)
    if constexpr (sizeof x == 64) {
        __m256i parts[2];
        memcpy(parts, &x, sizeof x);
        _mm256_stream_si256((__m256i *)to, parts[0]);
        _mm256_stream_si256((__m256i *)to + 1, parts[1]);
        return;
    } else if constexpr (sizeof x == 32) {
        __m256i part;
        memcpy(&part, &x, sizeof x);
        _mm256_stream_si256((__m256i *)to, part);
        return;
    }
#endif
#if defined(__SSE2__)
    if constexpr (sizeof x == 16) {
        __m128i part;
        memcpy(&part, &x, sizeof x);
        _mm_stream_si128((__m128i *)to, part);
        return;
    }
#endif
    memcpy(to, &x, sizeof x);
}

WITHIN void settle_streams()
{
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

WITHIN void update(wide grad, wide &weight, wide &first, wide &second, const Constants &c)
{
    grad *= c.grad_factor;
    first += c.new_share1 * (grad - first);
    second = c.beta2 * second + c.new_share2 * grad * grad;
    wide denominator = root(second) * c.root_factor + c.eps;
    weight = weight * c.kept - c.step_size * first / denominator;
}

enum class Rounded { nowhere, cached, streamed };

template <Rounded where>
void step(float *weight, const float *grad, float *first, float *second, uint16_t *rounded,
          int64_t count, const Constants &c)
{
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        __builtin_prefetch(grad + i + AHEAD);
        __builtin_prefetch(weight + i + AHEAD, 1);
        __builtin_prefetch(first + i + AHEAD, 1);
        __builtin_prefetch(second + i + AHEAD, 1);
        wide w = load(weight + i), m = load(first + i), v = load(second + i);
        update(load(grad + i), w, m, v, c);
        store(weight + i, w);
        store(first + i, m);
        store(second + i, v);
        if constexpr (where == Rounded::streamed) {
            stream(rounded + i, narrow(w));
        } else if constexpr (where == Rounded::cached) {
            half_bits r = narrow(w);
            memcpy(rounded + i, &r, sizeof r);
        }
    }
    if (i < count) { /* the same arithmetic on a part of a register */
        wide g = {}, w = {}, m = {}, v = {};
        size_t size = (count - i) * sizeof(float);
        memcpy(&g, grad + i, size), memcpy(&w, weight + i, size);
        memcpy(&m, first + i, size), memcpy(&v, second + i, size);
        update(g, w, m, v, c);
        memcpy(weight + i, &w, size), memcpy(first + i, &m, size), memcpy(second + i, &v, size);
        half_bits r = narrow(w);
        if (where != Rounded::nowhere)
            memcpy(rounded + i, &r, size / 2);
    }
    settle_streams();
}

WITHIN doubles squares(const float *from)
{
    half_wide x;
    memcpy(&x, from, sizeof x);
    doubles y = __builtin_convertvector(x, doubles);
    return y * y;
}

double sum_row(const float *row, int64_t count)
{
    const int64_t part = LANES / 2;
    doubles sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * part <= count; i += 4 * part) {
        for (int64_t ahead = 0; ahead < 4 * part; ahead += 16)
            __builtin_prefetch(row + i + 2 * AHEAD + ahead);
        for (int k = 0; k < 4; k++)
            sums[k] += squares(row + i + k * part);
    }
    doubles all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    double total = 0.0;
    for (int k = 0; k < part; k++)
        total += all[k];
    for (; i < count; i++)
        total += (double)row[i] * row[i];
    return total;
}

/* Call work(at, size) for parts of whole blocks, one a thread. */
template <typename Work> void over_blocks(int64_t count, const Work &work)
{
    in_parallel((count + BLOCK - 1) / BLOCK, 1, [&](int64_t begin, int64_t end) {
        int64_t last = end * BLOCK < count ? end * BLOCK : count;
        work(begin * BLOCK, last - begin * BLOCK);
    });
}

} // namespace

extern "C" {

/* One step of AdamW; ``rounded``, unless it is null, gets the new weights in bf16. */
void adamw(float *weight, const float *grad, float *first, float *second, uint16_t *rounded,
           int64_t count, const Constants *c)
{
    over_blocks(count, [=](int64_t at, int64_t size) {
        float *w = weight + at, *m = first + at, *v = second + at;
        uint16_t *r = rounded ? rounded + at : nullptr;
        if (!rounded)
            step<Rounded::nowhere>(w, grad + at, m, v, r, size, *c);
        else if ((uintptr_t)r % sizeof(half_bits))
            step<Rounded::cached>(w, grad + at, m, v, r, size, *c);
        else
            step<Rounded::streamed>(w, grad + at, m, v, r, size, *c);
    });
}

/* The sum of squares, in fp64: of rows, of the rows of a block, of blocks. */
double sum_of_squares(const float *x, int64_t count)
{
    const int64_t row = 1024;
    std::vector<double> sums((count + BLOCK - 1) / BLOCK);
    double *of_block = sums.data(), total = 0.0;
    in_parallel((int64_t)sums.size(), 1, [=](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; block++)
            for (int64_t i = block * BLOCK; i < count && i < (block + 1) * BLOCK; i += row)
                of_block[block] += sum_row(x + i, count - i < row ? count - i : row);
    });
    for (double sum : sums)
        total += sum;
    return total;
}

void fill_zero(float *x, int64_t count)
{
    over_blocks(count, [=](int64_t at, int64_t size) {
        float *to = x + at;
        int64_t i = 0;
        wide zero = {};
        for (; i < size && (uintptr_t)(to + i) % sizeof zero; i++)
            to[i] = 0.0f;
        for (; i + LANES <= size; i += LANES)
            stream(to + i, zero);
        for (; i < size; i++)
            to[i] = 0.0f;
        settle_streams();
    });
}
}
