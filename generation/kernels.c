/* Products and attention for decoding on a CPU: kernels.py calls them.

   A decoding step has few rows, so each weight that is read is used only a few times: the speed of
   memory is the limit. Numbers therefore lie in the order in which they are read. A matrix
   [out, in] is stored as [out / panel][in / n][panel][n], where n numbers fill 4 bytes (1 of fp32,
   2 of bf16, 4 of int8), so that a lane of a vector holds 4 bytes of one output. The keys of a head
   are such a matrix [positions, D], its values are one [D, positions].

   Each output of a row is summed in the same order, however many rows there are.

   Sums are fp32. Only on processors with bf16 instructions (AVX512_BF16) rows are bf16 too. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined __AVX2__
#include <immintrin.h>
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "The numbers of a lane are told apart by their place in 4 bytes, little end first."
#endif
#define INLINE static inline __attribute__((always_inline))

/* ROWS x SHARED sums, or those of ALONE vectors of a single row, have to fit into registers. */
#if defined __AVX512F__
#define LANES 16 /* fp32 numbers of a vector */
#define ROWS 4
#define SHARED 4
#define ALONE 4
#elif defined __AVX2__
#define LANES 8
#define ROWS 4
#define SHARED 2
#define ALONE 8
#else
#define LANES 4
#define ROWS 4
#define SHARED 2
#define ALONE 8
#endif
#define PANEL 64
#define NARROW 16    /* width of a panel of values where heads are narrow */
#define STEPS 32     /* of a panel at a time: 8 KB, which stay in the first cache for all rows */
#define GROUP 64     /* rows whose sums are kept at a time */
#define AHEAD (STEPS * PANEL * 4) /* bytes: how far ahead of its use memory is fetched */

typedef float floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4)));

/* What a matrix holds: BF16 is multiplied by rows of bf16, BF16_KEPT by rows of fp32. */
enum kind { FP32, BF16, INT8, BF16_KEPT };

#ifdef __AVX512BF16__
#define BF16_WEIGHTS BF16
const int rounds_rows = 1;
#else
#define BF16_WEIGHTS BF16_KEPT
const int rounds_rows = 0;
#endif

INLINE floats numbers(ints x) { return __builtin_convertvector(x, floats); }

/* How many numbers of a row a lane is multiplied by, one after the other; a pair of bf16 is one. */
INLINE int parts(enum kind kind) { return kind == INT8 ? 4 : kind == BF16_KEPT ? 2 : 1; }

/* Byte `i` of each lane as the highest of four, the others 0. */
INLINE ints highest(ints w, int i) {
#if defined __AVX2__ && LANES == 8
    const int from = 0x00808080 | i << 24, lane = 0x04000000; /* 0x80 stands for a byte of 0 */
    ints order = {from, from + lane, from + 2 * lane, from + 3 * lane,
                  from, from + lane, from + 2 * lane, from + 3 * lane};
    return (ints)_mm256_shuffle_epi8((__m256i)w, (__m256i)order);
#else
    return w << (24 - 8 * i) & (int)0xff000000;
#endif
}

/* Number `i` of each lane. bf16 is the upper half of fp32; int8 comes out 2^24 times as large. */
INLINE floats number(enum kind kind, ints w, int i) {
    if (kind == FP32) return (floats)w;
    if (kind == BF16_KEPT) return (floats)(i ? w & (int)0xffff0000 : w << 16);
    return numbers(highest(w, i));
}

/* sums [rows][PANEL] += x [rows, steps] times `vectors` of the `across` vectors of each of the
   steps of a panel. From row to row of x it is `apart` bytes. */
INLINE void block(enum kind kind, const int rows, const int vectors, const int across,
                  const ints *w, const char *x, long apart, long steps, float *sums) {
    floats y[ROWS][PANEL / LANES];
    for (int row = 0; row < rows; row++)
        for (int v = 0; v < vectors; v++) y[row][v] = *(floats *)(sums + row * PANEL + v * LANES);
    for (long step = 0; step < steps; step++, w += across, x += 4 * parts(kind)) {
        for (int v = 0; v < vectors; v += 16 / LANES)
            __builtin_prefetch((const char *)(w + v) + AHEAD, 0, 0);
#ifdef __AVX512BF16__
        if (kind == BF16) {
            for (int row = 0; row < rows; row++) {
                __m512bh pair = (__m512bh)((ints){} + *(const int32_t *)(x + row * apart));
                for (int v = 0; v < vectors; v++)
                    y[row][v] = (floats)_mm512_dpbf16_ps((__m512)y[row][v], (__m512bh)w[v], pair);
            }
            continue;
        }
#endif
        for (int i = 0; i < parts(kind); i++) {
            for (int v = 0; v < vectors; v++) {
                const floats weights = number(kind, w[v], i);
                for (int row = 0; row < rows; row++)
                    y[row][v] += weights * ((const float *)(x + row * apart))[i];
            }
        }
    }
    for (int row = 0; row < rows; row++)
        for (int v = 0; v < vectors; v++) *(floats *)(sums + row * PANEL + v * LANES) = y[row][v];
}

/* y [rows, width] = x [rows, steps] times a panel of `outputs` outputs, the first `width` of which
   are wanted. From row to row of y it is `apart` numbers. */
INLINE void panel(enum kind kind, const int outputs, const ints *w, long rows, const char *x,
                  long steps, float *y, long apart, long width) {
    const int across = outputs / LANES, alone = across < ALONE ? across : ALONE;
    const int shared = across < SHARED ? across : SHARED;
    const long size = 4 * parts(kind), chunk = rows < ROWS ? steps : STEPS;
    float sums[GROUP][PANEL];
    for (long first = 0; first < rows; first += GROUP) {
        const long count = rows - first < GROUP ? rows - first : GROUP;
        memset(sums, 0, count * sizeof *sums);
        for (long step = 0; step < steps; step += chunk) {
            const long some = steps - step < chunk ? steps - step : chunk;
            const ints *ours = w + step * across;
            const char *met = x + (first * steps + step) * size;
            long row = 0;
            for (; row + ROWS <= count; row += ROWS)
                for (int v = 0; v < across; v += shared)
                    block(kind, ROWS, shared, across, ours + v, met + row * steps * size,
                          steps * size, some, sums[row] + v * LANES);
            for (; row < count; row++)
                for (int v = 0; v < across; v += alone)
                    block(kind, 1, alone, across, ours + v, met + row * steps * size, steps * size,
                          some, sums[row] + v * LANES);
        }
        for (long row = 0; row < count; row++)
            memcpy(y + (first + row) * apart, sums[row], width * sizeof(float));
    }
}

/* Rounded to bf16: to the nearest, and to the even one of two that are equally near. */
INLINE uint16_t rounded(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}

/* `count` numbers rounded to bf16, in memory that the caller frees. */
static uint16_t *all_rounded(const float *x, long count) {
    uint16_t *y = malloc(count * sizeof *y);
    if (!y) abort();
    for (long i = 0; i < count; i++) y[i] = rounded(x[i]);
    return y;
}

/* The threads are those of torch's OpenMP library. They are called by GNU's interface, which LLVM's
   and Intel's libraries have too, so that no compiler brings a second library of its own. */
extern void GOMP_parallel(void (*work)(void *), void *arguments, unsigned threads, unsigned flags);
extern int omp_get_num_threads(void), omp_get_thread_num(void);

/* This thread's share of `count` pieces of work: from `first` up to, but without, `end`. */
INLINE void share(long count, long *first, long *end) {
    const long threads = omp_get_num_threads(), thread = omp_get_thread_num();
    *first = count * thread / threads;
    *end = count * (thread + 1) / threads;
}

struct product {
    enum kind kind;
    const ints *w;
    const char *x;
    float *y;
    const float *scale, *bias;
    long rows, steps, out;
};

static void product_share(void *arguments) {
    const struct product p = *(struct product *)arguments;
    long number, end;
    share((p.out + PANEL - 1) / PANEL, &number, &end);
    for (; number < end; number++) {
        const long first = number * PANEL, width = p.out - first < PANEL ? p.out - first : PANEL;
        const ints *w = p.w + first / LANES * p.steps;
        float *y = p.y + first;
        /* A call for each kind, so that the compiler knows it. */
        if (p.kind == FP32) panel(FP32, PANEL, w, p.rows, p.x, p.steps, y, p.out, width);
        if (p.kind == BF16) panel(BF16_WEIGHTS, PANEL, w, p.rows, p.x, p.steps, y, p.out, width);
        if (p.kind == INT8) panel(INT8, PANEL, w, p.rows, p.x, p.steps, y, p.out, width);
        for (long row = 0; row < p.rows; row++, y += p.out)
            for (long i = 0; i < width; i++) {
                const float scale = p.scale ? p.scale[first + i] * 0x1p-24f : 1;
                y[i] = y[i] * scale + (p.bias ? p.bias[first + i] : 0);
            }
    }
}

/* y [rows, out] = x [rows, in] times w [out, in], times a scale of each output (for INT8), plus a
   bias; NULL is none. */
void product(enum kind kind, const ints *w, const float *x, float *y, const float *scale,
             const float *bias, long rows, long in, long out) {
    const long n = kind == FP32 ? 1 : kind == BF16 ? 2 : 4;
    uint16_t *halves = kind == BF16 && rounds_rows ? all_rounded(x, rows * in) : NULL;
    const char *met = halves ? (char *)halves : (char *)x;
    struct product all = {kind, w, met, y, scale, bias, rows, in / n, out};
    GOMP_parallel(product_share, &all, 0, 0);
    free(halves);
}

INLINE floats choose(ints which, floats yes, floats no) {
    return (floats)((which & (ints)yes) | (~which & (ints)no));
}

/* e^x for x <= 0, accurate but for its last digits: a power of 2 times e^r with |r| <= ln(2) / 2,
   by its Taylor series. */
INLINE floats exponential(floats x) {
    const floats zero = {};
    const ints least = x < -87; /* e^-87 is near the least normal number */
    x = choose(least, zero, x);
    const ints power = __builtin_convertvector(x * 1.44269504f - 0.5f, ints);
    /* ln(2) in two parts */
    const floats r = x - numbers(power) * 0.693359375f + numbers(power) * 2.12194440e-4f;
    const floats small = 1 / 24.f + r * (1 / 120.f + r * (1 / 720.f));
    const floats y = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * small)));
    return choose(least, zero, y * (floats)((power + 127) << 23));
}

/* `count` scores, times `scale`, become weights that sum to 1; behind them 0, up to a whole vector. */
INLINE void softmax(float *scores, long count, float scale) {
    floats *all = (floats *)scores, most = (floats){} - __builtin_inff(), sum = {};
    long vectors = (count + LANES - 1) / LANES;
    for (long i = count; i < vectors * LANES; i++) scores[i] = -__builtin_inff();
    for (long i = 0; i < vectors; i++) most = choose(all[i] > most, all[i], most);
    float top = most[0], total = 0;
    for (int lane = 1; lane < LANES; lane++) top = most[lane] > top ? most[lane] : top;
    for (long i = 0; i < vectors; i++) sum += all[i] = exponential((all[i] - top) * scale);
    for (int lane = 0; lane < LANES; lane++) total += sum[lane];
    for (long i = 0; i < vectors; i++) all[i] /= total;
}

/* Where number `i` of output `o` lies in a matrix of so many steps and panels of such a width. */
INLINE long place(long o, long i, long steps, long n, long width) {
    return ((o / width * steps + i / n) * width + o % width) * n + i % n;
}

INLINE void put(char *matrix, long n, long where, float x) {
    if (n == 1) ((float *)matrix)[where] = x;
    else ((uint16_t *)matrix)[where] = rounded(x);
}

struct attention {
    enum kind kind;
    char *keys, *values;
    float *scores;
    const float *q, *k, *v;
    float *y;
    const int64_t *lengths;
    long rows, groups, heads, D, room, width, q_apart, k_apart, v_apart;
    float scale;
};

/* The heads of one row that share keys and values: the row's new k and v [D] are added behind the
   `at` earlier positions, and each head's q [D] attends to all of them. */
INLINE void attend_group(const struct attention *a, enum kind kind, const int width, long row,
                         long group) {
    const long n = kind == FP32 ? 1 : 2, size = 4 / n, D = a->D, room = a->room, heads = a->heads;
    const long number = row * a->groups + group, at = a->lengths[row];
    char *keys = a->keys + number * room * D * size;
    char *values = a->values + number * room * ((D + width - 1) / width * width) * size;
    float *weights = a->scores + number * heads * room, *y = a->y + number * heads * D;
    const char *q = (char *)(a->q + row * a->q_apart + group * heads * D);
    const float *k = a->k + row * a->k_apart + group * D, *v = a->v + row * a->v_apart + group * D;
    for (long d = 0; d < D; d++) {
        put(keys, n, place(at, d, D / n, n, PANEL), k[d]);
        put(values, n, place(d, at, room / n, n, width), v[d]);
        if (at % n == 0 && n == 2) /* the other one of its pair is read too, with a weight of 0 */
            put(values, n, place(d, at + 1, room / n, n, width), 0);
    }
    for (long first = 0; first <= at; first += PANEL)
        panel(kind, PANEL, (ints *)(keys + first * D * size), heads, q, D / n, weights + first,
              room, PANEL);
    for (long head = 0; head < heads; head++, weights += room, y += D) {
        softmax(weights, at + 1, a->scale);
        for (long d = 0; d < D; d += width)
            panel(kind, width, (ints *)(values + d * room * size), 1, (char *)weights, at / n + 1,
                  y + d, D, D - d < width ? D - d : width);
    }
}

static void attend_share(void *arguments) {
    const struct attention *a = arguments;
    long number, end;
    share(a->rows * a->groups, &number, &end);
    for (; number < end; number++) {
        const long row = number / a->groups, group = number % a->groups;
        if (a->kind == FP32 && a->width == PANEL) attend_group(a, FP32, PANEL, row, group);
        if (a->kind == FP32 && a->width != PANEL) attend_group(a, FP32, NARROW, row, group);
        if (a->kind != FP32 && a->width == PANEL) attend_group(a, BF16_KEPT, PANEL, row, group);
        if (a->kind != FP32 && a->width != PANEL) attend_group(a, BF16_KEPT, NARROW, row, group);
    }
}

/* Attention for a new position of each row: k and v [rows, groups, D] are added behind the
   `lengths` [rows] earlier positions, and q [rows, groups, heads, D] attends to y of that shape.
   From row to row of q, k and v it is `*_apart` numbers. The cache has room for `room` positions, a
   multiple of a panel; panels of values are `width` wide, PANEL or NARROW. `scores`
   [rows, groups, heads, room] is working memory. */
void attend(enum kind kind, char *keys, char *values, float *scores, const float *q, const float *k,
            const float *v, float *y, const int64_t *lengths, long rows, long groups, long heads,
            long D, long room, long width, long q_apart, long k_apart, long v_apart, float scale) {
    struct attention all = {kind, keys, values, scores, q, k, v, y, lengths, rows, groups, heads,
                            D, room, width, q_apart, k_apart, v_apart, scale};
    GOMP_parallel(attend_share, &all, 0, 0);
}
