// One vector type of the target's width, the few operations that differ between instruction sets, and nothing else.
//
// The kernels are written once against this header; the compiler's flags choose the width (16 floats with AVX-512,
// 8 with AVX2, 4 with NEON or anything else). Arithmetic is that of GCC's and Clang's vector extensions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace edge __attribute__((visibility("hidden"))) {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using Float = float __attribute__((vector_size(4 * kLanes)));
using Int = int32_t __attribute__((vector_size(4 * kLanes)));
using Word = uint32_t __attribute__((vector_size(4 * kLanes)));

#define EDGE_INLINE inline __attribute__((always_inline))

template <class V>
EDGE_INLINE V load(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

EDGE_INLINE Float load(const float* from) { return load<Float>(static_cast<const void*>(from)); }

template <class V>
EDGE_INLINE void store(void* to, V value) {
  std::memcpy(to, &value, sizeof value);
}

// The first `count` lanes; the others read as 0 and are not written, nor is their memory touched.
EDGE_INLINE Float load_part(const float* from, int count) {
#if defined(__AVX512F__)
  return reinterpret_cast<Float>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from));
#else
  float lanes[kLanes] = {};
  std::memcpy(lanes, from, sizeof(float) * static_cast<size_t>(count));
  return load(lanes);
#endif
}

EDGE_INLINE void store_part(float* to, Float value, int count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), reinterpret_cast<__m512>(value));
#else
  float lanes[kLanes];
  store(lanes, value);
  std::memcpy(to, lanes, sizeof(float) * static_cast<size_t>(count));
#endif
}

// The same where `count` is mostly all of them.
EDGE_INLINE Float load_up_to(const float* from, int count) {
  return count == kLanes ? load(from) : load_part(from, count);
}

EDGE_INLINE void store_up_to(float* to, Float value, int count) {
  if (count == kLanes)
    store(to, value);
  else
    store_part(to, value, count);
}

// body(i, kLanes) for whole vectors of [0, count), then body(i, what is left).
template <class Body>
EDGE_INLINE void each_vector(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) body(i, kLanes);
  if (i < count) body(i, static_cast<int>(count - i));
}

// Subtracting 0 changes no value, not even -0, so the compiler is left with the broadcast alone.
EDGE_INLINE Float splat(float value) { return value - Float{}; }
EDGE_INLINE Int splat(int32_t value) { return value - Int{}; }

// Adding and subtracting this rounds to the nearest integer, which the low mantissa bits of the sum then hold.
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23

EDGE_INLINE Float to_float(Int value) { return __builtin_convertvector(value, Float); }
EDGE_INLINE Int to_int(Float value) { return __builtin_convertvector(value, Int); }
EDGE_INLINE Float max(Float a, Float b) { return a > b ? a : b; }
EDGE_INLINE Float min(Float a, Float b) { return a < b ? a : b; }

// Lanes 0, 2, 4 ... of two vectors one after the other; and each lane of a half twice.
EDGE_INLINE Float evens(Float a, Float b) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
#elif defined(__AVX2__)
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
#else
  return __builtin_shufflevector(a, b, 0, 2, 4, 6);
#endif
}

EDGE_INLINE Float low_twice(Float a) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(a, a, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
#elif defined(__AVX2__)
  return __builtin_shufflevector(a, a, 0, 0, 1, 1, 2, 2, 3, 3);
#else
  return __builtin_shufflevector(a, a, 0, 0, 1, 1);
#endif
}

EDGE_INLINE Float high_twice(Float a) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(a, a, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15);
#elif defined(__AVX2__)
  return __builtin_shufflevector(a, a, 4, 4, 5, 5, 6, 6, 7, 7);
#else
  return __builtin_shufflevector(a, a, 2, 2, 3, 3);
#endif
}

// Halves are added to each other until four lanes are left.
EDGE_INLINE float sum(Float value) {
#if defined(__AVX512F__)
  const auto eight = __builtin_shufflevector(value, value, 0, 1, 2, 3, 4, 5, 6, 7) +
                     __builtin_shufflevector(value, value, 8, 9, 10, 11, 12, 13, 14, 15);
#elif defined(__AVX2__)
  const auto eight = value;
#endif
#if defined(__AVX2__)
  const auto four =
      __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
#else
  const auto four = value;
#endif
  const auto pairs = four + __builtin_shufflevector(four, four, 2, 3, 0, 1);
  return pairs[0] + pairs[1];
}

// Bytes to floats, one a lane. Written out, since GCC 12 converts vectors of bytes one by one; the masked forms of
// AVX-512 because it warns of the others.
EDGE_INLINE Float from_bytes(const uint8_t* from) {
#if defined(__AVX512F__)
  const __m128i bytes = load<__m128i>(from);
  return to_float(reinterpret_cast<Int>(_mm512_maskz_cvtepu8_epi32(0xffff, bytes)));
#elif defined(__AVX2__)
  return to_float(reinterpret_cast<Int>(_mm256_cvtepu8_epi32(_mm_set1_epi64x(load<int64_t>(from)))));
#elif defined(__ARM_NEON)
  const uint16x8_t wide = vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(load<uint32_t>(from))));
  return to_float(reinterpret_cast<Int>(vmovl_u16(vget_low_u16(wide))));
#endif
}

// The first `count` lanes, each in [-128, 127], as bytes.
EDGE_INLINE void store_bytes(int8_t* to, Int value, int count) {
#if defined(__AVX512F__)
  const auto bytes = _mm512_maskz_cvtepi32_epi8(0xffff, reinterpret_cast<__m512i>(value));
#elif defined(__AVX2__)
  const __m256i all = reinterpret_cast<__m256i>(value);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  const auto bytes = _mm_packs_epi16(words, words);
#elif defined(__ARM_NEON)
  const int16x4_t words = vmovn_s32(reinterpret_cast<int32x4_t>(value));
  const auto bytes = vmovn_s16(vcombine_s16(words, words));
#endif
  std::memcpy(to, &bytes, static_cast<size_t>(count));
}

// IEEE half precision to floats.
EDGE_INLINE Float from_halves(const uint16_t* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<Float>(_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__AVX2__)
  return reinterpret_cast<Float>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__ARM_NEON)
  return reinterpret_cast<Float>(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from))));
#else
#error "no conversion from half precision for this target"
#endif
}

// Lane by lane the sum of four products of a code (unsigned byte) and an activation (signed byte), added to `total`.
// With signed dot products alone, codes of 8 bits count as code - kSignedOffset; see dot_offset.
#if defined(__AVX512VNNI__)
template <int kBits>
EDGE_INLINE Int dot4(Int total, Word codes, Int activations) {
  return reinterpret_cast<Int>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(total), reinterpret_cast<__m512i>(codes),
                                                   reinterpret_cast<__m512i>(activations)));
}
#elif defined(__AVX512F__)
#error "the AVX-512 variant needs VNNI: build for AVX2 instead"
#elif defined(__AVXVNNI__)
template <int kBits>
EDGE_INLINE Int dot4(Int total, Word codes, Int activations) {
  return reinterpret_cast<Int>(_mm256_dpbusd_avx_epi32(
      reinterpret_cast<__m256i>(total), reinterpret_cast<__m256i>(codes), reinterpret_cast<__m256i>(activations)));
}
#elif defined(__AVX2__)
template <int kBits>
EDGE_INLINE Int dot4(Int total, Word codes, Int activations) {
  const __m256i x = reinterpret_cast<__m256i>(activations);
  const auto pairs = [x](Word part) { return _mm256_maddubs_epi16(reinterpret_cast<__m256i>(part), x); };
  const auto fours = [](__m256i sums, int16_t weight) {
    return reinterpret_cast<Int>(_mm256_madd_epi16(sums, _mm256_set1_epi16(weight)));
  };
  if (kBits < 8) return total + fours(pairs(codes), 1);
  // Pairs of full bytes would saturate at 16 bits; pairs of half bytes cannot.
  return total + fours(pairs(codes & 0x0f0f0f0fu), 1) + fours(pairs((codes >> 4) & 0x0f0f0f0fu), 16);
}
#elif defined(__ARM_FEATURE_MATMUL_INT8)
template <int kBits>
EDGE_INLINE Int dot4(Int total, Word codes, Int activations) {
  return reinterpret_cast<Int>(vusdotq_s32(reinterpret_cast<int32x4_t>(total), reinterpret_cast<uint8x16_t>(codes),
                                           reinterpret_cast<int8x16_t>(activations)));
}
#elif defined(__ARM_NEON)
#define EDGE_SIGNED_DOT 1
template <int kBits>
EDGE_INLINE Int dot4(Int total, Word codes, Int activations) {
  if (kBits == 8) codes ^= 0x80808080u;
  const int8x16_t a = reinterpret_cast<int8x16_t>(codes), b = reinterpret_cast<int8x16_t>(activations);
#if defined(__ARM_FEATURE_DOTPROD)
  return reinterpret_cast<Int>(vdotq_s32(reinterpret_cast<int32x4_t>(total), a, b));
#else
  const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)));
  const int32x4_t high = vpaddlq_s16(vmull_high_s8(a, b));
  return total + reinterpret_cast<Int>(vpaddq_s32(low, high));
#endif
}
#else
#error "no integer dot product for this target"
#endif

template <int kBits>
constexpr int dot_offset() {
#ifdef EDGE_SIGNED_DOT
  return kBits == 8 ? 128 : 0;
#else
  return 0;
#endif
}

}  // namespace edge
