/* Sums over the cells of a grid of patches. Rows of patches in the same cells form a band. The rows of a
   band are first added as vectors, so that scalar additions are needed for one row per band only. */

#pragma once

#include "numbers.h"

#define ROWS_AT_ONCE 6 /* runs have different lengths, which costs less if several rows share them */
#define COLUMNS 512    /* rows of a band that are summed at a time */
#define MASKED_BELOW -50.0f /* as in inputs.py */

/* `count` rows of `width` patches from `start` on, and the runs of patches in the same cell. */
typedef struct {
    int32_t start, count, width, runs;
} Band;

typedef struct {
    int32_t end, cell;
} Run;

typedef struct {
    Band *bands;
    Run *runs;
    int64_t count, patches;
} Bands;

/* Number of patches until the cells of a row repeat. */
static int64_t band_width(const int64_t *cell, int64_t patches) {
    int64_t i = 1;
    while (i < patches && cell[i] >= cell[i - 1]) i++;
    return smaller(i, COLUMNS);
}

/* The bands of the cells of all patches. room: 6 numbers per patch. */
static Bands find_bands(const int64_t *cell, int64_t patches, float *room) {
    Bands x = {(Band *)room, (Run *)(room + 4 * patches), 0, patches};
    int64_t width = band_width(cell, patches);
    Run *run = x.runs;
    for (int64_t at = 0; at < patches; cell += x.bands[x.count].count * width, x.count++) {
        int64_t wide = smaller(width, patches - at), count = 1;
        Run *first = run;
        while (at + (count + 1) * wide <= patches &&
               !memcmp(cell, cell + count * wide, wide * sizeof *cell))
            count++;
        for (int64_t i = 1; i <= wide; i++)
            if (i == wide || cell[i] != cell[i - 1]) *run++ = (Run){(int32_t)i, (int32_t)cell[i - 1]};
        x.bands[x.count] = (Band){(int32_t)at, (int32_t)count, (int32_t)wide, (int32_t)(run - first)};
        at += count * wide;
    }
    return x;
}

/* A bias as it enters the mean of a cell. hard: keys with a very low bias are hidden and in no cell. */
INLINE vec bounded(int hard, vec bias) {
    if (hard) return pick(bias > all(MASKED_BELOW), bias, (vec){0});
    return larger(bias, all(-1e4f));
}

/* Adds a row of a band to sums; their last vector may be longer than the rest of the bias. */
INLINE void add_band_row(int hard, const float *bias, int64_t left, int64_t width, float *sums) {
    for (int64_t i = 0; i < width; i += WIDTH) {
        float rest[WIDTH] = {0};
        const float *at = bias + i;
        if (left - i < WIDTH) memcpy(rest, at, (left - i) * sizeof *at), at = rest;
        store(sums + i, load(sums + i) + bounded(hard, load(at)));
    }
}

/* Sums of some rows over every cell. In `to`, cells have a stride of `apart` and rows are adjacent. */
static void sum_cells(const Bands *x, int hard, const float *const *rows, int64_t cells, float *to,
                      int64_t apart) {
    float sums[ROWS_AT_ONCE][COLUMNS + WIDTH];
    const Run *run = x->runs;
    for (int64_t g = 0; g < cells; g++)
        for (int row = 0; row < ROWS_AT_ONCE; row++) to[g * apart + row] = 0;
    for (int64_t n = 0; n < x->count; n++) {
        Band band = x->bands[n];
        for (int row = 0; row < ROWS_AT_ONCE; row++) {
            clear(sums[row], band.width + WIDTH);
            for (int64_t r = 0; r < band.count; r++) {
                int64_t at = band.start + r * band.width;
                add_band_row(hard, rows[row] + at, x->patches - at, band.width, sums[row]);
            }
        }
        for (int64_t i = 0, left = band.runs; left > 0; left--, run++) {
            float sum[ROWS_AT_ONCE] = {0};
            for (; i < run->end; i++)
#pragma GCC unroll 6
                for (int row = 0; row < ROWS_AT_ONCE; row++) sum[row] += sums[row][i];
            for (int row = 0; row < ROWS_AT_ONCE; row++) to[run->cell * apart + row] += sum[row];
        }
    }
}
