// Attributes as fields, for tests: what a plugin is created from, and what an engine keeps.
#include <cstring>

#include "library/ops.h"

namespace {

template <class T>
void store(char* out, double value) {
    const T typed = T(value);
    std::memcpy(out, &typed, sizeof typed);
}

std::string message;

}  // namespace

EDGE_API const char* probe_message() { return message.c_str(); }

/// Reads fields of the kinds given, one letter each, into `values`, in the op's order; 1: refused.
EDGE_API int probe_read(const char* op, int count, const char* const* names, const char* kinds, const double* given, int stored,
                        double* values) {
    char bytes[32][8] = {};
    std::vector<edge::Field> fields;
    for (int i = 0; i < count; ++i) {
        switch (kinds[i]) {
        case 'b': store<int8_t>(bytes[i], given[i]); break;
        case 'h': store<int16_t>(bytes[i], given[i]); break;
        case 'i': store<int32_t>(bytes[i], given[i]); break;
        case 'l': store<int64_t>(bytes[i], given[i]); break;
        case 'f': store<float>(bytes[i], given[i]); break;
        case 'd': store<double>(bytes[i], given[i]); break;
        default: break;
        }
        fields.push_back({names[i], kinds[i], kinds[i] == '2' ? 2 : 1, bytes[i]});
    }
    try {
        const edge::Attributes read = edge::read_fields(edge::find_op(op), fields, stored);
        std::copy(read.begin(), read.end(), values);
        return 0;
    } catch (const edge::Refusal& refusal) {
        message = refusal.what();
        return 1;
    }
}

/// What an engine keeps, read again as it would be.
EDGE_API int probe_store(const char* name, const double* given, int count, double* values) {
    try {
        const edge::Op& op = edge::find_op(name);
        const edge::StoredFields stored(op, edge::Attributes(given, given + count));
        const edge::Attributes read = edge::read_fields(op, stored.fields(), true);
        std::copy(read.begin(), read.end(), values);
        return 0;
    } catch (const edge::Refusal& refusal) {
        message = refusal.what();
        return 1;
    }
}
