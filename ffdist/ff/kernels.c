/* Kernels of ReLU layers: one pass over activations or weights each, where torch needs several. See kernels.py.

   A bfloat16 number is a uint16_t. Sums have a fixed order, and products are not fused with sums, so results do not
   depend on the instruction set that is chosen when the program runs. */

#include <math.h>
#include <stdint.h>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define KERNEL __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"))) void
#elif defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define KERNEL __attribute__((target_clones("avx512f", "avx2", "default"))) void
#else
#define KERNEL void
#endif
#define INLINE static inline __attribute__((always_inline))
#define LANES 16 /* partial sums, which become vectors */

const char source_sha256[] = SOURCE_SHA256; /* of this file, so that an older library is not used */

typedef union { uint32_t bits; float value; } number;

INLINE float widen(uint16_t half)
{
    number x = {.bits = (uint32_t)half << 16};
    return x.value;
}

INLINE uint16_t narrow(float value) /* to nearest, ties to even; NaN stays NaN */
{
    number x = {.value = value};
    return value != value ? 0x7fff : (uint16_t)((x.bits + 0x7fff + ((x.bits >> 16) & 1)) >> 16);
}

INLINE float load_half(const uint16_t *from) { return widen(*from); }
INLINE float load_float(const float *from) { return *from; }
INLINE void store_half(uint16_t *to, float value) { *to = narrow(value); }
INLINE void store_float(float *to, float value) { *to = value; }
INLINE float relu(float sum) { return 0.5f * sum + 0.5f * fabsf(sum); } /* without a branch; NaN stays NaN */

/* Activations, their sums of squares and normalized activations.

   sums [blocks, rows, units]: weighted inputs. bias [blocks * units]. divisor: squares are divided by it before the
   root; 0 for no normalization. Results: passed [rows, blocks * units], squares [rows], factors [rows] of the
   normalization, totals [blocks * units]: activations of the first `positive` rows, summed. */
#define DEFINE_ACTIVATE(NAME, IN, LOAD, OUT, STORE)                                                                    \
    KERNEL NAME(const IN *restrict sums, const float *restrict bias, int64_t rows, int64_t blocks, int64_t units,      \
                float divisor, float epsilon, OUT *restrict passed, float *restrict squares, float *restrict factors,  \
                float *restrict totals, int64_t positive)                                                              \
    {                                                                                                                  \
        for (int64_t row = 0; row < rows; row++) {                                                                     \
            float partial[LANES] = {0}, square = 0;                                                                    \
            for (int64_t block = 0; block < blocks; block++) {                                                         \
                const IN *x = sums + (block * rows + row) * units;                                                     \
                const float *b = bias + block * units;                                                                 \
                int64_t unit = 0;                                                                                      \
                for (; unit + LANES <= units; unit += LANES)                                                           \
                    for (int lane = 0; lane < LANES; lane++) {                                                         \
                        float activation = relu(LOAD(x + unit + lane) + b[unit + lane]);                               \
                        partial[lane] += activation * activation;                                                      \
                    }                                                                                                  \
                for (; unit < units; unit++) {                                                                         \
                    float activation = relu(LOAD(x + unit) + b[unit]);                                                 \
                    square += activation * activation;                                                                 \
                }                                                                                                      \
            }                                                                                                          \
            for (int lane = 0; lane < LANES; lane++) square += partial[lane];                                          \
            float factor = divisor > 0 ? 1 / sqrtf(square / divisor + epsilon) : 1;                                    \
            squares[row] = square, factors[row] = factor;                                                              \
            for (int64_t block = 0; block < blocks; block++) {                                                         \
                const IN *x = sums + (block * rows + row) * units;                                                     \
                const float *b = bias + block * units;                                                                 \
                float *total = totals + block * units;                                                                 \
                OUT *y = passed + (row * blocks + block) * units;                                                      \
                if (row < positive)                                                                                    \
                    for (int64_t unit = 0; unit < units; unit++) {                                                     \
                        float activation = relu(LOAD(x + unit) + b[unit]);                                             \
                        total[unit] += activation;                                                                     \
                        STORE(y + unit, activation * factor);                                                          \
                    }                                                                                                  \
                else                                                                                                   \
                    for (int64_t unit = 0; unit < units; unit++)                                                       \
                        STORE(y + unit, relu(LOAD(x + unit) + b[unit]) * factor);                                      \
            }                                                                                                          \
        }                                                                                                              \
    }

DEFINE_ACTIVATE(activate_bfloat16, uint16_t, load_half, uint16_t, store_half)
DEFINE_ACTIVATE(activate_float32, float, load_float, float, store_float)
DEFINE_ACTIVATE(activate_float32_to_bfloat16, float, load_float, uint16_t, store_half)

/* Minus the gradient of the loss with respect to activations.

   passed [rows, blocks * units]. weights [rows]: factor of each row. peers [blocks * units]: added to the first
   `positive` rows. Results: direction [blocks, rows, units]; bias [blocks * units]: its sum over rows. */
#define DEFINE_BACKWARD(NAME, IN, LOAD, OUT, STORE)                                                                    \
    KERNEL NAME(const IN *restrict passed, const float *restrict weights, const float *restrict peers, int64_t rows,   \
                int64_t blocks, int64_t units, int64_t positive, OUT *restrict direction, float *restrict bias)        \
    {                                                                                                                  \
        for (int64_t row = 0; row < rows; row++) {                                                                     \
            float weight = weights[row], share = row < positive ? 1 : 0;                                               \
            for (int64_t block = 0; block < blocks; block++) {                                                         \
                const IN *x = passed + (row * blocks + block) * units;                                                 \
                const float *peer = peers + block * units;                                                             \
                float *total = bias + block * units;                                                                   \
                OUT *y = direction + (block * rows + row) * units;                                                     \
                for (int64_t unit = 0; unit < units; unit++) {                                                         \
                    float value = LOAD(x + unit) * weight + share * peer[unit];                                        \
                    total[unit] += value;                                                                              \
                    STORE(y + unit, value);                                                                            \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }

DEFINE_BACKWARD(backward_bfloat16, uint16_t, load_half, uint16_t, store_half)
DEFINE_BACKWARD(backward_float32, float, load_float, float, store_float)
DEFINE_BACKWARD(backward_bfloat16_to_float32, uint16_t, load_half, float, store_float)

/* The optimizer `hinton`, in place. keep: 1 - momentum. decay: factor on the parameter. copy: gets the new values. */
#define DEFINE_UPDATE(NAME, IN, LOAD, COPY)                                                                            \
    KERNEL NAME(float *restrict parameter, float *restrict mean, const IN *restrict gradient,                          \
                uint16_t *restrict copy, int64_t size, float keep, float rate, float decay)                            \
    {                                                                                                                  \
        for (int64_t i = 0; i < size; i++) {                                                                           \
            float smooth = mean[i] + keep * (LOAD(gradient + i) - mean[i]);                                            \
            float value = parameter[i] * decay + rate * smooth;                                                        \
            mean[i] = smooth, parameter[i] = value;                                                                    \
            COPY;                                                                                                      \
        }                                                                                                              \
    }

DEFINE_UPDATE(update_bfloat16, uint16_t, load_half, (void)0)
DEFINE_UPDATE(update_float32, float, load_float, (void)0)
DEFINE_UPDATE(update_bfloat16_and_copy, uint16_t, load_half, copy[i] = narrow(value))
