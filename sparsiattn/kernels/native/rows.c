/* Attention of every query to its own best keys (k-NN attention, arXiv 2106.00515).

   A few rows of scores at a time stay in the innermost cache. The exact best patch keys of each row are
   found by counting; softmax and values are then computed only for these, for prefix keys and for the
   summary. Keys are packed once per head so that a vector holds one channel of several keys.

   With a mask, a cell of the summary stands for those of its keys that the query may attend to. Queries
   that may attend to the same keys share a view; the means of a few views are cached. */

#include <math.h>

#include "bands.h"
#include "top.c"

#define GROUP ROWS_AT_ONCE /* queries whose scores are computed together */
#define PASSES 10 /* most passes over a row to find its threshold */
#define TRIED 3   /* thresholds of a pass */
#define CLOSE 16  /* scores around the threshold that are ranked one by one */
#define TRIES 3   /* attempts to extract everything above a threshold in one pass */
#define MARGIN 0.25f /* margin of the first such threshold below the expected one, in standard deviations */
#define VIEWS 8   /* views that are cached, more than a group can need */

/* The order of `_attend_to_best` in rows.py. Steps are in elements. columns: of packed keys, patch keys
   first, then from `fixed` on prefix keys and cells, in whole vectors. keep: patch keys of a list.
   parts: items of work for each head. room: numbers that a thread needs. kind: of q, k, v and out.
   hard: whether the host's bias forbids keys of which it is low. across: as in `Call` of chunks.c, then
   without a prefix. views: VIEWS where queries differ in
   the keys that they may see and there is a summary, else 0. quantile: of the normal distribution at
   keep of all patch keys. */
typedef struct {
    int64_t batch, heads, queries, keys, dim, value_dim;
    int64_t first, prefix, keep, cells, columns, fixed;
    int64_t q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, out_b, out_h, out_n;
    int64_t threads, parts, room;
    int64_t kind, bias_kind, bias_b, bias_h, bias_n, hard, views, across;
    const void *q, *k, *v;
    void *out;
    const int64_t *cell;
    const void *bias;
    float *scratch;
    Parallel parallel;
    double scale, quantile;
} Rows;

typedef struct {
    const Rows *call;
    int64_t next, joined;
} RowsJob;

/* Keys that some queries may see, one or zero for each patch key, how many in every cell, and their
   means; `values` is the column of the first. */
typedef struct {
    float *seen, *held, *keys;
    int64_t values, used;
} View;

/* The list of a row: columns and weights, and weights of the cells of `view`; `picked` of the keys of
   each cell are in the list. Weights overwrite the cells' scores. */
typedef struct {
    float *weights, *cell_weights, sum;
    int32_t *index, *picked;
    int64_t count, cells;
    const View *view;
} List;

/* One thread's memory. keys: panels of SPAN columns, channel by channel. values: a row for every
   column, and for the means of the views behind the first. scores, bias: GROUP rows. rows: SPAN as
   float32. total: bias of every cell, rows of a
   group side by side. order: of `top.c`. cell: of every patch key. clock: counts uses
   of views. guess: the last row's
   threshold, in deviations from its mean. */
typedef struct {
    float *keys, *values, *scores, *rows, *bias, *total, *band_room, guess;
    Bands bands;
    int32_t *cell;
    uint32_t *order;
    int64_t clock;
    View views[1 + VIEWS];
    List lists[GROUP];
} RowsRoom;

/* Divides this memory; `room_of` in rows.py computes its size. */
static RowsRoom rows_room(const Rows *c, int64_t thread) {
    int64_t panels = (c->columns + SPAN - 1) / SPAN, cells = (c->cells + 15) / 16 * 16;
    int64_t listed = c->columns + 32; /* whole vectors are written past the end of a list */
    int64_t widest = c->dim > c->value_dim ? c->dim : c->value_dim;
    RowsRoom x = {0};
    float *at = c->scratch + thread * c->room;
    x.keys = at, at += panels * SPAN * c->dim;
    x.values = at, at += (c->columns + c->views * c->cells) * c->value_dim;
    x.scores = at, at += GROUP * c->columns;
    for (int64_t n = 0; n <= c->views; n++) {
        View *view = x.views + n;
        view->values = n ? c->columns + (n - 1) * c->cells : c->fixed + c->prefix;
        view->keys = at, at += cells * c->dim;
        view->held = at, at += cells;
        view->seen = at, at += c->bias ? c->fixed : 0;
    }
    x.cell = (int32_t *)at, at += listed;
    x.order = (uint32_t *)at, at += listed;
    for (int r = 0; r < GROUP; r++) {
        x.lists[r].weights = at, at += listed;
        x.lists[r].index = (int32_t *)at, at += listed;
        x.lists[r].picked = (int32_t *)at, at += cells;
    }
    x.rows = at, at += c->kind ? SPAN * (widest + 16) : 0;
    x.bias = at, at += c->bias ? GROUP * c->columns : 0;
    x.total = at, at += GROUP * cells;
    x.band_room = at;
    return x;
}

/* Column of a patch key, a prefix key or a cell, by its key; cells follow the keys. */
INLINE int64_t column_of(const Rows *c, int64_t key) {
    return key < c->prefix ? c->fixed + key
           : key < c->keys ? key - c->prefix
                           : c->fixed + c->prefix + key - c->keys;
}

/* A row of an operand as float32: in place, or converted in `to`. */
INLINE const float *row_of(const Rows *c, const void *x, int64_t at, int64_t count, float *to) {
    if (!c->kind) return (const float *)x + at;
    widen(c->kind, element(x, c->kind, at), to, count);
    return to;
}

INLINE void add_to(float *to, const float *row, int64_t dim) {
    for (int64_t d = 0; d < dim; d++) to[d] += row[d];
}

/* The summary of a view: means of the keys and values of every cell. seen: NULL if all are visible. */
static void pool_view(const Rows *c, const void *k, const float *seen, View *view, RowsRoom *x) {
    float *values = x->values + view->values * c->value_dim;
    memset(view->held, 0, (c->cells + 15) / 16 * 64);
    clear(view->keys, c->cells * c->dim);
    clear(values, c->cells * c->value_dim);
    for (int64_t i = c->prefix; i < c->keys; i++) {
        int64_t cell = x->cell[i - c->prefix];
        if (seen && seen[i - c->prefix] == 0) continue;
        view->held[cell]++;
        add_to(view->keys + cell * c->dim, row_of(c, k, i * c->k_n, c->dim, x->rows), c->dim);
        add_to(values + cell * c->value_dim, x->values + (i - c->prefix) * c->value_dim,
               c->value_dim);
    }
    for (int64_t g = 0; g < c->cells; g++) {
        float share = 1.0f / (view->held[g] > 0 ? view->held[g] : 1.0f);
        for (int64_t d = 0; d < c->dim; d++) view->keys[g * c->dim + d] *= share;
        for (int64_t d = 0; d < c->value_dim; d++) values[g * c->value_dim + d] *= share;
    }
}

/* Address of the host's bias of a query. */
INLINE const char *bias_at(const Rows *c, int64_t head, int64_t query) {
    int64_t at = head / c->heads * c->bias_b + head % c->heads * c->bias_h + query * c->bias_n;
    return element(c->bias, c->bias_kind, at);
}

/* A bias for every column from its factors. */
static void spread(const Rows *c, const float *factors, float *to) {
    int64_t across = c->across, rows = c->keys / across;
    const float *right = factors + rows;
    for (int64_t y = 0; y < rows; y++, to += across) {
        int64_t x = 0;
        for (; x + WIDTH <= across; x += WIDTH) store(to + x, load(right + x) + all(factors[y]));
        if (x < across && across >= WIDTH) /* some are written twice */
            x = across - WIDTH, store(to + x, load(right + x) + all(factors[y])), x = across;
        for (; x < across; x++) to[x] = right[x] + factors[y];
    }
    clear(to, c->columns - c->keys);
}

/* The host's bias of a query for every column; minus infinity for keys that are hidden from it. */
static void take_bias(const Rows *c, int64_t head, int64_t query, float *to) {
    int64_t patches = c->keys - c->prefix;
    const char *at = bias_at(c, head, query);
    if (c->across) {
        spread(c, (const float *)at, to);
        return;
    }
    clear(to + patches, c->columns - patches);
    widen(c->bias_kind, element(at, c->bias_kind, c->prefix), to, patches);
    widen(c->bias_kind, at, to + c->fixed, c->prefix);
    for (int64_t i = 0; i < c->columns && c->hard; i += WIDTH) {
        vec b = load(to + i);
        store(to + i, pick(b > all(MASKED_BELOW), b, all(-__builtin_inff())));
    }
}

/* The keys that are visible to a query, according to its bias. */
static void take_view(const Rows *c, const float *bias, float *seen) {
    for (int64_t i = 0; i < c->fixed; i += WIDTH)
        store(seen + i, pick(load(bias + i) == all(-__builtin_inff()), (vec){0}, all(1)));
}

static int is_view(const Rows *c, const float *bias, const View *view) {
    for (int64_t i = 0; i < c->fixed; i += WIDTH) {
        ints hidden = load(bias + i) == all(-__builtin_inff());
        if (sum_of(hidden ^ (load(view->seen + i) == 0))) return 0;
    }
    return 1;
}

/* The view of a query, pooled now if it is not in the cache, where it replaces the least recently used
   view. */
static const View *view_of(const Rows *c, const void *k, const float *bias, RowsRoom *x) {
    View *oldest = x->views + 1;
    if (!c->views || is_view(c, bias, x->views)) return x->views;
    for (int64_t n = 1; n <= c->views; n++) {
        View *view = x->views + n;
        if (view->used && is_view(c, bias, view)) {
            view->used = ++x->clock;
            return view;
        }
        if (view->used < oldest->used) oldest = view;
    }
    take_view(c, bias, oldest->seen);
    pool_view(c, k, oldest->seen, oldest, x);
    oldest->used = ++x->clock;
    return oldest;
}

/* Keys of SPAN columns, transposed; `rows` repeats any key where a column has none. */
static void pack_panel(const Rows *c, const float *const *rows, float *to) {
    for (int64_t n = 0; n < SPAN; n += 4) {
        int64_t d = 0;
        for (; d + 4 <= c->dim; d += 4)
            turn(rows[n] + d, rows[n + 1] + d, rows[n + 2] + d, rows[n + 3] + d, to + d * SPAN + n,
                 SPAN);
        for (; d < c->dim; d++)
            for (int64_t i = 0; i < 4; i++) to[d * SPAN + n + i] = rows[n + i][d];
    }
}

INLINE const void *keys_of(const Rows *c, int64_t head) {
    return element(c->k, c->kind, head / c->heads * c->k_b + head % c->heads * c->k_h);
}

/* The summary of the keys visible to the first patch query; other queries share it or have their own. */
static void pool_first(const Rows *c, int64_t head, RowsRoom *x) {
    for (int64_t n = 1; n <= c->views; n++) x->views[n].used = 0;
    for (int64_t i = c->prefix; i < c->keys; i++) x->cell[i - c->prefix] = (int32_t)c->cell[i];
    if (c->bias && !x->bands.count)
        x->bands = find_bands(c->cell + c->prefix, c->keys - c->prefix, x->band_room);
    if (c->hard) {
        take_bias(c, head, smaller(c->first, c->queries - 1), x->bias);
        take_view(c, x->bias, x->views[0].seen);
    }
    pool_view(c, keys_of(c, head), c->hard ? x->views[0].seen : 0, x->views, x);
}

static void pack_head(const Rows *c, int64_t head, RowsRoom *x) {
    const void *k = keys_of(c, head);
    const void *v = element(c->v, c->kind, head / c->heads * c->v_b + head % c->heads * c->v_h);
    for (int64_t i = 0; i < c->keys; i++) {
        if (i + 8 < c->keys) touch(element(v, c->kind, (i + 8) * c->v_n), c->value_dim);
        widen(c->kind, element(v, c->kind, i * c->v_n), x->values + column_of(c, i) * c->value_dim,
              c->value_dim);
    }
    if (c->cells) pool_first(c, head, x);
    for (int64_t from = 0; from < c->columns; from += SPAN) {
        const float *rows[SPAN];
        const float *any = row_of(c, k, 0, c->dim, x->rows + SPAN * c->dim);
        for (int64_t n = 0; n < SPAN; n++) {
            int64_t at = from + n, key = at < c->fixed ? at + c->prefix : at - c->fixed;
            rows[n] = any;
            if (at < c->fixed ? key < c->keys : key < c->prefix)
                rows[n] = row_of(c, k, key * c->k_n, c->dim, x->rows + n * c->dim);
            else if (at >= c->fixed && key < c->prefix + c->cells)
                rows[n] = x->views[0].keys + (key - c->prefix) * c->dim;
        }
        pack_panel(c, rows, x->keys + from * c->dim);
    }
}

INLINE void score_span(int wide, const float *keys, const float *const *rows, int64_t dim, float *to,
                       int64_t apart) {
    score(wide, GROUP, keys, rows, dim, to, apart);
}

/* Scores of GROUP queries for the columns of whole panels from `first` to `end`. */
static void score_panels(const Rows *c, const float *const *rows, const RowsRoom *x, int64_t first,
                         int64_t end, int64_t apart, float *to) {
    for (int64_t from = first; from < end; from += MOST * WIDTH) {
        int64_t wide = smaller(MOST, (end - from + WIDTH - 1) / WIDTH);
        const float *keys = x->keys + from / SPAN * SPAN * c->dim + from % SPAN;
#define SCORE_SPAN(n) score_span(n, keys, rows, c->dim, to + from, apart)
        FOR_WIDTH(wide, SCORE_SPAN)
    }
}

/* Columns without a key are minus infinity. */
static void end_scores(const Rows *c, float *s) {
    for (int64_t i = c->keys - c->prefix; i < c->fixed; i++) s[i] = -__builtin_inff();
    for (int64_t i = c->fixed + c->prefix + c->cells; i < c->columns; i++) s[i] = -__builtin_inff();
}

/* Scores of some queries, with a stride of `columns`. */
static void score_rows(const Rows *c, const float *const *rows, const RowsRoom *x, int64_t apart) {
    score_panels(c, rows, x, 0, c->columns, apart, x->scores);
    for (int r = 0; r < GROUP; r++) end_scores(c, x->scores + r * apart);
}

/* Scaled scores with the host's bias. Summary scores of the query's view replace those of the first
   view. */
static void bias_row(const Rows *c, const float *q, const float *bias, const View *view,
                     const RowsRoom *x, float *s) {
    float *cells = s + c->fixed + c->prefix;
    for (int64_t g = 0; g < c->cells && view != x->views; g++)
        cells[g] = dot(q, view->keys + g * c->dim, c->dim);
    for (int64_t i = 0; i < c->columns; i += WIDTH) {
        vec b = load(bias + i), none = all(-__builtin_inff());
        store(s + i, pick(b == none, none, load(s + i) * all((float)c->scale) + b));
    }
}

/* How many numbers of a row are at least each threshold. */
INLINE void count_from(const float *s, int64_t columns, const float *tried, int64_t *count) {
    ints sum[TRIED] = {{0}};
    for (int64_t i = 0; i < columns; i += WIDTH)
#pragma GCC unroll 3
        for (int j = 0; j < TRIED; j++)
            sum[j] = count_lanes(sum[j], lanes_from(load(s + i), all(tried[j])));
    for (int j = 0; j < TRIED; j++) count[j] = sum_of(sum[j]);
}

/* Numbers whose `keep` largest are searched, in whole vectors padded with minus infinity. */
typedef struct {
    const float *numbers;
    int64_t columns, count, keep;
} Contest;

/* Two thresholds around the one sought: `below` numbers, at least `keep`, are at or above `lower`,
   and `above` of them, at most `keep`, at or above `upper`. */
typedef struct {
    float lower, upper;
    int64_t below, above;
} Bracket;

/* Narrows a bracket down with thresholds that are `step` apart. */
INLINE void try_thresholds(const Contest *c, float middle, float step, Bracket *x) {
    float tried[TRIED];
    int64_t count[TRIED];
    for (int j = 0; j < TRIED; j++) tried[j] = middle + (float)(j - 1) * step;
    count_from(c->numbers, c->columns, tried, count);
    for (int j = 0; j < TRIED; j++) {
        if (count[j] >= c->keep && tried[j] > x->lower) x->lower = tried[j], x->below = count[j];
        if (count[j] <= c->keep && tried[j] < x->upper) x->upper = tried[j], x->above = count[j];
    }
}

INLINE int is_narrow(const Contest *c, const Bracket *x) {
    return x->below == c->keep || x->above == c->keep || x->below - x->above <= CLOSE;
}

/* Narrows a bracket down until few numbers are in it, if it can be. middle, step: the first thresholds
   to try. */
static void narrow_down(const Contest *c, float middle, float step, Bracket *x) {
    for (int pass = 0; pass < PASSES && !is_narrow(c, x); pass++) {
        if (x->lower > -__builtin_inff() && x->upper < __builtin_inff()) {
            float share = (float)(x->below - c->keep) / (float)(x->below - x->above);
            middle = x->lower + share * (x->upper - x->lower);
            step = 0.2f * (x->upper - x->lower);
        } else if (pass) {
            step *= 3;
            middle = x->lower > -__builtin_inff() ? x->lower + 2 * step : x->upper - 2 * step;
        }
        try_thresholds(c, middle, step, x);
    }
}

/* The `keep`th best, by ranking the few numbers within a bracket. */
static float threshold_within(const Contest *c, const Bracket *x) {
    /* columns without a key, up to 15, may be among them, and whole vectors are written */
    float close[CLOSE + 16 + WIDTH];
    int32_t places[CLOSE + 16 + WIDTH];
    int64_t count = 0, need = c->keep - x->above - 1;
    for (int64_t i = 0; i < c->columns; i += WIDTH) {
        vec a = load(c->numbers + i);
        Lanes within = lanes_from(a, all(x->lower)) & ~lanes_from(a, all(x->upper));
        count += keep_pairs(within, a, (ints){0}, close + count, places);
    }
    vec parts[CLOSE / WIDTH], sought = {0};
    for (int i = 0; i < CLOSE / WIDTH; i++)
        parts[i] = pick(lanes_at(i * WIDTH) < (int32_t)count, load(close + i * WIDTH),
                        all(-__builtin_inff()));
#pragma GCC unroll 4
    for (int i = 0; i < CLOSE / WIDTH; i++) {
        vec mine = parts[i];
        ints rank = {0}, lane = lanes_at(i * WIDTH);
#pragma GCC unroll 16
        for (int j = 0; j < CLOSE; j++) {
            vec other = all(parts[j / WIDTH][j % WIDTH]);
            rank -= (other > mine) | ((other == mine) & (lane > j));
        }
        sought += pick(rank == (int32_t)need, mine, (vec){0});
    }
    return total(sought);
}

/* Removes that many of the smallest numbers, which are all equal, from a list of `count`, last first. */
static void drop_last_alike(const Rows *c, float least, int64_t count, const List *list) {
    int64_t n = 0, spare = c->keep;
    for (int64_t i = 0; i < count; i++) spare -= list->weights[i] > least;
    for (int64_t i = 0; i < count; i++) {
        if (list->weights[i] == least && spare-- <= 0) continue;
        list->index[n] = list->index[i];
        list->weights[n++] = list->weights[i];
    }
}

/* For rows that are not finite, or have too many equal numbers. */
static void choose_by_order(const Rows *c, const float *s, const RowsRoom *x, const List *list) {
    int64_t patches = c->keys - c->prefix, n = 0;
    for (int64_t i = 0; i < patches; i++) x->order[i] = (uint32_t)(ranked(s[i], i) >> 32);
    uint32_t least = least_of(x->order, patches, c->keep);
    int64_t alike = c->keep;
    for (int64_t i = 0; i < patches; i++) alike -= x->order[i] > least;
    for (int64_t i = 0; i < patches; i++) {
        if (x->order[i] < least || (x->order[i] == least && alike-- <= 0)) continue;
        list->index[n] = (int32_t)i;
        list->weights[n++] = s[i];
    }
}

/* Mean and standard deviation of a row's numbers, ignoring minus infinity. Returns 0 if the row has
   other non-finite numbers, or too few numbers. */
static int spread_of(const Rows *c, const float *s, float *mean, float *deviation) {
    int64_t patches = c->keys - c->prefix, whole = patches / WIDTH * WIDTH;
    vec sum = {0}, squares = {0};
    ints hidden = {0};
    for (int64_t i = 0; i < whole; i += WIDTH) {
        vec a = load(s + i);
        sum += a, squares += a * a;
    }
    float added = total(sum);
    if (added == -__builtin_inff()) {
        sum = squares = (vec){0};
        for (int64_t i = 0; i < whole; i += WIDTH) {
            vec a = load(s + i);
            ints is_hidden = a == all(-__builtin_inff());
            a = pick(is_hidden, (vec){0}, a);
            hidden -= is_hidden, sum += a, squares += a * a;
        }
        added = total(sum), whole -= sum_of(hidden);
    }
    float share = 1.0f / (float)(whole ? whole : 1);
    *mean = added * share;
    float spread = total(squares) * share - *mean * *mean;
    *deviation = sqrtf(spread > 1e-12f ? spread : 1e-12f);
    return spread - spread == 0 && whole >= smaller(c->keep, WIDTH);
}

/* Numbers of at least a threshold and their indices, in order; returns how many. May overwrite its
   input. */
INLINE int64_t keep_from(const float *s, const int32_t *index, int64_t columns, float least,
                         const List *list) {
    int64_t n = 0;
    for (int64_t i = 0; i < columns; i += WIDTH) {
        vec a = load(s + i);
        ints places = lanes_at(i);
        if (index) memcpy(&places, index + i, sizeof places);
        n += keep_pairs(lanes_from(a, all(least)), a, places, list->weights + n, list->index + n);
    }
    return n;
}

/* The largest of a list of `count`, in order; 0 where too many are alike. from: what all of them are
   at least. middle, step: of `narrow_down`. */
static int keep_largest(const Rows *c, int64_t count, float from, float middle, float step,
                        const List *list, float *least) {
    Contest contest = {list->weights, (count + WIDTH - 1) / WIDTH * WIDTH, count, c->keep};
    Bracket x = {from, __builtin_inff(), count, 0};
    store(list->weights + count, all(-__builtin_inff()));
    narrow_down(&contest, middle, step, &x);
    if (!is_narrow(&contest, &x)) return 0;
    *least = x.lower;
    if (x.above == c->keep)
        *least = x.upper;
    else if (x.below > c->keep)
        *least = threshold_within(&contest, &x);
    int64_t n = keep_from(list->weights, list->index, contest.columns, *least, list);
    if (n > c->keep) drop_last_alike(c, *least, n, list);
    return 1;
}

/* The `keep` best patch keys of a row and their scores, in the order of keys. A threshold near that of
   the previous row of this head extracts the best ones and a few more in one pass; the remaining steps
   only process these. */
static void choose(const Rows *c, const float *s, RowsRoom *x, const List *list) {
    float mean, deviation, least;
    if (!spread_of(c, s, &mean, &deviation)) {
        choose_by_order(c, s, x, list);
        return;
    }
    float middle = mean + x->guess * deviation, margin = MARGIN, from = middle;
    int64_t n = 0;
    for (int tries = 0; n < c->keep && tries < TRIES; tries++, margin *= 3) {
        from = middle - margin * deviation;
        n = keep_from(s, 0, c->fixed, from, list);
    }
    if (n < c->keep) {
        from = -__builtin_inff();
        n = keep_from(s, 0, c->fixed, from, list);
    }
    if (n != c->keep && !keep_largest(c, n, from, middle, 0.12f * deviation, list, &least)) {
        choose_by_order(c, s, x, list);
        return;
    }
    if (n != c->keep) x->guess = (least - mean) / deviation;
}

/* Sum of weighted values, of a list's columns and of its cells, written times `share`. */
INLINE void mix(int wide, const float *values, int64_t apart, const List *list, float share,
                float *to) {
    const float *w = list->weights, *more = list->cell_weights;
    const int32_t *index = list->index;
    vec even[4], odd[4];
#pragma GCC unroll 4
    for (int j = 0; j < wide; j++) even[j] = odd[j] = (vec){0};
    int64_t i = 0, count = list->count;
    for (; i + 2 <= count; i += 2) {
        const float *a = values + index[i] * apart, *b = values + index[i + 1] * apart;
#pragma GCC unroll 4
        for (int j = 0; j < wide; j++) {
            even[j] += load(a + j * WIDTH) * all(w[i]);
            odd[j] += load(b + j * WIDTH) * all(w[i + 1]);
        }
    }
    if (i < count)
#pragma GCC unroll 4
        for (int j = 0; j < wide; j++)
            even[j] += load(values + index[i] * apart + j * WIDTH) * all(w[i]);
    if (list->cells) values += list->view->values * apart;
    for (i = 0; i + 2 <= list->cells; i += 2, values += 2 * apart)
#pragma GCC unroll 4
        for (int j = 0; j < wide; j++) {
            even[j] += load(values + j * WIDTH) * all(more[i]);
            odd[j] += load(values + apart + j * WIDTH) * all(more[i + 1]);
        }
    if (i < list->cells)
#pragma GCC unroll 4
        for (int j = 0; j < wide; j++) even[j] += load(values + j * WIDTH) * all(more[i]);
#pragma GCC unroll 4
    for (int j = 0; j < wide; j++) store(to + j * WIDTH, (even[j] + odd[j]) * all(share));
}

static void mix_row(const Rows *c, const RowsRoom *x, const List *list, float *to) {
    int64_t d = 0, apart = c->value_dim;
    const float share = 1.0f / list->sum;
    for (; d + 4 * WIDTH <= apart; d += 4 * WIDTH) mix(4, x->values + d, apart, list, share, to + d);
    for (; d + WIDTH <= apart; d += WIDTH) mix(1, x->values + d, apart, list, share, to + d);
    for (; d < apart; d++) {
        float sum = 0;
        for (int64_t i = 0; i < list->count; i++)
            sum += list->weights[i] * x->values[list->index[i] * apart + d];
        for (int64_t i = 0; i < list->cells; i++)
            sum += list->cell_weights[i] * x->values[(list->view->values + i) * apart + d];
        to[d] = sum * share;
    }
}

/* Which of a list's keys every cell loses, and the mean bias of those that it keeps, which is added to
   its score; a cell without any is minus infinity. row: of the group. */
static void lose_keys(const Rows *c, const float *bias, const RowsRoom *x, int64_t row, float *s) {
    const List *list = x->lists + row;
    const float *held = list->view->held;
    float *total = x->total + row;
    memset(list->picked, 0, (c->cells + 15) / 16 * 64);
    if (!bias) {
        for (int64_t i = 0; i < c->keep; i++) list->picked[x->cell[list->index[i]]]++;
        return;
    }
    for (int64_t i = 0; i < c->keep; i++) {
        int64_t key = list->index[i], cell = x->cell[key];
        if (c->hard && bias[key] == -__builtin_inff()) continue;
        list->picked[cell]++;
        total[cell * GROUP] -= bias[key] > -1e4f ? bias[key] : -1e4f;
    }
    for (int64_t g = 0; g < c->cells; g++) {
        float left = held[g] - (float)list->picked[g];
        s[g] = left > 0 ? s[g] + total[g * GROUP] / left : -__builtin_inff();
    }
}

/* The keys of a row of the group, and their scores. */
static void list_row(const Rows *c, int64_t row, int dense, RowsRoom *x) {
    float *s = x->scores + row * c->columns;
    const float *bias = c->bias ? x->bias + row * c->columns : 0;
    List *list = x->lists + row;
    int64_t count = c->keep;
    list->cells = dense ? 0 : c->cells, list->cell_weights = s + c->fixed + c->prefix;
    if (dense) {
        count = c->keys - c->prefix;
        for (int64_t i = 0; i < count; i++) list->index[i] = (int32_t)i, list->weights[i] = s[i];
    } else {
        choose(c, s, x, list);
        if (c->cells) lose_keys(c, bias, x, row, list->cell_weights);
    }
    for (int64_t i = 0; i < c->prefix; i++) {
        list->index[count + i] = (int32_t)(c->fixed + i);
        list->weights[count + i] = s[c->fixed + i];
    }
    list->count = count + c->prefix;
    store(list->weights + list->count, all(-__builtin_inff()));
}

/* Whether a row of weights has one that is greater than minus infinity, or NaN. */
static int has_key(const float *w, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (w[i] != -__builtin_inff()) return 1;
    return 0;
}

/* Scores of cells to weights, as many times as they stand for keys that the list does not hold; their
   sum. */
INLINE vec weigh_cells(const List *list, vec base, vec scale) {
    vec sum = {0};
    for (int64_t g = 0; g < list->cells; g += WIDTH) {
        int64_t rest = smaller(WIDTH, list->cells - g);
        ints picked;
        memcpy(&picked, list->picked + g, sizeof picked);
        vec left = load(list->view->held + g) - floats(picked);
        vec w = power((load(list->cell_weights + g) - base) * scale) * left;
        w = pick(lanes_at(0) < (int32_t)rest, w, (vec){0});
        sum += w;
        if (rest == WIDTH)
            store(list->cell_weights + g, w);
        else
            memcpy(list->cell_weights + g, &w, rest * sizeof(float));
    }
    return sum;
}

/* The largest score of a list and its cells. */
INLINE float largest_of(const List *list) {
    const float *w = list->weights;
    vec top = load(w), none = all(-__builtin_inff());
    for (int64_t i = WIDTH; i < list->count; i += WIDTH) top = larger(load(w + i), top);
    for (int64_t g = 0; g < list->cells; g += WIDTH) {
        ints is_cell = lanes_at(g) < (int32_t)list->cells;
        top = larger(pick(is_cell, load(list->cell_weights + g), none), top);
    }
    return largest(top);
}

/* Scores of a list to weights. */
static void weigh_list(const Rows *c, List *list) {
    float *w = list->weights, most = largest_of(list);
    if (c->bias && most == -__builtin_inff() && !has_key(w, list->count) &&
        !has_key(list->cell_weights, list->cells)) {
        clear(w, list->count);
        clear(list->cell_weights, list->cells);
        list->sum = __builtin_inff(); /* makes the row, which is divided by it, zero */
        return;
    }
    vec base = all(most), scale = all(c->bias ? LOG2E : (float)(c->scale * LOG2E));
    vec sum = weigh_cells(list, base, scale);
    for (int64_t i = 0; i < list->count; i += WIDTH) {
        vec x = power((load(w + i) - base) * scale);
        sum += x;
        store(w + i, x);
    }
    list->sum = total(sum);
}

/* Bias of the rows of a group, and scores with it. */
static void bias_rows(const Rows *c, int64_t head, int64_t from, int64_t count,
                      const float *const *rows, RowsRoom *x) {
    for (int64_t r = 0; r < count; r++) {
        float *bias = x->bias + r * c->columns;
        if (r && !c->bias_n)
            memcpy(bias, x->bias, c->columns * sizeof *bias);
        else
            take_bias(c, head, from + r, bias);
        if (c->cells && from + r >= c->first)
            x->lists[r].view = view_of(c, keys_of(c, head), bias, x);
        bias_row(c, rows[r], bias, x->lists[r].view, x, x->scores + r * c->columns);
    }
    if (!c->cells) return;
    const float *each[ROWS_AT_ONCE];
    for (int64_t r = 0; r < GROUP; r++) each[r] = x->bias + smaller(r, count - 1) * c->columns;
    sum_cells(&x->bands, c->hard != 0, each, c->cells, x->total, GROUP);
}

/* Writes a row of the result. */
static void give_row(const Rows *c, RowsRoom *x, const List *list, void *out, int64_t at) {
    if (!c->kind) {
        mix_row(c, x, list, (float *)out + at);
        return;
    }
    mix_row(c, x, list, x->rows);
    narrow(c->kind, x->rows, (void *)element(out, c->kind, at), c->value_dim);
}

/* Stage by stage for all rows of a group: results of a stage are then still in the cache when the next
   one reads them in other pieces. */
static void attend_rows(const Rows *c, int64_t head, int64_t from, int64_t end, RowsRoom *x) {
    const void *q = element(c->q, c->kind, head / c->heads * c->q_b + head % c->heads * c->q_h);
    int64_t to = head / c->heads * c->out_b + head % c->heads * c->out_h;
    void *out = (void *)element(c->out, c->kind, to);
    for (; from < end; from += GROUP) {
        const float *rows[GROUP];
        int64_t count = smaller(GROUP, end - from);
        for (int64_t r = 0; r < GROUP; r++) {
            int64_t at = (from + smaller(r, count - 1)) * c->q_n;
            rows[r] = row_of(c, q, at, c->dim, x->rows + (1 + r) * c->dim);
            x->lists[r].view = x->views;
        }
        score_rows(c, rows, x, c->columns);
        if (c->bias) bias_rows(c, head, from, count, rows, x);
        for (int64_t r = 0; r < count; r++)
            list_row(c, r, from + r < c->first, x);
        for (int64_t r = 0; r < count; r++) weigh_list(c, x->lists + r);
        for (int64_t r = 0; r < count; r++) give_row(c, x, x->lists + r, out, (from + r) * c->out_n);
    }
}

static void rows_some(void *data) {
    RowsJob *job = data;
    const Rows *c = job->call;
    RowsRoom room = rows_room(c, __atomic_fetch_add(&job->joined, 1, __ATOMIC_RELAXED));
    int64_t i, items = c->batch * c->heads * c->parts, packed = -1;
    while ((i = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < items) {
        int64_t head = i / c->parts, part = i % c->parts;
        if (head != packed) pack_head(c, packed = head, &room), room.guess = (float)c->quantile;
        attend_rows(c, head, part * c->queries / c->parts, (part + 1) * c->queries / c->parts,
                    &room);
    }
}

/* Writes out [B, H, N, Dv]. */
EXPORT void sparsiattn_rows(const Rows *c) {
    RowsJob job = {c, 0, 0};
    if (c->parallel && c->threads > 1)
        c->parallel(rows_some, &job, (unsigned)c->threads, 0);
    else
        rows_some(&job);
}

EXPORT int64_t sparsiattn_rows_size(void) { return sizeof(Rows); }
