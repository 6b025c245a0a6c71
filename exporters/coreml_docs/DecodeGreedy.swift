// Loads the language model's package, makes its state, prefills and decodes greedily. macOS 15 or iOS 18.
//
//     swiftc -O -parse-as-library DecodeGreedy.swift -o decode
//     ./decode lm.mlprogram.fp16.mlpackage 32 1 17 5 9      (package, tokens to make, prompt token ids)
//
// Token ids come from tokenizer/tokenizer.json of the bundle; README.md beside this file says what else an app needs.

import CoreML
import Foundation

/// The functions of one package over one KV cache.
final class LanguageModel {
    /// Compiled length -> function; 1 is there always.
    private var functions: [Int: MLModel] = [:]
    private var state: MLState
    /// Tokens that the cache holds; a run may begin on some of them again.
    private var history: [Int32] = []
    let capacity: Int

    init(package: URL, units: MLComputeUnits = .cpuAndNeuralEngine) async throws {
        let compiled = try await MLModel.compileModel(at: package)
        for (length, name) in [(1, "decode"), (4, "prefill_4"), (16, "prefill_16"), (64, "prefill_64")] {
            let configuration = MLModelConfiguration()
            configuration.computeUnits = units
            configuration.functionName = name
            // A short cache has no function for long prompts.
            if let model = try? await MLModel.load(contentsOf: compiled, configuration: configuration) {
                functions[length] = model
            }
        }
        guard let decode = functions[1] else { throw Failure.noDecodeFunction }
        let metadata = decode.modelDescription.metadata[.creatorDefinedKey] as? [String: String] ?? [:]
        capacity = Int(metadata["edge.context"] ?? "") ?? 0
        state = decode.makeState()  // zeros, shared by every function of the package
    }

    enum Failure: Error { case noDecodeFunction, cacheFull, noLogits }

    /// Empties the cache.
    func reset() throws {
        guard let decode = functions[1] else { throw Failure.noDecodeFunction }
        state = decode.makeState()
        history = []
    }

    /// Appends tokens and returns the scores of the one that follows.
    func append(_ tokens: [Int32]) async throws -> [Float] {
        var position = history.count
        history += tokens
        guard history.count <= capacity else { throw Failure.cacheFull }
        var logits: [Float] = []
        while position < history.count {
            let size = nextSize(position: position)
            // Where the end does not fill a run, the run begins earlier: the same tokens write the same keys again.
            let first = min(position, history.count - size)
            logits = try await run(Array(history[first..<first + size]), last: first + size - 1)
            position = first + size
        }
        return logits
    }

    /// The smallest length that takes all that is left, else the largest that is filled.
    private func nextSize(position: Int) -> Int {
        let left = history.count - position
        let sizes = functions.keys.sorted()
        return sizes.first { left <= $0 && $0 <= history.count } ?? sizes.last { $0 <= left }!
    }

    private func run(_ tokens: [Int32], last: Int) async throws -> [Float] {
        let ids = MLShapedArray<Int32>(scalars: tokens, shape: [1, tokens.count])
        let newest = MLShapedArray<Int32>(scalars: [Int32(last)], shape: [1])
        let inputs = try MLDictionaryFeatureProvider(dictionary: [
            "ids": MLMultiArray(ids), "last": MLMultiArray(newest),
        ])
        guard let model = functions[tokens.count] else { throw Failure.noDecodeFunction }
        let outputs = try await model.prediction(from: inputs, using: state)
        guard let logits = outputs.featureValue(for: "logits")?.shapedArrayValue(of: Float.self) else {
            throw Failure.noLogits
        }
        return logits.scalars
    }
}

@main
struct Decode {
    static func main() async throws {
        let arguments = CommandLine.arguments
        guard arguments.count > 3, let count = Int(arguments[2]) else {
            print("usage: decode PACKAGE COUNT TOKEN...")
            exit(2)
        }
        let model = try await LanguageModel(package: URL(fileURLWithPath: arguments[1]))
        var logits = try await model.append(arguments[3...].compactMap { Int32($0) })
        for _ in 0..<count {
            let best = logits.indices.max { logits[$0] < logits[$1] } ?? 0
            print(best, terminator: " ")
            logits = try await model.append([Int32(best)])
        }
        print()
    }
}
