/* Lists of the best keys: from rows of scores, and for tiles whose queries vote for keys.

   A vote is the attention that a voter, the mean of a few queries, gives to a key; the largest vote of
   a tile's voters counts. Votes are compared by their logarithms, which are distributed more evenly. */

#include "rows.c"

#define PANELS 16 /* of SPAN keys each, which stay in a thread's cache */

/* The order of `_best_keys` in lists.py. `step`: from row to row of the scores. Lists begin with the first
   `prefix` columns; `keep` others follow, in order. room: numbers that a thread needs. */
typedef struct {
    int64_t rows, columns, prefix, keep, step, threads, room;
    const float *scores;
    int64_t *out;
    float *scratch;
    Parallel parallel;
    double quantile;
} Best;

typedef struct {
    const Best *call;
    int64_t next, joined;
} BestJob;

static void best_some(void *data) {
    BestJob *job = data;
    const Best *b = job->call;
    int64_t n = b->columns - b->prefix, whole = (n + 15) / 16 * 16, r;
    Rows c = {.keys = n, .keep = b->keep, .fixed = whole};
    float *s = b->scratch + __atomic_fetch_add(&job->joined, 1, __ATOMIC_RELAXED) * b->room;
    List list = {.weights = s + whole, .index = (int32_t *)(s + 2 * whole + 32)};
    RowsRoom x = {.order = (uint32_t *)(s + 3 * whole + 64), .guess = (float)b->quantile};
    for (int64_t i = n; i < whole; i++) s[i] = -__builtin_inff();
    while ((r = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < b->rows) {
        int64_t *to = b->out + r * (b->prefix + b->keep);
        memcpy(s, b->scores + r * b->step + b->prefix, n * sizeof *s);
        choose(&c, s, &x, &list);
        for (int64_t i = 0; i < b->prefix; i++) to[i] = i;
        for (int64_t i = 0; i < b->keep; i++) to[b->prefix + i] = list.index[i] + b->prefix;
    }
}

EXPORT void sparsiattn_best(const Best *b) {
    BestJob job = {b, 0, 0};
    if (b->parallel && b->threads > 1)
        b->parallel(best_some, &job, (unsigned)b->threads, 0);
    else
        best_some(&job);
}

EXPORT int64_t sparsiattn_best_size(void) { return sizeof(Best); }

/* The order of `_voted_keys` in lists.py. order: tokens of every voter, `slots` of them, of which
   the first `held` count; tile by tile. parts, room: as in `Rows`. groups: of GROUP voters each, whose
   scores are computed together. */
typedef struct {
    int64_t batch, heads, keys, dim, prefix, keep, columns, fixed;
    int64_t tiles, voters, slots;
    int64_t q_b, q_h, q_n, k_b, k_h, k_n;
    int64_t threads, parts, room, groups;
    int64_t bias_kind, bias_b, bias_h, bias_n, hard, across;
    const float *q, *k;
    const int64_t *order, *held;
    int64_t *out;
    const void *bias;
    float *scratch;
    Parallel parallel;
    double scale, quantile;
} Votes;

typedef struct {
    const Votes *call;
    int64_t next, joined;
} VotesJob;

/* The query of a voter: the mean of its queries. */
static void mean_voter(const Votes *v, const float *q, int64_t voter, float *to) {
    const int64_t *tokens = v->order + voter * v->slots;
    int64_t held = v->held[voter];
    clear(to, v->dim);
    for (int64_t i = 0; i < held; i++) {
        const float *row = q + (v->prefix + tokens[i]) * v->q_n;
        int64_t d = 0;
        for (; d + WIDTH <= v->dim; d += WIDTH) store(to + d, load(to + d) + load(row + d));
        for (; d < v->dim; d++) to[d] += row[d];
    }
    for (int64_t d = 0; d < v->dim; d++) to[d] *= 1.0f / (float)held;
}

/* The mean over some queries of the factors of the host's bias, for every column. */
static void mean_factors(const Rows *c, int64_t head, const int64_t *tokens, int64_t held, float *to) {
    float mean[WIDEST];
    int64_t count = c->keys / c->across + c->across;
    clear(mean, count);
    for (int64_t i = 0; i < held; i++) add_to(mean, (const float *)bias_at(c, head, tokens[i]), count);
    for (int64_t i = 0; i < count; i++) mean[i] *= 1.0f / (float)held;
    spread(c, mean, to);
}

/* Adds the mean of the host's bias over the queries of a voter to the voter's scores. */
static void bias_voter(const Votes *v, const Rows *c, int64_t head, int64_t voter, RowsRoom *x,
                       float *s) {
    const int64_t *tokens = v->order + voter * v->slots;
    int64_t held = v->bias_n ? v->held[voter] : 1;
    float *mean = x->bias, *row = x->bias + v->columns;
    if (v->across) {
        mean_factors(c, head, tokens, held, mean);
        bias_row(c, 0, mean, x->views, x, s);
        return;
    }
    take_bias(c, head, v->prefix + tokens[0], mean);
    for (int64_t i = 1; i < held; i++) {
        take_bias(c, head, v->prefix + tokens[i], row);
        for (int64_t n = 0; n < v->columns; n += WIDTH) store(mean + n, load(mean + n) + load(row + n));
    }
    vec share = all(1.0f / (float)held);
    for (int64_t n = 0; n < v->columns && held > 1; n += WIDTH) store(mean + n, load(mean + n) * share);
    bias_row(c, 0, mean, x->views, x, s);
}

/* The logarithms of the votes in a row of scores, where they are the largest so far. */
static void vote(const Votes *v, const float *s, float *votes) {
    vec top = load(s), sum = {0}, scale = all(v->bias ? LOG2E : (float)(v->scale * LOG2E));
    for (int64_t i = WIDTH; i < v->columns; i += WIDTH) top = larger(load(s + i), top);
    vec base = all(largest(top));
    if (v->bias && base[0] == -__builtin_inff()) return; /* it may attend to no key */
    for (int64_t i = 0; i < v->columns; i += WIDTH) sum += power((load(s + i) - base) * scale);
    vec share = all(log2f(total(sum)));
    for (int64_t i = 0; i < v->fixed; i += WIDTH)
        store(votes + i, larger((load(s + i) - base) * scale - share, load(votes + i)));
}

static void write_list(const Votes *v, const Rows *c, RowsRoom *x, float *votes, int64_t *to) {
    for (int64_t i = c->keys - c->prefix; i < c->fixed; i++) votes[i] = -__builtin_inff();
    choose(c, votes, x, x->lists);
    for (int64_t i = 0; i < v->prefix; i++) to[i] = i;
    for (int64_t i = 0; i < v->keep; i++) to[v->prefix + i] = x->lists[0].index[i] + v->prefix;
}

/* Scores of some voters. Panels of keys that fit into a thread's cache are used by all of them. */
static void score_voters(const Votes *v, const Rows *c, const RowsRoom *x, const float *means,
                         int64_t count, float *scores) {
    for (int64_t first = 0; first < c->columns; first += PANELS * SPAN) {
        int64_t end = smaller(first + PANELS * SPAN, c->columns);
        for (int64_t g = 0; g < count; g += GROUP) {
            const float *rows[GROUP];
            for (int64_t r = 0; r < GROUP; r++) rows[r] = means + smaller(g + r, count - 1) * v->dim;
            score_panels(c, rows, x, first, end, c->columns, scores + g * c->columns);
        }
    }
}

/* Lists of some tiles. */
static void list_tiles(const Votes *v, const Rows *c, int64_t head, int64_t first, int64_t end,
                       RowsRoom *x, float *votes, float *means, float *scores) {
    const float *q = v->q + head / v->heads * v->q_b + head % v->heads * v->q_h;
    int64_t last = end * v->voters, list = v->prefix + v->keep, most = v->groups * GROUP;
    for (int64_t from = first * v->voters; from < last; from += most) {
        int64_t count = smaller(most, last - from);
        for (int64_t r = 0; r < count; r++) mean_voter(v, q, from + r, means + r * v->dim);
        score_voters(v, c, x, means, count, scores);
        for (int64_t r = 0; r < count; r++) {
            int64_t tile = (from + r) / v->voters, place = (from + r) % v->voters;
            float *row = scores + r * c->columns;
            end_scores(c, row);
            if (!place)
                for (int64_t i = 0; i < v->fixed; i += WIDTH)
                    store(votes + i, all(-__builtin_inff()));
            if (v->bias) bias_voter(v, c, head, from + r, x, row);
            vote(v, row, votes);
            if (place == v->voters - 1)
                write_list(v, c, x, votes, v->out + (head * v->tiles + tile) * list);
        }
    }
}

static void votes_some(void *data) {
    VotesJob *job = data;
    const Votes *v = job->call;
    int64_t i, items = v->batch * v->heads * v->parts, packed = -1;
    Rows c = {
        .heads = v->heads, .keys = v->keys, .dim = v->dim, .prefix = v->prefix, .keep = v->keep,
        .columns = v->columns, .fixed = v->fixed, .k_b = v->k_b, .k_h = v->k_h, .k_n = v->k_n,
        .room = v->room, .k = v->k, .v = v->k, .scratch = v->scratch, .scale = v->scale,
        .bias_kind = v->bias_kind, .bias_b = v->bias_b, .bias_h = v->bias_h, .bias_n = v->bias_n,
        .hard = v->hard, .across = v->across, .bias = v->bias,
    };
    int64_t thread = __atomic_fetch_add(&job->joined, 1, __ATOMIC_RELAXED);
    RowsRoom x = rows_room(&c, thread);
    int64_t most = v->groups * GROUP;
    float *means = v->scratch + (thread + 1) * v->room - (most * v->dim + 15) / 16 * 16;
    float *votes = means - v->columns, *scores = votes - most * v->columns;
    while ((i = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < items) {
        int64_t head = i / v->parts, part = i % v->parts;
        if (head != packed) pack_head(&c, packed = head, &x), x.guess = (float)v->quantile;
        list_tiles(v, &c, head, part * v->tiles / v->parts, (part + 1) * v->tiles / v->parts, &x,
                   votes, means, scores);
    }
}

/* Writes lists [B, H, T, P + keep]. */
EXPORT void sparsiattn_votes(const Votes *v) {
    VotesJob job = {v, 0, 0};
    if (v->parallel && v->threads > 1)
        v->parallel(votes_some, &job, (unsigned)v->threads, 0);
    else
        votes_some(&job);
}

EXPORT int64_t sparsiattn_votes_size(void) { return sizeof(Votes); }
