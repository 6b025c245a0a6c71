#include "ops.h"

#include <cmath>
#include <cstring>
#include <optional>

namespace edge {
namespace {

constexpr const char* TYPE_NAMES[] = {"float32", "float16", "int8", "int32"};
constexpr uint64_t TYPE_BYTES[] = {4, 2, 1, 4};

std::string type_name(int type) { return type >= 0 && type < 4 ? TYPE_NAMES[type] : "of a type that no op takes"; }

[[noreturn]] void refuse(const Op& op, const std::string& subject, const std::string& what) {
    const char* kind = op.attribute(subject) >= 0 ? ", attribute " : op.input(subject) >= 0 ? ", input " : "";
    throw Refusal(op.name + kind + subject + ": " + what);
}

/// `body`'s result; what arithmetic refuses is refused with the op's name.
template <class Body>
auto named(const Op& op, const std::string& subject, const Body& body) {
    try {
        return body();
    } catch (const Refusal& refusal) {
        refuse(op, subject, refusal.what());
    }
}

std::string shape_text(const Pattern& pattern) {
    std::string text;
    for (const std::string& dim : pattern.dims) text += (text.empty() ? "" : ", ") + dim;
    return "[" + text + (pattern.open ? ", ..." : "") + "]";
}

void check_tensor(const Op& op, const Input& input, const EdgeTensor& tensor) {
    std::string wanted;
    for (const int type : input.types) wanted += (wanted.empty() ? "" : " or ") + type_name(type);
    if (!takes_type(op, op.input(input.name), tensor.type))
        refuse(op, input.name, "is " + type_name(tensor.type) + ", must be " + wanted);
    for (int i = 0; i < tensor.rank; ++i)
        if (tensor.dims[i] != -1 && (tensor.dims[i] < 1 || tensor.dims[i] > INT32_MAX))
            refuse(op, input.name, "dimension " + std::to_string(i) + " is " + std::to_string(tensor.dims[i]));
}

void check_attributes(const Op& op, const Attributes& values) {
    if (values.size() != op.attributes.size()) throw std::logic_error(op.name + ": attributes are lacking");
    for (size_t i = 0; i < values.size(); ++i) {
        const bool whole = std::floor(values[i]) == values[i] && std::fabs(values[i]) <= INT32_MAX;
        if (!std::isfinite(values[i]) || !(op.attributes[i].real || whole))
            refuse(op, op.attributes[i].name,
                   "is not a " + std::string(op.attributes[i].real ? "finite number" : "32-bit integer"));
    }
}

/// The scope of numbers, after every input has been looked at on its own and with the others.
Scope<Integers> checked(const Op& op, const Attributes& attributes, const std::vector<EdgeTensor>& inputs,
                        Integers& algebra) {
    check_attributes(op, attributes);
    std::vector<int> ranks, types;
    for (const EdgeTensor& tensor : inputs) ranks.push_back(tensor.rank);
    check_ranks(op, ranks);
    std::vector<std::vector<int64_t>> dims;
    for (size_t i = 0; i < inputs.size(); ++i) {
        check_tensor(op, op.inputs[i], inputs[i]);
        types.push_back(inputs[i].type);
        dims.emplace_back(inputs[i].dims, inputs[i].dims + inputs[i].rank);
        for (int64_t& dim : dims.back())
            if (dim == -1) dim = Integers::UNKNOWN;
    }
    Scope<Integers> scope = named(op, "", [&] { return Scope<Integers>(op, attributes, types, dims, algebra); });
    for (const Check& check : op.checks)  // first, since sizes may divide by what they check
        if (named(op, check.subject, [&] { return scope(check.text); }) == 0)
            refuse(op, check.subject, check.text + " does not hold");
    for (size_t i = 0; i < inputs.size(); ++i) {
        const std::vector<int64_t> wanted = scope.shape(op.inputs[i].shape);
        for (size_t d = 0; d < op.inputs[i].shape.dims.size(); ++d) {
            if (wanted[d] == Integers::UNKNOWN || dims[i][d] == Integers::UNKNOWN || wanted[d] == dims[i][d]) continue;
            refuse(op, op.inputs[i].name,
                   "dimension " + std::to_string(d) + " is " + std::to_string(dims[i][d]) + ", must be " +
                       op.inputs[i].shape.dims[d] + " = " + std::to_string(wanted[d]));
        }
    }
    return scope;
}

/// A number of a plan or a kernel: an attribute of either kind, or an integer expression.
int32_t number(const Op& op, const Attributes& attributes, const Scope<Integers>& scope, const std::string& text) {
    int32_t bits;
    const int attribute = op.attribute(text);
    if (attribute >= 0 && op.attributes[size_t(attribute)].real) {
        const float value = float(attributes[size_t(attribute)]);
        std::memcpy(&bits, &value, 4);
        return bits;
    }
    const int64_t value = scope(text);
    if (value < INT32_MIN || value > INT32_MAX) throw Refusal(op.name + ": " + text + " passes 32 bits");
    return int32_t(value);
}

uint64_t bytes_of(const EdgeTensor& tensor) {
    uint64_t bytes = TYPE_BYTES[tensor.type];
    for (int i = 0; i < tensor.rank; ++i) bytes *= uint64_t(tensor.dims[i]);
    return bytes;
}

}  // namespace

void check_ranks(const Op& op, const std::vector<int>& ranks) {
    if (ranks.size() != op.inputs.size())
        throw Refusal(op.name + ": takes " + std::to_string(op.inputs.size()) + " inputs, was given " +
                      std::to_string(ranks.size()));
    for (size_t i = 0; i < ranks.size(); ++i) {
        const Pattern& shape = op.inputs[i].shape;
        const int least = int(shape.dims.size());
        if (ranks[i] < least || (ranks[i] > least && !shape.open) || ranks[i] > EDGE_MAX_RANK)
            refuse(op, op.inputs[i].name,
                   "has " + std::to_string(ranks[i]) + " dimensions, must have " + shape_text(shape));
    }
}

bool takes_type(const Op& op, int at, int type) {
    const size_t input_count = op.inputs.size(), i = size_t(at);
    if (i >= input_count) return op.outputs[i - input_count].type == type;
    const std::vector<int>& types = op.inputs[i].types;
    return std::find(types.begin(), types.end(), type) != types.end();
}

std::vector<EdgeTensor> outputs_of(const Op& op, const Attributes& attributes, const std::vector<EdgeTensor>& inputs) {
    Integers algebra;
    const Scope<Integers> scope = checked(op, attributes, inputs, algebra);
    std::vector<EdgeTensor> outputs;
    for (const Output& output : op.outputs) {
        const std::vector<int64_t> dims = scope.shape(output.shape);
        EdgeTensor tensor{output.type, int32_t(dims.size()), {}, nullptr};
        for (size_t d = 0; d < dims.size(); ++d) tensor.dims[d] = dims[d] == Integers::UNKNOWN ? -1 : dims[d];
        outputs.push_back(tensor);
    }
    return outputs;
}

uint64_t workspace_bytes(const Op& op, const Attributes& attributes, const std::vector<EdgeTensor>& inputs) {
    if (op.workspace.empty()) return 0;
    Integers algebra;
    return uint64_t(checked(op, attributes, inputs, algebra)(op.workspace_bytes));
}

Work plan_work(const Op& op, const Attributes& attributes, const std::vector<EdgeTensor>& inputs, int sms,
               bool workspace) {
    Integers algebra;
    Scope<Integers> scope = checked(op, attributes, inputs, algebra);
    scope.set("sms", sms);
    scope.set("workspace", workspace && !op.workspace.empty());
    if (!op.plan) throw std::logic_error("ops.txt: " + op.name + " has no plan");

    std::vector<int32_t> shape;
    for (const std::string& field : op.plan_fields) shape.push_back(number(op, attributes, scope, field));
    Work work;
    work.launches.resize(EDGE_MAX_LAUNCHES);
    const unsigned count = op.plan(shape.data(), work.launches.data());
    if (!count) {
        std::string text;
        for (size_t i = 0; i < shape.size(); ++i)
            if (!std::isdigit(static_cast<unsigned char>(op.plan_fields[i][0])))
                text += (text.empty() ? "" : ", ") + op.plan_fields[i] + " = " + std::to_string(shape[i]);
        throw Refusal(op.name + ": no kernel takes " + text);
    }
    work.launches.resize(count);

    for (const std::string& name : op.tensor_arguments) {
        if (name == op.workspace) {
            if (count > 1) work.arguments.push_back({int(op.inputs.size() + op.outputs.size()), 0});
            continue;
        }
        const int input = op.input(name), output = op.output(name);
        if (input < 0 && output < 0) throw std::logic_error("ops.txt: " + op.name + " has no tensor " + name);
        work.arguments.push_back({input >= 0 ? input : int(op.inputs.size()) + output, 0});
    }
    for (const std::string& text : op.number_arguments)
        work.arguments.push_back({-1, number(op, attributes, scope, text)});
    for (size_t i = 0; i < op.outputs.size(); ++i)
        if (op.outputs[i].like >= 0)
            work.copies.push_back({op.outputs[i].like, int(i), bytes_of(inputs[size_t(op.outputs[i].like)])});
    return work;
}

// --- attributes as fields -------------------------------------------------------------------------------------------
namespace {

template <class T>
double first(const void* data) {
    T value;
    std::memcpy(&value, data, sizeof value);
    return double(value);
}

std::optional<double> value_of(const Field& field) {
    if (field.count != 1 || !field.data) return {};
    switch (field.kind) {
    case 'b': return first<int8_t>(field.data);
    case 'h': return first<int16_t>(field.data);
    case 'i': return first<int32_t>(field.data);
    case 'l': return first<int64_t>(field.data);
    case 'f': return first<float>(field.data);
    case 'd': return first<double>(field.data);
    default: return {};
    }
}

}  // namespace

Attributes read_fields(const Op& op, const std::vector<Field>& fields, bool stored) {
    std::vector<std::optional<double>> found(op.attributes.size());
    std::optional<double> format;
    for (const Field& field : fields) {
        const std::string name = field.name ? field.name : "";
        if (stored && name == FORMAT_FIELD) {
            format = value_of(field);
            continue;
        }
        if (!stored && name.compare(0, 7, "plugin_") == 0) continue;
        const int i = op.attribute(name);
        if (i < 0) throw Refusal(op.name + ": has no attribute " + name);
        const bool real = field.kind == 'f' || field.kind == 'd';
        const std::optional<double> value = value_of(field);
        if (!value || real != op.attributes[size_t(i)].real)
            refuse(op, name, std::string("is not one ") + (op.attributes[size_t(i)].real ? "float" : "integer"));
        if (found[size_t(i)]) refuse(op, name, "is given twice");
        found[size_t(i)] = value;
    }
    if (stored && (!format || *format != FORMAT))
        throw Refusal(op.name + ": the engine was built with another version of this library (format " +
                      (format ? std::to_string(int64_t(*format)) : "unknown") + ", this one reads " +
                      std::to_string(FORMAT) + "); build it again");
    Attributes values;
    for (size_t i = 0; i < found.size(); ++i) {
        if (!found[i]) refuse(op, op.attributes[i].name, "is missing");
        values.push_back(*found[i]);
    }
    check_attributes(op, values);
    return values;
}

StoredFields::StoredFields(const Op& op, const Attributes& attributes) {
    check_attributes(op, attributes);
    words_.push_back(FORMAT);
    for (size_t i = 0; i < attributes.size(); ++i) {
        const float real = float(attributes[i]);
        words_.push_back(op.attributes[i].real ? 0 : int32_t(attributes[i]));
        if (op.attributes[i].real) std::memcpy(&words_.back(), &real, 4);
    }
    fields_.push_back({FORMAT_FIELD, 'i', 1, words_.data()});
    for (size_t i = 0; i < attributes.size(); ++i)
        fields_.push_back({op.attributes[i].name.c_str(), op.attributes[i].real ? 'f' : 'i', 1, &words_[i + 1]});
}

}  // namespace edge
