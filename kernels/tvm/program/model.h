// One artifact of a bundle, loaded: TVM's virtual machine, the weights, and the states that its kernels write in place.
#pragma once

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <fstream>
#include <sstream>

#include "weights.h"

namespace edge {

using Feeds = std::map<std::string, Tensor>;

inline std::string text_of(const json::Object& object, const char* key) {
  return object.at(String(key)).cast<String>();
}

inline json::Object read_manifest(const std::string& folder) {
  std::ifstream file(folder + "/manifest.json");
  if (!file) throw std::runtime_error(folder + ": holds no manifest.json");
  std::stringstream text;
  text << file.rdbuf();
  return parse(text.str(), folder + "/manifest.json");
}

// The first TVM artifact of a component and mode.
inline json::Object find_artifact(const json::Object& manifest, const std::string& component, const std::string& mode) {
  for (const json::Value& value : manifest.at(String("artifacts")).cast<json::Array>()) {
    const auto artifact = value.cast<json::Object>();
    if (text_of(artifact, "backend") == "tvm" && text_of(artifact, "component") == component &&
        text_of(artifact, "mode") == mode)
      return artifact;
  }
  throw std::runtime_error("the bundle has no tvm artifact for " + component + " in mode " + mode);
}

class Model {
 public:
  Model(const std::string& folder, const json::Object& artifact)
      : options_(artifact.at(String("options")).cast<json::Object>()),
        weights_(read_weights(folder + "/" + text_of(options_, "parameters"))) {
    const auto library = tvm::ffi::Module::LoadFromFile(folder + "/" + text_of(artifact, "model"));
    machine_ = library->GetFunction("vm_load_executable").value()().cast<tvm::ffi::Module>();
    constexpr int kPooledAllocator = 2;
    function("vm_initialization")(static_cast<int>(kDLCPU), 0, kPooledAllocator);
    for (const json::Value& value : artifact.at(String("states")).cast<json::Array>()) {
      const auto state = value.cast<json::Object>();
      states_.emplace(text_of(state, "input"),
                      zeros(sizes(state.at(String("shape"))), data_type(text_of(state, "dtype"))));
    }
  }

  // Prompt lengths that functions were compiled for -> function.
  std::map<int64_t, std::string> lengths() const {
    std::map<int64_t, std::string> found;
    for (const auto& [length, name] : options_.at(String("functions")).cast<json::Object>())
      found[std::stoll(std::string(length.template cast<String>()))] = name.template cast<String>();
    return found;
  }

  // The outputs, then what the states became (the same tensors).
  tvm::ffi::Array<Tensor> run(const std::string& name, const Feeds& feeds) {
    const auto arity = function("get_function_arity")(name).cast<int64_t>();
    std::vector<Tensor> held;
    for (int64_t i = 0; i < arity; ++i) {
      const std::string wanted = function("get_function_param_name")(name, i).cast<String>();
      held.push_back(find(wanted, feeds));
    }
    std::vector<tvm::ffi::AnyView> arguments(held.begin(), held.end());
    tvm::ffi::Any result;
    function(name).CallPacked(arguments.data(), static_cast<int32_t>(arguments.size()), &result);
    return result.cast<tvm::ffi::Array<Tensor>>();
  }

 private:
  tvm::ffi::Function function(const std::string& name) {
    const auto found = machine_.value()->GetFunction(name);
    if (!found.has_value()) throw std::runtime_error("the library has no function " + name);
    return found.value();
  }

  const Tensor& find(const std::string& name, const Feeds& feeds) const {
    for (const Feeds* held : {&feeds, &states_, &weights_}) {
      const auto found = held->find(name);
      if (found != held->end()) return found->second;
    }
    throw std::runtime_error("nothing is named " + name);
  }

  json::Object options_;
  Feeds weights_, states_;
  tvm::ffi::Optional<tvm::ffi::Module> machine_;
};

}  // namespace edge
