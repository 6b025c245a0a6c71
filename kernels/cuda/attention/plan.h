// From an attention's shape to its launches.
#pragma once

#include <cstdio>

#include "../common/launch.h"
#include "sizes.h"

/// int8: of the cache. kind: 0 the kernel for the number of tokens, 1 the one that branches on it. sms is not used:
/// splits is the graph's attribute (edge_attention_splits).
struct EdgeAttentionShape {
    int int8, batch, tokens, heads, kv_heads, head_dim, capacity, splits, kind, sms;
};

/// Splits of the cache that fill a device: enough blocks of a decode step for three on each multiprocessor, of 128
/// slots or more, so that a block's start and end stay a small part of it.
inline int edge_attention_splits(int batch, int heads, int kv_heads, int capacity, int sms) {
    const int blocks = batch * kv_heads * int(edge_parts(heads / kv_heads, edge::DECODE_HEADS));
    const int most = capacity / 128 < 1 ? 1 : capacity / 128, wanted = int(edge_parts(3 * sms, blocks));
    return wanted < most ? wanted : most;
}

/// One launch; 0 if no kernel takes the shape.
inline unsigned edge_plan_attention(const EdgeAttentionShape& s, EdgeLaunch* out) {
    const int width = edge::padded_width(s.head_dim);
    if (!width || s.batch < 1 || s.tokens < 1 || s.kv_heads < 1 || s.heads < 1 || s.heads % s.kv_heads) return 0;
    if (s.capacity < 1 || s.splits < 1 || (s.int8 && s.capacity % 2) || s.batch > 65535) return 0;
    const int group = s.heads / s.kv_heads;
    const unsigned parts = edge_parts(group, edge::DECODE_HEADS);
    const unsigned tiles = edge_parts(s.tokens * group, edge::PREFILL_ROWS);
    const bool decode = s.tokens == 1;
    const int decode_shared = edge::decode_shared(width), prefill_shared = edge::prefill_shared(width);

    char name[96];
    std::snprintf(name, sizeof name, "edge_attention_%s_d%d_%s", s.int8 ? "i8" : "f16", width,
                  s.kind == 1 ? "any" : decode ? "decode" : "prefill");
    *out = edge_launch(name, decode ? unsigned(s.splits) : tiles, edge::ATTENTION_THREADS,
                       decode ? decode_shared : prefill_shared);
    out->grid[1] = decode ? s.kv_heads * parts : s.kv_heads;
    out->grid[2] = s.batch;
    if (s.kind == 1) {  // what covers both
        out->grid[0] = tiles > unsigned(s.splits) ? tiles : unsigned(s.splits);
        out->grid[1] = s.kv_heads * parts;
        out->shared_bytes = decode_shared > prefill_shared ? decode_shared : prefill_shared;
    }
    return 1;
}

/// rows: of partial, the larger of tokens and splits.
struct EdgeAttentionMergeShape {
    int batch, tokens, heads, head_dim, rows, sms;
};

/// One launch; 0 if no kernel takes the shape.
inline unsigned edge_plan_attention_merge(const EdgeAttentionMergeShape& s, EdgeLaunch* out) {
    if (!edge::padded_width(s.head_dim) || s.batch < 1 || s.heads < 1 || s.tokens < 1 || s.rows < s.tokens) return 0;
    if (s.tokens > 65535 || s.batch > 65535) return 0;
    *out = edge_launch("edge_attention_merge", s.heads, s.tokens == 1 ? edge::MERGE_THREADS : 32, 0);
    out->grid[1] = s.tokens;
    out->grid[2] = s.batch;
    return 1;
}

EDGE_EXPORT_PLAN(attention, EdgeAttentionShape)
EDGE_EXPORT_PLAN(attention_merge, EdgeAttentionMergeShape)
