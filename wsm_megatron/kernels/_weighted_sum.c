/* Weighted sums of n arrays into m arrays: float64 products and sums, one rounding at the end.
 *
 * Works through the arrays in blocks whose accumulators stay in the L1 cache. Each source element is
 * read from memory and converted to double once, for all m outputs. The loops are written for the
 * compiler's vectoriser; nothing may be contracted to a fused multiply-add (-ffp-contract=off).
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <fenv.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#endif

/* One clone for each instruction set, chosen when the module is loaded (needs glibc's ifunc). */
#if defined(__x86_64__) && defined(__GLIBC__)
#if defined(__clang__)
#define PER_CPU __attribute__((target_clones("avx512bw", "avx2", "default")))
#elif __GNUC__ >= 12
#define PER_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PER_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#endif
#ifndef PER_CPU
#define PER_CPU
#endif
#define INLINE static inline __attribute__((always_inline))

enum dtype { BF16, FP16, FP32, FP64, DTYPES };
static const size_t ITEM_SIZE[DTYPES] = {2, 2, 4, 8};

/* Elements of a block, and doubles of all its buffers together: they fill two thirds of a 32 KiB L1 cache, and
 * their distance is not 4096 bytes, which would put them all in the same cache sets. */
#define LARGEST_BLOCK 448
#define SMALLEST_BLOCK 64
#define SCRATCH 2624
#define GROUP 4 /* sources in one pass over the accumulators */

/* Elements of a checkpoint file may lie at any address. */
typedef uint16_t u16 __attribute__((aligned(1), may_alias));
typedef float f32 __attribute__((aligned(1), may_alias));
typedef double f64 __attribute__((aligned(1), may_alias));

typedef struct {
    size_t n, m, numel;
    const char *const *sources; /* n addresses */
    char *const *outputs;       /* m addresses */
    const uint8_t *source_types, *output_types;
    const double *coefficients; /* m rows of n */
} Job;

INLINE uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float float_from(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE double from_bf16(uint16_t bits) { return float_from((uint32_t)bits << 16); }

INLINE double from_fp16(uint16_t bits) {
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, magnitude = (uint32_t)(bits & 0x7fff) << 13;
    uint32_t normal = magnitude + ((127 - 15) << 23), infinite_or_nan = magnitude | 0x7f800000;
    uint32_t subnormal = float_bits(float_from(magnitude + ((127 - 14) << 23)) - 0x1p-14f);
    uint32_t wide = magnitude < (1 << 23) ? subnormal : magnitude < (31 << 23) ? normal : infinite_or_nan;
    return float_from(sign | wide);
}

/* Rounds to 14 significant bits and to odd: an inexact value gets a last bit of 1, which keeps it off every
 * tie of bf16 (8 bits) and fp16 (11). So rounding the result to nearest gives what one rounding of the double
 * gives (Boldo and Melquiond, "Emulation of a FMA and Correctly Rounded Sums", 2008). float32 holds it exactly,
 * but for what is below half of the smallest bf16 or beyond the largest. */
INLINE uint32_t round_to_odd(double value) {
    const uint64_t low = ((uint64_t)1 << 39) - 1;
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits = (bits | ((bits & low) + low)) & ~low;
    memcpy(&value, &bits, sizeof bits);
    return float_bits((float)value);
}

INLINE uint16_t to_bf16(double value) {
    uint32_t bits = round_to_odd(value);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
}

INLINE uint16_t to_fp16(double value) {
    uint32_t bits = round_to_odd(value), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    uint32_t rebiased = magnitude - ((127 - 15) << 23);
    uint32_t normal = (rebiased + 0x0fff + ((rebiased >> 13) & 1)) >> 13;
    /* Adding 0.5 leaves a multiple of 2^-24, the fp16 subnormal spacing, in the low bits. */
    uint32_t subnormal = float_bits(float_from(magnitude) + 0.5f) - float_bits(0.5f);
    uint32_t rounded = magnitude < 0x38800000 ? subnormal : normal;
    rounded = magnitude >= 0x47800000 ? 0x7c00 : rounded; /* at least 65536, the next step after 65504 */
    rounded = magnitude > 0x7f800000 ? 0x7e00 : rounded;
    return sign | rounded;
}

/* acc = [acc +] c[0] * source[0] + c[1] * source[1] + ..., over one block of COUNT <= GROUP sources of one
 * type. COUNT and STARTS are constants where this is used, so each use becomes one branch-free loop. */
#define SUM(TYPE, CONVERT, COUNT, STARTS)                                                    \
    do {                                                                                     \
        const TYPE *restrict s0 = (const void *)sources[0];                                  \
        const TYPE *restrict s1 = (const void *)sources[COUNT > 1 ? 1 : 0];                  \
        const TYPE *restrict s2 = (const void *)sources[COUNT > 2 ? 2 : 0];                  \
        const TYPE *restrict s3 = (const void *)sources[COUNT > 3 ? 3 : 0];                  \
        for (size_t i = 0; i < length; i++) {                                                \
            double sum = c[0] * CONVERT(s0[i]);                                              \
            if (!STARTS) sum = acc[i] + sum;                                                 \
            if (COUNT > 1) sum = sum + c[1] * CONVERT(s1[i]);                                \
            if (COUNT > 2) sum = sum + c[2] * CONVERT(s2[i]);                                \
            if (COUNT > 3) sum = sum + c[3] * CONVERT(s3[i]);                                \
            acc[i] = sum;                                                                    \
        }                                                                                    \
    } while (0)

INLINE void sum_of(double *restrict acc, const char *const *sources, int dtype, int count, int starts,
                   const double *restrict coefficients, size_t length) {
    double c[GROUP];
    for (int j = 0; j < count; j++) c[j] = coefficients[j];
    switch (dtype) {
    case BF16: SUM(u16, from_bf16, count, starts); break;
    case FP16: SUM(u16, from_fp16, count, starts); break;
    case FP32: SUM(f32, (double), count, starts); break;
    default: SUM(f64, (double), count, starts);
    }
}

INLINE void sum(double *restrict acc, const char *const *sources, int dtype, int count, int starts,
                const double *restrict coefficients, size_t length) {
    switch (count + (starts ? GROUP : 0)) {
    case 1: sum_of(acc, sources, dtype, 1, 0, coefficients, length); break;
    case 2: sum_of(acc, sources, dtype, 2, 0, coefficients, length); break;
    case 3: sum_of(acc, sources, dtype, 3, 0, coefficients, length); break;
    case 4: sum_of(acc, sources, dtype, 4, 0, coefficients, length); break;
    case 5: sum_of(acc, sources, dtype, 1, 1, coefficients, length); break;
    case 6: sum_of(acc, sources, dtype, 2, 1, coefficients, length); break;
    case 7: sum_of(acc, sources, dtype, 3, 1, coefficients, length); break;
    default: sum_of(acc, sources, dtype, 4, 1, coefficients, length);
    }
}

INLINE void convert(double *restrict to, const char *source, int dtype, size_t length) {
    const double one = 1.0;
    sum_of(to, &source, dtype, 1, 1, &one, length);
}

/* Rounds a block into its output; true when all that was written is finite. */
INLINE int store(void *output, int dtype, const double *restrict acc, size_t count) {
    int finite = 1;
    if (dtype == BF16 || dtype == FP16) {
        u16 *restrict to = output;
        uint16_t largest = 0, infinite = dtype == BF16 ? 0x7f80 : 0x7c00;
        if (dtype == BF16)
            for (size_t i = 0; i < count; i++) to[i] = to_bf16(acc[i]);
        else
            for (size_t i = 0; i < count; i++) to[i] = to_fp16(acc[i]);
        for (size_t i = 0; i < count; i++) {
            uint16_t magnitude = to[i] & 0x7fff;
            largest = magnitude > largest ? magnitude : largest;
        }
        finite = largest < infinite;
    } else if (dtype == FP32) {
        f32 *restrict to = output;
        uint32_t largest = 0;
        for (size_t i = 0; i < count; i++) {
            to[i] = (float)acc[i];
            uint32_t magnitude = float_bits(to[i]) & 0x7fffffff;
            largest = magnitude > largest ? magnitude : largest;
        }
        finite = largest < 0x7f800000;
    } else {
        f64 *restrict to = output;
        int64_t largest = 0, magnitude;
        for (size_t i = 0; i < count; i++) {
            to[i] = acc[i];
            memcpy(&magnitude, &acc[i], sizeof magnitude);
            magnitude &= INT64_MAX;
            largest = magnitude > largest ? magnitude : largest;
        }
        finite = largest < 0x7ff0000000000000;
    }
    return finite;
}

static Py_ssize_t block_size(Py_ssize_t m) {
    Py_ssize_t block = SCRATCH / (m + GROUP) / SMALLEST_BLOCK * SMALLEST_BLOCK;
    return block < SMALLEST_BLOCK ? SMALLEST_BLOCK : block > LARGEST_BLOCK ? LARGEST_BLOCK : block;
}

/* The next sources of one type, at most GROUP. */
INLINE int group_size(const Job *job, size_t first) {
    int count = 1;
    while (count < GROUP && first + count < job->n && job->source_types[first + count] == job->source_types[first])
        count++;
    return count;
}

/* The sums of one block into `scratch`, (m + GROUP) blocks of doubles. */
INLINE void sum_groups(const Job *job, double *scratch, size_t block, size_t first, size_t length) {
    size_t n = job->n, m = job->m;
    double *converted = scratch + m * block;
    for (size_t j = 0, count; j < n; j += count) {
        int dtype = job->source_types[j];
        count = group_size(job, j);
        const char *group[GROUP];
        for (size_t g = 0; g < count; g++) {
            group[g] = job->sources[j + g] + first * ITEM_SIZE[dtype];
            if (m > 1 && dtype != FP64) {
                convert(converted + g * block, group[g], dtype, length);
                group[g] = (const char *)(converted + g * block);
            }
        }
        if (m > 1) dtype = FP64;
        for (size_t k = 0; k < m; k++)
            sum(scratch + k * block, group, dtype, count, j == 0, job->coefficients + k * n + j, length);
    }
}

/* For a few outputs, AVX-512 has registers for all accumulators: they stay there from the first source to the last.
 * For one output the loops above are as fast, for more than WIDE_OUTPUTS faster. */
#if defined(__x86_64__) && defined(__GLIBC__)
#include <immintrin.h>
#define WIDE __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,f16c")))
enum { LANES = 8, WIDE_OUTPUTS = 4 };

static int is_wide(const Job *job) {
    return 1 < job->m && job->m <= WIDE_OUTPUTS && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq");
}

/* LANES elements as doubles; those outside the mask are 0, and are not touched. */
WIDE INLINE __m512d load_wide(const char *source, int dtype, __mmask8 mask) {
    switch (dtype) {
    case BF16: {
        __m256i bits = _mm256_cvtepu16_epi32(_mm_maskz_loadu_epi16(mask, source));
        return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)));
    }
    case FP16: return _mm512_cvtps_pd(_mm256_cvtph_ps(_mm_maskz_loadu_epi16(mask, source)));
    case FP32: return _mm512_cvtps_pd(_mm256_maskz_loadu_ps(mask, source));
    default: return _mm512_maskz_loadu_pd(mask, source);
    }
}

INLINE __mmask8 first_lanes(size_t count) { return count < LANES ? (1 << count) - 1 : 0xff; }

/* Also here m is a constant where this is used. */
WIDE INLINE void sum_wide_of(const Job *job, double *acc, size_t block, size_t first, size_t length, size_t m) {
    for (size_t i = 0; i < length; i += 2 * LANES) {
        size_t rest = length - i;
        __mmask8 left = first_lanes(rest), right = first_lanes(rest > LANES ? rest - LANES : 0);
        __m512d sums[WIDE_OUTPUTS][2];
        for (size_t j = 0; j < job->n; j++) {
            int dtype = job->source_types[j];
            const char *source = job->sources[j] + (first + i) * ITEM_SIZE[dtype];
            __m512d x = load_wide(source, dtype, left);
            __m512d y = load_wide(source + LANES * ITEM_SIZE[dtype], dtype, right);
            for (size_t k = 0; k < m; k++) {
                __m512d c = _mm512_set1_pd(job->coefficients[k * job->n + j]);
                __m512d cx = _mm512_mul_pd(c, x), cy = _mm512_mul_pd(c, y);
                sums[k][0] = j ? _mm512_add_pd(sums[k][0], cx) : cx;
                sums[k][1] = j ? _mm512_add_pd(sums[k][1], cy) : cy;
            }
        }
        for (size_t k = 0; k < m; k++) {
            _mm512_mask_storeu_pd(acc + k * block + i, left, sums[k][0]);
            _mm512_mask_storeu_pd(acc + k * block + i + LANES, right, sums[k][1]);
        }
    }
}

WIDE static void sum_wide(const Job *job, double *acc, size_t block, size_t first, size_t length) {
    switch (job->m) {
    case 2: sum_wide_of(job, acc, block, first, length, 2); break;
    case 3: sum_wide_of(job, acc, block, first, length, 3); break;
    default: sum_wide_of(job, acc, block, first, length, WIDE_OUTPUTS);
    }
}
#else
#define is_wide(job) 0
#define sum_wide sum_groups
#endif

/* scratch: (m + GROUP) blocks of doubles. Returns whether every value written is finite. */
PER_CPU
static int weighted_sum(const Job *job, double *scratch) {
    size_t block = block_size(job->m), numel = job->numel;
    int finite = 1, wide = is_wide(job);
    for (size_t first = 0; first < numel; first += block) {
        size_t length = numel - first < block ? numel - first : block;
        if (wide)
            sum_wide(job, scratch, block, first, length);
        else
            sum_groups(job, scratch, block, first, length);
        for (size_t k = 0; k < job->m; k++) {
            int dtype = job->output_types[k];
            finite &= store(job->outputs[k] + first * ITEM_SIZE[dtype], dtype, scratch + k * block, length);
        }
    }
    return finite;
}

/* Copies a tuple of addresses. */
static int read_addresses(PyObject *tuple, const char **to) {
    for (Py_ssize_t i = 0; i < PyTuple_Size(tuple); i++) {
        to[i] = PyLong_AsVoidPtr(PyTuple_GetItem(tuple, i));
        if (PyErr_Occurred()) return 0;
    }
    return 1;
}

static int read_floats(PyObject *tuple, double *to) {
    for (Py_ssize_t i = 0; i < PyTuple_Size(tuple); i++) {
        to[i] = PyFloat_AsDouble(PyTuple_GetItem(tuple, i));
        if (PyErr_Occurred()) return 0;
    }
    return 1;
}

static int types_known(const char *types, Py_ssize_t count) {
    for (Py_ssize_t i = 0; i < count; i++)
        if ((unsigned char)types[i] >= DTYPES) return 0;
    return 1;
}

/* Without the GIL, in the default floating-point mode: round to nearest, subnormals kept. */
static int run_without_gil(const Job *job, double *scratch) {
    int finite;
    fenv_t caller;
    Py_BEGIN_ALLOW_THREADS
    fegetenv(&caller);
    fesetenv(FE_DFL_ENV);
    finite = weighted_sum(job, scratch);
    fesetenv(&caller);
    Py_END_ALLOW_THREADS
    return finite;
}

PyDoc_STRVAR(run_doc,
"run(numel, sources, source_types, coefficients, outputs, output_types) -> bool\n\n"
"sources, outputs: tuples of addresses; *_types: bytes, one code each (0 bf16, 1 fp16, 2 fp32, 3 fp64);\n"
"coefficients: tuple of len(outputs) x len(sources) floats. The caller vouches for the addresses.\n"
"Returns True when every value written is finite.");

static PyObject *run(PyObject *Py_UNUSED(module), PyObject *args) {
    PyObject *sources, *coefficients, *outputs, *result = NULL;
    const char *source_types, *output_types;
    Py_ssize_t numel, n, m;
    if (!PyArg_ParseTuple(args, "nO!y#O!O!y#:run", &numel, &PyTuple_Type, &sources, &source_types, &n,
                          &PyTuple_Type, &coefficients, &PyTuple_Type, &outputs, &output_types, &m))
        return NULL;
    if (numel < 0 || n < 1 || m < 1 || PyTuple_Size(sources) != n || PyTuple_Size(outputs) != m ||
        PyTuple_Size(coefficients) != m * n || !types_known(source_types, n) || !types_known(output_types, m)) {
        PyErr_SetString(PyExc_ValueError, "run: lengths or type codes do not fit together");
        return NULL;
    }
    const char **addresses = malloc((n + m) * sizeof *addresses);
    double *numbers = malloc((m * n + (m + GROUP) * block_size(m)) * sizeof *numbers);
    if (!addresses || !numbers) {
        PyErr_NoMemory();
    } else if (read_addresses(sources, addresses) && read_addresses(outputs, addresses + n) &&
               read_floats(coefficients, numbers)) {
        Job job = {n, m, numel, addresses, (char **)addresses + n, (const uint8_t *)source_types,
                   (const uint8_t *)output_types, numbers};
        result = PyBool_FromLong(run_without_gil(&job, numbers + m * n));
    }
    free(addresses);
    free(numbers);
    return result;
}

static PyMethodDef methods[] = {{"run", run, METH_VARARGS, run_doc}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_weighted_sum", "Weighted sums with one rounding.", -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__weighted_sum(void) { return PyModule_Create(&definition); }
