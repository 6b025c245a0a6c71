// __half and __half2 with the arithmetic that GPUs have: each operation rounds once, to nearest even. Sums, products and
// quotients of two halves are formed in float32, whose 24 bits make the second rounding harmless (24 >= 2 * 11 + 2);
// a fused multiply-add is formed in float64. Part of cuda_on_cpu.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __half {
    uint16_t bits;
    __half() = default;
    __half(float x) : bits(round(x)) {}
    operator float() const { return widen(bits); }

    static float widen(uint16_t h) {
        const uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
        uint32_t word;
        if (magnitude >= 0x7c00) {
            word = 0x7f800000 | (magnitude & 0x3ff) << 13;  // infinite, or not a number
        } else if (magnitude >= 0x400) {
            word = (magnitude << 13) + (112u << 23);
        } else {
            const float value = float(magnitude) * 0x1p-24f;  // subnormal: exact
            std::memcpy(&word, &value, 4);
        }
        word |= sign;
        float value;
        std::memcpy(&value, &word, 4);
        return value;
    }

    static uint16_t round(float x) {
        uint32_t word;
        std::memcpy(&word, &x, 4);
        const uint16_t sign = uint16_t(word >> 16 & 0x8000);
        word &= 0x7fffffff;
        if (word > 0x7f800000) return 0x7fff;          // the one NaN that GPUs make
        if (word >= 0x477ff000) return sign | 0x7c00;  // 65520 and more
        if (word < 0x38800000) {                       // below 2^-14: the unit is 2^-24, and rint rounds to even
            float magnitude;
            std::memcpy(&magnitude, &word, 4);
            return sign | uint16_t(std::rint(magnitude * 0x1p24f));
        }
        return sign | uint16_t((word - (112u << 23) + 0xfff + (word >> 13 & 1)) >> 13);
    }
};

struct alignas(4) __half2 {
    __half x, y;
};

using half = __half;
using half2 = __half2;

inline __half __float2half(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline float __half2float(__half x) { return x; }
inline __half __int2half_rn(int x) { return float(x); }  // |x| < 2^24
inline __half __ushort_as_half(unsigned short bits) {
    __half h;
    h.bits = bits;
    return h;
}
inline unsigned short __half_as_ushort(__half h) { return h.bits; }
inline __half __hneg(__half a) { return __ushort_as_half(a.bits ^ 0x8000); }
inline __half __habs(__half a) { return __ushort_as_half(a.bits & 0x7fff); }
inline bool __hisnan(__half a) { return (a.bits & 0x7fff) > 0x7c00; }
inline bool __hgt(__half a, __half b) { return float(a) > float(b); }

inline __half __hadd(__half a, __half b) { return float(a) + float(b); }
inline __half __hsub(__half a, __half b) { return float(a) - float(b); }
inline __half __hmul(__half a, __half b) { return float(a) * float(b); }
inline __half __hdiv(__half a, __half b) { return float(a) / float(b); }
inline __half __hmax(__half a, __half b) { return std::fmax(float(a), float(b)); }
inline __half __hmin(__half a, __half b) { return std::fmin(float(a), float(b)); }
inline __half __hfma(__half a, __half b, __half c) {
    const double exact = double(float(a)) * double(float(b)) + double(float(c));
    float value = float(exact);  // to odd, so that the second rounding sees whether anything was lost
    uint32_t word;
    std::memcpy(&word, &value, 4);
    if (std::isfinite(value) && double(value) != exact) {
        if (std::fabs(double(value)) > std::fabs(exact)) --word;
        word |= 1;
    }
    std::memcpy(&value, &word, 4);
    return value;
}

// As on the GPU the sum of two halves is a half; a half and a float do not mix without a cast.
inline __half operator+(__half a, __half b) { return __hadd(a, b); }
inline __half operator-(__half a, __half b) { return __hsub(a, b); }
inline __half operator*(__half a, __half b) { return __hmul(a, b); }
inline __half operator/(__half a, __half b) { return __hdiv(a, b); }

inline __half2 __halves2half2(__half a, __half b) { return {a, b}; }
inline __half2 make_half2(__half a, __half b) { return {a, b}; }
inline __half2 __half2half2(__half a) { return {a, a}; }
inline __half2 __float2half2_rn(float a) { return {a, a}; }
inline __half2 __floats2half2_rn(float a, float b) { return {a, b}; }
inline __half __low2half(__half2 a) { return a.x; }
inline __half __high2half(__half2 a) { return a.y; }
inline float __low2float(__half2 a) { return a.x; }
inline float __high2float(__half2 a) { return a.y; }

#define EDGE_HALF2(name, of)                                                                    \
    inline __half2 name(__half2 a, __half2 b) { return {of(a.x, b.x), of(a.y, b.y)}; }
EDGE_HALF2(__hadd2, __hadd)
EDGE_HALF2(__hsub2, __hsub)
EDGE_HALF2(__hmul2, __hmul)
EDGE_HALF2(__hmax2, __hmax)
EDGE_HALF2(__hmin2, __hmin)
#undef EDGE_HALF2
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }
