/* The best of every row of scores. */

#include <stdlib.h>

#include "vectors.h"

/* A number with the order of the scores: NaN is largest, and of equal scores the first is larger. */
INLINE uint64_t ranked(float x, int64_t i) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) bits = 0x7fffffffu;
    bits = bits >> 31 ? ~bits : bits | 0x80000000u;
    return (uint64_t)bits << 32 | (uint32_t)~(uint32_t)i;
}

INLINE void sift(uint64_t *heap, int64_t at, int64_t size) {
    uint64_t x = heap[at];
    for (int64_t child; (child = 2 * at + 1) < size; at = child) {
        if (child + 1 < size && heap[child + 1] < heap[child]) child++;
        if (heap[child] >= x) break;
        heap[at] = heap[child];
    }
    heap[at] = x;
}

#define MANY 192 /* up to this many are sorted by counting, which takes quadratic time */

/* Selection by a heap whose root is the smallest of the best so far. */
static void top_by_heap(const float *x, int64_t count, int64_t most, uint64_t *heap, int64_t *to) {
    for (int64_t i = 0; i < most; i++) heap[i] = ranked(x[i], i);
    for (int64_t i = most / 2; i-- > 0;) sift(heap, i, most);
    for (int64_t i = most; i < count; i++) {
        uint64_t rank = ranked(x[i], i);
        if (rank <= heap[0]) continue;
        heap[0] = rank;
        sift(heap, 0, most);
    }
    for (int64_t left = most; left > 0; left--) {
        to[left - 1] = (int64_t)(uint32_t)~(uint32_t)heap[0];
        heap[0] = heap[left - 1];
        sift(heap, 0, left - 1);
    }
}

/* The smallest of the `most` largest numbers, found bit by bit: counting needs no branches. */
static uint32_t least_of(const uint32_t *x, int64_t count, int64_t most) {
    uint32_t every = ~0u, some = 0;
    for (int64_t i = 0; i < count; i++) every &= x[i], some |= x[i];
    uint32_t mixed = every ^ some, least = every;
    for (int bit = 31; bit >= 0; bit--) {
        if (!(mixed >> bit & 1)) continue; /* equal in all */
        uint32_t tried = least | (uint32_t)1 << bit;
        int32_t above = 0;
        for (int64_t i = 0; i < count; i++) above += x[i] >= tried;
        if (above >= most) least = tried;
        if (above == most) break;
    }
    return least;
}

static void top_by_count(const float *x, int64_t count, int64_t most, uint32_t *order,
                         int64_t *to) {
    uint64_t best[MANY];
    int64_t n = 0;
    for (int64_t i = 0; i < count; i++) order[i] = (uint32_t)(ranked(x[i], i) >> 32);
    uint32_t least = least_of(order, count, most);
    for (int64_t i = 0; i < count && n < most; i++) {
        best[n] = (uint64_t)order[i] << 32 | (uint32_t)~(uint32_t)i;
        n += order[i] > least;
    }
    for (int64_t i = 0; i < count && n < most; i++)
        if (order[i] == least) best[n++] = (uint64_t)least << 32 | (uint32_t)~(uint32_t)i;
    for (int64_t i = 0; i < most; i++) {
        int64_t before = 0;
        for (int64_t j = 0; j < most; j++) before += best[j] > best[i];
        to[before] = (int64_t)(uint32_t)~(uint32_t)best[i];
    }
}

/* Indices of the `most` best of a row, best first. room: 8 bytes for each of `count`. */
static void top_of(const float *x, int64_t count, int64_t most, void *room, int64_t *to) {
    if (most > MANY)
        top_by_heap(x, count, most, room, to);
    else
        top_by_count(x, count, most, room, to);
}

/* The order of `sparsiattn.kernels.native.launch`. */
typedef struct {
    int64_t rows, count, most, threads;
    const float *scores;
    int64_t *out;
    Parallel parallel;
} Top;

typedef struct {
    const Top *top;
    int64_t next;
} TopJob;

static void top_some(void *data) {
    TopJob *job = data;
    const Top *c = job->top;
    uint64_t *room = malloc(c->count * sizeof *room);
    int64_t r;
    while (room && (r = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < c->rows)
        top_of(c->scores + r * c->count, c->count, c->most, room, c->out + r * c->most);
    free(room);
}

/* Indices of the `most` best of every row, best first. Returns whether all rows were processed: memory
   may run out. */
EXPORT int64_t sparsiattn_top(const Top *c) {
    TopJob job = {c, 0};
    if (c->parallel && c->threads > 1 && c->rows > 1)
        c->parallel(top_some, &job, (unsigned)c->threads, 0);
    else
        top_some(&job);
    return job.next >= c->rows;
}

EXPORT int64_t sparsiattn_top_size(void) { return sizeof(Top); }
