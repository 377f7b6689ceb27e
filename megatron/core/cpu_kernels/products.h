/* bfloat16 products with float sums by torch's own micro-kernels, in blocks of a few fixed shapes.

   torch compiles a product for every new number of rows, which takes as long as the product of
   1000; here that number changes no shape. Columns and depths are multiples of 32. The left operand
   lies row by row, the right one in panels: WIDTH columns, pairs along the depth together. */

#pragma once

#ifndef BF16
#error "products are of bfloat16"
#endif

#include <stdlib.h>

#include <new>

#include "vectors.h"

namespace c10 {
struct BFloat16 {
    uint16_t bits;
};
enum class ScalarType : int8_t { BFloat16 = 15 };
}
namespace at::native::cpublas {
void brgemm(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add,
            const c10::BFloat16 *A, const c10::BFloat16 *B, float *C, bool is_vnni);
void brgemm_release(bool is_vnni);
bool could_pack(c10::ScalarType type);
}

#define BLOCK 128
#define LEAST_BLOCK 16
#define WIDTH 128
#define DEPTH 512
#define SLAB 1024 /* rows that a weight gradient sums over at a time */

/* Whether this processor multiplies bfloat16 in these panels; torch's own paths do not. */
static inline bool can_multiply()
{
    return at::native::cpublas::could_pack(c10::ScalarType::BFloat16);
}

static inline void done_multiplying() { at::native::cpublas::brgemm_release(true); }

/* Memory that the next call uses again: fresh memory would be mapped anew in each. */
class Room {
  public:
    ~Room() { free(start_); }

    /* As many Ts; what was asked for before is gone. */
    template <class T> T *of(int64_t count)
    {
        int64_t bytes = (count * (int64_t)sizeof(T) + 63) & ~(int64_t)63;
        if (bytes > bytes_) {
            free(start_);
            bytes_ = 0;
            start_ = aligned_alloc(64, bytes);
            if (!start_)
                throw std::bad_alloc();
            bytes_ = bytes;
        }
        return (T *)start_;
    }

  private:
    void *start_ = nullptr;
    int64_t bytes_ = 0;
};

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t rounded_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

/* Half of the lanes of a and b, so that LOG2(LANES) rounds of it turn a square around. */
template <int STEP, bool SECOND> WITHIN bits half_of(bits a, bits b)
{
    bits picked = {};
#if defined(__clang__)
    for (int lane = 0; lane < LANES; lane++)
        picked[lane] = lane & STEP ? b[SECOND ? lane : lane - STEP] : a[SECOND ? lane + STEP : lane];
#else
    mask where = {};
    for (int lane = 0; lane < LANES; lane++)
        where[lane] = lane & STEP ? LANES + (SECOND ? lane : lane - STEP)
                                  : (SECOND ? lane + STEP : lane);
    picked = __builtin_shuffle(a, b, where);
#endif
    return picked;
}

template <int STEP> WITHIN void turn_by(bits *square)
{
    for (int i = 0; i < LANES; i++)
        if (!(i & STEP)) {
            bits a = square[i], b = square[i + STEP];
            square[i] = half_of<STEP, false>(a, b);
            square[i + STEP] = half_of<STEP, true>(a, b);
        }
}

/* Turn LANES x LANES pairs around. */
WITHIN void turn(bits *square)
{
#if LANES >= 16
    turn_by<8>(square);
#endif
#if LANES >= 8
    turn_by<4>(square);
#endif
    turn_by<2>(square);
    turn_by<1>(square);
}

/* LANES pairs: of row k and the next, zeros for those from count on. */
WITHIN bits pairs(const number *from, int64_t stride, int64_t k, int64_t count)
{
    half_bits low = {}, high = {};
    if (k < count)
        memcpy(&low, from + k * stride, sizeof low);
    if (k + 1 < count)
        memcpy(&high, from + (k + 1) * stride, sizeof high);
    return __builtin_convertvector(low, bits) | (__builtin_convertvector(high, bits) << 16);
}

/* Panels of WIDTH columns of [rows, columns], zeros from rows to depth. */
static void pack(const number *from, int64_t stride, int64_t rows, int64_t depth, int64_t columns,
                 number *to)
{
    for (int64_t n = 0; n < columns; n += WIDTH) {
        int64_t width = least(WIDTH, columns - n);
        for (int64_t k = 0; k < depth; k += 2)
            for (int64_t i = 0; i < width; i += LANES) {
                bits x = pairs(from + n + i, stride, k, rows);
                memcpy(to + n * depth + k * width + i * 2, &x, sizeof x);
            }
    }
}

/* Panels of WIDTH columns of the transpose of [columns, depth]. */
static void pack_transposed(const number *from, int64_t stride, int64_t depth, int64_t columns,
                            number *to)
{
    for (int64_t n = 0; n < columns; n += WIDTH) {
        int64_t width = least(WIDTH, columns - n);
        for (int64_t i = 0; i < width; i += LANES)
            for (int64_t k = 0; k < depth; k += 2 * LANES) {
                bits square[LANES];
                for (int64_t j = 0; j < LANES; j++)
                    memcpy(&square[j], from + (n + i + j) * stride + k, sizeof(bits));
                turn(square);
                for (int64_t j = 0; j < LANES; j++)
                    memcpy(to + n * depth + (k + j * 2) * width + i * 2, &square[j],
                           sizeof(bits));
            }
    }
}

/* The transpose [columns, depth] of [rows, columns], zeros from rows to depth. */
static void transpose(const number *from, int64_t stride, int64_t rows, int64_t depth,
                      int64_t columns, number *to)
{
    const int64_t line = 64 / sizeof(number); /* both halves while it is in the cache */
    for (int64_t first = 0; first < columns; first += line)
        for (int64_t k = 0; k < depth; k += 2 * LANES)
            for (int64_t i = first; i < least(first + line, columns); i += LANES) {
                bits square[LANES];
                for (int64_t j = 0; j < LANES; j++)
                    square[j] = pairs(from + i, stride, k + j * 2, rows);
                turn(square);
                for (int64_t j = 0; j < LANES; j++)
                    memcpy(to + (i + j) * depth + k, &square[j], sizeof(bits));
            }
}

static inline void block_product(int64_t rows, int64_t width, int64_t depth, const number *left,
                                 int64_t left_stride, const number *panel, float *out,
                                 int64_t out_stride, bool add)
{
    typedef const c10::BFloat16 *operand;
    at::native::cpublas::brgemm(rows, width, depth, left_stride, width, out_stride, add,
                                (operand)left, (operand)panel, out, true);
}

/* The largest power of two that fits, at most `limit`: so blocks have few shapes. */
static inline int64_t fitting(int64_t left, int64_t limit)
{
    while (limit > left)
        limit /= 2;
    return limit;
}

/* out [rows, columns] = left [rows, depth] times packed panels; rows are a multiple of LEAST_BLOCK. */
static void product(int64_t rows, int64_t columns, int64_t depth, const number *left,
                    int64_t left_stride, const number *panels, float *out)
{
    for (int64_t n = 0; n < columns; n += WIDTH)
        for (int64_t m = 0, block; m < rows; m += block) {
            block = fitting(rows - m, BLOCK);
            block_product(block, least(WIDTH, columns - n), depth, left + m * left_stride,
                          left_stride, panels + n * depth, out + m * columns + n, columns, false);
        }
}

/* sum [heights, columns] += left^T right, of [rows, heights] and [rows, columns]. */
static void add_product(int64_t rows, int64_t heights, int64_t columns, const number *left,
                        int64_t left_stride, const number *right, int64_t right_stride, float *sum,
                        int64_t sum_stride)
{
    static thread_local Room turned_room, panels_room;
    for (int64_t start = 0; start < rows; start += SLAB) {
        int64_t count = least(SLAB, rows - start), depth = rounded_up(count, 32);
        number *turned = turned_room.of<number>(depth * heights);
        number *panels = panels_room.of<number>(depth * columns);
        transpose(left + start * left_stride, left_stride, count, depth, heights, turned);
        pack(right + start * right_stride, right_stride, count, depth, columns, panels);
        for (int64_t n = 0; n < columns; n += WIDTH)
            for (int64_t m = 0, block; m < heights; m += block) {
                int64_t width = least(WIDTH, columns - n);
                block = fitting(heights - m, BLOCK);
                for (int64_t k = 0, some; k < depth; k += some) {
                    some = fitting(depth - k, DEPTH);
                    block_product(block, width, some, turned + m * depth + k, depth,
                                  panels + n * depth + k * width, sum + m * sum_stride + n,
                                  sum_stride, true);
                }
            }
    }
}
