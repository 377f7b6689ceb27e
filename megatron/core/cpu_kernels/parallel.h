/* Share work among torch's threads: its OpenMP library is the one that is loaded.

   Each piece must be the same bits whoever computes it, so that the number of threads changes
   nothing: sums over all pieces are taken afterwards, in their order. */

#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

/* Call work(begin, end) for parts of 0..count that cover it, one a thread; ``grain`` is the least
   that is worth a thread. */
template <typename Work> static inline void in_parallel(int64_t count, int64_t grain, const Work &work)
{
#ifdef _OPENMP
    int64_t threads = omp_in_parallel() ? 1 : omp_get_max_threads();
    if (threads > count / grain)
        threads = count / grain;
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        {
            int64_t all = omp_get_num_threads(), mine = omp_get_thread_num();
            work(count * mine / all, count * (mine + 1) / all);
        }
        return;
    }
#endif
    work(0, count);
}
