// What ops.txt says, and everything that can be known of an op without a GPU: whether inputs and attributes are right,
// its outputs' types and shapes, its launches, and how attributes are stored in an engine. No header of TensorRT's or
// CUDA's: the plugin (tensorrt/plugin.cpp) and the C library (edge_kernels.cpp) are thin over this.
#pragma once

#include <map>
#include <string>
#include <type_traits>
#include <vector>

#include "edge_kernels.h"
#include "expression.h"

namespace edge {

/// Dimensions as texts; with `open`, "..." follows them.
struct Pattern {
    std::vector<std::string> dims;
    bool open = false;
};

struct Input {
    std::string name;
    std::vector<int> types;  // EDGE_F16 ...
    Pattern shape;
};

struct Output {
    std::string name;
    int type = -1;
    Pattern shape;
    int like = -1;  // the input whose type, shape and, if the caller wants so, memory it has
};

struct Attribute {
    std::string name;
    bool real;
};

struct Check {
    std::string subject, text;  // an input's or an attribute's name, and what must hold
};

using Planner = unsigned (*)(const void* shape, EdgeLaunch* out);

struct Op {
    std::string name;
    std::vector<Input> inputs;
    std::vector<Output> outputs;
    std::vector<Attribute> attributes;
    std::vector<Check> checks;
    Planner plan = nullptr;
    std::vector<std::string> plan_fields, tensor_arguments, number_arguments;
    std::string workspace, workspace_bytes;  // name of the scratch buffer, "" for none, and its size

    int attribute(const std::string& name) const;  // its index, -1 if there is none
    int input(const std::string& name) const;
    int output(const std::string& name) const;
};

/// Every op of ops.txt, in its order.
const std::vector<Op>& ops();

/// Raises Refusal with the names of those there are.
const Op& find_op(const std::string& name);

/// In the order of Op::attributes.
using Attributes = std::vector<double>;

/// What names stand for: dimensions of the inputs, integer attributes, `rest`, `x.f32`.
template <class Algebra>
class Scope {
public:
    using Value = typename Algebra::Value;

    /// `types` and `dims` of as many inputs as the op has.
    Scope(const Op& op, const Attributes& attributes, const std::vector<int>& types,
          const std::vector<std::vector<Value>>& dims, Algebra& algebra)
        : algebra_(algebra) {
        for (size_t i = 0; i < attributes.size(); ++i)
            if (!op.attributes[i].real) set(op.attributes[i].name, int64_t(attributes[i]));
        for (size_t i = 0; i < op.inputs.size(); ++i) {
            set(op.inputs[i].name + ".f32", types[i] == EDGE_F32);
            bind(op.inputs[i].shape, dims[i]);
        }
    }

    void set(const std::string& name, int64_t value) { values_.insert_or_assign(name, algebra_.constant(value)); }

    Value operator()(const std::string& text) const {
        return evaluate(text, algebra_, [this](const std::string& name) {
            const auto found = values_.find(name);
            if (found == values_.end()) throw std::logic_error("ops.txt: nothing is called " + name);
            return found->second;
        });
    }

    std::vector<Value> shape(const Pattern& pattern) const {
        std::vector<Value> dims;
        for (const std::string& text : pattern.dims) dims.push_back((*this)(text));
        if (pattern.open) dims.insert(dims.end(), rest_.begin(), rest_.end());
        return dims;
    }

private:
    /// The first known dimension of a name is its value; the caller checks the others.
    void bind(const Pattern& pattern, const std::vector<Value>& dims) {
        for (size_t i = 0; i < pattern.dims.size(); ++i) {
            const std::string& text = pattern.dims[i];
            if (!std::isalpha(static_cast<unsigned char>(text[0])) || text.find_first_of(" (") != std::string::npos)
                continue;
            const auto found = values_.find(text);
            if (found == values_.end() || unknown(found->second)) values_.insert_or_assign(text, dims[i]);
        }
        if (!pattern.open) return;
        rest_.assign(dims.begin() + long(pattern.dims.size()), dims.end());
        Value product = algebra_.constant(1);
        for (const Value& value : rest_) product = algebra_.apply(Operation::multiply, product, value);
        values_.insert_or_assign("rest", product);
    }

    static bool unknown(const Value& value) {
        if constexpr (std::is_same_v<Algebra, Integers>) return value == Integers::UNKNOWN;
        return false;
    }

    Algebra& algebra_;
    std::map<std::string, Value> values_;
    std::vector<Value> rest_;
};

/// Raises Refusal unless there are as many inputs as the op has, each of the right number of dimensions.
void check_ranks(const Op& op, const std::vector<int>& ranks);

/// Whether tensor `at` (inputs, then outputs) may be of the type.
bool takes_type(const Op& op, int at, int type);

/// Raises Refusal unless the op takes these inputs, as far as their dimensions are known; else the outputs.
std::vector<EdgeTensor> outputs_of(const Op& op, const Attributes& attributes, const std::vector<EdgeTensor>& inputs);

/// One argument of a kernel: the address of a tensor (inputs, outputs, the workspace), or a number's 32 bits.
struct Argument {
    int tensor = -1;
    int32_t bits = 0;
};

/// Everything of a run but addresses and stream.
struct Work {
    std::vector<EdgeLaunch> launches;
    std::vector<Argument> arguments;
    struct Copy {
        int input, output;
        uint64_t bytes;
    };
    std::vector<Copy> copies;  // what an output that is like an input begins with, if its memory is another
};

/// Bytes of the scratch buffer that makes the op faster; 0: none does. All dimensions are known.
uint64_t workspace_bytes(const Op& op, const Attributes& attributes, const std::vector<EdgeTensor>& inputs);

/// Raises Refusal as outputs_of, and where no kernel takes the shape; all dimensions are known. `workspace`: the run
/// has its scratch buffer.
Work plan_work(const Op& op, const Attributes& attributes, const std::vector<EdgeTensor>& inputs, int sms,
               bool workspace);

/// An attribute as TensorRT hands it over or keeps it. `kind` is the letter of its C type: b, h, i, l (8 to 64 bits),
/// f, d (float, double), or something else, which no attribute is.
struct Field {
    const char* name;
    char kind;
    int count;
    const void* data;
};

/// Attributes from a node's fields: each once, finite, of its kind. `stored`: from an engine, where the format must be
/// ours; from a file there is none, and fields that begin with "plugin_" are TensorRT's own.
Attributes read_fields(const Op& op, const std::vector<Field>& fields, bool stored);

/// The fields that an engine keeps; they point into this object.
class StoredFields {
public:
    StoredFields(const Op& op, const Attributes& attributes);
    StoredFields(const StoredFields&) = delete;
    StoredFields& operator=(const StoredFields&) = delete;
    const std::vector<Field>& fields() const { return fields_; }

private:
    std::vector<int32_t> words_;
    std::vector<Field> fields_;
};

/// Version of what StoredFields writes.
constexpr int32_t FORMAT = 1;
constexpr const char* FORMAT_FIELD = "edge_format";

}  // namespace edge
