/* All SwiGLU experts of a rank in bfloat16, forward and backward; see compiled_experts.py.

   An expert is out = (p silu(x gate^T) (x up^T)) down^T for a row x of weight p; weight1 is gate
   above up [2 ffn, h], weight2 is down [h, ffn]. Rows lie expert by expert. A row's result depends
   on no other row. */

#include "products.h"
#include "swiglu.h"

#define CHUNK 128 /* rows whose products stay in the cache */

struct Experts {
    int64_t num_experts, hidden, ffn, num_rows;
    const int64_t *sizes; /* [num_experts], rows of each */
    const number *weight1, *weight2;
};

static void round_rows(const float *from, int64_t rows, int64_t width, number *to)
{
    for (int64_t i = 0; i < rows * width; i += LANES) {
        wide x;
        memcpy(&x, from + i, sizeof x);
        store(to + i, x, LANES);
    }
}

/* Rows of a chunk from `first`, of which LEAST_BLOCKs can be read: in place, or copied to `room`. */
static const number *readable(const number *rows, int64_t first, int64_t count, int64_t num_rows,
                              int64_t width, number *room)
{
    if (first + rounded_up(count, LEAST_BLOCK) <= num_rows)
        return rows + first * width;
    memcpy(room, rows + first * width, count * width * sizeof *rows);
    return room;
}

extern "C" int is_available(void) { return can_multiply(); }

extern "C" void forward(const Experts *all, const number *rows, const float *probs, number *inner,
                        number *out)
{
    static thread_local Room panels_room, sums_room, active_room, rows_room;
    const int64_t h = all->hidden, f = all->ffn;
    number *panels1 = panels_room.of<number>(3 * f * h), *panels2 = panels1 + 2 * f * h;
    float *sums = sums_room.of<float>(CHUNK * (2 * f > h ? 2 * f : h));
    number *active = active_room.of<number>(CHUNK * f);
    number *copied = rows_room.of<number>(CHUNK * h);
    int64_t first = 0;
    for (int64_t e = 0; e < all->num_experts; first += all->sizes[e++]) {
        if (!all->sizes[e])
            continue;
        pack_transposed(all->weight1 + e * 2 * f * h, h, h, 2 * f, panels1);
        pack_transposed(all->weight2 + e * f * h, f, f, h, panels2);
        for (int64_t done = 0; done < all->sizes[e]; done += CHUNK) {
            int64_t at = first + done, count = least(CHUNK, all->sizes[e] - done);
            int64_t padded = rounded_up(count, LEAST_BLOCK);
            const number *x = readable(rows, at, count, all->num_rows, h, copied);
            product(padded, 2 * f, h, x, h, panels1, sums);
            round_rows(sums, count, 2 * f, inner + at * 2 * f);
            activate_rows(inner + at * 2 * f, 2 * f, probs + at, active, f, count, f);
            product(padded, h, f, active, f, panels2, sums);
            round_rows(sums, count, h, out + at * h);
        }
    }
    done_multiplying();
}

/* Where the gradients of the rows of one expert go; each [its rows, ...]. */
struct Found {
    number *inner; /* gradient of the output of weight1 */
    number *active; /* input of weight2 */
};

static void backward_rows(const Experts *all, int64_t first, int64_t size, const number *grad,
                          const float *probs, const number *inner, const number *panels1,
                          const number *panels2, Found found, number *grad_rows, float *grad_probs)
{
    static thread_local Room sums_room, rows_room;
    const int64_t h = all->hidden, f = all->ffn, widest = 2 * f > h ? 2 * f : h;
    float *sums = sums_room.of<float>(CHUNK * widest);
    number *copied = rows_room.of<number>(CHUNK * widest);
    for (int64_t done = 0; done < size; done += CHUNK) {
        int64_t at = first + done, count = least(CHUNK, size - done);
        int64_t padded = rounded_up(count, LEAST_BLOCK);
        const number *g = readable(grad, at, count, all->num_rows, h, copied);
        number *grad_inner = found.inner + done * 2 * f;
        product(padded, f, h, g, h, panels2, sums);
        differentiate_rows(inner + at * 2 * f, 2 * f, probs + at, sums, f, grad_inner, 2 * f,
                           grad_probs + at, found.active + done * f, f, count, f);
        const number *d = readable(found.inner, done, count, size, 2 * f, copied);
        product(padded, h, 2 * f, d, 2 * f, panels1, sums);
        round_rows(sums, count, h, grad_rows + at * h);
    }
}

static void add_weight_gradients(const Experts *all, int64_t expert, int64_t first, int64_t size,
                                 const number *rows, const number *grad, Found found,
                                 float *grad_weight1, float *grad_weight2)
{
    const int64_t h = all->hidden, f = all->ffn, numel = h * f;
    add_product(size, h, f, grad + first * h, h, found.active, f, grad_weight2 + expert * numel, f);
    add_product(size, 2 * f, h, found.inner, 2 * f, rows + first * h, h,
                grad_weight1 + expert * 2 * numel, h);
}

/* With grad_weight1 null, what weight gradients need is left in found_inner and found_active
   [num_rows, ...]; else they are added, and both are null. */
extern "C" void backward(const Experts *all, const number *rows, const float *probs,
                         const number *inner, const number *grad, number *grad_rows,
                         float *grad_probs, float *grad_weight1, float *grad_weight2,
                         number *found_inner, number *found_active)
{
    static thread_local Room panels_room, found_room;
    const int64_t h = all->hidden, f = all->ffn;
    number *panels1 = panels_room.of<number>(3 * f * h), *panels2 = panels1 + 2 * f * h;
    int64_t first = 0, most = 0;
    for (int64_t e = 0; e < all->num_experts; e++)
        most = most < all->sizes[e] ? all->sizes[e] : most;
    number *room = grad_weight1 ? found_room.of<number>(3 * f * least(most, SLAB)) : nullptr;
    for (int64_t e = 0; e < all->num_experts; first += all->sizes[e++]) {
        if (!all->sizes[e])
            continue;
        pack(all->weight1 + e * 2 * f * h, h, 2 * f, 2 * f, h, panels1);
        pack(all->weight2 + e * f * h, f, h, h, f, panels2);
        for (int64_t done = 0; done < all->sizes[e]; done += SLAB) {
            int64_t at = first + done, size = least(SLAB, all->sizes[e] - done);
            Found found = {room ? room : found_inner + at * 2 * f,
                           room ? room + 2 * f * size : found_active + at * f};
            backward_rows(all, at, size, grad, probs, inner, panels1, panels2, found, grad_rows,
                          grad_probs);
            if (grad_weight1)
                add_weight_gradients(all, e, at, size, rows, grad, found, grad_weight1,
                                     grad_weight2);
        }
    }
    done_multiplying();
}

extern "C" void weight_gradients(const Experts *all, const number *rows, const number *grad,
                                 const number *found_inner, const number *found_active,
                                 float *grad_weight1, float *grad_weight2)
{
    int64_t first = 0;
    for (int64_t e = 0; e < all->num_experts; first += all->sizes[e++]) {
        Found found = {(number *)found_inner + first * 2 * all->ffn,
                       (number *)found_active + first * all->ffn};
        add_weight_gradients(all, e, first, all->sizes[e], rows, grad, found, grad_weight1,
                             grad_weight2);
    }
    done_multiplying();
}
