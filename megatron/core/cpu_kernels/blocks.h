// Vectors of 16 numbers, rows that are read and written with their rotation, and products of blocks.
//
// bf16 products want their second factor in pairs of rows (VNNI): element (row, column) lies at
// [row / 2][column][row % 2]. A pair is one word of 32 bits, and so is one fp32 number: "words"
// below are either, so that both dtypes are packed by the same code.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace c10 {
struct BFloat16 {
  uint16_t bits;
};
}  // namespace c10

// Exported by libtorch_cpu: C [M, N] (+)= A [M, K] B [K, N], in fp32.
namespace at::native::cpublas {
void brgemm(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add,
            const c10::BFloat16* A, const c10::BFloat16* B, float* C, bool pairs);
void brgemm(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add,
            const float* A, const float* B, float* C, bool pairs);
void brgemm_release(bool pairs);
}  // namespace at::native::cpublas

namespace {

using bf16 = c10::BFloat16;
typedef float V __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));
typedef int32_t N __attribute__((vector_size(64)));
typedef uint16_t Half __attribute__((vector_size(32)));
typedef uint16_t WordPairs __attribute__((vector_size(64)));

constexpr int64_t LANES = 16;
constexpr int64_t BLOCK = 64;  // queries and keys of a block; more columns no packed product takes
constexpr int64_t WIDEST = 256;  // channels of a head

template <class T>
constexpr int64_t PER_WORD = 4 / sizeof(T);

inline V load(const float* from) {
  V x;
  memcpy(&x, from, sizeof x);
  return x;
}

inline U load_words(const bf16* from) {
  Half x;
  memcpy(&x, from, sizeof x);
  return __builtin_convertvector(x, U);
}

inline V load(const bf16* from) { return (V)(load_words(from) << 16); }

inline void store(float* to, V x) { memcpy(to, &x, sizeof x); }

// To nearest even, in the upper half of each word.
inline U rounded(V x) {
  U bits = (U)x;
  return bits + 0x7fff + ((bits >> 16) & 1);
}

inline void store(bf16* to, V x) {
#ifdef __AVX512BF16__
  auto kept = _mm512_cvtneps_pbh((__m512)x);
#else
  Half kept = __builtin_convertvector(rounded(x) >> 16, Half);
#endif
  memcpy(to, &kept, sizeof kept);
}

// Two rows as the second factor of a product: words of pairs, or one row after the other.
inline void store_pair(bf16* to, int64_t, V first, V second) {
#ifdef __AVX512BF16__
  auto both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  static const __m512i ORDER = (__m512i)WordPairs{0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,
                                                  21, 6, 22, 7, 23, 8,  24, 9,  25, 10, 26,
                                                  11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  auto words = _mm512_permutexvar_epi16(ORDER, both);
#else
  U words = (rounded(first) >> 16) | (rounded(second) & 0xffff0000u);
#endif
  memcpy(to, &words, sizeof words);
}

inline void store_pair(float* to, int64_t columns, V first, V second) {
  store(to, first);
  store(to + columns, second);
}

inline void copy_pair(const bf16* first, const bf16* second, bf16* to, int64_t) {
  U words = load_words(first) | (load_words(second) << 16);
  memcpy(to, &words, sizeof words);
}

inline void copy_pair(const float* first, const float* second, float* to, int64_t columns) {
  store(to, load(first));
  store(to + columns, load(second));
}

// 2 ** x, exactly 0 below -127; NaN stays. A polynomial of degree 6 on [-1/2, 1/2], off by 1e-7.
inline V exp2(V x) {
  x = x < -127.0f ? V{} - 127.0f : x;
  V shifted = x + 12582912.0f;  // 1.5 * 2 ** 23: the whole number lies in the last bits
  V f = x - (shifted - 12582912.0f);
  V p = f * 1.54035304e-4f + 1.33335581e-3f;
  p = p * f + 9.61812911e-3f;
  p = p * f + 5.55041087e-2f;
  p = p * f + 2.40226507e-1f;
  p = p * f + 6.93147181e-1f;
  p = p * f + 1.0f;
  N power = ((N)shifted - 0x4b400000 + 127) << 23;
  return p * (V)power;
}

inline float sum(V x) {
  float total = 0.0f;
  for (int64_t i = 0; i < LANES; i++) total += x[i];
  return total;
}

// Interleave: a0 b0 a1 b1 .. of the lower or upper halves.
#ifdef __clang__
#define LOWER(a, b) \
  __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define UPPER(a, b) \
  __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#else
#define LOWER(a, b) \
  __builtin_shuffle(a, b, U{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23})
#define UPPER(a, b) \
  __builtin_shuffle(a, b, U{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31})
#endif

inline void turn_square(const uint32_t* from, int64_t from_row, uint32_t* to, int64_t to_row) {
  U a[16], b[16];
  for (int i = 0; i < 16; i++) memcpy(&a[i], from + i * from_row, sizeof(U));
  for (int stage = 0; stage < 4; stage++) {  // a card trick: four perfect shuffles of 16 rows
    for (int i = 0; i < 8; i++) {
      b[2 * i] = LOWER(a[i], a[i + 8]);
      b[2 * i + 1] = UPPER(a[i], a[i + 8]);
    }
    memcpy(a, b, sizeof a);
  }
  for (int i = 0; i < 16; i++) memcpy(to + i * to_row, &a[i], sizeof(U));
}

// Words [rows, columns] -> [columns, rows]; ``rows`` is a multiple of 16.
__attribute__((noinline)) void turn(const void* from, int64_t from_row, void* to, int64_t to_row, int64_t rows,
                 int64_t columns) {
  auto in = static_cast<const uint32_t*>(from);
  auto out = static_cast<uint32_t*>(to);
  for (int64_t i = 0; i < rows; i += 16) {
    const int64_t whole = columns / 16 * 16;
    for (int64_t j = 0; j < whole; j += 16)
      turn_square(in + i * from_row + j, from_row, out + j * to_row + i, to_row);
    for (int64_t j = whole; j < columns; j++)
      for (int64_t k = i; k < i + 16; k++) out[j * to_row + k] = in[k * from_row + j];
  }
}

// Rows [rows, columns] as the second factor of products: panels of ``panel`` columns, the last one
// narrower, each [rows / 2][width][2]; of fp32 [rows][width].
template <class T>
void pair_rows(const T* from, T* to, int64_t rows, int64_t columns, int64_t panel) {
  for (int64_t first = 0; first < columns; first += panel) {
    int64_t width = columns - first < panel ? columns - first : panel;
    for (int64_t i = 0; i < rows; i += 2)
      for (int64_t j = 0; j < width; j += LANES) {
        const T* at = from + i * columns + first + j;
        copy_pair(at, at + columns, to + first * rows + i * width + PER_WORD<T> * j, width);
      }
  }
}

// Element (position, sample, group, head of the group) of a tensor; steps in elements.
struct View {
  void* at;
  int64_t s, b, g, r;

  template <class T>
  T* head(int64_t sample, int64_t group, int64_t number) const {
    return static_cast<T*>(at) + sample * b + group * g + number * r;
  }
};

// x * cos + swapped(x) * sin by position, see RotaryTables; ``cos`` null rotates nothing.
struct Rotation {
  const void* cos;
  const void* sin;
  int64_t half, interleaved;

  template <class T>
  void turn_row(float* x, int64_t channels, int64_t position, float sign) const {
    if (cos == nullptr) return;
    auto cosines = static_cast<const T*>(cos) + position * channels;
    auto sines = static_cast<const T*>(sin) + position * channels;
    if (!interleaved && half % LANES == 0) {
      for (int64_t i = 0, j = half; i < half; i += LANES, j += LANES) {
        V first = load(x + i), second = load(x + j);
        store(x + i, first * load(cosines + i) + second * (sign * load(sines + i)));
        store(x + j, second * load(cosines + j) + first * (sign * load(sines + j)));
      }
      return;
    }
    float c[WIDEST], s[WIDEST], was[WIDEST];
    for (int64_t i = 0; i < channels; i += LANES) {
      store(c + i, load(cosines + i));
      store(s + i, sign * load(sines + i));
      store(was + i, load(x + i));
    }
    if (interleaved) {
      for (int64_t i = 0; i < 2 * half; i += 2) {
        x[i] = was[i] * c[i] + was[i + 1] * s[i];
        x[i + 1] = was[i + 1] * c[i + 1] + was[i] * s[i + 1];
      }
    } else {
      for (int64_t i = 0; i < half; i++) x[i] = was[i] * c[i] + was[i + half] * s[i];
      for (int64_t i = half; i < 2 * half; i++) x[i] = was[i] * c[i] + was[i - half] * s[i];
    }
  }
};

// Fetch a later one of the ``left`` rows from ``at``: they lie on pages of their own, and nothing
// else sees them coming.
template <bool WRITES = false, class T>
inline void prefetch_row(const T* at, int64_t row, int64_t channels, int64_t left) {
  constexpr int64_t AHEAD = 12;
  for (int64_t j = 0; j < channels && left > AHEAD; j += 64 / sizeof(T))
    __builtin_prefetch(at + AHEAD * row + j, WRITES);
}

// Rows ``first`` to ``first + count`` of ``from``, rotated, side by side in ``to``; then zeros up to
// ``padded`` rows.
template <class T>
void read_rows(const T* from, int64_t row, int64_t channels, int64_t first, int64_t count,
               int64_t padded, const Rotation& rotation, T* to) {
  float x[WIDEST];
  for (int64_t i = 0; i < count; i++) {
    const T* at = from + (first + i) * row;
    prefetch_row(at, row, channels, count - i);
    if (rotation.cos == nullptr) {
      for (int64_t j = 0; j < channels; j += 16) memcpy(to + i * channels + j, at + j, 16 * sizeof(T));
      continue;
    }
    for (int64_t j = 0; j < channels; j += LANES) store(x + j, load(at + j));
    rotation.turn_row<T>(x, channels, first + i, 1.0f);
    for (int64_t j = 0; j < channels; j += LANES) store(to + i * channels + j, load(x + j));
  }
  memset(to + count * channels, 0, (padded - count) * channels * sizeof(T));
}

// Write scale * rows, turned back, over rows ``first`` to ``first + count`` of ``to``.
template <class T>
void write_rows(const float* from, float scale, int64_t channels, int64_t first, int64_t count,
                const Rotation& rotation, T* to, int64_t row) {
  float x[WIDEST];
  for (int64_t i = 0; i < count; i++) {
    prefetch_row<true>(to + (first + i) * row, row, channels, count - i);
    for (int64_t j = 0; j < channels; j += LANES)
      store(x + j, scale * load(from + i * channels + j));
    rotation.turn_row<T>(x, channels, first + i, -1.0f);
    for (int64_t j = 0; j < channels; j += LANES) store(to + (first + i) * row + j, load(x + j));
  }
}

inline void product(int64_t rows, int64_t columns, int64_t inner, const bf16* a, int64_t a_row,
                    const bf16* b, int64_t b_row, float* c, int64_t c_row, bool add) {
  at::native::cpublas::brgemm(rows, columns, inner, a_row, b_row, c_row, add, a, b, c, true);
}

inline void product(int64_t rows, int64_t columns, int64_t inner, const float* a, int64_t a_row,
                    const float* b, int64_t b_row, float* c, int64_t c_row, bool add) {
  at::native::cpublas::brgemm(rows, columns, inner, a_row, b_row, c_row, add, a, b, c, false);
}

// Memory of this thread, kept from call to call. ``take`` first counts (``base`` null), then gives.
struct Arena {
  char* base = nullptr;
  int64_t used = 0;

  template <class T>
  void take(T*& to, int64_t count) {
    to = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (count * int64_t(sizeof(T)) + 191) / 64 * 64;  // a line more: no two at one set
  }
};

struct Memory {
  char* at = nullptr;
  int64_t size = 0;

  char* of_size(int64_t wanted) {
    if (wanted > size) {
      free(at);
      size = 0;
      at = static_cast<char*>(aligned_alloc(64, (wanted + 63) / 64 * 64));
      if (at == nullptr) throw std::bad_alloc();
      size = wanted;
    }
    return at;
  }
  ~Memory() { free(at); }
};

}  // namespace
