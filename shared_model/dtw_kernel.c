/* Banded DTW (Sakoe and Chiba 1978) for many pairs in lock step: a vector holds the same cell of LANES pairs.

   A tile is SERIES rows against LANES columns. Rows are series held still over a sweep, columns lie lane by lane in
   memory, so that the cost of a cell is one load for SERIES vectors. One thread: no OpenMP. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define SERIES 4
#define FAR 1e30f

typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef struct {
    lanes *columns; /* (time, leads): LANES series, side by side */
    lanes *row;     /* (time, SERIES): the sweep's last row of the accumulated cost */
    lanes *still;   /* (leads, SERIES): one sample of the rows' series */
} workspace;

int dtw_lanes(void) { return LANES; }

#ifdef __clang__ /* it would leave gcc's loop scalar */
#define smaller(a, b) __builtin_elementwise_min(a, b)
#else
static inline lanes smaller(lanes a, lanes b) {
    lanes least;
    for (int k = 0; k < LANES; k++) least[k] = a[k] < b[k] ? a[k] : b[k];
    return least;
}
#endif

static inline lanes all_of(float value) { return value - (lanes){0}; }

/* Squared differences of `count` neighbouring cells of a row, summed over leads: cost[count][SERIES]. */
static inline __attribute__((always_inline)) void cell_cost(
    const lanes *still, const lanes *column, long leads, const int count, lanes cost[][SERIES]) {
    for (int c = 0; c < count; c++)
        for (int s = 0; s < SERIES; s++) cost[c][s] = (lanes){0};
    for (long lead = 0; lead < leads; lead++)
        for (int s = 0; s < SERIES; s++)
            for (int c = 0; c < count; c++) {
                lanes difference = still[lead * SERIES + s] - column[c * leads + lead];
                cost[c][s] += difference * difference;
            }
}

/* The next cell of each row: `left` and `corner` are its neighbours, `row` holds the one above and takes the result. */
static inline __attribute__((always_inline)) void next_cell(
    const lanes cost[SERIES], lanes *row, lanes left[SERIES], lanes corner[SERIES]) {
    for (int s = 0; s < SERIES; s++) {
        lanes above = row[s];
        left[s] = smaller(smaller(above, corner[s]), left[s]) + cost[s];
        corner[s] = above;
        row[s] = left[s];
    }
}

/* One row of the table, cells [first, last]. */
static inline __attribute__((always_inline)) void sweep(
    const workspace *work, long leads, long sample, long first, long last) {
    lanes left[SERIES], corner[SERIES], cost[2][SERIES];
    for (int s = 0; s < SERIES; s++) {
        left[s] = all_of(FAR);
        corner[s] = first ? work->row[(first - 1) * SERIES + s] : all_of(sample ? FAR : 0);
    }
    long j = first;
    for (; j < last; j += 2) {
        cell_cost(work->still, work->columns + j * leads, leads, 2, cost);
        next_cell(cost[0], work->row + j * SERIES, left, corner);
        next_cell(cost[1], work->row + (j + 1) * SERIES, left, corner);
    }
    if (j == last) {
        cell_cost(work->still, work->columns + j * leads, leads, 1, cost);
        next_cell(cost[0], work->row + j * SERIES, left, corner);
    }
}

/* Rows: where `turn` is 0, series rows[0..SERIES) in all lanes; else the columns themselves, turned by turn, turn + 1,
   ... lanes out of `filled`, so that all pairs of one group take half the tiles. */
static void hold_still(
    const workspace *work, const float *const *rows, int turn, int filled, long leads, long time, long sample) {
    for (long lead = 0; lead < leads; lead++)
        for (int s = 0; s < SERIES; s++) {
            lanes *to = work->still + lead * SERIES + s;
            if (!turn) {
                *to = all_of(rows[s][lead * time + sample]);
                continue;
            }
            const float *from = (const float *)(work->columns + sample * leads + lead);
            float twice[3 * LANES];
            memcpy(twice, from, filled * sizeof(float));
            memcpy(twice + filled, from, filled * sizeof(float));
            memcpy(to, twice + (turn + s) % filled, filled * sizeof(float));
        }
}

/* Squared distances of a tile, left in the last SERIES vectors of work->row. */
static void tile(
    const workspace *work, const float *const *rows, int turn, int filled, long leads, long time, long band) {
    for (long k = 0; k < time * SERIES; k++) work->row[k] = all_of(FAR);
    for (long i = 0; i < time; i++) {
        long first = i > band ? i - band : 0, last = i + band < time ? i + band : time - 1;
        hold_still(work, rows, turn, filled, leads, time, i);
        if (leads == 1) /* constants let the compiler keep all of a cell in registers */
            sweep(work, 1, i, first, last);
        else if (leads == 12)
            sweep(work, 12, i, first, last);
        else
            sweep(work, leads, i, first, last);
    }
}

static void lay_side_by_side(const workspace *work, const float *x, int filled, long leads, long time) {
    float *to = (float *)work->columns;
    memset(to, 0, time * leads * sizeof(lanes));
    for (int lane = 0; lane < filled; lane++)
        for (long lead = 0; lead < leads; lead++)
            for (long t = 0; t < time; t++) to[(t * leads + lead) * LANES + lane] = *x++;
}

/* Series a[0..n) against the columns: distance[i * step + lane]. */
static void against_columns(
    const workspace *work, const float *a, long n, int filled, long leads, long time, long band, float *distance,
    long step) {
    for (long i = 0; i < n; i += SERIES) {
        const float *rows[SERIES];
        for (int s = 0; s < SERIES; s++) rows[s] = a + (i + s < n ? i + s : n - 1) * leads * time;
        tile(work, rows, 0, filled, leads, time, band);
        for (int s = 0; s < SERIES && i + s < n; s++)
            for (int lane = 0; lane < filled; lane++)
                distance[(i + s) * step + lane] = sqrtf(work->row[(time - 1) * SERIES + s][lane]);
    }
}

/* The columns against each other: distance[lane * step + other]. */
static void among_columns(
    const workspace *work, int filled, long leads, long time, long band, float *distance, long step) {
    for (int turn = 1; turn <= filled / 2; turn += SERIES) {
        tile(work, NULL, turn, filled, leads, time, band);
        for (int s = 0; s < SERIES && turn + s <= filled / 2; s++)
            for (int lane = 0; lane < filled; lane++) {
                int other = (lane + turn + s) % filled;
                float d = sqrtf(work->row[(time - 1) * SERIES + s][lane]);
                distance[lane * step + other] = distance[other * step + lane] = d;
            }
    }
}

static workspace reserve(long leads, long time) {
    workspace work;
    work.columns = aligned_alloc(sizeof(lanes), time * leads * sizeof(lanes));
    work.row = aligned_alloc(sizeof(lanes), time * SERIES * sizeof(lanes));
    work.still = aligned_alloc(sizeof(lanes), leads * SERIES * sizeof(lanes));
    if (work.still) memset(work.still, 0, leads * SERIES * sizeof(lanes));
    return work;
}

static int release(workspace work, int status) {
    free(work.columns), free(work.row), free(work.still);
    return status;
}

/* a (n, leads, time), b (m, leads, time) -> distance (n, m). Returns 0, or -1 where memory ran out. */
int dtw_cross(const float *a, long n, const float *b, long m, long leads, long time, long band, float *distance) {
    workspace work = reserve(leads, time);
    if (!work.columns || !work.row || !work.still) return release(work, -1);
    for (long j = 0; j < m; j += LANES) {
        int filled = m - j < LANES ? m - j : LANES;
        lay_side_by_side(&work, b + j * leads * time, filled, leads, time);
        against_columns(&work, a, n, filled, leads, time, band, distance + j, m);
    }
    return release(work, 0);
}

/* x (n, leads, time) -> distance (n, n), symmetric; the diagonal is left as it is. Returns as dtw_cross does. */
int dtw_pairwise(const float *x, long n, long leads, long time, long band, float *distance) {
    workspace work = reserve(leads, time);
    if (!work.columns || !work.row || !work.still) return release(work, -1);
    for (long j = 0; j < n; j += LANES) {
        int filled = n - j < LANES ? n - j : LANES;
        long below = j + filled;
        lay_side_by_side(&work, x + j * leads * time, filled, leads, time);
        among_columns(&work, filled, leads, time, band, distance + j * n + j, n);
        against_columns(
            &work, x + below * leads * time, n - below, filled, leads, time, band, distance + below * n + j, n);
    }
    for (long i = 0; i < n; i++)
        for (long j = 0; j < i; j++) distance[j * n + i] = distance[i * n + j];
    return release(work, 0);
}
