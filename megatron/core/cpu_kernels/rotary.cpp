// Rotate heads by position on their way from one layout to another, in one pass.
#include "blocks.h"
#include "parallel.h"

namespace {

// The same fields, in the same order, as _Task in rotary.py.
struct Task {
  View from, to;
  Rotation rotation;
  int64_t b, groups, heads, s, channels;
  double sign;  // -1 turns back
};

template <class T>
void rotate(const Task& task, int64_t begin, int64_t end) {
  float x[WIDEST];
  for (int64_t i = begin; i < end; i++)
    for (int64_t sample = 0; sample < task.b; sample++)
      for (int64_t g = 0; g < task.groups; g++)
        for (int64_t r = 0; r < task.heads; r++) {
          const T* from = task.from.head<T>(sample, g, r) + i * task.from.s;
          T* to = task.to.head<T>(sample, g, r) + i * task.to.s;
          for (int64_t j = 0; j < task.channels; j += LANES) store(x + j, load(from + j));
          task.rotation.turn_row<T>(x, task.channels, i, float(task.sign));
          for (int64_t j = 0; j < task.channels; j += LANES) store(to + j, load(x + j));
        }
}

template <class T>
void rotate_all(const Task& task) {
  in_parallel(task.s, 64, [&](int64_t begin, int64_t end) { rotate<T>(task, begin, end); });
}

}  // namespace

extern "C" {
void rotate_bfloat16(const Task* task) { rotate_all<bf16>(*task); }
void rotate_float32(const Task* task) { rotate_all<float>(*task); }
}
