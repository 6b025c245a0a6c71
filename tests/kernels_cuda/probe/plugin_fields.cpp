// What a plugin does with an op, for tests: attributes as fields, and the arguments of the kernel.
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
EDGE_API int probe_read(const char* op, int count, const char* const* names, const char* kinds, const double* given,
                        int stored, double* values) {
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

/// A launch's arguments: the tensor's number (inputs, then outputs) or -1 and a number's bits; returns how many, or -1.
EDGE_API int probe_arguments(const char* name, const EdgeAttribute* attributes, int attribute_count,
                             const EdgeTensor* inputs, int input_count, int sms, int workspace, int* tensors,
                             int32_t* bits) {
    try {
        const edge::Op& op = edge::find_op(name);
        edge::Attributes values;
        for (int i = 0; i < attribute_count; ++i) values.push_back(attributes[i].value);  // in the op's order
        const edge::Work work = edge::plan_work(op, values, {inputs, inputs + input_count}, sms, workspace);
        for (size_t i = 0; i < work.arguments.size(); ++i) {
            tensors[i] = work.arguments[i].tensor;
            bits[i] = work.arguments[i].bits;
        }
        return int(work.arguments.size());
    } catch (const std::exception& fault) {
        message = fault.what();
        return -1;
    }
}
