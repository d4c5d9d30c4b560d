/* Queries over a chunk of keys under a running softmax (FlashAttention, arXiv 2205.14135), so that
   all that a thread works on stays in its own cache: tiles of queries, transposed so that a vector
   holds one channel of several, or a single query. */

#include "vectors.h"

#define CHUNK 60
#define CELLS 144 /* up to this many cells of a summary are counted here */

/* The order of `sparsiattn.kernels.native.launch`. Steps are in elements. */
typedef struct {
    int64_t batch, heads, keys, dim, value_dim;
    int64_t first, tiles, slots;
    int64_t entries, list_b, list_h;
    int64_t unit, listed, prefix;
    int64_t cells, counted, by_tile, bias_b, bias_h;
    int64_t q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, out_b, out_h, out_n;
    int64_t threads;
    const float *q, *k, *v;
    float *out;
    const int64_t *chosen, *table, *held, *order, *cell;
    const float *bias;
    float *pooled;
    Parallel parallel;
    double scale;
} Call;

/* What one thread needs for one list. */
typedef struct {
    float q[WIDEST * SPAN] __attribute__((aligned(64)));
    float o[WIDEST * SPAN] __attribute__((aligned(64)));
    float s[CHUNK * SPAN] __attribute__((aligned(64)));
    float top[SPAN] __attribute__((aligned(64)));
    float sum[SPAN] __attribute__((aligned(64)));
    float fade[SPAN] __attribute__((aligned(64)));
    const float *k[CHUNK], *v[CHUNK];
    /* rows to be fetched while values are summed up, `pace` at a time: they come from afar */
    const float *soon[2 * SPAN];
    int64_t left, pace;
    int32_t picked[CELLS + 1]; /* keys of every cell in the list at hand */
    float counted[CELLS];      /* the bias that follows from them */
} Room;

INLINE void ahead(const float *const *rows, int64_t from, int64_t to, int64_t dim) {
    for (int64_t i = from; i < to; i++) touch(rows[i], dim);
}

INLINE void score_all(int wide, const float *q, const Room *room, int64_t count, const Call *c,
                      float *s) {
    int64_t i = 0;
    for (; i + 6 <= count; i += 6) {
        ahead(room->k, i + 6, i + 12 < count ? i + 12 : count, c->dim);
        ahead(room->v, i, i + 6, c->value_dim);
        score(wide, 6, q, room->k + i, c->dim, s + i * SPAN, SPAN);
    }
    if (i + 4 <= count) score(wide, 4, q, room->k + i, c->dim, s + i * SPAN, SPAN), i += 4;
    if (i + 2 <= count) score(wide, 2, q, room->k + i, c->dim, s + i * SPAN, SPAN), i += 2;
    if (i < count) score(wide, 1, q, room->k + i, c->dim, s + i * SPAN, SPAN);
}

INLINE void fetch_some(Room *room, int64_t dim) {
    for (int64_t n = 0; n < room->pace && room->left > 0; n++) touch(room->soon[--room->left], dim);
}

INLINE void blend_all(int wide, Room *room, int64_t count, int64_t dim, int64_t at) {
    const float *s = room->s + at, *fade = room->fade + at;
    float *o = room->o + at;
    int64_t d = 0;
    for (; d + 6 <= dim; d += 6) {
        fetch_some(room, dim);
        blend(wide, 6, s, room->v, d, count, fade, o + d * SPAN);
    }
    if (d + 4 <= dim) blend(wide, 4, s, room->v, d, count, fade, o + d * SPAN), d += 4;
    if (d + 2 <= dim) blend(wide, 2, s, room->v, d, count, fade, o + d * SPAN), d += 2;
    if (d < dim) blend(wide, 1, s, room->v, d, count, fade, o + d * SPAN);
}

/* Logits of a chunk to weights, and by how much what came before must fade. */
INLINE void weigh(Room *room, int64_t count, int64_t at) {
    float *s = room->s + at;
    vec before = load(room->top + at), top = before, sum = {0};
    for (int64_t i = 0; i < count; i++) top = larger(load(s + i * SPAN), top);
    /* where all logits are minus infinity the difference would be no number */
    vec base = pick(top == all(-__builtin_inff()), (vec){0}, top);
    for (int64_t i = 0; i < count; i++) {
        vec p = power(load(s + i * SPAN) - base);
        sum += p;
        store(s + i * SPAN, p);
    }
    vec fade = power(before - base);
    store(room->top + at, top);
    store(room->fade + at, fade);
    store(room->sum + at, load(room->sum + at) * fade + sum);
}

INLINE void strip(int wide, Room *room, int64_t count, const Call *c, int64_t at) {
    score_all(wide, room->q + at, room, count, c, room->s + at);
}

static __attribute__((noinline)) void score_chunk(Room *room, int64_t count, const Call *c,
                                                  int64_t wide, int64_t at) {
#define SCORE(n) strip(n, room, count, c, at)
    FOR_WIDTH(wide, SCORE)
}

static __attribute__((noinline)) void blend_chunk(Room *room, int64_t count, const Call *c,
                                                  int64_t wide, int64_t at) {
#define BLEND(n) blend_all(n, room, count, c->value_dim, at)
    FOR_WIDTH(wide, BLEND)
}

/* Queries of a part, scaled and transposed. Empty lanes repeat the last query. */
static void take_queries(const Call *c, const float *const *rows, int64_t lanes, Room *room) {
    float scale = (float)(c->scale * LOG2E);
    for (int64_t n = 0; n < lanes; n += 4) {
        int64_t d = 0;
        for (; d + 4 <= c->dim; d += 4)
            turn(rows[n] + d, rows[n + 1] + d, rows[n + 2] + d, rows[n + 3] + d,
                 room->q + d * SPAN + n, SPAN);
        for (; d < c->dim; d++)
            for (int64_t i = 0; i < 4; i++) room->q[d * SPAN + n + i] = rows[n + i][d];
    }
    for (int64_t d = 0; d < c->dim; d++)
        for (int64_t n = 0; n < lanes; n += WIDTH)
            store(room->q + d * SPAN + n, load(room->q + d * SPAN + n) * all(scale));
}

static void give_rows(const Call *c, float *const *rows, int64_t count, int64_t lanes, Room *room) {
    for (int64_t n = 0; n < lanes; n += WIDTH) {
        vec sum = load(room->sum + n), none = {0};
        vec share = pick(sum == none, none, 1.0f / sum);
        for (int64_t d = 0; d < c->value_dim; d++)
            store(room->o + d * SPAN + n, load(room->o + d * SPAN + n) * share);
    }
    int64_t n = 0;
    for (; n + 4 <= count; n += 4) {
        int64_t d = 0;
        for (; d + 4 <= c->value_dim; d += 4) {
            float turned[16];
            const float *o = room->o + d * SPAN + n;
            turn(o, o + SPAN, o + 2 * SPAN, o + 3 * SPAN, turned, 4);
            for (int64_t i = 0; i < 4; i++) memcpy(rows[n + i] + d, turned + 4 * i, 16);
        }
        for (; d < c->value_dim; d++)
            for (int64_t i = 0; i < 4; i++) rows[n + i][d] = room->o[d * SPAN + n + i];
    }
    for (; n < count; n++)
        for (int64_t d = 0; d < c->value_dim; d++) rows[n][d] = room->o[d * SPAN + n];
}

static void weigh_chunk(const Call *c, int64_t keys, int64_t lanes, Room *room) {
    for (int64_t n = 0; n < lanes; n += WIDTH) weigh(room, keys, n);
    for (int64_t n = 0; n < lanes; n += MOST * WIDTH)
        blend_chunk(room, keys, c, smaller(MOST, (lanes - n) / WIDTH), n);
}

/* One query over the rows of a chunk, under a running softmax whose state is in lane 0. */
static void one_query(const Call *c, const float *q, int64_t count, int64_t biased,
                      const float *bias, Room *room) {
    float *s = room->s, top = room->top[0];
    for (int64_t i = 0; i < count; i++) {
        if (i + 8 < count) touch(room->k[i + 8], c->dim);
        touch(room->v[i], c->value_dim);
        s[i] = dot(q, room->k[i], c->dim) * (float)(c->scale * LOG2E);
    }
    for (int64_t g = 0; g < biased; g++) s[count - biased + g] += bias[g] * LOG2E;
    vec most = all(top), sum = {0};
    for (int64_t i = count; i % WIDTH; i++) s[i] = -__builtin_inff();
    for (int64_t i = 0; i < count; i += WIDTH) most = larger(load(s + i), most);
    for (int i = 0; i < WIDTH; i++) top = most[i] > top ? most[i] : top;
    float base = top == -__builtin_inff() ? 0.0f : top;
    float fade = power(all(room->top[0] - base))[0];
    for (int64_t i = 0; i < count; i += WIDTH) {
        vec p = power(load(s + i) - all(base));
        sum += p;
        store(s + i, p);
    }
    room->top[0] = top;
    room->sum[0] = room->sum[0] * fade + total(sum);
    float *o = room->o;
    int64_t d = 0;
    for (; d + WIDTH <= c->value_dim; d += WIDTH) {
        vec even = load(o + d) * all(fade), odd = {0};
        int64_t i = 0;
        for (; i + 2 <= count; i += 2) {
            even += load(room->v[i] + d) * all(s[i]);
            odd += load(room->v[i + 1] + d) * all(s[i + 1]);
        }
        if (i < count) even += load(room->v[i] + d) * all(s[i]);
        store(o + d, even + odd);
    }
    for (; d < c->value_dim; d++) {
        o[d] *= fade;
        for (int64_t i = 0; i < count; i++) o[d] += room->v[i][d] * s[i];
    }
}

static void begin_query(const Call *c, Room *room) {
    room->top[0] = -__builtin_inff();
    room->sum[0] = 0;
    memset(room->o, 0, c->value_dim * 4);
}

static void end_query(const Call *c, float *to, const Room *room) {
    float share = room->sum[0] == 0 ? 0 : 1 / room->sum[0];
    for (int64_t d = 0; d < c->value_dim; d++) to[d] = room->o[d] * share;
}
