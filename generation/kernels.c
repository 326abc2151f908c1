/* Products and attention for decoding on a CPU: kernels.py calls them.

   A decoding step has few rows, so each weight that is read is used only a few times: memory
   bandwidth is the limit. Numbers are therefore stored in the order in which they are read. A
   matrix [out, in] is stored as [out / panel][in / n][panel][n], where n numbers fill 4 bytes (1 of
   fp32, 2 of bf16, 4 of int8), so that each lane of a vector holds 4 bytes of one output. The keys
   of a head are such a matrix [positions, D], its values are one [D, positions].

   Each output of a row is summed in the same order for any number of rows, so a row's result is
   bit-identical alone and in a batch.

   Sums are fp32. The rows are rounded to bf16 only on CPUs with bf16 instructions (AVX512_BF16). */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined __AVX2__
#include <immintrin.h>
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "These kernels need a little-endian processor."
#endif
#define INLINE static inline __attribute__((always_inline))

/* A tile of sums has to fit into registers: ROWS rows x TILE vectors, or one row x ROW_TILE. */
#if defined __AVX512F__
#define LANES 16 /* fp32 numbers of a vector */
#define ROWS 4
#define TILE 4
#define ROW_TILE 4
#elif defined __AVX2__
#define LANES 8
#define ROWS 4
#define TILE 2
#define ROW_TILE 8
#else
#define LANES 4
#define ROWS 4
#define TILE 2
#define ROW_TILE 8
#endif
#define PANEL 64
#define NARROW 16 /* width of a panel of values where heads are narrow */
#define STEPS 32  /* of a panel at a time: 8 KB, which stay in the L1 cache for all rows */
#define GROUP 64  /* rows whose sums are kept at a time */
#define PREFETCH (STEPS * PANEL * 4) /* bytes */

typedef float floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4)));

/* The type of a matrix. BF16 is multiplied by bf16 rows, BF16_CACHE by fp32 rows. */
enum kind { FP32, BF16, INT8, BF16_CACHE };

#ifdef __AVX512BF16__
#define NATIVE_BF16 BF16
const int rounds_rows = 1;
#else
#define NATIVE_BF16 BF16_CACHE
const int rounds_rows = 0;
#endif

INLINE floats to_floats(ints x) { return __builtin_convertvector(x, floats); }

/* The multiplications that 4 bytes of a lane take; bf16 instructions multiply a pair at once. */
INLINE int parts(enum kind kind) { return kind == INT8 ? 4 : kind == BF16_CACHE ? 2 : 1; }

/* Byte `i` of each lane moved to its most significant byte, the others 0. */
INLINE ints top_byte(ints w, int i) {
#if defined __AVX2__ && LANES == 8
    const int from = 0x00808080 | i << 24, lane = 0x04000000; /* 0x80 gives a byte of 0 */
    ints order = {from, from + lane, from + 2 * lane, from + 3 * lane,
                  from, from + lane, from + 2 * lane, from + 3 * lane};
    return (ints)_mm256_shuffle_epi8((__m256i)w, (__m256i)order);
#else
    return w << (24 - 8 * i) & (int)0xff000000;
#endif
}

/* Number `i` of each lane as fp32. bf16 is its upper half; int8 becomes 2^24 times as large. */
INLINE floats unpack(enum kind kind, ints w, int i) {
    if (kind == FP32) return (floats)w;
    if (kind == BF16_CACHE) return (floats)(i ? w & (int)0xffff0000 : w << 16);
    return to_floats(top_byte(w, i));
}

/* sums [rows][PANEL] += x [rows, steps] @ the first `vectors` of a panel's `across` vectors per
   step. The rows of x are `stride` bytes apart. */
INLINE void mul_tile(enum kind kind, const int rows, const int vectors, const int across,
                     const ints *w, const char *x, long stride, long steps, float *sums) {
    floats y[ROWS][PANEL / LANES];
    for (int row = 0; row < rows; row++)
        for (int v = 0; v < vectors; v++) y[row][v] = *(floats *)(sums + row * PANEL + v * LANES);
    for (long step = 0; step < steps; step++, w += across, x += 4 * parts(kind)) {
        for (int v = 0; v < vectors; v += 16 / LANES)
            __builtin_prefetch((const char *)(w + v) + PREFETCH, 0, 0);
#ifdef __AVX512BF16__
        if (kind == BF16) {
            for (int row = 0; row < rows; row++) {
                __m512bh pair = (__m512bh)((ints){} + *(const int32_t *)(x + row * stride));
                for (int v = 0; v < vectors; v++)
                    y[row][v] = (floats)_mm512_dpbf16_ps((__m512)y[row][v], (__m512bh)w[v], pair);
            }
            continue;
        }
#endif
        for (int i = 0; i < parts(kind); i++) {
            for (int v = 0; v < vectors; v++) {
                const floats weights = unpack(kind, w[v], i);
                for (int row = 0; row < rows; row++)
                    y[row][v] += weights * ((const float *)(x + row * stride))[i];
            }
        }
    }
    for (int row = 0; row < rows; row++)
        for (int v = 0; v < vectors; v++) *(floats *)(sums + row * PANEL + v * LANES) = y[row][v];
}

/* y [rows, width] = x [rows, steps] @ the first `width` of a panel's `outputs` outputs. The rows of
   y are `stride` numbers apart. */
INLINE void mul_panel(enum kind kind, const int outputs, const ints *w, long rows, const char *x,
                      long steps, float *y, long stride, long width) {
    const int across = outputs / LANES, row_tile = across < ROW_TILE ? across : ROW_TILE;
    const int tile = across < TILE ? across : TILE;
    const long size = 4 * parts(kind), chunk = rows < ROWS ? steps : STEPS;
    float sums[GROUP][PANEL];
    for (long first = 0; first < rows; first += GROUP) {
        const long count = rows - first < GROUP ? rows - first : GROUP;
        memset(sums, 0, count * sizeof *sums);
        for (long step = 0; step < steps; step += chunk) {
            const long some = steps - step < chunk ? steps - step : chunk;
            const ints *w_step = w + step * across;
            const char *x_step = x + (first * steps + step) * size;
            long row = 0;
            for (; row + ROWS <= count; row += ROWS)
                for (int v = 0; v < across; v += tile)
                    mul_tile(kind, ROWS, tile, across, w_step + v, x_step + row * steps * size,
                             steps * size, some, sums[row] + v * LANES);
            for (; row < count; row++)
                for (int v = 0; v < across; v += row_tile)
                    mul_tile(kind, 1, row_tile, across, w_step + v, x_step + row * steps * size,
                             steps * size, some, sums[row] + v * LANES);
        }
        for (long row = 0; row < count; row++)
            memcpy(y + (first + row) * stride, sums[row], width * sizeof(float));
    }
}

/* Round to bf16, to nearest, ties to even. */
INLINE uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}

/* `count` numbers as bf16, in memory that the caller frees. */
static uint16_t *all_to_bf16(const float *x, long count) {
    uint16_t *y = malloc(count * sizeof *y);
    if (!y) abort();
    for (long i = 0; i < count; i++) y[i] = to_bf16(x[i]);
    return y;
}

/* These run on the threads of torch's OpenMP library. GNU's interface, which LLVM's and Intel's
   libraries have too, is called directly, so that no compiler links a second OpenMP library. */
extern void GOMP_parallel(void (*work)(void *), void *arguments, unsigned threads, unsigned flags);
extern int omp_get_num_threads(void), omp_get_thread_num(void);

/* This thread's part of `count` work items: `first` <= item < `end`. */
INLINE void thread_range(long count, long *first, long *end) {
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

static void product_thread(void *arguments) {
    const struct product p = *(struct product *)arguments;
    long number, end;
    thread_range((p.out + PANEL - 1) / PANEL, &number, &end);
    for (; number < end; number++) {
        const long first = number * PANEL, width = p.out - first < PANEL ? p.out - first : PANEL;
        const ints *w = p.w + first / LANES * p.steps;
        float *y = p.y + first;
        /* A call for each kind, so that it is a constant to the compiler. */
        if (p.kind == FP32) mul_panel(FP32, PANEL, w, p.rows, p.x, p.steps, y, p.out, width);
        if (p.kind == BF16) mul_panel(NATIVE_BF16, PANEL, w, p.rows, p.x, p.steps, y, p.out, width);
        if (p.kind == INT8) mul_panel(INT8, PANEL, w, p.rows, p.x, p.steps, y, p.out, width);
        for (long row = 0; row < p.rows; row++, y += p.out)
            for (long i = 0; i < width; i++) {
                const float scale = p.scale ? p.scale[first + i] * 0x1p-24f : 1;
                y[i] = y[i] * scale + (p.bias ? p.bias[first + i] : 0);
            }
    }
}

/* y [rows, out] = x [rows, in] @ w [out, in].T * scale [out] (for INT8) + bias [out]; NULL for no
   scale or bias. */
void product(enum kind kind, const ints *w, const float *x, float *y, const float *scale,
             const float *bias, long rows, long in, long out) {
    const long n = kind == FP32 ? 1 : kind == BF16 ? 2 : 4;
    uint16_t *bf16_x = kind == BF16 && rounds_rows ? all_to_bf16(x, rows * in) : NULL;
    const char *x_rows = bf16_x ? (char *)bf16_x : (char *)x;
    struct product all = {kind, w, x_rows, y, scale, bias, rows, in / n, out};
    GOMP_parallel(product_thread, &all, 0, 0);
    free(bf16_x);
}

INLINE floats select_lanes(ints which, floats yes, floats no) {
    return (floats)((which & (ints)yes) | (~which & (ints)no));
}

/* e^x for x <= 0, except for the last digits: a power of 2 times e^r with |r| <= ln(2) / 2, by its
   Taylor series. */
INLINE floats exponential(floats x) {
    const floats zero = {};
    const ints tiny = x < -87; /* e^-87 is near the smallest normal number */
    x = select_lanes(tiny, zero, x);
    const ints power = __builtin_convertvector(x * 1.44269504f - 0.5f, ints);
    /* ln(2) in two parts */
    const floats r = x - to_floats(power) * 0.693359375f + to_floats(power) * 2.12194440e-4f;
    const floats small = 1 / 24.f + r * (1 / 120.f + r * (1 / 720.f));
    const floats y = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * small)));
    return select_lanes(tiny, zero, y * (floats)((power + 127) << 23));
}

/* softmax(scores * scale) in place; zeros after it fill the last vector. */
INLINE void softmax(float *scores, long count, float scale) {
    floats *all = (floats *)scores, maximum = (floats){} - __builtin_inff(), sum = {};
    long vectors = (count + LANES - 1) / LANES;
    for (long i = count; i < vectors * LANES; i++) scores[i] = -__builtin_inff();
    for (long i = 0; i < vectors; i++) maximum = select_lanes(all[i] > maximum, all[i], maximum);
    float top = maximum[0], total = 0;
    for (int lane = 1; lane < LANES; lane++) top = maximum[lane] > top ? maximum[lane] : top;
    for (long i = 0; i < vectors; i++) sum += all[i] = exponential((all[i] - top) * scale);
    for (int lane = 0; lane < LANES; lane++) total += sum[lane];
    for (long i = 0; i < vectors; i++) all[i] /= total;
}

/* The index of input `i` of output `o` in a matrix of `steps` steps and panels of `width`. */
INLINE long packed_index(long o, long i, long steps, long n, long width) {
    return ((o / width * steps + i / n) * width + o % width) * n + i % n;
}

INLINE void store(char *matrix, long n, long index, float x) {
    if (n == 1) ((float *)matrix)[index] = x;
    else ((uint16_t *)matrix)[index] = to_bf16(x);
}

struct attention {
    enum kind kind;
    char *keys, *values;
    float *scores;
    const float *q, *k, *v;
    float *y;
    const int64_t *lengths;
    long rows, groups, heads, D, capacity, width, q_stride, k_stride, v_stride;
    float scale;
};

/* The heads of one row that share keys and values: the row's new k and v [D] are appended to its
   `at` earlier positions, and each head's q [D] attends to all of them. */
INLINE void attend_group(const struct attention *a, enum kind kind, const int width, long row,
                         long group) {
    const long n = kind == FP32 ? 1 : 2, size = 4 / n;
    const long D = a->D, capacity = a->capacity, heads = a->heads;
    const long number = row * a->groups + group, at = a->lengths[row];
    char *keys = a->keys + number * capacity * D * size;
    char *values = a->values + number * capacity * ((D + width - 1) / width * width) * size;
    float *weights = a->scores + number * heads * capacity, *y = a->y + number * heads * D;
    const char *q = (char *)(a->q + row * a->q_stride + group * heads * D);
    const float *k = a->k + row * a->k_stride + group * D;
    const float *v = a->v + row * a->v_stride + group * D;
    for (long d = 0; d < D; d++) {
        store(keys, n, packed_index(at, d, D / n, n, PANEL), k[d]);
        store(values, n, packed_index(d, at, capacity / n, n, width), v[d]);
        if (at % n == 0 && n == 2) /* its pair is read too, with a weight of 0 */
            store(values, n, packed_index(d, at + 1, capacity / n, n, width), 0);
    }
    for (long first = 0; first <= at; first += PANEL)
        mul_panel(kind, PANEL, (ints *)(keys + first * D * size), heads, q, D / n, weights + first,
                  capacity, PANEL);
    for (long head = 0; head < heads; head++, weights += capacity, y += D) {
        softmax(weights, at + 1, a->scale);
        for (long d = 0; d < D; d += width)
            mul_panel(kind, width, (ints *)(values + d * capacity * size), 1, (char *)weights,
                      at / n + 1, y + d, D, D - d < width ? D - d : width);
    }
}

static void attend_thread(void *arguments) {
    const struct attention *a = arguments;
    long number, end;
    thread_range(a->rows * a->groups, &number, &end);
    for (; number < end; number++) {
        const long row = number / a->groups, group = number % a->groups;
        if (a->kind == FP32 && a->width == PANEL) attend_group(a, FP32, PANEL, row, group);
        if (a->kind == FP32 && a->width != PANEL) attend_group(a, FP32, NARROW, row, group);
        if (a->kind != FP32 && a->width == PANEL) attend_group(a, BF16_CACHE, PANEL, row, group);
        if (a->kind != FP32 && a->width != PANEL) attend_group(a, BF16_CACHE, NARROW, row, group);
    }
}

/* Attention for a new position of each row: k and v [rows, groups, D] are appended to the `lengths`
   [rows] earlier positions, and y is the output for q, both [rows, groups, heads, D]. The rows of
   q, k and v are `*_stride` numbers apart. The cache has `capacity` positions, a multiple of a
   panel; panels of values are `width` wide, PANEL or NARROW. `scores` [rows, groups, heads,
   capacity] is working memory. */
void attend(enum kind kind, char *keys, char *values, float *scores, const float *q, const float *k,
            const float *v, float *y, const int64_t *lengths, long rows, long groups, long heads,
            long D, long capacity, long width, long q_stride, long k_stride, long v_stride,
            float scale) {
    struct attention all = {kind, keys, values, scores, q, k, v, y, lengths, rows, groups, heads,
                            D, capacity, width, q_stride, k_stride, v_stride, scale};
    GOMP_parallel(attend_thread, &all, 0, 0);
}
