// Planned work, run: what the C library and the plugin share beside the table.
#pragma once

#include "driver.h"
#include "ops.h"

namespace edge {

/// Finds the kernels of `work` beforehand.
inline void prepare(const Work& work) {
    for (const EdgeLaunch& launch : work.launches) prepare_kernel(launch);
}

/// Addresses are on the device; `workspace` is of the bytes that the op asked for, if the work was planned with one.
inline void run(const Work& work, const void* const* inputs, size_t input_count, void* const* outputs,
                size_t output_count, void* workspace, void* stream) {
    for (const Work::Copy& copy : work.copies)
        if (outputs[copy.output] != inputs[copy.input])
            copy_on_device(outputs[copy.output], inputs[copy.input], copy.bytes, stream);
    std::vector<const void*> addresses(inputs, inputs + input_count);
    addresses.insert(addresses.end(), outputs, outputs + output_count);
    addresses.push_back(workspace);
    std::vector<void*> values;  // where each argument's value is
    for (const Argument& argument : work.arguments)
        values.push_back(argument.tensor < 0 ? const_cast<int32_t*>(&argument.bits)
                                             : static_cast<void*>(&addresses[size_t(argument.tensor)]));
    for (const EdgeLaunch& launch : work.launches) launch_kernel(launch, values.data(), stream);
}

}  // namespace edge
