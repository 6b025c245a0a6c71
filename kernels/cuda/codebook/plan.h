// From an EdgeCodebook's shape to its launch.
#pragma once

#include "../common/launch.h"
#include "sizes.h"

/// positions: the product of the dimensions behind the books.
struct EdgeCodebookShape {
    int batch, books, positions, channels, size, sms;
};

/// One launch; 0 if no kernel takes the shape.
inline unsigned edge_plan_codebook(const EdgeCodebookShape& s, EdgeLaunch* out) {
    if (s.batch < 1 || s.batch > 65535 || s.books < 1 || s.positions < 1 || s.channels < 1 || s.size < 1) return 0;
    *out = edge_launch("edge_codebook", edge_parts(s.positions, edge::CODEBOOK_POSITIONS), edge::CODEBOOK_THREADS, 0);
    out->grid[1] = edge_parts(s.channels, edge::CODEBOOK_CHANNELS);
    out->grid[2] = s.batch;
    return 1;
}

EDGE_EXPORT_PLAN(codebook, EdgeCodebookShape)
