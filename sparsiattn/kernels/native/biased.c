/* Dense attention with one bias per key, which weights merged tokens by their size (ToMe, eq. 1).
   Queries and keys are processed in chunks, see chunks.c. */

/* The order of `_key_biased` in biased.py. bias: one number per key and image. */
typedef struct {
    int64_t batch, heads, tokens, dim, value_dim;
    int64_t q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, out_b, out_h, out_n;
    int64_t threads;
    const float *q, *k, *v;
    float *out;
    const float *bias;
    Parallel parallel;
    double scale;
} KeyBiased;

typedef struct {
    const KeyBiased *call;
    int64_t parts, chunk, next;
} KeyBiasedJob;

/* Some queries of one head, with all keys. */
static void attend_part(const KeyBiasedJob *job, int64_t head, int64_t part, Room *room) {
    const KeyBiased *p = job->call;
    const Call c = {.dim = p->dim, .value_dim = p->value_dim};
    int64_t b = head / p->heads, h = head % p->heads, first = part * SPAN;
    int64_t count = smaller(SPAN, p->tokens - first), lanes = (count + WIDTH - 1) / WIDTH * WIDTH;
    const float *k = p->k + b * p->k_b + h * p->k_h, *v = p->v + b * p->v_b + h * p->v_h;
    const float *bias = p->bias + b * p->tokens, *from[SPAN];
    float *to[SPAN];
    for (int64_t n = 0; n < lanes; n++) {
        int64_t token = first + smaller(n, count - 1);
        from[n] = p->q + b * p->q_b + h * p->q_h + token * p->q_n;
        to[n] = p->out + b * p->out_b + h * p->out_h + token * p->out_n;
    }
    take_rows(from, p->dim, (float)(p->scale * LOG2E), lanes, room->q);
    for (int64_t n = 0; n < lanes; n++) room->top[n] = -__builtin_inff(), room->sum[n] = 0;
    for (int64_t d = 0; d < p->value_dim; d++) clear(room->o + d * SPAN, lanes);
    for (int64_t at = 0, keys; at < p->tokens; at += keys) {
        keys = smaller(job->chunk, p->tokens - at);
        for (int64_t i = 0; i < keys; i++)
            room->k[i] = k + (at + i) * p->k_n, room->v[i] = v + (at + i) * p->v_n;
        for (int64_t n = 0; n < lanes; n += MOST * WIDTH)
            score_chunk(room, keys, &c, smaller(MOST, (lanes - n) / WIDTH), n);
        for (int64_t i = 0; i < keys; i++) {
            vec more = all(bias[at + i] * LOG2E);
            for (int64_t n = 0; n < lanes; n += WIDTH)
                store(room->s + i * SPAN + n, load(room->s + i * SPAN + n) + more);
        }
        weigh_chunk(&c, keys, lanes, room);
    }
    give_rows(&c, to, count, lanes, room);
}

static void attend_some(void *data) {
    KeyBiasedJob *job = data;
    const KeyBiased *p = job->call;
    Room room;
    int64_t i, items = p->batch * p->heads * job->parts;
    room.left = room.pace = 0;
    while ((i = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < items)
        attend_part(job, i / job->parts, i % job->parts, &room);
}

EXPORT void sparsiattn_biased(const KeyBiased *p) {
    int64_t chunks = runs_of(p->tokens, CHUNK), each = runs_of(p->tokens, chunks);
    KeyBiasedJob job = {p, runs_of(p->tokens, SPAN), smaller(CHUNK, runs_of(each, 6) * 6), 0};
    if (p->parallel && p->threads > 1)
        p->parallel(attend_some, &job, (unsigned)p->threads, 0);
    else
        attend_some(&job);
}

EXPORT int64_t sparsiattn_biased_size(void) { return sizeof(KeyBiased); }
