/* Token merging (the strategy `token_merge`): the search for similar tokens (ToMe, section 3.1), and
   the shorter sequence.

   Tokens alternate between two sides. There are four stages, each started when the previous one is
   complete: mean keys of unit length; the best partner of every token of the first side; the best of
   these edges, image by image; rows of the new sequence. */

/* The order of `_merged` in merge.py. Steps are in elements. tokens: those after `prefix` keys.
   ahead: rows before `x` that are copied. logs: of sizes, those rows counting once. group: images at a time, `shared` numbers
   of `scratch` for each; `each`: for every thread. size: of every token; 0 where all count once. */
typedef struct {
    int64_t batch, heads, dim, prefix, tokens, merged, width, ahead;
    int64_t k_b, k_h, k_n, x_b, x_n;
    int64_t threads, group, shared, each;
    const float *k, *x, *size;
    float *out, *sizes, *logs;
    int64_t *index, *assign;
    float *scratch;
    Parallel parallel;
} Merge;

enum { LENGTHS, MATCHES, EDGES, MEANS, MERGE_STAGES };
#define KEYS_AT_ONCE 64
#define ROWS_AT_ONCE 6 /* as many as `score` takes */
#define MEANS_AT_ONCE 32

/* from: the first image of the group at hand. odd: tokens of the first side are `odd`, odd + 2 ...
   first, second: how many there are. wide: channels of a mean key, in whole vectors. */
typedef struct {
    const Merge *merge;
    int64_t from, odd, first, second, wide, joined;
    int64_t items[MERGE_STAGES], next[MERGE_STAGES], done[MERGE_STAGES];
} MergeJob;

/* What one image of the group has. keys: of the first side, row by row. panels: of the second,
   SPAN in a row. partner: of the second side. source: the last token of the first side that goes to
   each of the second, after: the one before it; -1 for none. */
typedef struct {
    float *keys, *panels, *likeness;
    int64_t *best, *order;
    int32_t *partner, *source, *after;
} Pairs;

INLINE int64_t in_lines(int64_t numbers) { return (numbers + 15) / 16 * 16; }

static Pairs pairs_of(const MergeJob *job, int64_t image) {
    const Merge *m = job->merge;
    int64_t side = in_lines(job->first > job->second ? job->first : job->second);
    float *keys = m->scratch + image * m->shared, *panels = keys + side * job->wide;
    float *likeness = panels + (side + SPAN) * m->dim;
    int64_t *best = (int64_t *)(likeness + side), *order = best + side;
    int32_t *partner = (int32_t *)(order + side);
    Pairs x = {keys, panels, likeness, best, order, partner, partner + side, partner + 2 * side};
    return x;
}

/* The unit vector in the direction of a token's mean key over heads, which is that of the sum. */
static void mean_key(const MergeJob *job, const float *k, float *to) {
    const Merge *m = job->merge;
    memcpy(to, k, m->dim * sizeof *to);
    for (int64_t h = 1; h < m->heads; h++) {
        const float *row = k + h * m->k_h;
        int64_t d = 0;
        for (; d + WIDTH <= m->dim; d += WIDTH) store(to + d, load(to + d) + load(row + d));
        for (; d < m->dim; d++) to[d] += row[d];
    }
    float length = sqrtf(dot(to, to, m->dim));
    length = length > 1e-12f ? length : 1e-12f;
    for (int64_t d = 0; d < m->dim; d++) to[d] /= length;
}

static void mean_keys_of(const MergeJob *job, int64_t i, float *room) {
    const Merge *m = job->merge;
    int64_t runs = job->items[LENGTHS] / job->items[EDGES], image = i / runs;
    Pairs x = pairs_of(job, image);
    const float *k = m->k + (job->from + image) * m->k_b + m->prefix * m->k_n;
    int64_t from = i % runs * KEYS_AT_ONCE;
    for (int64_t t = from; t < smaller(from + KEYS_AT_ONCE, m->tokens); t++) {
        int64_t place = t / 2;
        if (t % 2 == job->odd) {
            mean_key(job, k + t * m->k_n, x.keys + place * job->wide);
            continue;
        }
        mean_key(job, k + t * m->k_n, room);
        float *panel = x.panels + place / SPAN * SPAN * m->dim + place % SPAN;
        for (int64_t d = 0; d < m->dim; d++) panel[d * SPAN] = room[d];
    }
}

/* The largest lane and its index; of equal lanes the one with the smallest index. */
static void best_lane(vec top, ints where, float *value, int32_t *number) {
    float most = top[0];
    int32_t at = where[0];
    for (int j = 1; j < WIDTH; j++)
        if (top[j] > most || (top[j] == most && where[j] < at)) most = top[j], at = where[j];
    *value = most, *number = at;
}

/* Best partners of some tokens of the first side. A cosine that is NaN is never the best. */
static void match_some(const MergeJob *job, int64_t i, float *s) {
    const Merge *m = job->merge;
    int64_t runs = job->items[MATCHES] / job->items[EDGES];
    Pairs x = pairs_of(job, i / runs);
    int64_t from = i % runs * ROWS_AT_ONCE, count = smaller(ROWS_AT_ONCE, job->first - from);
    const float *rows[ROWS_AT_ONCE];
    vec top[ROWS_AT_ONCE], none = all(-__builtin_inff());
    ints where[ROWS_AT_ONCE];
    for (int64_t r = 0; r < ROWS_AT_ONCE; r++) {
        rows[r] = x.keys + (from + smaller(r, count - 1)) * job->wide;
        top[r] = none, where[r] = (ints){0};
    }
    for (int64_t at = 0; at < job->second; at += SPAN) {
        const float *panel = x.panels + at * m->dim;
        int64_t lanes = (smaller(SPAN, job->second - at) + WIDTH - 1) / WIDTH * WIDTH;
        for (int64_t n = 0; n < lanes; n += MOST * WIDTH) {
#define LIKENESS(w) score(w, ROWS_AT_ONCE, panel + n, rows, m->dim, s + n, SPAN)
            FOR_WIDTH(smaller(MOST, (lanes - n) / WIDTH), LIKENESS)
        }
        for (int64_t n = 0; n < lanes; n += WIDTH) {
            ints numbers = lanes_at(at + n), real = numbers < (int32_t)job->second;
            for (int64_t r = 0; r < count; r++) {
                vec likeness = load(s + r * SPAN + n);
                ints better = real & (likeness > top[r]);
                top[r] = pick(better, likeness, top[r]);
                where[r] = (numbers & better) | (where[r] & ~better);
            }
        }
    }
    for (int64_t r = 0; r < count; r++)
        best_lane(top[r], where[r], x.likeness + from + r, x.partner + from + r);
}

INLINE float size_of(const Merge *m, int64_t image, int64_t token) {
    return m->size ? m->size[image * m->tokens + token] : 1;
}

/* The new tokens of one image: remaining tokens of the first side, in order, then the second side. */
static void cut_edges(const MergeJob *job, int64_t i) {
    const Merge *m = job->merge;
    Pairs x = pairs_of(job, i);
    int64_t image = job->from + i, left = m->tokens - m->merged, kept = 0, odd = job->odd;
    int64_t *index = m->index + image * left, *assign = m->assign + image * m->tokens;
    float *sizes = m->sizes + image * left;
    float *logs = m->logs + image * (m->ahead + left);
    top_of(x.likeness, job->first, m->merged, x.order, x.best);
    for (int64_t j = 0; j < job->second; j++) x.source[j] = -1;
    for (int64_t a = 0; a < job->first; a++) assign[2 * a + odd] = 0;
    for (int64_t e = m->merged; e-- > 0;) assign[2 * x.best[e] + odd] = 1;
    for (int64_t a = 0; a < job->first; a++) {
        int64_t token = 2 * a + odd, to = x.partner[a];
        if (assign[token]) {
            x.after[a] = x.source[to], x.source[to] = (int32_t)a;
            assign[token] = job->first - m->merged + to;
            continue;
        }
        index[kept] = token, sizes[kept] = size_of(m, image, token), assign[token] = kept++;
    }
    for (int64_t j = 0; j < job->second; j++) {
        int64_t token = 2 * j + 1 - odd;
        float size = size_of(m, image, token);
        for (int32_t a = x.source[j]; a >= 0; a = x.after[a])
            size += size_of(m, image, 2 * a + odd);
        index[kept + j] = token, sizes[kept + j] = size, assign[token] = kept + j;
    }
    clear(logs, m->ahead);
    for (int64_t n = 0; n < left; n++) logs[m->ahead + n] = sizes[n] == 1 ? 0 : logf(sizes[n]);
}

/* to[] (+)= from[] by */
INLINE void scale_row(const float *from, float by, int64_t width, int more, float *to) {
    int64_t d = 0;
    for (; d + WIDTH <= width; d += WIDTH) {
        vec x = load(from + d) * all(by);
        store(to + d, more ? load(to + d) + x : x);
    }
    for (; d < width; d++) to[d] = from[d] * by + (more ? to[d] : 0);
}

/* Rows of the new sequence: means weighted by size. */
static void mean_rows(const MergeJob *job, int64_t i) {
    const Merge *m = job->merge;
    int64_t runs = job->items[MEANS] / job->items[EDGES], left = m->tokens - m->merged;
    int64_t image = job->from + i / runs, from = i % runs * MEANS_AT_ONCE;
    int64_t stay = job->first - m->merged, *index = m->index + image * left;
    Pairs pairs = pairs_of(job, i / runs);
    const float *x = m->x + image * m->x_b;
    float *out = m->out + image * (m->ahead + left) * m->width;
    for (int64_t n = 0; n < m->ahead && !from; n++)
        memcpy(out + n * m->width, x + (n - m->ahead) * m->x_n, m->width * sizeof *out);
    for (int64_t n = from; n < smaller(from + MEANS_AT_ONCE, left); n++) {
        float *to = out + (m->ahead + n) * m->width;
        const float *row = x + index[n] * m->x_n;
        int32_t a = n < stay ? -1 : pairs.source[n - stay];
        if (a < 0) {
            memcpy(to, row, m->width * sizeof *to);
            continue;
        }
        float size = m->sizes[image * left + n];
        scale_row(row, size_of(m, image, index[n]) / size, m->width, 0, to);
        for (; a >= 0; a = pairs.after[a]) {
            int64_t token = 2 * a + job->odd;
            scale_row(x + token * m->x_n, size_of(m, image, token) / size, m->width, 1, to);
        }
    }
}

static void merge_some(void *data) {
    MergeJob *job = data;
    const Merge *m = job->merge;
    float *room = m->scratch + m->group * m->shared;
    room += __atomic_fetch_add(&job->joined, 1, __ATOMIC_RELAXED) * m->each;
    for (int stage = 0; stage < MERGE_STAGES; stage++) {
        int64_t i, all_of = job->items[stage];
        while ((i = __atomic_fetch_add(&job->next[stage], 1, __ATOMIC_RELAXED)) < all_of) {
            if (stage == LENGTHS)
                mean_keys_of(job, i, room);
            else if (stage == MATCHES)
                match_some(job, i, room);
            else if (stage == EDGES)
                cut_edges(job, i);
            else
                mean_rows(job, i);
            __atomic_add_fetch(&job->done[stage], 1, __ATOMIC_RELEASE);
        }
        if (stage != MEANS) await(&job->done[stage], all_of);
    }
}

INLINE int64_t runs_of(int64_t count, int64_t run) { return (count + run - 1) / run; }

EXPORT void sparsiattn_merge(const Merge *m) {
    int64_t odd = m->prefix % 2, first = (m->tokens - odd + 1) / 2, second = m->tokens - first;
    for (int64_t from = 0; from < m->batch; from += m->group) {
        int64_t images = smaller(m->group, m->batch - from);
        MergeJob job = {
            m, from, odd, first, second, in_lines(m->dim), 0,
            {images * runs_of(m->tokens, KEYS_AT_ONCE), images * runs_of(first, ROWS_AT_ONCE),
             images, images * runs_of(m->tokens - m->merged, MEANS_AT_ONCE)},
            {0}, {0},
        };
        if (m->parallel && m->threads > 1)
            m->parallel(merge_some, &job, (unsigned)m->threads, 0);
        else
            merge_some(&job);
    }
}

EXPORT int64_t sparsiattn_merge_size(void) { return sizeof(Merge); }
