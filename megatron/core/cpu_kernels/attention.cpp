// Causal attention of grouped queries, forward and backward, in blocks; weights are never kept.
//
// Scores lie transposed, [keys, 64 queries]: the softmax then goes down columns, and what comes out
// is the second factor of the next product as it stands. Each group of a sample is computed alone
// and in one order, so its bits depend on nothing beside it.
//
// Source: Dao 2023 (arXiv:2307.08691), for weights that backward makes again from the logarithm of
// their sum.
#include <atomic>

#include "blocks.h"
#include "parallel.h"

namespace {

// The same fields, in the same order, as _Task in attention.py.
struct Task {
  View q, k, v, out, d_out, dq, dk, dv;
  float* lse;  // [b, groups, heads, s], of scores times scale, in powers of two
  Rotation rotation;
  int64_t b, groups, heads, s, d, e, window;
  double scale;

  int64_t padded() const { return (s + BLOCK - 1) / BLOCK * BLOCK; }
  float scale2() const { return float(scale * 1.4426950408889634); }
  // First block of keys that block ``i`` of queries sees; last block of queries that sees ``j``.
  int64_t first_key(int64_t i) const {
    return i * BLOCK > window ? (i * BLOCK - window) / BLOCK : 0;
  }
  int64_t last_query(int64_t j) const {
    int64_t last = (j * BLOCK + BLOCK - 1 + window) / BLOCK, end = padded() / BLOCK - 1;
    return last < end ? last : end;
  }
  int64_t lse_at(int64_t sample, int64_t group, int64_t head) const {
    return ((sample * groups + group) * heads + head) * s;
  }
  int64_t rows_of(int64_t i) const { return s - i * BLOCK < BLOCK ? s - i * BLOCK : BLOCK; }
};

const Rotation NONE = {nullptr, nullptr, 0, 0};

// Put -inf where a query of block ``i`` may not look, in ``count`` rows of keys from ``key``.
void hide(const Task& task, float* scores, int64_t i, int64_t key, int64_t count) {
  for (int64_t row = 0; row < count; row++) {
    int64_t before = key + row - i * BLOCK;           // queries that are earlier than this key
    int64_t seen = before + task.window + 1;          // those behind have it out of their window
    float* at = scores + row * BLOCK;
    for (int64_t c = 0; c < before; c++) at[c] = -INFINITY;
    for (int64_t c = seen < 0 ? 0 : seen; c < BLOCK; c++) at[c] = -INFINITY;
  }
}

template <class T>
struct Forward {
  static constexpr int64_t CHUNK = 512;  // keys of which scores lie there at a time
  const Task& task;
  int64_t n, turned_row;
  T *k_rows, *v_rows, *v_pairs, *v_turned, *q_rows, *q_turned, *weights;
  float *scores, *found, *rows;
  V high[4], total[4];  // of 64 queries

  Forward(const Task& t, Arena& arena) : task(t), n(t.padded()), turned_row(n + 32) {
    arena.take(k_rows, n * t.d);
    arena.take(v_rows, n * t.e);
    arena.take(v_pairs, n * t.e);
    arena.take(v_turned, turned_row * t.e);
    arena.take(q_rows, BLOCK * t.d);
    arena.take(q_turned, BLOCK * t.d);
    arena.take(weights, CHUNK * BLOCK);
    arena.take(scores, CHUNK * BLOCK);
    arena.take(found, t.e * BLOCK);
    arena.take(rows, t.e * BLOCK);
  }

  void group(int64_t sample, int64_t g) {
    constexpr int64_t E = PER_WORD<T>;
    read_rows(task.k.head<T>(sample, g, 0), task.k.s, task.d, 0, task.s, n, task.rotation, k_rows);
    read_rows(task.v.head<T>(sample, g, 0), task.v.s, task.e, 0, task.s, n, NONE, v_rows);
    T* words = v_rows;
    if (E > 1) pair_rows(v_rows, words = v_pairs, n, task.e, WIDEST);
    turn(words, task.e, v_turned, turned_row / E, n / E, task.e);
    for (int64_t r = 0; r < task.heads; r++)
      for (int64_t i = 0; i < n / BLOCK; i++) block(sample, g, r, i);
  }

  void block(int64_t sample, int64_t g, int64_t r, int64_t i) {
    constexpr int64_t E = PER_WORD<T>;
    int64_t count = task.rows_of(i), end = (i + 1) * BLOCK, start = task.first_key(i) * BLOCK;
    read_rows(task.q.head<T>(sample, g, r), task.q.s, task.d, i * BLOCK, count, BLOCK,
              task.rotation, q_rows);
    turn(q_rows, task.d / E, q_turned, BLOCK, BLOCK, task.d / E);
    for (int64_t c = 0; c < 4; c++) high[c] = V{} - INFINITY, total[c] = V{};
    for (int64_t key = start; key < end; key += CHUNK) {
      int64_t keys = end - key < CHUNK ? end - key : CHUNK;
      product(keys, BLOCK, task.d, k_rows + key * task.d, task.d, q_turned, BLOCK, scores, BLOCK,
              false);
      hide_edges(i, key, keys);
      weigh(keys, key > start);
      product(task.e, BLOCK, keys, v_turned + key, turned_row, weights, BLOCK, found, BLOCK,
              key > start);
    }
    finish(sample, g, r, i, count);
  }

  void hide_edges(int64_t i, int64_t key, int64_t keys) {
    for (int64_t row = 0; row < keys; row += BLOCK) {
      bool inside = key + row < i * BLOCK && key + row + task.window >= (i + 1) * BLOCK - 1;
      if (!inside) hide(task, scores + row * BLOCK, i, key + row, BLOCK);
    }
  }

  // Scores -> weights relative to the highest score so far; what was found is brought to that.
  void weigh(int64_t keys, bool again) {
    float scale = task.scale2();
    V was[4], part[4] = {};
    memcpy(was, high, sizeof was);
    for (int64_t row = 0; row < keys; row++)
      for (int64_t c = 0; c < 4; c++) {
        V x = load(scores + row * BLOCK + c * LANES);
        high[c] = x > high[c] ? x : high[c];
      }
    for (int64_t row = 0; row < keys; row += 2)
      for (int64_t c = 0; c < 4; c++) {
        const float* at = scores + row * BLOCK + c * LANES;
        V first = exp2((load(at) - high[c]) * scale);
        V second = exp2((load(at + BLOCK) - high[c]) * scale);
        part[c] += first + second;
        store_pair(weights + row * BLOCK + PER_WORD<T> * c * LANES, BLOCK, first, second);
      }
    for (int64_t c = 0; c < 4; c++) {
      V fade = again ? exp2((was[c] - high[c]) * scale) : V{};
      total[c] = total[c] * fade + part[c];
      for (int64_t row = 0; again && row < task.e; row++) {
        float* at = found + row * BLOCK + c * LANES;
        store(at, load(at) * fade);
      }
    }
  }

  void finish(int64_t sample, int64_t g, int64_t r, int64_t i, int64_t count) {
    float lse[BLOCK];
    for (int64_t c = 0; c < 4; c++) {
      V one = V{} + 1.0f, inverse = one / total[c];
      for (int64_t row = 0; row < task.e; row++) {
        float* at = found + row * BLOCK + c * LANES;
        store(at, load(at) * inverse);
      }
      for (int64_t l = 0; l < LANES; l++)
        lse[c * LANES + l] = high[c][l] * task.scale2() + std::log2(total[c][l]);
    }
    memcpy(task.lse + task.lse_at(sample, g, r) + i * BLOCK, lse, count * sizeof(float));
    turn(found, BLOCK, rows, task.e, task.e, BLOCK);
    write_rows(rows, 1.0f, task.e, i * BLOCK, count, NONE, task.out.head<T>(sample, g, r),
               task.out.s);
  }
};

template <class T>
struct Backward {
  // Keys and queries of a tile; weights of one tile lie there at a time.
  static constexpr int64_t TILE = sizeof(T) == 2 ? 512 : 256;
  static constexpr int64_t ROW = TILE + 32;  // rows a power of two apart would share few sets
  static constexpr int64_t STRIP = sizeof(T) == 2 ? 512 : 128;      // keys of which scores lie there at a time
  static constexpr int64_t E = PER_WORD<T>;
  const Task& task;
  int64_t n, turned_row;
  T *rows, *pairs, *k_rows, *v_rows, *k_turned, *q_turned, *q_pairs, *o_turned, *o_pairs;
  T *weights, *d_scores, *ds_pairs;
  float *dk, *dv, *dq, *lse, *delta, *scores, *d_weights, *wide;

  Backward(const Task& t, Arena& arena) : task(t), n(t.padded()), turned_row(n + 32) {
    int64_t most = t.d > t.e ? t.d : t.e;
    arena.take(rows, n * most);
    arena.take(pairs, n * most);
    arena.take(k_rows, n * t.d);
    arena.take(v_rows, n * t.e);
    arena.take(k_turned, turned_row * t.d);
    for (T** x : {&q_turned, &q_pairs}) arena.take(*x, n * t.d);
    for (T** x : {&o_turned, &o_pairs}) arena.take(*x, n * t.e);
    for (T** x : {&weights, &d_scores}) arena.take(*x, TILE * ROW);
    arena.take(ds_pairs, TILE * BLOCK);
    for (float** x : {&dk, &dq}) arena.take(*x, n * t.d);
    arena.take(dv, n * t.e);
    for (float** x : {&lse, &delta}) arena.take(*x, n);
    for (float** x : {&scores, &d_weights}) arena.take(*x, STRIP * BLOCK);
    arena.take(wide, BLOCK * t.d);
  }

  void group(int64_t sample, int64_t g) {
    read_rows(task.k.head<T>(sample, g, 0), task.k.s, task.d, 0, task.s, n, task.rotation, k_rows);
    read_rows(task.v.head<T>(sample, g, 0), task.v.s, task.e, 0, task.s, n, NONE, v_rows);
    T* words = k_rows;
    if (E > 1) pair_rows(k_rows, words = pairs, n, task.d, WIDEST);
    turn(words, task.d, k_turned, turned_row / E, n / E, task.d);
    memset(dk, 0, n * task.d * sizeof(float));
    memset(dv, 0, n * task.e * sizeof(float));
    for (int64_t r = 0; r < task.heads; r++) {
      prepare(sample, g, r);
      for (int64_t j = 0; j < n; j += TILE)
        for (int64_t i = j; i < n; i += TILE) tile(j / BLOCK, i / BLOCK);
      for (int64_t i = 0; i < n / BLOCK; i++) {
        turn(dq + i * BLOCK * task.d, BLOCK, wide, task.d, task.d, BLOCK);
        write_rows(wide, float(task.scale), task.d, i * BLOCK, task.rows_of(i),
                   task.rotation, task.dq.head<T>(sample, g, r), task.dq.s);
      }
    }
    write_rows(dk, float(task.scale), task.d, 0, task.s, task.rotation,
               task.dk.head<T>(sample, g, 0), task.dk.s);
    write_rows(dv, 1.0f, task.e, 0, task.s, NONE, task.dv.head<T>(sample, g, 0), task.dv.s);
  }

  // Pack queries and gradients of one head; delta = sum(d_out * out) by query.
  void prepare(int64_t sample, int64_t g, int64_t r) {
    read_rows(task.q.head<T>(sample, g, r), task.q.s, task.d, 0, task.s, n, task.rotation, rows);
    pack(task.d, q_turned, q_pairs);
    read_rows(task.d_out.head<T>(sample, g, r), task.d_out.s, task.e, 0, task.s, n, NONE, rows);
    pack(task.e, o_turned, o_pairs);
    const T* out = task.out.head<T>(sample, g, r);
    for (int64_t i = 0; i < task.s; i++) {
      V total = {};
      prefetch_row(out + i * task.out.s, task.out.s, task.e, task.s - i);
      for (int64_t j = 0; j < task.e; j += LANES)
        total += load(rows + i * task.e + j) * load(out + i * task.out.s + j);
      delta[i] = sum(total);
    }
    memcpy(lse, task.lse + task.lse_at(sample, g, r), task.s * sizeof(float));
    for (int64_t i = task.s; i < n; i++) lse[i] = INFINITY, delta[i] = 0.0f;  // no weight at all
  }

  void pack(int64_t channels, T* turned, T* paired) {
    for (int64_t i = 0; i < n; i += BLOCK)
      turn(rows + i * channels, channels / E, turned + i * channels, BLOCK, BLOCK, channels / E);
    pair_rows(rows, paired, n, channels, BLOCK);
  }

  void tile(int64_t j0, int64_t i0) {
    int64_t blocks = n / BLOCK, step = TILE / BLOCK;
    int64_t j1 = j0 + step < blocks ? j0 + step : blocks;
    int64_t i1 = i0 + step < blocks ? i0 + step : blocks;
    for (int64_t i = i0; i < i1; i++) {
      int64_t first = task.first_key(i) > j0 ? task.first_key(i) : j0, end = i + 1 < j1 ? i + 1 : j1;
      if (first >= end) continue;
      for (int64_t key = first * BLOCK; key < end * BLOCK; key += STRIP) {
        int64_t left = end * BLOCK - key;
        strip(i, key, left < STRIP ? left : STRIP, j0 * BLOCK, (i - i0) * BLOCK);
      }
      T* b = E > 1 ? ds_pairs + (first - j0) * BLOCK * BLOCK
                   : d_scores + (first - j0) * BLOCK * ROW + (i - i0) * BLOCK;
      product(task.d, BLOCK, (end - first) * BLOCK, k_turned + first * BLOCK, turned_row, b,
              E > 1 ? BLOCK : ROW, dq + i * BLOCK * task.d, BLOCK, first > task.first_key(i));
    }
    for (int64_t j = j0; j < j1; j++) {
      int64_t first = j > i0 ? j : i0, last = task.last_query(j), end = last + 1 < i1 ? last + 1 : i1;
      if (first >= end) continue;
      int64_t at = (j - j0) * BLOCK * ROW + (first - i0) * BLOCK, queries = (end - first) * BLOCK;
      add(weights + at, o_pairs, first * BLOCK, queries, dv + j * BLOCK * task.e, task.e);
      add(d_scores + at, q_pairs, first * BLOCK, queries, dk + j * BLOCK * task.d, task.d);
    }
  }

  // to [64 keys, channels] += from [64 keys, queries] * rows of queries from ``query``.
  void add(const T* from, const T* paired, int64_t query, int64_t queries, float* to,
           int64_t channels) {
    for (int64_t c = 0; c < channels; c += BLOCK) {
      int64_t width = channels - c < BLOCK ? channels - c : BLOCK;
      product(BLOCK, width, queries, from, ROW, paired + c * n + query * width, width, to + c,
              channels, true);
    }
  }

  // Weights and gradients of scores of ``count`` keys and block ``i`` of queries, in the tile.
  void strip(int64_t i, int64_t key, int64_t count, int64_t key0, int64_t column) {
    product(count, BLOCK, task.d, k_rows + key * task.d, task.d, q_turned + i * BLOCK * task.d,
            BLOCK, scores, BLOCK, false);
    product(count, BLOCK, task.e, v_rows + key * task.e, task.e, o_turned + i * BLOCK * task.e,
            BLOCK, d_weights, BLOCK, false);
    for (int64_t row = 0; row < count; row += BLOCK) {
      bool inside = key + row < i * BLOCK && key + row + task.window >= (i + 1) * BLOCK - 1;
      if (!inside) hide(task, scores + row * BLOCK, i, key + row, BLOCK);
    }
    float scale = task.scale2();
    for (int64_t row = 0; row < count; row += 2)
      for (int64_t c = 0; c < BLOCK; c += LANES) {
        V l = load(lse + i * BLOCK + c), d = load(delta + i * BLOCK + c);
        int64_t from = row * BLOCK + c, to = (key - key0 + row) * ROW + column + c;
        V p0 = exp2(load(scores + from) * scale - l);
        V p1 = exp2(load(scores + from + BLOCK) * scale - l);
        V s0 = p0 * (load(d_weights + from) - d), s1 = p1 * (load(d_weights + from + BLOCK) - d);
        store(weights + to, p0), store(weights + to + ROW, p1);
        store(d_scores + to, s0), store(d_scores + to + ROW, s1);
        if (E > 1) store_pair(ds_pairs + (key - key0 + row) * BLOCK + E * c, BLOCK, s0, s1);
      }
  }
};

// Groups ``begin`` to ``end`` among those of all samples.
template <template <class> class Pass, class T>
void part(const Task& task, int64_t begin, int64_t end) {
  static thread_local Memory memory;
  Arena count;
  Pass<T>(task, count);
  Arena arena;
  arena.base = memory.of_size(count.used);
  Pass<T> pass(task, arena);
  for (int64_t i = begin; i < end; i++) pass.group(i / task.groups, i % task.groups);
  if (sizeof(T) == 2) at::native::cpublas::brgemm_release(true);
}

// 0, or 1 where torch has no such products for this processor or there is no memory.
template <template <class> class Pass, class T>
int run(const Task* task) {
  std::atomic<int> failed{0};
  in_parallel(task->b * task->groups, 1, [&](int64_t begin, int64_t end) {
    try {
      part<Pass, T>(*task, begin, end);
    } catch (...) {  // must not leave this thread
      failed = 1;
    }
  });
  return failed;
}

}  // namespace

extern "C" {
int forward_bfloat16(const Task* task) { return run<Forward, bf16>(task); }
int forward_float32(const Task* task) { return run<Forward, float>(task); }
int backward_bfloat16(const Task* task) { return run<Backward, bf16>(task); }
int backward_float32(const Task* task) { return run<Backward, float>(task); }
}
