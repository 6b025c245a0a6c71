// Runs a bundle's TVM artifacts without Python.
//
//   run_bundle BUNDLE decode MODE COUNT ID...      the COUNT most likely tokens after a prompt, one number a line
//   run_bundle BUNDLE serve COMPONENT MODE         calls over standard input and output, for a session elsewhere
//
// A call is: function, number of tensors, tensors; the answer: 0, number of tensors, tensors, or 1 and a message.
// Numbers are uint32 and texts are their length and bytes; a tensor is name, type, rank, int64 sizes and its values;
// all little-endian. The end of the input ends the program.
#include <tvm/ffi/error.h>
#include <tvm/runtime/base.h>

#include <algorithm>
#include <cstdio>
#include <iostream>

#include "model.h"

namespace edge {
namespace {

// --- decode -----------------------------------------------------------------------------------------------------

// One run of at most all that is left, of a compiled length; on tokens already held where the end would not fill it.
// The same cut as runtimes/buckets.py.
Tensor advance(Model& model, const std::vector<int32_t>& ids, size_t& position) {
  const auto lengths = model.lengths();
  const auto end = static_cast<int64_t>(ids.size()), left = end - static_cast<int64_t>(position);
  auto chosen = lengths.begin();
  int64_t first = static_cast<int64_t>(position);
  for (auto it = lengths.begin(); it != lengths.end(); ++it) {
    if (it->first <= left) chosen = it;
    if (it->first >= left && it->first <= end) {
      chosen = it;
      first = end - it->first;
      break;
    }
  }
  const Tensor tokens = zeros({1, chosen->first}, {kDLInt, 32, 1}), last = zeros({1}, {kDLInt, 32, 1});
  std::copy_n(ids.begin() + first, chosen->first, static_cast<int32_t*>(tokens.data_ptr()));
  position = static_cast<size_t>(first + chosen->first);
  *static_cast<int32_t*>(last.data_ptr()) = static_cast<int32_t>(position - 1);
  return model.run(chosen->second, {{"ids", tokens}, {"last", last}})[0];
}

int decode(const std::string& folder, const std::vector<std::string>& words) {
  const json::Object manifest = read_manifest(folder);
  Model model(folder, find_artifact(manifest, "lm", words.at(0)));
  const auto vocabulary = manifest.at(String("vocab_size")).cast<int64_t>();
  const auto context = manifest.at(String("context")).cast<int64_t>();
  std::vector<int32_t> ids;
  for (size_t i = 2; i < words.size(); ++i) {
    ids.push_back(std::stoi(words[i]));
    if (ids.back() < 0 || ids.back() >= vocabulary) throw std::runtime_error("no such token: " + words[i]);
  }
  const size_t wanted = ids.size() + std::stoul(words.at(1));
  if (ids.empty()) throw std::runtime_error("the prompt is empty");
  if (static_cast<int64_t>(wanted) > context + 1)
    throw std::runtime_error("more tokens than the context of " + std::to_string(context));
  size_t position = 0;
  while (ids.size() < wanted) {
    Tensor logits = advance(model, ids, position);
    while (position < ids.size()) logits = advance(model, ids, position);
    const float* row = static_cast<const float*>(logits.data_ptr());
    ids.push_back(static_cast<int32_t>(std::max_element(row, row + vocabulary) - row));
    std::cout << ids.back() << "\n";
  }
  return 0;
}

// --- serve ------------------------------------------------------------------------------------------------------

bool read_exact(void* to, size_t count) { return count == 0 || std::fread(to, count, 1, stdin) == 1; }

template <class T>
T number() {
  T value{};
  if (!read_exact(&value, sizeof value)) throw std::runtime_error("the input ends inside a call");
  return value;
}

std::string word() {
  std::string text(number<uint32_t>(), '\0');
  if (!read_exact(text.data(), text.size())) throw std::runtime_error("the input ends inside a call");
  return text;
}

std::pair<std::string, Tensor> read_tensor() {
  std::string name = word();
  const DLDataType type = data_type(word());
  std::vector<int64_t> shape(number<uint32_t>());
  for (int64_t& size : shape) size = number<int64_t>();
  Tensor tensor = zeros(shape, type);
  if (!read_exact(tensor.data_ptr(), byte_size(tensor)))
    throw std::runtime_error("the input ends inside a call");
  return {std::move(name), tensor};
}

void write_number(uint32_t value) { std::fwrite(&value, sizeof value, 1, stdout); }

void write_text(const std::string& text) {
  write_number(static_cast<uint32_t>(text.size()));
  std::fwrite(text.data(), 1, text.size(), stdout);
}

void write_tensor(const Tensor& tensor) {
  write_text("");
  write_text(tvm::ffi::DLDataTypeToString(tensor.dtype()));
  write_number(static_cast<uint32_t>(tensor.ndim()));
  for (int i = 0; i < tensor.ndim(); ++i) {
    const int64_t size = tensor.size(i);
    std::fwrite(&size, sizeof size, 1, stdout);
  }
  std::fwrite(tensor.data_ptr(), 1, byte_size(tensor), stdout);
}

int serve(const std::string& folder, const std::vector<std::string>& words) {
  const json::Object artifact = find_artifact(read_manifest(folder), words.at(0), words.at(1));
  Model model(folder, artifact);
  const size_t outputs = artifact.at(String("outputs")).cast<json::Array>().size();
  write_number(0);  // ready
  std::fflush(stdout);
  uint32_t length = 0;
  while (read_exact(&length, sizeof length)) {
    std::string name(length, '\0');
    read_exact(name.data(), length);
    Feeds feeds;
    for (uint32_t count = number<uint32_t>(); count > 0; --count) feeds.insert(read_tensor());
    try {
      const auto results = model.run(name, feeds);
      write_number(0);
      write_number(static_cast<uint32_t>(outputs));
      for (size_t i = 0; i < outputs; ++i) write_tensor(results[static_cast<int64_t>(i)]);
    } catch (const std::exception& error) {
      write_number(1);
      write_text(error.what());
    }
    std::fflush(stdout);
  }
  return 0;
}

}  // namespace
}  // namespace edge

int main(int count, char** given) {
  const std::vector<std::string> words(given + std::min(count, 3), given + count);
  try {
    const std::string command = count > 2 ? given[2] : "";
    if (command == "decode" && words.size() > 2) return edge::decode(given[1], words);
    if (command == "serve" && words.size() == 2) return edge::serve(given[1], words);
    std::cerr << "usage: run_bundle BUNDLE decode MODE COUNT ID...\n"
                 "       run_bundle BUNDLE serve COMPONENT MODE\n";
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "run_bundle: " << error.what() << "\n";
    return 1;
  }
}
