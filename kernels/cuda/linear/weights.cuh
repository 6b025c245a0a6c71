// The weight as the checkpoint has it, and codes to halves: w = (code - zero) * scale.
#pragma once

#include "../common/device.cuh"

namespace edge {

/// codes [N, blocks * block * Bits / 8] bytes, low bits first; scales [N, blocks]; zeros [N, words] packed like codes.
template <int Bits, class Scale>
struct Weight {
    const unsigned* codes;
    const Scale* scales;
    const unsigned* zeros;
    int columns, blocks, zero_words;
    long long row_bytes;
    unsigned reciprocal;

    __device__ __forceinline__ Weight(const int* codes, const Scale* scales, const int* zeros, int columns, int block)
        : codes(reinterpret_cast<const unsigned*>(codes)),
          scales(scales),
          zeros(reinterpret_cast<const unsigned*>(zeros)),
          columns(columns),
          blocks((columns + block - 1) / block),
          zero_words((blocks * Bits + 31) / 32),
          row_bytes((long long)(blocks)*block * Bits / 8),
          reciprocal(0xffffffffu / unsigned(block) + 1) {}

    /// column / block, by one multiplication: exact while column * block < 2^32, since the reciprocal is at most
    /// block / 2^32 of a block too large.
    __device__ __forceinline__ int block_of(int column) const {
#ifdef __CUDA_ARCH__
        return int(__umulhi(unsigned(column), reciprocal));
#else
        return int((unsigned long long)(unsigned(column)) * reciprocal >> 32);
#endif
    }

    __device__ __forceinline__ const unsigned char* row(int n) const {
        return reinterpret_cast<const unsigned char*>(codes) + n * row_bytes;
    }
    __device__ __forceinline__ Scale scale(int n, int column) const {
        return __ldg(scales + (long long)(n)*blocks + block_of(column));
    }
    __device__ __forceinline__ unsigned zero(int n, int column) const {
        const int bit = block_of(column) * Bits;
        return __ldg(zeros + (long long)(n)*zero_words + bit / 32) >> bit % 32 & ((1u << Bits) - 1);
    }
};

/// Codes of one 32-bit word less their zero point, as pairs of halves: exact, as |code - zero| <= 255.
///
/// A half's bits 0x6400 | q are the number 1024 + q, so one logical instruction makes a pair. For 4 bits the pairs are
/// (0, 4), (1, 5), (2, 6), (3, 7), the order in which `interleave` puts x; the second and the fourth have q one nibble
/// higher, 1024 + 16 q, and a multiply-add brings them down. (The trick is FasterTransformer's, Kim et al. 2022,
/// arXiv:2211.10017.) For 8 bits they are (0, 1), (2, 3).
template <int Bits>
struct Unpack;

template <>
struct Unpack<4> {
    static constexpr int PAIRS = 4;
    using Pairs = uint4;  // of x, beside the pairs of a word
    unsigned low, high;  // (1024 + zero) twice, -(64 + zero) twice

    __device__ __forceinline__ explicit Unpack(unsigned zero)
        : low(0x64006400u + zero * 0x00010001u), high(0xd400d400u + zero * 0x00100010u) {}

    __device__ __forceinline__ void operator()(unsigned word, __half2 (&pairs)[4]) const {
        const __half2 sixteenth = as_half2(0x2c002c00u);
        const unsigned upper = word >> 8;
        pairs[0] = __hsub2(as_half2(and_or(word, 0x000f000fu, 0x64006400u)), as_half2(low));
        pairs[1] = __hfma2(as_half2(and_or(word, 0x00f000f0u, 0x64006400u)), sixteenth, as_half2(high));
        pairs[2] = __hsub2(as_half2(and_or(upper, 0x000f000fu, 0x64006400u)), as_half2(low));
        pairs[3] = __hfma2(as_half2(and_or(upper, 0x00f000f0u, 0x64006400u)), sixteenth, as_half2(high));
    }

    /// Eight halves of x in the order of the pairs.
    __device__ __forceinline__ static uint4 interleave(uint4 x) {
        return make_uint4(__byte_perm(x.x, x.z, 0x5410), __byte_perm(x.x, x.z, 0x7632), __byte_perm(x.y, x.w, 0x5410),
                          __byte_perm(x.y, x.w, 0x7632));
    }
};

template <>
struct Unpack<8> {
    static constexpr int PAIRS = 2;
    using Pairs = uint2;
    unsigned low;

    __device__ __forceinline__ explicit Unpack(unsigned zero) : low(0x64006400u + zero * 0x00010001u) {}

    __device__ __forceinline__ void operator()(unsigned word, __half2 (&pairs)[2]) const {
        pairs[0] = __hsub2(as_half2(__byte_perm(word, 0x64646464u, 0x4140)), as_half2(low));
        pairs[1] = __hsub2(as_half2(__byte_perm(word, 0x64646464u, 0x4342)), as_half2(low));
    }

    __device__ __forceinline__ static uint4 interleave(uint4 x) { return x; }
};

/// Eight halves of a row of x from `column` on, zeros past the row's end; K is a multiple of 8.
__device__ __forceinline__ uint4 load_x(const __half* row, int column, int columns) {
    return column < columns ? load16(row + column) : make_uint4(0, 0, 0, 0);
}

__device__ __forceinline__ float sum_of_squares(uint4 x) {
    float sum = 0;
    const unsigned words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 pair = __half22float2(as_half2(words[i]));
        sum += pair.x * pair.x + pair.y * pair.y;
    }
    return sum;
}

/// RMS norm of eight values: the quotient is rounded to half, then multiplied by the norm's weight in half.
__device__ __forceinline__ uint4 normalised(uint4 x, float factor, uint4 norm) {
    unsigned words[4] = {x.x, x.y, x.z, x.w};
    const unsigned weights[4] = {norm.x, norm.y, norm.z, norm.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 pair = __half22float2(as_half2(words[i]));
        words[i] = as_bits(__hmul2(__floats2half2_rn(pair.x * factor, pair.y * factor), as_half2(weights[i])));
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace edge
