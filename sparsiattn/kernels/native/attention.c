/* Attention of query tiles to lists of keys, float32.

   A work item is one part of a tile: up to SPAN queries that see the same keys. Keys and values are
   read in place, row by row, and each of their elements is multiplied with a vector of queries. */

#include <math.h>

#include "chunks.c"

#define FEW 4   /* tiles up to this size are computed query by query */
#define ALONE 8 /* up to this number, prefix queries are computed one by one */
#define TEAM 64 /* most ranges of work */

/* A range of items. Each thread starts with its own range, so that rows stay in its cache, and then
   helps with the others. apart: padding to two cache lines, so that no two threads write to the same
   one. */
typedef struct {
    int64_t next, end, apart[14];
} Range;

/* The items of a head are `full` parts of prefix queries, which take the longest, then the parts of its
   tiles. each: number of items of a head. bands: those of the cells. */
typedef struct {
    const Call *call;
    int64_t parts, full, each, chunk, ranges, joined;
    Range range[TEAM];
    Bands bands;
} Job;

enum { UNTOUCHED, BEGUN, PREPARED };

/* One image and head. total: number of keys of every cell. state: progress of the data that all its
   tiles share. */
typedef struct {
    const float *q, *k, *v, *bias;
    float *out, *pooled_k, *pooled_v, *total;
    const int64_t *chosen;
    int64_t *state;
    const char *host;
} Head;

/* Position of the next key in a tile's list. */
typedef struct {
    const int64_t *chosen;
    int64_t done, entry, slot, cell;
} Cursor;

/* Size of one head's summary in floats, including its state. */
INLINE int64_t lead_of(const Call *c) {
    return (c->cells * (c->dim + c->value_dim + 1) + 15) / 16 * 16 + 16;
}

static Head head_of(const Call *c, int64_t i) {
    int64_t b = i / c->heads, h = i % c->heads;
    float *pooled = c->pooled + i * lead_of(c) + 16;
    Head x = {
        c->q + b * c->q_b + h * c->q_h, c->k + b * c->k_b + h * c->k_h,
        c->v + b * c->v_b + h * c->v_h, c->bias ? c->bias + b * c->bias_b + h * c->bias_h : 0,
        c->out + b * c->out_b + h * c->out_h, pooled, pooled + c->cells * c->dim,
        pooled + c->cells * (c->dim + c->value_dim), c->chosen + b * c->list_b + h * c->list_h,
        (int64_t *)(pooled - 16), 0,
    };
    if (c->host) x.host = element(c->host, c->host_kind, b * c->host_b + h * c->host_h);
    return x;
}

INLINE const char *host_row(const Call *c, const Head *x, int64_t token) {
    return element(x->host, c->host_kind, token * c->host_n);
}

/* Whether queries with this row of the host's bias may attend to a key. */
INLINE int is_seen(const Call *c, const char *row, int64_t key) {
    return !c->hard || host_at(c, row, key) != -__builtin_inff();
}

INLINE int64_t key_of(const Call *c, Cursor *at) {
    if (at->done < c->prefix) return at->done;
    if (!c->unit) return at->chosen[at->done];
    int64_t block = at->chosen[at->entry], held = c->held ? c->held[block] : c->unit;
    int64_t key = c->table[block * c->unit + at->slot] + c->prefix;
    if (++at->slot >= held) at->slot = 0, at->entry++;
    return key;
}

/* The rows of the next listed keys, at most `most`. */
static int64_t next_listed(const Call *c, const Head *x, Cursor *at, int64_t most, Room *room) {
    int64_t n = 0;
    while (n < most && at->done < c->listed) {
        int64_t key = key_of(c, at);
        room->key[n] = key;
        room->k[n] = x->k + key * c->k_n;
        room->v[n++] = x->v + key * c->v_n;
        if (c->counted && is_seen(c, x->host, key)) room->picked[c->cell[key]]++;
        at->done++;
        if (at->entry >= c->entries && c->unit) at->done = c->listed;
    }
    return n;
}

/* Rows of the next keys of a list, at most `most`; the summary's come last. */
static int64_t next_keys(const Job *job, const Head *x, Cursor *at, int64_t most, Room *room) {
    const Call *c = job->call;
    int64_t n = next_listed(c, x, at, most, room);
    if (n == most || at->done < c->listed || at->cell == c->cells) return n;
    if (!at->cell) {
        await(x->state, PREPARED); /* written by the thread that pools this head's keys */
        for (int64_t g = 0; g < c->cells && c->counted; g++) {
            room->kept[g] = x->total[g] - (float)room->picked[g];
            room->counted[g] = logf(room->kept[g]);
        }
    }
    for (; n < most && at->cell < c->cells; at->cell++) {
        room->k[n] = x->pooled_k + at->cell * c->dim;
        room->v[n++] = x->pooled_v + at->cell * c->value_dim;
    }
    return n;
}

static void begin_list(const Call *c, Room *room) {
    if (c->counted) memset(room->picked, 0, sizeof room->picked);
}

/* The token in a slot of a tile, prefix tokens not counted. */
INLINE int64_t token_of(const Call *c, int64_t tile, int64_t slot) {
    return c->order ? c->order[tile * c->slots + slot] : tile * c->slots + slot;
}

INLINE const float *bias_of(const Call *c, const Head *x, int64_t tile, int64_t slot,
                            const Room *room) {
    if (c->counted) return room->counted;
    return x->bias + (c->by_tile ? tile : token_of(c, tile, slot)) * c->cells;
}

/* Adds the summary's logits to the last `cells` rows of a chunk that ends with cell `end`. */
static void add_bias(const Call *c, const Head *x, int64_t tile, int64_t slot, int64_t count,
                     int64_t lanes, int64_t from, int64_t end, const Room *room, float *s) {
    for (int64_t n = 0; n < lanes; n++) {
        const float *bias = bias_of(c, x, tile, slot + smaller(n, count - 1), room);
        for (int64_t g = from; g < end; g++)
            s[(g - from) * SPAN + n] += cell_bias(c, bias, g, n, room);
    }
}

/* Adds the biases to the logits of a chunk. */
static void end_logits(const Call *c, const Head *x, int64_t tile, int64_t slot, int64_t count,
                       int64_t lanes, int64_t keys, int64_t cell, int64_t end, Room *room) {
    int64_t listed = keys - (end - cell);
    if (c->host) add_host(c, room, listed, lanes);
    if (end > cell)
        add_bias(c, x, tile, slot, count, lanes, cell, end, room, room->s + listed * SPAN);
}

/* Queues for prefetch the rows that this part writes, and those of `q` that the next part reads (if
   any). */
static void prefetch_rows(const Job *job, float *const *to, int64_t count, const float *q,
                          int64_t tile, int64_t slot, Room *room) {
    const Call *c = job->call;
    int64_t chunks = (c->listed + c->cells + job->chunk - 1) / job->chunk, n = 0;
    for (int64_t i = slot; q && i < smaller(slot + SPAN, c->slots); i++)
        room->soon[n++] = q + (c->first + token_of(c, tile, i)) * c->q_n;
    for (int64_t i = 0; i < count; i++) room->soon[n++] = to[i];
    room->left = n;
    room->pace = n / (1 + chunks * (c->value_dim / 6)) + 1;
}

/* Takes the queries of a part from their rows, and begins their softmax. */
static void begin_part(const Job *job, const Head *x, const float *const *from, int64_t lanes,
                       Room *room) {
    const Call *c = job->call;
    if (c->host) sum_host(c, &job->bands, lanes, room);
    take_rows(from, c->dim, (float)(c->scale * LOG2E), lanes, room->q);
    for (int64_t n = 0; n < lanes; n++) room->top[n] = -__builtin_inff(), room->sum[n] = 0;
    for (int64_t d = 0; d < c->value_dim; d++) clear(room->o + d * SPAN, lanes);
}

/* Logits of a part for the rows of a chunk. */
static void score_part(const Call *c, int64_t keys, int64_t lanes, Room *room) {
    for (int64_t n = 0; n < lanes; n += MOST * WIDTH)
        score_chunk(room, keys, c, smaller(MOST, (lanes - n) / WIDTH), n);
}

/* One part of a tile. then: the next item of this thread, -1 if not known. */
static void tile_part(const Job *job, const Head *x, int64_t tile, int64_t slot, int64_t then,
                      Room *room) {
    const Call *c = job->call;
    int64_t count = smaller(SPAN, c->slots - slot);
    int64_t lanes = (count + WIDTH - 1) / WIDTH * WIDTH;
    const float *from[SPAN];
    float *to[SPAN];
    Cursor at = {x->chosen + tile * c->entries, 0, 0, 0, 0};
    begin_list(c, room);
    int64_t cell = 0, keys = next_keys(job, x, &at, job->chunk, room);
    ahead(room->k, 0, smaller(keys, 12), c->dim);
    for (int64_t n = 0; n < lanes; n++) {
        int64_t token = c->first + token_of(c, tile, slot + smaller(n, count - 1));
        from[n] = x->q + token * c->q_n;
        to[n] = x->out + token * c->out_n;
        if (c->host) room->host[n] = host_row(c, x, token);
    }
    begin_part(job, x, from, lanes, room);
    int64_t part = then % job->each - job->full, of_tile = then >= 0 && part >= 0;
    prefetch_rows(job, to, count, of_tile ? head_of(c, then / job->each).q : 0, part / job->parts,
                  part % job->parts * SPAN, room);
    for (; keys > 0; keys = next_keys(job, x, &at, job->chunk, room)) {
        score_part(c, keys, lanes, room);
        end_logits(c, x, tile, slot, count, lanes, keys, cell, at.cell, room);
        cell = at.cell;
        weigh_chunk(c, keys, lanes, room);
    }
    give_rows(c, to, count, lanes, room);
}

/* Rows of the host's bias of a small tile, and their sums. */
static void begin_hosts(const Job *job, const Head *x, int64_t tile, Room *room) {
    const Call *c = job->call;
    if (!c->host) return;
    for (int64_t slot = 0; slot < c->slots; slot++)
        room->host[slot] = host_row(c, x, c->first + token_of(c, tile, slot));
    int64_t lanes = c->slots;
    for (; c->across && lanes % WIDTH; lanes++) room->host[lanes] = room->host[c->slots - 1];
    sum_host(c, &job->bands, lanes, room);
}

/* Whether a slot of a tile repeats its last token. */
INLINE int repeats(const Call *c, int64_t tile, int64_t slot) {
    return slot && token_of(c, tile, slot) == token_of(c, tile, slot - 1);
}

static void small_tile(const Job *job, const Head *x, int64_t tile, Room *room) {
    const Call *c = job->call;
    begin_hosts(job, x, tile, room);
    for (int64_t slot = 0; slot < c->slots; slot++) {
        int64_t token = c->first + token_of(c, tile, slot), cell = 0, keys;
        Cursor at = {x->chosen + tile * c->entries, 0, 0, 0, 0};
        begin_list(c, room);
        begin_query(c, room);
        while ((keys = next_keys(job, x, &at, CHUNK, room)) > 0) {
            const float *bias = c->cells ? bias_of(c, x, tile, slot, room) : 0;
            one_query(c, x->q + token * c->q_n, keys, cell, at.cell, bias, slot, room);
            cell = at.cell;
        }
        end_query(c, x->out + token * c->out_n, room);
    }
}

/* Adds rows of keys to the sums of their cells. */
static void add_cells(const Call *c, const float *const *rows, const int64_t *cell, int64_t count,
                      int64_t dim, float *to) {
    for (int64_t i = 0; i < count; i++) {
        int64_t d = 0;
        if (cell[i] == c->cells) continue;
        float *sum = to + cell[i] * dim;
        for (; d + WIDTH <= dim; d += WIDTH) store(sum + d, load(sum + d) + load(rows[i] + d));
        for (; d < dim; d++) sum[d] += rows[i][d];
    }
}

/* Rows of some keys in a row. */
static void take_keys(const Call *c, const Head *x, int64_t from, int64_t count, Room *room) {
    for (int64_t i = 0; i < count; i++) {
        room->key[i] = from + i;
        room->k[i] = x->k + (from + i) * c->k_n;
        room->v[i] = x->v + (from + i) * c->v_n;
    }
}

/* One pass over all keys and values: computes prefix query `n` (if there is one), which attends to
   every key and to no summary, and the sums of the summary if requested. */
static void pass(const Call *c, const Head *x, int64_t n, int sums, Room *room) {
    if (n < c->first) begin_query(c, room);
    if (n < c->first && c->host) room->host[0] = host_row(c, x, n);
    for (int64_t from = 0; from < c->keys; from += CHUNK) {
        int64_t count = smaller(CHUNK, c->keys - from);
        take_keys(c, x, from, count, room);
        if (n < c->first) {
            one_query(c, x->q + n * c->q_n, count, 0, 0, 0, -1, room);
        } else {
            ahead(room->k, 0, count, c->dim);
            ahead(room->v, 0, count, c->value_dim);
        }
        if (!sums) continue;
        int64_t cell[CHUNK];
        for (int64_t i = 0; i < count; i++) {
            cell[i] = is_seen(c, x->host, from + i) ? c->cell[from + i] : c->cells;
            if (cell[i] < c->cells) x->total[cell[i]]++;
        }
        add_cells(c, room->k, cell, count, c->dim, x->pooled_k);
        add_cells(c, room->v, cell, count, c->value_dim, x->pooled_v);
    }
    if (n < c->first) end_query(c, x->out + n * c->out_n, room);
}

/* Up to SPAN prefix queries from `first` on, which attend to every key and to no summary. */
static void prefix_part(const Job *job, const Head *x, int64_t first, Room *room) {
    const Call *c = job->call;
    int64_t count = smaller(SPAN, c->first - first), keys;
    int64_t lanes = (count + WIDTH - 1) / WIDTH * WIDTH;
    const float *from[SPAN];
    float *to[SPAN];
    for (int64_t n = 0; n < lanes; n++) {
        int64_t token = first + smaller(n, count - 1);
        from[n] = x->q + token * c->q_n;
        to[n] = x->out + token * c->out_n;
        if (c->host) room->host[n] = host_row(c, x, token);
    }
    begin_part(job, x, from, lanes, room);
    room->left = 0;
    for (int64_t at = 0; at < c->keys; at += keys) {
        keys = smaller(CHUNK, c->keys - at);
        take_keys(c, x, at, keys, room);
        score_part(c, keys, lanes, room);
        if (c->host) add_host(c, room, keys, lanes);
        weigh_chunk(c, keys, lanes, room);
    }
    give_rows(c, to, count, lanes, room);
}

/* The summary of a head, and in the same pass the row of prefix query `n`; see `pass`. */
static void pool_head(const Call *c, const Head *x, int64_t n, Room *room) {
    clear(x->pooled_k, c->cells * (c->dim + c->value_dim + 1));
    if (c->cells || n < c->first) pass(c, x, n, c->cells > 0, room);
    for (int64_t g = 0; g < c->cells; g++) {
        float share = 1.0f / (x->total[g] > 0 ? x->total[g] : 1);
        for (int64_t d = 0; d < c->dim; d++) x->pooled_k[g * c->dim + d] *= share;
        for (int64_t d = 0; d < c->value_dim; d++) x->pooled_v[g * c->value_dim + d] *= share;
    }
}

/* Data that the tiles of a head share, computed by the first thread: the summary, and the rows of a few
   prefix queries. Both bring the keys and values into the cache for the other threads. */
static void prepare(const Job *job, const Head *x, Room *room) {
    const Call *c = job->call;
    int64_t untouched = UNTOUCHED;
    if (!__atomic_compare_exchange_n(x->state, &untouched, BEGUN, 0, __ATOMIC_ACQUIRE,
                                     __ATOMIC_RELAXED))
        return;
    pool_head(c, x, job->full ? c->first : 0, room);
    __atomic_store_n(x->state, PREPARED, __ATOMIC_RELEASE);
    for (int64_t n = 1; n < c->first && !job->full; n++) pass(c, x, n, 0, room);
}

static void attend(void *data) {
    Job *job = data;
    const Call *c = job->call;
    Room room;
    int64_t thread = __atomic_fetch_add(&job->joined, 1, __ATOMIC_RELAXED), i;
    for (int64_t n = 0; n < job->ranges; n++) {
        Range *range = job->range + (thread + n) % job->ranges;
        while ((i = __atomic_fetch_add(&range->next, 1, __ATOMIC_RELAXED)) < range->end) {
            int64_t at = i % job->each - job->full, then = i + 1 < range->end ? i + 1 : -1;
            Head x = head_of(c, i / job->each);
            prepare(job, &x, &room);
            if (at < 0)
                prefix_part(job, &x, (at + job->full) * SPAN, &room);
            else if (c->slots <= FEW && c->tiles)
                small_tile(job, &x, at, &room);
            else if (c->tiles)
                tile_part(job, &x, at / job->parts, at % job->parts * SPAN, then, &room);
        }
    }
}

/* Lists in chunks of similar length: a short last chunk would cost almost as much as a full one. */
static int64_t chunk_of(const Call *c) {
    int64_t keys = c->listed + c->cells, chunks = (keys + CHUNK - 1) / CHUNK;
    int64_t each = chunks ? (keys + chunks - 1) / chunks : 1;
    return smaller(CHUNK, (each + 5) / 6 * 6);
}

static Job job_of(const Call *c) {
    int64_t heads = c->batch * c->heads, parts = c->slots <= FEW ? 1 : (c->slots + SPAN - 1) / SPAN;
    int64_t full = c->first > ALONE ? (c->first + SPAN - 1) / SPAN : 0, each = c->tiles * parts + full;
    Job job = {.call = c, .parts = parts, .full = full, .each = each ? each : 1, .chunk = chunk_of(c)};
    for (int64_t i = 0; i < heads; i++) *head_of(c, i).state = UNTOUCHED;
    if (c->host && c->counted) {
        int64_t prefix = 0;
        while (prefix < c->keys && c->cell[prefix] == c->cells) prefix++;
        job.bands = find_bands(c->cell + prefix, c->keys - prefix, c->pooled + heads * lead_of(c));
    }
    return job;
}

/* Writes the result to out [B, H, P + n, Dv]. */
EXPORT void sparsiattn_attend(const Call *c) {
    Job job = job_of(c);
    int64_t items = c->batch * c->heads * job.each;
    job.ranges = c->parallel ? smaller(smaller(c->threads, TEAM), items) : 1;
    for (int64_t n = 0; n < job.ranges; n++)
        job.range[n] = (Range){.next = n * items / job.ranges, .end = (n + 1) * items / job.ranges};
    if (job.ranges > 1)
        c->parallel(attend, &job, (unsigned)job.ranges, 0);
    else
        attend(&job);
}

EXPORT int64_t sparsiattn_attend_size(void) { return sizeof(Call); }
