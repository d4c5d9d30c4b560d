/* Scores of key blocks for query tiles (the strategy `connectivity`), and the best of them.

   There are three stages, each started when the previous one is complete: means of query tiles; means
   of key blocks, and the logits of the mean query for every key; scores, head by head. In the hosts'
   layout the rows of all heads of a token are adjacent, so the first two stages go token by token and
   read every number once. All products are those of vectors.h, with tiles or channels as lanes. */

#include "backward.c"
#include "lists.c"
#include "merge.c"
#include "biased.c"
#include "threads.c"

/* The order of `sparsiattn.kernels.native.launch`. Steps are in elements. group: images at a time,
   `shared` numbers of `room` for each; `each`: for every thread. */
typedef struct {
    int64_t batch, heads, dim, prefix;
    int64_t tiles, tile, blocks, block, basis;
    int64_t q_b, q_h, q_n, k_b, k_h, k_n;
    int64_t count, threads, group, shared, each;
    const float *q, *k;
    const int64_t *order, *held, *block_order, *block_held;
    const float *down, *up, *self_weight, *shares;
    float *out, *room;
    int64_t *chosen;
    Parallel parallel;
    double scale, basis_scale, threshold;
    int64_t salience;
} Plan;

enum { TILES, BLOCKS, HEADS, STAGES };
#define RUN 64 /* approximate number of tokens of an item of the first stages */

/* from, images: the group at hand. wide, room: channels and blocks in whole vectors. size: abs(up) of
   the blocks. shared, scratch: memory of the heads and of the threads. */
typedef struct {
    const Plan *plan;
    int64_t from, images, wide, units, room, run, joined;
    float *size, *shared, *scratch;
    int64_t items[STAGES], next[STAGES], done[STAGES];
} PlanJob;

/* What one head of the group has: means of all queries, of tiles, and of units (prefix keys, then
   blocks); logits of patch keys under the mean query, the first keys of all blocks, then the second
   ones, and so on. */
typedef struct {
    float *mean, *rows, *keys, *key_logits;
} HeadPlan;

static HeadPlan head_plan(const PlanJob *job, int64_t image, int64_t head) {
    const Plan *p = job->plan;
    float *at = job->shared + image * p->shared + head * (p->shared / p->heads);
    HeadPlan x = {at, at + job->wide, at + (1 + p->tiles) * job->wide,
                  at + (1 + p->tiles + job->units) * job->wide};
    return x;
}

INLINE void add_rows(float *to, const float *a, const float *b, int64_t dim) {
    int64_t d = 0;
    for (; d + WIDTH <= dim; d += WIDTH) store(to + d, load(to + d) + (load(a + d) + load(b + d)));
    for (; d < dim; d++) to[d] += a[d] + b[d];
}

INLINE void add_row(float *to, const float *a, int64_t dim) {
    int64_t d = 0;
    for (; d + WIDTH <= dim; d += WIDTH) store(to + d, load(to + d) + load(a + d));
    for (; d < dim; d++) to[d] += a[d];
}

INLINE void shrink(float *to, float by, int64_t dim) {
    for (int64_t d = 0; d < dim; d++) to[d] *= by;
}

/* The mean over some tokens of every head's rows, `apart` from each other in `to`. end: of the
   list that these tokens are a part of, whose next rows are fetched. */
static void mean_of(const Plan *p, const float *x, int64_t h_step, int64_t n_step,
                    const int64_t *tokens, int64_t count, const int64_t *end, float *to,
                    int64_t apart) {
    int64_t heads = p->heads, dim = p->dim;
    for (int64_t h = 0; h < heads; h++) clear(to + h * apart, dim);
    for (int64_t i = 0; i < count; i += 2) {
        for (int64_t j = i + 4; j < i + 6 && tokens + j < end; j++)
            for (int64_t h = 0; h < heads; h++) touch(x + tokens[j] * n_step + h * h_step, dim);
        const float *a = x + tokens[i] * n_step, *b = x + tokens[i + (i + 1 < count)] * n_step;
        for (int64_t h = 0; h < heads; h++)
            if (i + 1 < count)
                add_rows(to + h * apart, a + h * h_step, b + h * h_step, dim);
            else
                add_row(to + h * apart, a + h * h_step, dim);
    }
    for (int64_t h = 0; h < heads; h++) shrink(to + h * apart, 1.0f / (float)count, dim);
}

static void mean_queries(const PlanJob *job, int64_t i) {
    const Plan *p = job->plan;
    int64_t image = i / p->tiles, t = i % p->tiles;
    const float *q = p->q + (job->from + image) * p->q_b + p->prefix * p->q_n;
    const int64_t *tokens = p->order + t * p->tile, *end = p->order + p->tiles * p->tile;
    mean_of(p, q, p->q_h, p->q_n, tokens, p->held ? p->held[t] : p->tile, end,
            head_plan(job, image, 0).rows + t * job->wide, p->shared / p->heads);
}

/* The mean query of every head: the unweighted mean of the tiles. */
static void mean_tiles(const PlanJob *job) {
    const Plan *p = job->plan;
    for (int64_t i = 0; i < job->images * p->heads; i++) {
        HeadPlan x = head_plan(job, i / p->heads, i % p->heads);
        clear(x.mean, p->dim);
        for (int64_t t = 0; t < p->tiles; t++) add_row(x.mean, x.rows + t * job->wide, p->dim);
        shrink(x.mean, 1.0f / (float)p->tiles, p->dim);
    }
}

static void mean_keys(const PlanJob *job, int64_t i) {
    const Plan *p = job->plan;
    int64_t runs = job->items[BLOCKS] / job->images, image = i / runs;
    const float *k = p->k + (job->from + image) * p->k_b + p->prefix * p->k_n;
    const int64_t *end = p->block_order + p->blocks * p->block;
    for (int64_t u = i % runs * job->run; u < smaller((i % runs + 1) * job->run, p->blocks); u++) {
        const int64_t *tokens = p->block_order + u * p->block;
        int64_t held = p->block_held ? p->block_held[u] : p->block;
        mean_of(p, k, p->k_h, p->k_n, tokens, held, end,
                head_plan(job, image, 0).keys + (p->prefix + u) * job->wide,
                p->shared / p->heads);
        for (int64_t h = 0; p->salience && h < p->heads; h++) {
            HeadPlan x = head_plan(job, image, h);
            for (int64_t j = 0; j < held; j++)
                x.key_logits[j * job->room + u] =
                    dot(x.mean, k + h * p->k_h + tokens[j] * p->k_n, p->dim) * (float)p->scale;
        }
    }
}

/* o[channel][lane] = sum of rows[i][channel] s[i][lane]. */
static void mixture(const float *s, const float *const *rows, int64_t count, int64_t channels,
                    float *o) {
    float none[SPAN] = {0};
    clear(o, channels * SPAN);
    for (int64_t n = 0; n < SPAN; n += MOST * WIDTH) {
        int64_t d = 0;
        for (; d + 6 <= channels; d += 6)
            blend(MOST, 6, s + n, rows, d, count, none, o + d * SPAN + n);
        for (; d < channels; d++) blend(MOST, 1, s + n, rows, d, count, none, o + d * SPAN + n);
    }
}

static void softmax(float *s, int64_t count, float scale, int64_t lanes) {
    for (int64_t n = 0; n < lanes; n += WIDTH) {
        vec top = load(s + n), sum = {0};
        for (int64_t i = 1; i < count; i++) top = larger(load(s + i * SPAN + n), top);
        for (int64_t i = 0; i < count; i++) {
            vec p = power((load(s + i * SPAN + n) - top) * all(scale * LOG2E));
            sum += p;
            store(s + i * SPAN + n, p);
        }
        vec share = 1.0f / sum;
        for (int64_t i = 0; i < count; i++)
            store(s + i * SPAN + n, load(s + i * SPAN + n) * share);
    }
}

/* How much more attention the mean query pays to each block than low resolution predicts. to: whole
   vectors. */
static void stand_out(const PlanJob *job, const HeadPlan *x, float *basis, float *low, float *to) {
    const Plan *p = job->plan;
    clear(basis, p->basis);
    for (int64_t u = 0; u < job->units; u++) {
        float logit = dot(x->mean, x->keys + u * job->wide, p->dim) * (float)p->scale;
        const float *down = p->down + u * p->basis;
        for (int64_t i = 0; i < p->basis; i++) basis[i] += logit * down[i];
    }
    for (int64_t u = 0; u < p->blocks; u++)
        low[u] = dot(p->up + (p->prefix + u) * p->basis, basis, p->basis);
    clear(to, job->room);
    for (int64_t j = 0; j < p->block; j++)
        for (int64_t u = 0; u < p->blocks; u += WIDTH) {
            /* `power` is valid below 100 */
            vec most = all(30.0f * LOG2E);
            vec above = (load(x->key_logits + j * job->room + u) - load(low + u)) * all(LOG2E);
            vec weight = power(pick(above > most, most, above));
            for (int i = 0; i < WIDTH && p->block_held; i++)
                if (u + i >= p->blocks || j >= p->block_held[u + i]) weight[i] = 0;
            store(to + u, load(to + u) + weight);
        }
    for (int64_t u = 0; u < p->blocks; u++)
        to[u] /= (float)(p->block_held ? p->block_held[u] : p->block);
}

/* keys of low resolution: W_down^T K, SPAN channels at a time */
static void reduce_keys(const PlanJob *job, const float *keys, const float **at, float *part,
                        float *some, float *low) {
    const Plan *p = job->plan;
    for (int64_t u = 0; u < job->units; u++) at[u] = p->down + u * p->basis;
    if (job->wide == SPAN) {
        mixture(keys, at, job->units, p->basis, low);
        return;
    }
    for (int64_t d = 0; d < job->wide; d += SPAN) {
        for (int64_t u = 0; u < job->units; u++)
            memcpy(part + u * SPAN, keys + u * job->wide + d, SPAN * 4);
        mixture(part, at, job->units, p->basis, some);
        for (int64_t j = 0; j < p->basis; j++)
            memcpy(low + j * job->wide + d, some + j * SPAN, SPAN * 4);
    }
}

/* Writes rows of scores of some tiles, from columns with a stride of SPAN. */
static void to_rows(const float *columns, int64_t count, int64_t blocks, float *rows) {
    int64_t n = 0;
    for (; n + 4 <= count; n += 4) {
        int64_t u = 0;
        for (; u + 4 <= blocks; u += 4) {
            const float *at = columns + u * SPAN + n;
            turn(at, at + SPAN, at + 2 * SPAN, at + 3 * SPAN, rows + n * blocks + u, blocks);
        }
        for (; u < blocks; u++)
            for (int64_t i = n; i < n + 4; i++) rows[i * blocks + u] = columns[u * SPAN + i];
    }
    for (; n < count; n++)
        for (int64_t u = 0; u < blocks; u++) rows[n * blocks + u] = columns[u * SPAN + n];
}

/* Completes the row of scores of a tile, and chooses its best blocks. out: see `stand_out`. */
static void end_row(const PlanJob *job, int64_t row, int64_t t, const float *out, void *room) {
    const Plan *p = job->plan;
    float *to = p->out + row * p->blocks, sum = 0;
    vec sums = {0};
    int64_t u = 0;
    for (; u + WIDTH <= p->blocks; u += WIDTH) {
        vec x = load(to + u) * load(out + u);
        sums += x;
        store(to + u, x);
    }
    for (; u < p->blocks; u++) sum += to[u] *= out[u];
    sum = (sum + total(sums)) * (p->shares ? *p->self_weight : 0);
    const float *shares = p->shares + (p->shares ? t * p->blocks : 0);
    for (u = 0; u < p->blocks && p->shares; u++) to[u] += sum * shares[u];
    if (p->count) top_of(to, p->blocks, p->count, room, p->chosen + row * p->count);
}

static void score_head(const PlanJob *job, int64_t i, float *room) {
    const Plan *p = job->plan;
    HeadPlan x = head_plan(job, i / p->heads, i % p->heads);
    int64_t units = job->units, wide = job->wide, most = units > p->basis ? units : p->basis;
    const float *k = p->k + (job->from + i / p->heads) * p->k_b + i % p->heads * p->k_h;
    const float **at = (const float **)room;
    float *turned = room + (2 * most + 15) / 16 * 16, *part = turned + wide * SPAN;
    float *low = part + units * SPAN, *some = low + p->basis * wide;
    float *weights = some + p->basis * SPAN, *basis = weights + p->blocks * SPAN;
    float *out = basis + p->basis;
    for (int64_t u = 0; u < p->prefix; u++) memcpy(x.keys + u * wide, k + u * p->k_n, p->dim * 4);
    for (int64_t u = 0; u < units; u++) memset(x.keys + u * wide + p->dim, 0, (wide - p->dim) * 4);
    for (int64_t u = 0; u < p->blocks; u++) out[u] = 1;
    if (p->salience) stand_out(job, &x, basis, weights, out);
    reduce_keys(job, x.keys, at, part, some, low);
    for (int64_t t = 0; t < p->tiles; t += SPAN) {
        int64_t count = smaller(SPAN, p->tiles - t);
        int64_t lanes = (count + WIDTH - 1) / WIDTH * WIDTH;
        for (int64_t d = 0; d < p->dim; d++)
            for (int64_t n = 0; n < lanes; n++)
                turned[d * SPAN + n] = x.rows[(t + smaller(n, count - 1)) * wide + d];
        for (int64_t j = 0; j < p->basis; j++) at[j] = low + j * wide;
        product(turned, at, p->basis, p->dim, some, lanes);
        softmax(some, p->basis, (float)p->basis_scale, lanes);
        for (int64_t u = 0; u < p->blocks; u++) at[u] = job->size + u * p->basis;
        product(some, at, p->blocks, p->basis, weights, lanes);
        int64_t row = (job->from * p->heads + i) * p->tiles + t;
        to_rows(weights, count, p->blocks, p->out + row * p->blocks);
        for (int64_t n = 0; n < count; n++) end_row(job, row + n, t + n, out, room);
    }
}

static void one_item(PlanJob *job, int stage, int64_t i, float *room) {
    if (stage == TILES)
        mean_queries(job, i);
    else if (stage == BLOCKS)
        mean_keys(job, i);
    else
        score_head(job, i, room);
    /* the thread that completes the last tile also sums them, before the stage is complete */
    if (__atomic_add_fetch(&job->done[stage], 1, __ATOMIC_ACQ_REL) == job->items[stage]) {
        if (stage == TILES) mean_tiles(job);
        __atomic_add_fetch(&job->done[stage], 1, __ATOMIC_RELEASE);
    }
}

static void plan_some(void *data) {
    PlanJob *job = data;
    float *room = job->scratch + __atomic_fetch_add(&job->joined, 1, __ATOMIC_RELAXED) * job->plan->each;
    for (int stage = 0; stage < STAGES; stage++) {
        int64_t i;
        while ((i = __atomic_fetch_add(&job->next[stage], 1, __ATOMIC_RELAXED)) < job->items[stage])
            one_item(job, stage, i, room);
        /* one more than the number of items: see `one_item` */
        await(&job->done[stage], job->items[stage] + 1);
    }
}

/* Writes scores [B, H, T, U] and, where `count` is not 0, the places of the best [B, H, T, C]. */
EXPORT void sparsiattn_score(const Plan *p) {
    int64_t sizes = p->blocks * p->basis, run = p->block < RUN ? RUN / p->block : 1;
    float *size = p->room, *shared = size + (sizes + 15) / 16 * 16;
    const float *up = p->up + p->prefix * p->basis;
    for (int64_t i = 0; i < sizes; i++) {
        float x = __builtin_fabsf(up[i]);
        size[i] = x <= (float)p->threshold ? 0 : x;
    }
    for (int64_t from = 0; from < p->batch; from += p->group) {
        int64_t images = smaller(p->group, p->batch - from);
        PlanJob job = {
            p, from, images, (p->dim + SPAN - 1) / SPAN * SPAN, p->prefix + p->blocks,
            (p->blocks + 15) / 16 * 16, run, 0, size, shared, shared + p->group * p->shared,
            {images * p->tiles, images * ((p->blocks + run - 1) / run), images * p->heads},
            {0}, {0},
        };
        if (p->parallel && p->threads > 1)
            p->parallel(plan_some, &job, (unsigned)p->threads, 0);
        else
            plan_some(&job);
    }
}

EXPORT int64_t sparsiattn_score_size(void) { return sizeof(Plan); }
