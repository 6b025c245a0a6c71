// Several new tokens: tiles of 64 rows, each a token and one of the heads that share a key head, against tiles of keys.
//
// Blocks are (tile of rows, key head, row of the batch); a warp has 16 rows. Keys and then values of a tile lie in
// shared memory as halves (int8 as exact integers, their scales beside them). Rows of the cache come from past; new
// rows come from qkv and are turned on the way, since the block that writes them into the cache may not have done so
// yet. Each new row is written by the block that has its token's first row. Operands are laid out as in decode.cuh:
// here all sixteen rows of q count, and the second product has two tiles of eight rows each.
#pragma once

#include "cache.cuh"
#include "decode.cuh"

namespace edge {

template <class Element, int Width>
struct Prefill {
    static constexpr bool INT8 = CacheScale<Element>::INT8;
    static constexpr float LIFT = CacheScale<Element>::LIFT;
    static constexpr int LANES = Width / 8, ROWS = ATTENTION_THREADS / LANES;  // rows that the block stages at a time
    static constexpr int SLOTS = prefill_slots(Width), PITCH = prefill_pitch(Width), TILES = SLOTS / 8;
    static constexpr int K_CHUNKS = Width / 32, V_CHUNKS = Width / 64;

    const Attention<Element>& op;
    __half *query, *tile;
    float* scales;
    int kv, b, first_row, end_row;  // (token, head) pairs: token * group + head
    int last, first;                // slots of the newest and of the oldest new token; first < 0: some have none
    int i = int(threadIdx.x) % LANES, line = int(threadIdx.x) / LANES;

    __device__ __forceinline__ Prefill(const Attention<Element>& op, unsigned char* shared, int index, int kv, int b)
        : op(op), kv(kv), b(b) {
        query = reinterpret_cast<__half*>(shared);
        tile = query + PREFILL_ROWS * PITCH;
        scales = reinterpret_cast<float*>(tile + SLOTS * PITCH);
        first_row = index * PREFILL_ROWS;
        end_row = min(first_row + PREFILL_ROWS, op.tokens * op.group());
        last = op.newest(b);
        first = last - op.tokens + 1;
    }

    __device__ __forceinline__ int oldest_of(int slot) const {
        return op.window > 0 ? max(slot - op.window + 1, 0) : 0;
    }

    __device__ __forceinline__ void stage_query() {
        for (int r = line; r < PREFILL_ROWS; r += ROWS) {
            const int token = (first_row + r) / op.group(), head = kv * op.group() + (first_row + r) % op.group();
            Quads x = {};
            if (first_row + r < end_row && first + token >= 0) x = query_quads(op, b, token, first + token, head, i);
            store_quads<true>(query + r * PITCH, x, op.head_dim, i);
        }
    }

    /// The new rows of the tokens whose first row is in this tile.
    __device__ __forceinline__ void keep_rows() {
        const int begin = (first_row + op.group() - 1) / op.group(), end = (end_row + op.group() - 1) / op.group();
        for (int at = begin; at < end; at += ROWS) {  // all lanes take part, for the shuffles
            const int token = at + line, slot = first + token;
            const bool is_there = token < end && slot >= 0;
            Quads key = {}, value = {};
            if (is_there) {
                key = query_quads(op, b, token, slot, op.heads + kv, i);
                value = value_quads(op, b, token, kv, i);
            }
            const float key_scale = quantised<Width>(key, op.past_key);
            const float value_scale = quantised<Width>(value, op.past_key);
            if (is_there) keep<Width>(op, op.row(b, kv, slot), key, value, key_scale, value_scale, i);
        }
    }

    /// Keys, or values, of slots begin .. begin + SLOTS as halves with their scales; zero outside of [from, to).
    template <bool Keys>
    __device__ __forceinline__ void stage(int begin, int from, int to) {
        const Element* const cache = Keys ? op.past_key : op.past_value;
        const __half* const cache_scales = Keys ? op.key_scales : op.value_scales;
#pragma unroll 4
        for (int r = line; r < SLOTS; r += ROWS) {
            const int slot = begin + r;
            __half* const row = tile + r * PITCH;
            const bool is_there = slot >= from && slot < to, is_new = is_there && slot >= first;
            float scale = 0;
            if (__any_sync(ALL_LANES, is_new)) {
                Quads x = {};
                if (is_new)
                    x = Keys ? query_quads(op, b, slot - first, slot, op.heads + kv, i)
                             : value_quads(op, b, slot - first, kv, i);
                scale = quantised<Width>(x, cache);
                if (is_new) store_quads<true>(row, x, op.head_dim, i);
            }
            if (!is_new) {
                Chunk<Element> x;
                x.clear();
                if (is_there && 8 * i < op.head_dim) x.load(cache + op.row(b, kv, slot) * op.head_dim + 8 * i);
                store16(row + 8 * i, make_uint4(x.word(0), x.word(1), x.word(2), x.word(3)));
                if constexpr (INT8) scale = is_there ? __half2float(cache_scales[op.row(b, kv, slot)]) : 0.0f;
            }
            if (INT8 && i == 0) scales[r] = scale;
        }
    }

    __device__ __forceinline__ void run() {
        const int g = int(lane()) / 4, t = int(lane()) % 4, rows = int(threadIdx.x) / 32 * 16;
        int slot_of[2], oldest[2];  // of the lane's two rows, g and g + 8 of the warp's
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            slot_of[r] = first + (first_row + rows + g + 8 * r) / op.group();
            oldest[r] = oldest_of(slot_of[r]);
        }
        const int to = min(first + (end_row - 1) / op.group(), last) + 1;  // past what the tile's last row sees
        const int from = oldest_of(max(first + first_row / op.group(), 0));

        stage_query();
        keep_rows();
        const __half* const mine = query + (rows + g) * PITCH;
        float acc[2][4 * V_CHUNKS][4] = {};  // [rows 0..7, 8..15][64 c + 8 g + 2 j, + 1][2 dim + row 2 t, 2 t + 1]
        float m[2] = {-infinity(), -infinity()}, l[2] = {};
        for (int begin = from / SLOTS * SLOTS; begin < to; begin += SLOTS) {
            stage<true>(begin, from, to);
            __syncthreads();
            float p[TILES][4] = {};  // [rows g, g + 8: slots 8 n + 2 t, + 1]
#pragma unroll
            for (int c = 0; c < K_CHUNKS; ++c) {
                const uint4 top = load16(mine + 8 * (t + 4 * c)), bottom = load16(mine + 8 * PITCH + 8 * (t + 4 * c));
                const unsigned a[2][4] = {{top.x, bottom.x, top.y, bottom.y}, {top.z, bottom.z, top.w, bottom.w}};
#pragma unroll
                for (int n = 0; n < TILES; ++n) {
                    const uint4 key = load16(tile + (8 * n + g) * PITCH + 8 * (t + 4 * c));
                    mma(p[n], a[0], key.x, key.y);
                    mma(p[n], a[1], key.z, key.w);
                }
            }
            float largest[2] = {-infinity(), -infinity()};
#pragma unroll
            for (int n = 0; n < TILES; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int slot = begin + 8 * n + 2 * t + e % 2, r = e / 2;
                    p[n][e] *= op.scale * (INT8 ? scales[8 * n + 2 * t + e % 2] : 1.0f);
                    if (op.softcap > 0) p[n][e] = op.capped(p[n][e]);
                    if (slot > slot_of[r] || slot < oldest[r]) p[n][e] = -infinity();
                    largest[r] = fmaxf(largest[r], p[n][e]);
                }
            __syncthreads();  // the keys have been used
            stage<false>(begin, from, to);
            float factor[2], shift[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                largest[r] = fmaxf(largest[r], __shfl_xor_sync(ALL_LANES, largest[r], 1));
                largest[r] = fmaxf(largest[r], __shfl_xor_sync(ALL_LANES, largest[r], 2));
                largest[r] = fmaxf(largest[r], m[r]);
                shift[r] = largest[r] == -infinity() ? 0.0f : largest[r];  // nothing seen yet: exp(-inf - 0) = 0
                factor[r] = __expf(m[r] - shift[r]);
                m[r] = largest[r];
                l[r] *= factor[r];
                const float x = __shfl_sync(ALL_LANES, factor[r], 8 * t);
                const float y = __shfl_sync(ALL_LANES, factor[r], 8 * t + 4);
#pragma unroll
                for (int j = 0; j < 4 * V_CHUNKS; ++j)
                    acc[r][j][0] *= x, acc[r][j][1] *= y, acc[r][j][2] *= x, acc[r][j][3] *= y;
            }
            __syncthreads();
            weigh(p, shift, acc, l, g, t);
            __syncthreads();  // the values have been used
        }
        write(acc, m, l, rows, g, t);
    }

    /// acc += p V and l += sum of p, where p = exp(score - shift) rounded to half.
    __device__ __forceinline__ void weigh(const float (&p)[TILES][4], const float (&shift)[2],
                                          float (&acc)[2][4 * V_CHUNKS][4], float (&l)[2], int g, int t) {
#pragma unroll
        for (int n = 0; n < TILES; n += 2) {
            unsigned weights[2][2];  // [rows][slots 8 n, 8 n + 8]
#pragma unroll
            for (int k = 0; k < 2; ++k)
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    float x = __expf(p[n + k][2 * r] - shift[r]), y = __expf(p[n + k][2 * r + 1] - shift[r]);
                    if constexpr (INT8) {
                        l[r] += x + y;
                        x *= scales[8 * (n + k) + 2 * t] * LIFT, y *= scales[8 * (n + k) + 2 * t + 1] * LIFT;
                    }
                    const __half2 rounded = __floats2half2_rn(x, y);
                    if constexpr (!INT8) l[r] += __low2float(rounded) + __high2float(rounded);  // what the values get
                    weights[r][k] = as_bits(rounded);
                }
            const __half* const row = tile + (8 * n + 2 * t) * PITCH + 8 * g;
#pragma unroll
            for (int c = 0; c < V_CHUNKS; ++c) {
                const uint4 x = load16(row + 64 * c), y = load16(row + PITCH + 64 * c);
                const uint4 z = load16(row + 8 * PITCH + 64 * c), w = load16(row + 9 * PITCH + 64 * c);
                const unsigned words[4][4] = {
                    {x.x, y.x, z.x, w.x}, {x.y, y.y, z.y, w.y}, {x.z, y.z, z.z, w.z}, {x.w, y.w, z.w, w.w}};
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const unsigned a[4] = {low_halves(words[j][0], words[j][1]), high_halves(words[j][0], words[j][1]),
                                           low_halves(words[j][2], words[j][3]), high_halves(words[j][2], words[j][3])};
                    mma(acc[0][4 * c + j], a, weights[0][0], weights[0][1]);
                    mma(acc[1][4 * c + j], a, weights[1][0], weights[1][1]);
                }
            }
        }
    }

    __device__ __forceinline__ void write(const float (&acc)[2][4 * V_CHUNKS][4], const float (&m)[2], float (&l)[2],
                                          int rows, int g, int t) {
        const auto out_of = [&](int r) { return op.out(b, kv * op.group() + r % op.group(), r / op.group()); };
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            l[r] += __shfl_xor_sync(ALL_LANES, l[r], 1);
            l[r] += __shfl_xor_sync(ALL_LANES, l[r], 2);
            const int state = first_row + rows + g + 8 * r;
            if (t == 0 && state < end_row)
                *reinterpret_cast<float2*>(out_of(state) + op.head_dim) = make_float2(m[r], l[r]);
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int row = first_row + rows + 8 * r + 2 * t + e;
                if (row >= end_row) continue;
                float* const out = out_of(row);
#pragma unroll
                for (int c = 0; c < V_CHUNKS; ++c)
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        const float(&pair)[4] = acc[r][4 * c + j];
                        const int d = 64 * c + 8 * g + 2 * j;
                        if (d < op.head_dim)
                            *reinterpret_cast<float2*>(out + d) = make_float2(pair[e] / LIFT, pair[2 + e] / LIFT);
                    }
            }
        }
    }
};

template <class Element, int Width>
__device__ __forceinline__ void prefill(const Attention<Element>& op, unsigned char* shared) {
    const int tile = int(blockIdx.x), kv = int(blockIdx.y);
    if (kv >= op.kv_heads || tile * PREFILL_ROWS >= op.tokens * op.group()) return;
    Prefill<Element, Width>(op, shared, tile, kv, int(blockIdx.z)).run();
}

}  // namespace edge
