/* Runs regions in torch's own threads; also holds the hash of the sources.

   torch's stable C interface runs a range in parts, each in its own thread; a region is entered once
   per part, and divides its work itself. Inside another region, or with one thread, there is a single
   part. */

#include "vectors.h"

typedef void (*Part)(int64_t from, int64_t to, void *data);
typedef int32_t (*ParallelFor)(int64_t from, int64_t to, int64_t grain, Part part, void *data);

static ParallelFor parallel_for;

typedef struct {
    Region region;
    void *data;
    int entered;
} Crew;

static void enter(int64_t from, int64_t to, void *data) {
    Crew *crew = data;
    (void)from, (void)to;
    __atomic_store_n(&crew->entered, 1, __ATOMIC_RELAXED);
    crew->region(crew->data);
}

/* Sets the function that runs parts, `torch_parallel_for`. */
EXPORT void sparsiattn_set_parallel_for(ParallelFor function) { parallel_for = function; }

/* A `Parallel`. If no thread could be started, the caller's thread does all the work. */
EXPORT void sparsiattn_parallel(Region region, void *data, unsigned threads, unsigned flags) {
    Crew crew = {region, data, 0};
    (void)flags;
    if (parallel_for(0, threads, 1, enter, &crew) && !crew.entered) region(data);
}

/* The hash of the sources, see toolchain.py. */
#if !defined(FINGERPRINT)
#define FINGERPRINT ""
#endif
EXPORT const char *sparsiattn_fingerprint(void) { return FINGERPRINT; }
