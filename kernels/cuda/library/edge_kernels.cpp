#include "edge_kernels.h"

#include <algorithm>

#include "run.h"

#ifndef EDGE_BUILD
#define EDGE_BUILD ""
#endif

namespace {

using namespace edge;

thread_local std::string message;

/// Runs `body`; what it throws becomes a code and a message: no exception leaves a C function.
template <class Body>
int guarded(const Body& body) noexcept {
    try {
        body();
        return EDGE_OK;
    } catch (const Refusal& refusal) {
        message = refusal.what();
        return EDGE_REFUSED;
    } catch (const DriverFault& fault) {
        message = fault.message;
        return fault.code;
    } catch (const std::exception& fault) {
        message = fault.what();
        return EDGE_BROKEN;
    }
}

Attributes attributes_of(const Op& op, const EdgeAttribute* given, int count) {
    std::vector<Field> fields;
    std::vector<int64_t> integers(static_cast<size_t>(count));
    for (int i = 0; i < count; ++i) {
        const int at = op.attribute(given[i].name ? given[i].name : "");
        const bool whole = given[i].value == double(int32_t(std::clamp(given[i].value, -2147483648.0, 2147483647.0)));
        if (at < 0 || op.attributes[size_t(at)].real || !whole) {
            fields.push_back({given[i].name, 'd', 1, &given[i].value});
        } else {
            integers[size_t(i)] = int64_t(given[i].value);
            fields.push_back({given[i].name, 'l', 1, &integers[size_t(i)]});
        }
    }
    return read_fields(op, fields, false);
}

bool equal_shapes(const EdgeTensor& a, const EdgeTensor& b) {
    return a.type == b.type && a.rank == b.rank && std::equal(a.dims, a.dims + a.rank, b.dims);
}

std::string described(const EdgeTensor& tensor) {
    static const char* const names[] = {"float32", "float16", "int8", "int32"};
    std::string text = tensor.type >= 0 && tensor.type < 4 ? names[tensor.type] : "of an unknown type";
    for (int i = 0; i < tensor.rank && i < EDGE_MAX_RANK; ++i)
        text += (i ? ", " : " [") + std::to_string(tensor.dims[i]);
    return text + (tensor.rank > 0 ? "]" : "");
}

}  // namespace

const char* edge_message(void) { return message.c_str(); }

const char* edge_build(void) { return "edge-build:" EDGE_BUILD; }

const char* edge_op(int i) {
    const char* name = nullptr;
    guarded([&] { name = i >= 0 && size_t(i) < ops().size() ? ops()[size_t(i)].name.c_str() : nullptr; });
    return name;
}

int edge_set_kernels(const char* path) {
    return guarded([&] { set_kernels(path); });
}

int edge_outputs(const char* name, const EdgeAttribute* attributes, int attribute_count, const EdgeTensor* inputs,
                 int input_count, EdgeTensor* outputs, int* output_count) {
    return guarded([&] {
        const Op& op = find_op(name);
        const std::vector<EdgeTensor> found =
            outputs_of(op, attributes_of(op, attributes, attribute_count), {inputs, inputs + input_count});
        std::copy(found.begin(), found.end(), outputs);
        *output_count = int(found.size());
    });
}

int edge_workspace(const char* name, const EdgeAttribute* attributes, int attribute_count, const EdgeTensor* inputs,
                   int input_count, uint64_t* bytes) {
    return guarded([&] {
        const Op& op = find_op(name);
        *bytes = workspace_bytes(op, attributes_of(op, attributes, attribute_count), {inputs, inputs + input_count});
    });
}

int edge_plan(const char* name, const EdgeAttribute* attributes, int attribute_count, const EdgeTensor* inputs,
              int input_count, int sms, int workspace, EdgeLaunch* launches, int* launch_count) {
    return guarded([&] {
        const Op& op = find_op(name);
        const Work work = plan_work(op, attributes_of(op, attributes, attribute_count), {inputs, inputs + input_count},
                                    sms, workspace);
        std::copy(work.launches.begin(), work.launches.end(), launches);
        *launch_count = int(work.launches.size());
    });
}

int edge_run(const char* name, const EdgeAttribute* attributes, int attribute_count, const EdgeTensor* inputs,
             int input_count, const EdgeTensor* outputs, int output_count, void* workspace, void* stream) {
    return guarded([&] {
        const Op& op = find_op(name);
        const Attributes values = attributes_of(op, attributes, attribute_count);
        const std::vector<EdgeTensor> given(inputs, inputs + input_count);
        const std::vector<EdgeTensor> wanted = outputs_of(op, values, given);
        if (wanted.size() != size_t(output_count))
            throw Refusal(op.name + ": has " + std::to_string(wanted.size()) + " outputs, was given " +
                          std::to_string(output_count));
        std::vector<const void*> from;
        std::vector<void*> to;
        for (const EdgeTensor& tensor : given) from.push_back(tensor.data);
        for (size_t i = 0; i < wanted.size(); ++i) {
            if (!equal_shapes(wanted[i], outputs[i]))
                throw Refusal(op.name + ", output " + op.outputs[i].name + ": is " + described(outputs[i]) +
                              ", must be " + described(wanted[i]));
            to.push_back(outputs[i].data);
        }
        run(plan_work(op, values, given, multiprocessors(), workspace), from.data(), from.size(), to.data(), to.size(),
            workspace, stream);
    });
}
