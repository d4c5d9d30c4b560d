/* The gradient of attention over lists (FlashAttention, arXiv 2205.14135, appendix B.2), which
   recomputes the weights. A work item is one head, since any of its tiles may add to any key. */

#include "attention.c"

/* The order of `_gradients` in gradients.py. `call.out` is the gradient of the result; gradients of
   queries, keys and values are [B, H, N, D]. room: memory of a thread, in floats. */
typedef struct {
    Call call;
    int64_t queries, room;
    float *q, *k, *v, *scratch;
} Back;

typedef struct {
    const Back *call;
    Job *job;
    int64_t next, joined;
} BackJob;

/* The keys of a list and the memory in which their gradients are summed; weights and their gradients,
   a row of SPAN queries per key, or one number per key. */
typedef struct {
    const float **k, **v;
    float **to_k, **to_v;
    float *p, *ds, *pooled;
    float *q, *head_k, *head_v;
} Sums;

/* Divides a thread's memory; `room_of` in gradients.py computes its size. */
static Sums sums_of(const Back *back, int64_t thread) {
    const Call *c = &back->call;
    int64_t list = c->listed + c->cells, most = list > c->keys ? list : c->keys;
    float *at = back->scratch + thread * back->room;
    Sums x = {0};
    x.k = (const float **)at, at += 2 * most;
    x.v = (const float **)at, at += 2 * most;
    x.to_k = (float **)at, at += 2 * most;
    x.to_v = (float **)at, at += 2 * most;
    x.p = at, at += list * SPAN + most + WIDTH;
    x.ds = at, at += list * SPAN + most + WIDTH;
    x.pooled = at;
    return x;
}

/* Sets the rows of a chunk to those from `at` on. cells: how many of the last ones are summary keys;
   `cell` is the first of these. */
static void note_rows(const Call *c, const Room *room, int64_t at, int64_t count, int64_t cells,
                      int64_t cell, Sums *x) {
    for (int64_t i = 0; i < count; i++) {
        int64_t g = cell + i - (count - cells), key = room->key[i];
        int is_cell = i >= count - cells;
        x->k[at + i] = room->k[i];
        x->v[at + i] = room->v[i];
        x->to_k[at + i] = is_cell ? x->pooled + g * c->dim : x->head_k + key * c->dim;
        x->to_v[at + i] = is_cell ? x->pooled + c->cells * c->dim + g * c->value_dim
                                  : x->head_v + key * c->value_dim;
    }
}

INLINE void add_scaled(float *to, const float *row, float by, int64_t dim) {
    int64_t d = 0;
    for (; d + WIDTH <= dim; d += WIDTH) store(to + d, load(to + d) + load(row + d) * all(by));
    for (; d < dim; d++) to[d] += row[d] * by;
}

/* Weights from `count` logits in base 2; all zero for a row without a key. */
static void weigh_row(float *s, int64_t count) {
    float most = -__builtin_inff(), sum = 0;
    for (int64_t i = 0; i < count; i++) most = s[i] > most ? s[i] : most;
    vec base = all(most == -__builtin_inff() ? 0 : most);
    for (int64_t i = count; i % WIDTH; i++) s[i] = -__builtin_inff();
    for (int64_t i = 0; i < count; i += WIDTH) store(s + i, power(load(s + i) - base));
    for (int64_t i = 0; i < count; i++) sum += s[i];
    float share = sum == 0 ? 0 : 1 / sum;
    for (int64_t i = 0; i < count; i++) s[i] *= share;
}

/* One query and the keys whose logits are in `p`. */
static void row_gradients(const Call *c, const float *q, const float *grad, int64_t count, float *to_q,
                          const Sums *x) {
    float delta = 0;
    weigh_row(x->p, count);
    for (int64_t i = 0; i < count; i++) {
        x->ds[i] = dot(grad, x->v[i], c->value_dim);
        delta += x->p[i] * x->ds[i];
    }
    clear(to_q, c->dim);
    for (int64_t i = 0; i < count; i++) {
        float ds = x->p[i] * (x->ds[i] - delta) * (float)c->scale;
        add_scaled(to_q, x->k[i], ds, c->dim);
        add_scaled(x->to_k[i], q, ds, c->dim);
        add_scaled(x->to_v[i], grad, x->p[i], c->value_dim);
    }
}

static void dense_row(const Call *c, const Head *h, int64_t n, Room *room, Sums *x) {
    const float *q = h->q + n * c->q_n;
    if (c->host) room->host[0] = host_row(c, h, n);
    for (int64_t from = 0; from < c->keys; from += CHUNK) {
        int64_t count = smaller(CHUNK, c->keys - from);
        take_keys(c, h, from, count, room);
        score_query(c, q, count, 0, 0, 0, -1, room);
        note_rows(c, room, from, count, 0, 0, x);
        memcpy(x->p + from, room->s, count * sizeof *room->s);
    }
    row_gradients(c, q, h->out + n * c->out_n, c->keys, x->q + n * c->dim, x);
}

static void small_gradients(const Job *job, const Head *h, int64_t tile, Room *room, Sums *x) {
    const Call *c = job->call;
    begin_hosts(job, h, tile, room);
    for (int64_t slot = 0; slot < c->slots; slot++) {
        int64_t token = c->first + token_of(c, tile, slot), cell = 0, done = 0, keys;
        const float *q = h->q + token * c->q_n;
        Cursor at = {h->chosen + tile * c->entries, 0, 0, 0, 0};
        if (repeats(c, tile, slot)) continue;
        begin_list(c, room);
        while ((keys = next_keys(job, h, &at, CHUNK, room)) > 0) {
            const float *bias = c->cells ? bias_of(c, h, tile, slot, room) : 0;
            score_query(c, q, keys, cell, at.cell, bias, slot, room);
            note_rows(c, room, done, keys, at.cell - cell, cell, x);
            memcpy(x->p + done, room->s, keys * sizeof *room->s);
            cell = at.cell, done += keys;
        }
        row_gradients(c, q, h->out + token * c->out_n, done, x->q + token * c->dim, x);
    }
}

/* Weights, and the gradients of their logits times the scale; `dp` holds the gradients of weights. */
static void weigh_list_of(const Call *c, float *p, float *dp, int64_t count, int64_t n) {
    vec top = all(-__builtin_inff()), sum = {0}, delta = {0}, none = {0};
    for (int64_t i = 0; i < count; i++) top = larger(load(p + i * SPAN + n), top);
    vec base = pick(top == all(-__builtin_inff()), none, top);
    for (int64_t i = 0; i < count; i++) {
        vec x = power(load(p + i * SPAN + n) - base);
        sum += x, delta += x * load(dp + i * SPAN + n);
        store(p + i * SPAN + n, x);
    }
    vec share = pick(sum == none, none, 1.0f / sum), scale = all((float)c->scale);
    delta *= share;
    for (int64_t i = 0; i < count; i++) {
        vec x = load(p + i * SPAN + n) * share;
        store(p + i * SPAN + n, x);
        store(dp + i * SPAN + n, x * (load(dp + i * SPAN + n) - delta) * scale);
    }
}

INLINE void mix_columns_of(int wide, const float *s, const float *const *rows, int64_t count,
                           int64_t channels, float *o) {
    float none[SPAN] = {0};
    int64_t d = 0;
    for (; d + 6 <= channels; d += 6) blend(wide, 6, s, rows, d, count, none, o + d * SPAN);
    for (; d < channels; d++) blend(wide, 1, s, rows, d, count, none, o + d * SPAN);
}

/* o[channel][lane] = sum of rows[i][channel] s[i][lane] for whole vectors of lanes. */
static void mix_columns(const float *s, const float *const *rows, int64_t count, int64_t channels,
                        float *o, int64_t lanes) {
    clear(o, channels * SPAN);
    for (int64_t n = 0; n < lanes; n += MOST * WIDTH) {
        int64_t wide = smaller(MOST, (lanes - n) / WIDTH);
#define MIX_COLUMNS(w) mix_columns_of(w, s + n, rows, count, channels, o + n)
        FOR_WIDTH(wide, MIX_COLUMNS)
    }
}

/* Adds to every row of `to` the rows of queries, weighted by `s`: to[i] += sum of s[i][n] rows[n]. */
static void add_mixtures(const float *s, int64_t keys, const float *const *rows, int64_t queries,
                         int64_t dim, float *const *to, Room *room) {
    for (int64_t d = 0; d < dim; d += SPAN) {
        int64_t part = smaller(SPAN, dim - d), lanes = (part + WIDTH - 1) / WIDTH * WIDTH;
        for (int64_t n = 0; n < queries; n++) {
            memcpy(room->o + n * SPAN, rows[n] + d, part * sizeof(float));
            for (int64_t i = part; i < lanes; i++) room->o[n * SPAN + i] = 0;
        }
        for (int64_t from = 0; from < keys; from += CHUNK) {
            const float *weights[CHUNK];
            int64_t count = smaller(CHUNK, keys - from);
            for (int64_t i = 0; i < count; i++) weights[i] = s + (from + i) * SPAN;
            product(room->o, weights, count, queries, room->s, lanes);
            for (int64_t i = 0; i < count; i++)
                add_scaled(to[from + i] + d, room->s + i * SPAN, 1, part);
        }
    }
}

static void tile_gradients(const Job *job, const Head *h, int64_t tile, int64_t slot, Room *room,
                           Sums *x) {
    const Call *c = job->call;
    const float *q[SPAN], *grad[SPAN];
    float *to[SPAN];
    int64_t count = 0, cell = 0, done = 0, keys;
    for (; count < smaller(SPAN, c->slots - slot) && !repeats(c, tile, slot + count); count++) {
        int64_t token = c->first + token_of(c, tile, slot + count);
        q[count] = h->q + token * c->q_n;
        grad[count] = h->out + token * c->out_n;
        to[count] = x->q + token * c->dim;
        if (c->host) room->host[count] = host_row(c, h, token);
    }
    if (!count) return;
    int64_t lanes = (count + WIDTH - 1) / WIDTH * WIDTH;
    for (int64_t n = count; n < lanes; n++) {
        q[n] = q[count - 1], grad[n] = grad[count - 1];
        if (c->host) room->host[n] = room->host[count - 1];
    }
    if (c->host) sum_host(c, &job->bands, lanes, room);
    take_rows(q, c->dim, (float)(c->scale * LOG2E), lanes, room->q);
    Cursor at = {h->chosen + tile * c->entries, 0, 0, 0, 0};
    begin_list(c, room);
    while ((keys = next_keys(job, h, &at, job->chunk, room)) > 0) {
        product(room->q, room->k, keys, c->dim, room->s, lanes);
        end_logits(c, h, tile, slot, count, lanes, keys, cell, at.cell, room);
        note_rows(c, room, done, keys, at.cell - cell, cell, x);
        memcpy(x->p + done * SPAN, room->s, keys * SPAN * sizeof *room->s);
        cell = at.cell, done += keys;
    }
    take_rows(grad, c->value_dim, 1, lanes, room->q);
    product(room->q, x->v, done, c->value_dim, x->ds, lanes);
    for (int64_t n = 0; n < lanes; n += WIDTH) weigh_list_of(c, x->p, x->ds, done, n);
    mix_columns(x->ds, x->k, done, c->dim, room->o, lanes);
    put_rows(room->o, to, count, c->dim);
    add_mixtures(x->ds, done, q, count, c->dim, x->to_k, room);
    add_mixtures(x->p, done, grad, count, c->value_dim, x->to_v, room);
}

/* Distributes the gradient of a cell's mean to its keys. */
static void spread_cells(const Call *c, const Head *h, const Sums *x) {
    const float *values = x->pooled + c->cells * c->dim;
    for (int64_t i = 0; i < c->keys; i++) {
        int64_t g = c->cell[i];
        if (g == c->cells || !is_seen(c, h->host, i)) continue;
        float share = 1.0f / h->total[g];
        add_scaled(x->head_k + i * c->dim, x->pooled + g * c->dim, share, c->dim);
        add_scaled(x->head_v + i * c->value_dim, values + g * c->value_dim, share, c->value_dim);
    }
}

static void head_gradients(const BackJob *job, int64_t i, Room *room, Sums *x) {
    const Back *back = job->call;
    const Call *c = &back->call;
    Head h = head_of(c, i);
        x->q = back->q + i * back->queries * c->dim;
    x->head_k = back->k + i * c->keys * c->dim;
    x->head_v = back->v + i * c->keys * c->value_dim;
    clear(x->head_k, c->keys * c->dim);
    clear(x->head_v, c->keys * c->value_dim);
    clear(x->pooled, c->cells * (c->dim + c->value_dim));
    pool_head(c, &h, c->first, room);
    *h.state = PREPARED;
    for (int64_t n = 0; n < c->first; n++) dense_row(c, &h, n, room, x);
    for (int64_t tile = 0; tile < c->tiles; tile++)
        if (c->slots <= FEW)
            small_gradients(job->job, &h, tile, room, x);
        else
            for (int64_t slot = 0; slot < c->slots; slot += SPAN)
                tile_gradients(job->job, &h, tile, slot, room, x);
    if (c->cells) spread_cells(c, &h, x);
}

static void back_some(void *data) {
    BackJob *job = data;
    const Call *c = &job->call->call;
    Room room;
    Sums sums = sums_of(job->call, __atomic_fetch_add(&job->joined, 1, __ATOMIC_RELAXED));
    int64_t i;
    while ((i = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < c->batch * c->heads)
        head_gradients(job, i, &room, &sums);
}

/* Writes the gradients of q, k and v. */
EXPORT void sparsiattn_backward(const Back *back) {
    const Call *c = &back->call;
    Job lists = job_of(c);
    BackJob job = {back, &lists, 0, 0};
    if (c->parallel && c->threads > 1)
        c->parallel(back_some, &job, (unsigned)c->threads, 0);
    else
        back_some(&job);
}

EXPORT int64_t sparsiattn_backward_size(void) { return sizeof(Back); }
