// TensorRT's plugin interface (IPluginV3) over the op table: one class serves every op of library/ops.txt, and holds no
// logic of its own. What each method must do is NvInferRuntime.h's; what the ops are is library/ops.h's.
//
// The library links nothing of TensorRT: IPluginRegistry::loadLibrary (trtexec --dynamicPlugins) asks it for its
// creators by the exported getCreators. Built against the headers of the TensorRT that loads it, 10.3 or newer.
#include <NvInferRuntime.h>

#include <cstdio>
#include <memory>

#include "../library/run.h"

namespace {

using namespace nvinfer1;
using edge::Attributes;
using edge::Op;

static_assert(int(DataType::kFLOAT) == EDGE_F32 && int(DataType::kHALF) == EDGE_F16 &&
              int(DataType::kINT8) == EDGE_I8 && int(DataType::kINT32) == EDGE_I32 && Dims::MAX_DIMS == EDGE_MAX_RANK);

constexpr char const* NAMESPACE = "edge";
constexpr char const* VERSION = "1";
constexpr int32_t DONE = 0, FAILED = 1;  // what methods with a status return

ILoggerFinder* logger_finder = nullptr;

void report(char const* text) noexcept {
    ILogger* const logger = logger_finder ? logger_finder->findLogger() : nullptr;
    if (logger) {
        logger->log(ILogger::Severity::kERROR, text);
    } else {
        std::fprintf(stderr, "[edge plugins] %s\n", text);
    }
}

/// The result of `body`, or `otherwise` with a message: TensorRT's callbacks must not throw.
template <class Body, class Result>
Result guarded(Body const& body, Result otherwise) noexcept {
    try {
        return body();
    } catch (edge::DriverFault const& fault) {
        report(fault.message.c_str());
    } catch (std::exception const& fault) {
        report(fault.what());
    }
    return otherwise;
}

EdgeTensor tensor_of(DataType type, Dims const& dims) {
    EdgeTensor tensor{int32_t(type), dims.nbDims, {}, nullptr};
    for (int32_t i = 0; i < dims.nbDims; ++i) tensor.dims[i] = dims.d[i];
    return tensor;
}

EdgeTensor tensor_of(PluginTensorDesc const& desc) { return tensor_of(desc.type, desc.dims); }

/// Expressions over TensorRT's symbolic dimensions.
struct Dimensions {
    using Value = IDimensionExpr const*;
    IExprBuilder& builder;

    Value constant(int64_t value) const { return builder.constant(value); }
    Value apply(edge::Operation operation, Value a, Value b) const {
        static constexpr DimensionOperation OPERATIONS[] = {
            // in the order of edge::Operation
            DimensionOperation::kSUM,       DimensionOperation::kSUB,      DimensionOperation::kPROD,
            DimensionOperation::kFLOOR_DIV, DimensionOperation::kCEIL_DIV, DimensionOperation::kMIN,
            DimensionOperation::kMAX,       DimensionOperation::kEQUAL,    DimensionOperation::kLESS};
        return builder.operation(OPERATIONS[int(operation)], *a, *b);
    }
};

class Plugin final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuildV2, public IPluginV3OneRuntime {
public:
    Plugin(Op const& op, Attributes const& attributes) : op_(op), attributes_(attributes), stored_(op, attributes) {
        for (edge::Field const& field : stored_.fields())
            fields_.emplace_back(field.name, field.data,
                                 field.kind == 'f' ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32, field.count);
        collection_ = {int32_t(fields_.size()), fields_.data()};
        timing_id_ = op.name;
        for (double const value : attributes) {
            char text[32];
            std::snprintf(text, sizeof text, " %.9g", value);
            timing_id_ += text;
        }
    }

    // --- IPluginV3
    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        switch (type) {
        case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
        case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuildV2*>(this);
        case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }
    IPluginV3* clone() noexcept override {
        return guarded([&]() -> IPluginV3* { return new Plugin(op_, attributes_); }, static_cast<IPluginV3*>(nullptr));
    }

    // --- core
    AsciiChar const* getPluginName() const noexcept override { return op_.name.c_str(); }
    AsciiChar const* getPluginVersion() const noexcept override { return VERSION; }
    AsciiChar const* getPluginNamespace() const noexcept override { return NAMESPACE; }

    // --- build
    int32_t getNbOutputs() const noexcept override { return int32_t(op_.outputs.size()); }

    int32_t getOutputDataTypes(DataType* types, int32_t count, DataType const*, int32_t) const noexcept override {
        for (int32_t i = 0; i < count; ++i) types[i] = DataType(op_.outputs[size_t(i)].type);
        return DONE;
    }

    int32_t getOutputShapes(DimsExprs const* inputs, int32_t count, DimsExprs const*, int32_t, DimsExprs* outputs,
                            int32_t, IExprBuilder& builder) noexcept override {
        return guarded(
            [&] {
                std::vector<std::vector<Dimensions::Value>> dims;
                std::vector<int> ranks;
                for (int32_t i = 0; i < count; ++i) {
                    dims.emplace_back(inputs[i].d, inputs[i].d + inputs[i].nbDims);
                    ranks.push_back(inputs[i].nbDims);
                }
                edge::check_ranks(op_, ranks);
                Dimensions algebra{builder};
                // Types are not known here, and no shape depends on them.
                edge::Scope<Dimensions> const scope(op_, attributes_, std::vector<int>(dims.size(), EDGE_F16), dims,
                                                    algebra);
                for (size_t i = 0; i < op_.outputs.size(); ++i) {
                    auto const shape = scope.shape(op_.outputs[i].shape);
                    outputs[i].nbDims = int32_t(shape.size());
                    std::copy(shape.begin(), shape.end(), outputs[i].d);
                }
                return DONE;
            },
            FAILED);
    }

    bool supportsFormatCombination(int32_t at, DynamicPluginTensorDesc const* tensors, int32_t,
                                   int32_t) noexcept override {
        PluginTensorDesc const& desc = tensors[at].desc;
        return desc.format == TensorFormat::kLINEAR && edge::takes_type(op_, at, int(desc.type));
    }

    int32_t configurePlugin(DynamicPluginTensorDesc const* inputs, int32_t count, DynamicPluginTensorDesc const*,
                            int32_t) noexcept override {
        return guarded(
            [&] {
                std::vector<EdgeTensor> tensors;
                for (int32_t i = 0; i < count; ++i) tensors.push_back(tensor_of(inputs[i].desc));
                edge::outputs_of(op_, attributes_, tensors);  // refuses, with a sentence, what is known to be wrong
                return DONE;
            },
            FAILED);
    }

    size_t getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t count, DynamicPluginTensorDesc const*,
                            int32_t) const noexcept override {
        return guarded(
            [&]() -> size_t {
                std::vector<EdgeTensor> tensors;
                for (int32_t i = 0; i < count; ++i) tensors.push_back(tensor_of(inputs[i].desc.type, inputs[i].max));
                return edge::workspace_bytes(op_, attributes_, tensors);
            },
            size_t(0));
    }

    char const* getTimingCacheID() noexcept override { return timing_id_.c_str(); }

    // Asked for only where PreviewFeature::kALIASED_PLUGIN_IO_10_03 is on.
    int32_t getAliasedInput(int32_t output) noexcept override { return op_.outputs[size_t(output)].like; }

    // --- runtime
    int32_t onShapeChange(PluginTensorDesc const* inputs, int32_t count, PluginTensorDesc const*,
                          int32_t) noexcept override {
        return guarded(
            [&] {
                std::vector<EdgeTensor> tensors;
                for (int32_t i = 0; i < count; ++i) tensors.push_back(tensor_of(inputs[i]));
                work_ = edge::plan_work(op_, attributes_, tensors, edge::multiprocessors(), true);
                edge::prepare(work_);
                return DONE;
            },
            FAILED);
    }

    int32_t enqueue(PluginTensorDesc const*, PluginTensorDesc const*, void const* const* inputs, void* const* outputs,
                    void* workspace, cudaStream_t stream) noexcept override {
        return guarded(
            [&] {
                edge::run(work_, inputs, op_.inputs.size(), outputs, op_.outputs.size(), workspace, stream);
                return DONE;
            },
            FAILED);
    }

    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }
    PluginFieldCollection const* getFieldsToSerialize() noexcept override { return &collection_; }

private:
    Op const& op_;
    Attributes attributes_;
    edge::StoredFields stored_;
    std::vector<PluginField> fields_;
    PluginFieldCollection collection_{};
    std::string timing_id_;
    edge::Work work_;
};

char kind_of(PluginFieldType type) {
    switch (type) {
    case PluginFieldType::kINT8: return 'b';
    case PluginFieldType::kINT16: return 'h';
    case PluginFieldType::kINT32: return 'i';
    case PluginFieldType::kINT64: return 'l';
    case PluginFieldType::kFLOAT32: return 'f';
    case PluginFieldType::kFLOAT64: return 'd';
    default: return '?';
    }
}

class Creator final : public IPluginCreatorV3One {
public:
    explicit Creator(Op const& op) : op_(op) {
        for (edge::Attribute const& attribute : op.attributes)
            fields_.emplace_back(attribute.name.c_str(), nullptr,
                                 attribute.real ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32, 1);
        collection_ = {int32_t(fields_.size()), fields_.data()};
    }

    IPluginV3* createPlugin(AsciiChar const*, PluginFieldCollection const* given,
                            TensorRTPhase phase) noexcept override {
        return guarded(
            [&]() -> IPluginV3* {
                std::vector<edge::Field> fields;
                for (int32_t i = 0; i < given->nbFields; ++i) {
                    PluginField const& field = given->fields[i];
                    fields.push_back({field.name, kind_of(field.type), field.length, field.data});
                }
                return new Plugin(op_, edge::read_fields(op_, fields, phase == TensorRTPhase::kRUNTIME));
            },
            static_cast<IPluginV3*>(nullptr));
    }
    PluginFieldCollection const* getFieldNames() noexcept override { return &collection_; }
    AsciiChar const* getPluginName() const noexcept override { return op_.name.c_str(); }
    AsciiChar const* getPluginVersion() const noexcept override { return VERSION; }
    AsciiChar const* getPluginNamespace() const noexcept override { return NAMESPACE; }

private:
    Op const& op_;
    std::vector<PluginField> fields_;
    PluginFieldCollection collection_{};
};

}  // namespace

EDGE_API void setLoggerFinder(ILoggerFinder* finder) { logger_finder = finder; }

EDGE_API IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static std::vector<std::unique_ptr<Creator>> const owned = guarded(
        [] {
            std::vector<std::unique_ptr<Creator>> made;
            for (Op const& op : edge::ops()) made.push_back(std::make_unique<Creator>(op));
            return made;
        },
        std::vector<std::unique_ptr<Creator>>());
    static std::vector<IPluginCreatorInterface*> const creators = [] {
        std::vector<IPluginCreatorInterface*> all;
        for (auto const& creator : owned) all.push_back(creator.get());
        return all;
    }();
    count = int32_t(creators.size());
    return creators.data();
}
