/* What decoding does with every weight and every key, as fast as memory is read: see kernels.py.

   A step has few rows, so each number that is read is of use a few times only. Therefore all lie in the order of their
   reading: a matrix [out, in] as [out / panel][in / n][panel][n], n numbers to 4 bytes (1 of fp32, 2 of bf16, 4 of int8).
   One vector has such 4 bytes of several outputs, and a panel takes a few vectors. The keys of a head are such a matrix
   [positions, D], its values are one [D, positions].

   Each output of a row is summed in the same order, however many rows there are. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "numbers that lie together are told apart by their place"
#endif
#define INLINE static inline __attribute__((always_inline))
#if defined __AVX512F__
#define LANES 16 /* of a vector */
#define ROWS 4   /* at once: as many as have their sums in registers */
#elif defined __AVX2__
#define LANES 8
#define ROWS 1
#else
#define LANES 4
#define ROWS 1
#endif
#define PANEL 64
#define NARROW 16   /* a panel of values where heads are not so wide */
#define AHEAD 8192  /* bytes from here is what the processor is asked to fetch, and not to keep */

typedef float floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4)));

/* What a matrix holds. The rows that it meets are fp32, but those that meet BF16 are rounded to it too. */
enum kind { FP32, BF16, INT8, BF16_KEPT };

INLINE floats numbers(ints x) { return __builtin_convertvector(x, floats); }

/* A sum, and the numbers of each lane of `w` times as many of a row. bf16 is the upper half of fp32. */
INLINE floats join(enum kind kind, floats sum, ints w, const char *row) {
    const float *x = (const float *)row;
    const int upper = -65536;
    if (kind == FP32) return sum + (floats)w * x[0];
    if (kind == BF16_KEPT) return sum + (floats)(w << 16) * x[0] + (floats)(w & upper) * x[1];
    if (kind == INT8) {
        sum += numbers((w << 24) >> 24) * x[0];
        sum += numbers((w << 16) >> 24) * x[1];
        sum += numbers((w << 8) >> 24) * x[2];
        return sum + numbers(w >> 24) * x[3];
    }
    ints pair = (ints){} + *(const int32_t *)row;
#ifdef __AVX512BF16__
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)pair);
#else
    return sum + (floats)(w << 16) * (floats)(pair << 16) + (floats)(w & upper) * (floats)(pair & upper);
#endif
}

/* The bytes of a row that a lane meets. */
INLINE long bytes(enum kind kind) { return kind == BF16_KEPT ? 8 : kind == INT8 ? 16 : 4; }

/* y [rows, width] = x [rows, steps] times a panel of so many outputs; from row to row of y it is `apart` numbers. */
INLINE void panel(enum kind kind, const int outputs, const ints *w, const int rows, const char *x, long steps, float *y,
                  long apart, long width) {
    const int vectors = outputs / LANES;
    floats sums[ROWS][PANEL / LANES] = {};
    for (long step = 0; step < steps; step++, w += vectors) {
        for (int v = 0; v < vectors; v += 16 / LANES) __builtin_prefetch((const char *)(w + v) + AHEAD, 0, 0);
        for (int row = 0; row < rows; row++)
            for (int v = 0; v < vectors; v++)
                sums[row][v] = join(kind, sums[row][v], w[v], x + (row * steps + step) * bytes(kind));
    }
    for (int row = 0; row < rows; row++) memcpy(y + row * apart, sums[row], width * sizeof(float));
}

/* The same of a whole panel for any number of rows. */
INLINE void panel_of_all(enum kind kind, const ints *w, long rows, const char *x, long steps, float *y, long apart,
                         long width) {
    long row = 0, size = steps * bytes(kind);
    for (; row + ROWS <= rows; row += ROWS)
        panel(kind, PANEL, w, ROWS, x + row * size, steps, y + row * apart, apart, width);
    for (; row < rows; row++) panel(kind, PANEL, w, 1, x + row * size, steps, y + row * apart, apart, width);
}

/* To bf16: to the nearest, of two to the even one. */
INLINE uint16_t rounded(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}

/* `count` numbers, in memory that is to be freed. */
static uint16_t *all_rounded(const float *x, long count) {
    uint16_t *y = malloc(count * sizeof *y);
    if (!y) abort();
    for (long i = 0; i < count; i++) y[i] = rounded(x[i]);
    return y;
}

/* y [rows, out] = x [rows, in] times w [out, in], times a scale of each output, plus a bias; NULL: without. */
void product(enum kind kind, const ints *w, const float *x, float *y, const float *scale, const float *bias, long rows,
             long in, long out) {
    const long n = kind == FP32 ? 1 : kind == BF16 ? 2 : 4, steps = in / n;
    uint16_t *halves = kind == BF16 ? all_rounded(x, rows * in) : NULL;
    const char *met = halves ? (char *)halves : (char *)x;
#pragma omp parallel for
    for (long first = 0; first < out; first += PANEL) {
        const ints *ours = w + first / LANES * steps;
        long width = out - first < PANEL ? out - first : PANEL;
        /* Three calls, so that each has a kind that the compiler knows. */
        if (kind == FP32) panel_of_all(FP32, ours, rows, met, steps, y + first, out, width);
        if (kind == BF16) panel_of_all(BF16, ours, rows, met, steps, y + first, out, width);
        if (kind == INT8) panel_of_all(INT8, ours, rows, met, steps, y + first, out, width);
        for (long row = 0; row < rows; row++)
            for (long i = first; i < first + width; i++)
                y[row * out + i] = y[row * out + i] * (scale ? scale[i] : 1) + (bias ? bias[i] : 0);
    }
    free(halves);
}

INLINE floats chosen(ints which, floats yes, floats no) { return (floats)((which & (ints)yes) | (~which & (ints)no)); }

/* e^x for x <= 0, but for its last digits: a power of 2 times e^r, |r| <= ln(2) / 2, by its Taylor series. */
INLINE floats exponential(floats x) {
    floats zero = {};
    ints least = x < -87; /* there is hardly a smaller number than its exponential */
    x = chosen(least, zero, x);
    ints power = __builtin_convertvector(x * 1.44269504f - 0.5f, ints);
    floats r = x - numbers(power) * 0.693359375f + numbers(power) * 2.12194440e-4f; /* ln(2), in two parts */
    floats y = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r * (1 / 720.f))))));
    return chosen(least, zero, y * (floats)((power + 127) << 23));
}

/* What `count` scores, times `scale`, weigh against each other; and 0 behind them, up to a whole vector. */
INLINE void softmax(float *scores, long count, float scale) {
    floats *all = (floats *)scores, most = (floats){} - __builtin_inff(), sum = {};
    long vectors = (count + LANES - 1) / LANES;
    for (long i = count; i < vectors * LANES; i++) scores[i] = -__builtin_inff();
    for (long i = 0; i < vectors; i++) most = chosen(all[i] > most, all[i], most);
    float top = most[0], total = 0;
    for (int lane = 1; lane < LANES; lane++) top = most[lane] > top ? most[lane] : top;
    for (long i = 0; i < vectors; i++) sum += all[i] = exponential((all[i] - top) * scale);
    for (int lane = 0; lane < LANES; lane++) total += sum[lane];
    for (long i = 0; i < vectors; i++) all[i] /= total;
}

/* Where in a matrix of so many steps and so wide panels number `i` of output `o` lies. */
INLINE long place(long o, long i, long steps, long n, long width) {
    return ((o / width * steps + i / n) * width + o % width) * n + i % n;
}

INLINE void put(char *matrix, long n, long where, float x) {
    if (n == 1) ((float *)matrix)[where] = x;
    else ((uint16_t *)matrix)[where] = rounded(x);
}

/* What heads of one row that share keys and values do: their new k and v [D] join the `at` earlier ones, and each head
   takes what its q [D] sees to y [heads, D]. */
INLINE void attend_group(enum kind kind, const int width, char *keys, char *values, float *weights, const float *q,
                         const float *k, const float *v, float *y, long at, long heads, long D, long room, float scale) {
    const long n = kind == FP32 ? 1 : 2, size = 4 / n;
    for (long d = 0; d < D; d++) {
        put(keys, n, place(at, d, D / n, n, PANEL), k[d]);
        put(values, n, place(d, at, room / n, n, width), v[d]);
        if (at % n == 0 && n == 2) /* what is read with it weighs nothing, but has to be a number */
            put(values, n, place(d, at + 1, room / n, n, width), 0);
    }
    for (long first = 0; first <= at; first += PANEL)
        panel_of_all(kind, (ints *)(keys + first * D * size), heads, (char *)q, D / n, weights + first, room, PANEL);
    for (long head = 0; head < heads; head++, weights += room, y += D) {
        softmax(weights, at + 1, scale);
        for (long d = 0; d < D; d += width)
            panel(kind, width, (ints *)(values + d * room * size), 1, (char *)weights, at / n + 1, y + d, D,
                  D - d < width ? D - d : width);
    }
}

/* A new position of each row: k and v [rows, groups, D] join the `lengths` [rows] earlier ones, and the queries
   q [rows, groups, heads, D] take what they see to y of that shape. From row to row of q, k and v it is so many numbers.
   There is room for `room` positions, a multiple of a panel; the values' panels have a `width` of PANEL or NARROW;
   `scores` [rows, groups, heads, room] is memory to work in. */
void attend(enum kind kind, char *keys, char *values, float *scores, const float *q, const float *k, const float *v,
            float *y, const int64_t *lengths, long rows, long groups, long heads, long D, long room, long width,
            long q_apart, long k_apart, long v_apart, float scale) {
    const long size = kind == FP32 ? 4 : 2, D_held = (D + width - 1) / width * width;
#pragma omp parallel for collapse(2)
    for (long row = 0; row < rows; row++)
        for (long group = 0; group < groups; group++) {
            const long number = row * groups + group;
            char *held_keys = keys + number * room * D * size, *held_values = values + number * room * D_held * size;
            float *weights = scores + number * heads * room, *taken = y + number * heads * D;
            const float *asked = q + row * q_apart + group * heads * D;
            const float *key = k + row * k_apart + group * D, *value = v + row * v_apart + group * D;
#define GROUP(KIND, WIDTH)                                                                                                 \
    attend_group(KIND, WIDTH, held_keys, held_values, weights, asked, key, value, taken, lengths[row], heads, D, room, scale)
            if (kind == FP32 && width == PANEL) GROUP(FP32, PANEL);
            if (kind == FP32 && width != PANEL) GROUP(FP32, NARROW);
            if (kind != FP32 && width == PANEL) GROUP(BF16_KEPT, PANEL);
            if (kind != FP32 && width != PANEL) GROUP(BF16_KEPT, NARROW);
        }
}
