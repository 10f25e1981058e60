/* Kernels of layers: one pass over activations or weights each, where torch needs several. See kernels.py.

   A bfloat16 number is a uint16_t. Sums have a fixed order, and products are not fused with sums, so results do not
   depend on the instruction set that is chosen when the program runs. */

#include <math.h>
#include <stdint.h>
#include <string.h>

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

/* Maps [images, height, width, channels] before their batch norm. An activation is relu(map * scale + shift), with scale
   and shift [channels]. Squares of side x side positions are windows, [images, down, across, channels]. */

/* Sums by channel of maps and of their squares [2 * channels], added to totals. partial [2 * channels]: working memory. */
#define DEFINE_MOMENTS(NAME, IN, LOAD)                                                                                 \
    KERNEL NAME(const IN *restrict maps, int64_t images, int64_t positions, int64_t channels, float *restrict partial, \
                double *restrict totals)                                                                               \
    {                                                                                                                  \
        float *restrict sum = partial, *restrict square = partial + channels;                                          \
        for (int64_t image = 0; image < images; image++) {                                                             \
            memset(partial, 0, 2 * channels * sizeof(float));                                                          \
            for (int64_t position = 0; position < positions; position++, maps += channels)                             \
                for (int64_t c = 0; c < channels; c++) {                                                               \
                    float value = LOAD(maps + c);                                                                      \
                    sum[c] += value, square[c] += value * value;                                                       \
                }                                                                                                      \
            for (int64_t c = 0; c < 2 * channels; c++) totals[c] += partial[c];                                        \
        }                                                                                                              \
    }

DEFINE_MOMENTS(moments_bfloat16, uint16_t, load_half)
DEFINE_MOMENTS(moments_float32, float, load_float)

/* Activations: what is passed on, and the sums by window of their values and of their squares, added to sums and squares.

   pool: 0, or pooling of 2 x 2 positions by the maximum (1) or the mean (2). noise [images, channels]: factors of what
   is passed on. lines [2 * width * channels]: working memory. */
#define DEFINE_ACTIVATE_MAPS(NAME, IN, LOAD, STORE)                                                                    \
    KERNEL NAME(const IN *restrict maps, const float *restrict scale, const float *restrict shift,                     \
                const float *restrict noise, int64_t images, int64_t height, int64_t width, int64_t channels,          \
                int64_t side, int64_t pool, float *restrict lines, IN *restrict passed, float *restrict sums,          \
                float *restrict squares)                                                                               \
    {                                                                                                                  \
        int64_t across = (width + side - 1) / side, down = (height + side - 1) / side, step = width * channels;        \
        for (int64_t image = 0; image < images; image++, noise += channels)                                            \
            for (int64_t y = 0; y < height; y++) {                                                                     \
                float *restrict line = lines + (y % 2) * step;                                                         \
                for (int64_t x = 0; x < width; x++, maps += channels) {                                                \
                    int64_t window = ((image * down + y / side) * across + x / side) * channels;                       \
                    float *restrict sum = sums + window, *restrict square = squares + window;                          \
                    float *restrict activations = line + x * channels;                                                 \
                    for (int64_t c = 0; c < channels; c++) {                                                           \
                        float activation = relu(LOAD(maps + c) * scale[c] + shift[c]);                                 \
                        activations[c] = activation;                                                                   \
                        sum[c] += activation, square[c] += activation * activation;                                    \
                    }                                                                                                  \
                }                                                                                                      \
                if (!pool)                                                                                             \
                    for (int64_t x = 0; x < width; x++, passed += channels)                                            \
                        for (int64_t c = 0; c < channels; c++) STORE(passed + c, line[x * channels + c] * noise[c]);   \
                else if (y % 2)                                                                                        \
                    for (int64_t x = 0; x + 1 < width; x += 2, passed += channels) {                                   \
                        const float *first = lines + x * channels, *second = first + step;                             \
                        for (int64_t c = 0; c < channels; c++) {                                                       \
                            float a = first[c], b = first[channels + c], d = second[c], e = second[channels + c];      \
                            float upper = a > b ? a : b, lower = d > e ? d : e, most = upper > lower ? upper : lower;  \
                            STORE(passed + c, (pool == 1 ? most : (a + b + d + e) / 4) * noise[c]);                    \
                        }                                                                                              \
                    }                                                                                                  \
            }                                                                                                          \
    }

DEFINE_ACTIVATE_MAPS(activate_maps_bfloat16, uint16_t, load_half, store_half)
DEFINE_ACTIVATE_MAPS(activate_maps_float32, float, load_float, store_float)

/* Minus the gradient of the loss with respect to a map after its batch norm. slope and constant: by window, the gradient
   with respect to an activation is activation * slope + constant. */
INLINE float slope_of(float map, float scale, float shift, float slope, float constant)
{
    float activation = relu(map * scale + shift), gradient = activation * slope + constant;
    return activation > 0 ? gradient : 0;
}

/* Sums by channel of this gradient, and of its product with map - mean [2 * channels], added to totals. */
#define DEFINE_GRADIENT_SUMS(NAME, IN, LOAD)                                                                           \
    KERNEL NAME(const IN *restrict maps, const float *restrict scale, const float *restrict shift,                     \
                const float *restrict mean, const float *restrict slope, const float *restrict constant,               \
                int64_t images, int64_t height, int64_t width, int64_t channels, int64_t side,                         \
                float *restrict partial, double *restrict totals)                                                      \
    {                                                                                                                  \
        int64_t across = (width + side - 1) / side, down = (height + side - 1) / side;                                 \
        float *restrict sum = partial, *restrict along = partial + channels;                                           \
        for (int64_t image = 0; image < images; image++) {                                                             \
            memset(partial, 0, 2 * channels * sizeof(float));                                                          \
            for (int64_t y = 0; y < height; y++)                                                                       \
                for (int64_t x = 0; x < width; x++, maps += channels) {                                                \
                    int64_t window = ((image * down + y / side) * across + x / side) * channels;                       \
                    const float *restrict s = slope + window, *restrict t = constant + window;                         \
                    for (int64_t c = 0; c < channels; c++) {                                                           \
                        float map = LOAD(maps + c), gradient = slope_of(map, scale[c], shift[c], s[c], t[c]);          \
                        sum[c] += gradient, along[c] += gradient * (map - mean[c]);                                    \
                    }                                                                                                  \
                }                                                                                                      \
            for (int64_t c = 0; c < 2 * channels; c++) totals[c] += partial[c];                                        \
        }                                                                                                              \
    }

DEFINE_GRADIENT_SUMS(gradient_sums_bfloat16, uint16_t, load_half)
DEFINE_GRADIENT_SUMS(gradient_sums_float32, float, load_float)

/* Minus the gradient with respect to maps, of their shape: gain * (gradient - base - (map - mean) * along). */
#define DEFINE_BACKWARD_MAPS(NAME, IN, LOAD, STORE)                                                                    \
    KERNEL NAME(const IN *restrict maps, const float *restrict scale, const float *restrict shift,                     \
                const float *restrict mean, const float *restrict slope, const float *restrict constant,               \
                const float *restrict gain, const float *restrict base, const float *restrict along, int64_t images,   \
                int64_t height, int64_t width, int64_t channels, int64_t side, IN *restrict direction)                 \
    {                                                                                                                  \
        int64_t across = (width + side - 1) / side, down = (height + side - 1) / side;                                 \
        for (int64_t image = 0; image < images; image++)                                                               \
            for (int64_t y = 0; y < height; y++)                                                                       \
                for (int64_t x = 0; x < width; x++, maps += channels, direction += channels) {                         \
                    int64_t window = ((image * down + y / side) * across + x / side) * channels;                       \
                    const float *restrict s = slope + window, *restrict t = constant + window;                         \
                    for (int64_t c = 0; c < channels; c++) {                                                           \
                        float map = LOAD(maps + c), gradient = slope_of(map, scale[c], shift[c], s[c], t[c]);          \
                        STORE(direction + c, gain[c] * (gradient - base[c] - (map - mean[c]) * along[c]));             \
                    }                                                                                                  \
                }                                                                                                      \
    }

DEFINE_BACKWARD_MAPS(backward_maps_bfloat16, uint16_t, load_half, store_half)
DEFINE_BACKWARD_MAPS(backward_maps_float32, float, load_float, store_float)
