/* Regions in torch's own threads, and by what this library was made.

   torch's stable C interface runs a range in parts, each in a thread of its own; a region is entered
   once for each part, and shares out its work itself. Inside another region, and with one thread, one
   part is all of it. */

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

/* Which function runs parts: `torch_parallel_for`. */
EXPORT void sparsiattn_set_parallel_for(ParallelFor function) { parallel_for = function; }

/* A `Parallel`. Where no thread could be begun, the caller's own does all. */
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
