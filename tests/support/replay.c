/* Replays calls of the compiled code that Python recorded, on whatever processor this runs.

       replay LIBRARY CALLS RESULTS

   CALLS: for every call the length of its name, the name, the size of its struct, the struct, how
   many pointers it has, and for each its offset in the struct, the number of bytes that it points
   to, and these. No bytes at all stand for the function that runs a region in threads. RESULTS: the
   bytes of all pointers afterwards, in order. Numbers are of 64 bits. */

#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef void (*Part)(int64_t, int64_t, void *);
typedef struct {
    Part part;
    void *data;
    int64_t at;
} Share;

static void *run_share(void *data) {
    Share *share = data;
    share->part(share->at, share->at + 1, share->data);
    return NULL;
}

/* As `torch_parallel_for`, with a thread for every number. */
static int32_t parallel_for(int64_t from, int64_t to, int64_t grain, Part part, void *data) {
    pthread_t threads[64];
    Share shares[64];
    (void)grain;
    for (int64_t i = from; i < to; i++) {
        shares[i - from] = (Share){part, data, i};
        pthread_create(&threads[i - from], NULL, run_share, &shares[i - from]);
    }
    for (int64_t i = from; i < to; i++) pthread_join(threads[i - from], NULL);
    return 0;
}

static uint64_t number(FILE *file) {
    uint64_t x;
    if (fread(&x, sizeof x, 1, file) != 1) exit(feof(file) ? 0 : 3);
    return x;
}

static void *bytes(FILE *file, uint64_t size) {
    void *to = aligned_alloc(64, (size + 64) / 64 * 64);
    if (!to || fread(to, 1, size, file) != size) exit(4);
    return to;
}

int main(int count, char **words) {
    void *library = count == 4 ? dlopen(words[1], RTLD_NOW) : NULL;
    if (!library) return fprintf(stderr, "%s\n", count == 4 ? dlerror() : "3 arguments"), 2;
    void (*set)(void *) = (void (*)(void *))dlsym(library, "sparsiattn_set_parallel_for");
    void *parallel = dlsym(library, "sparsiattn_parallel");
    set((void *)parallel_for);
    FILE *calls = fopen(words[2], "rb"), *results = fopen(words[3], "wb");
    for (;;) {
        char name[64] = "sparsiattn_";
        uint64_t length = number(calls);
        if (length > 40 || fread(name + 11, 1, length, calls) != length) return 5;
        void (*function)(void *) = (void (*)(void *))dlsym(library, name);
        if (!function) return 6;
        char *call = bytes(calls, number(calls));
        void *at[64];
        uint64_t sizes[64], pointers = number(calls);
        for (uint64_t i = 0; i < pointers; i++) {
            uint64_t offset = number(calls);
            sizes[i] = number(calls);
            at[i] = sizes[i] ? bytes(calls, sizes[i]) : parallel;
            memcpy(call + offset, &at[i], sizeof at[i]);
        }
        function(call);
        for (uint64_t i = 0; i < pointers; i++) fwrite(at[i], 1, sizes[i], results);
        fflush(results);
    }
}
