// Runs a bundle's Core ML packages on this Mac and compares them with the checkpoint's golden embeddings. No package but Apple's own is needed.
//
//     swiftc -O coreml/selfcheck.swift -o selfcheck && ./selfcheck BUNDLE
//
// The functions below the main part are what an app needs to check itself at its first start: read the manifest, read golden.safetensors, predict, compare.
// Packages that take a picture instead of a tensor are left to selfcheck.py.

import CoreML
import Foundation

struct Failure: Error, CustomStringConvertible {
    let description: String
}

/// Float32 or Int32 tensors of a .safetensors file, by name.
struct Tensors {
    let data: Data
    let header: [String: Any]
    let start: Int

    init(contentsOf url: URL) throws {
        data = try Data(contentsOf: url)
        guard data.count >= 8 else { throw Failure(description: "\(url.lastPathComponent) is too short for a safetensors file") }
        let length = data.prefix(8).enumerated().reduce(0) { $0 + (Int($1.element) << (8 * $1.offset)) }
        guard length > 0, length <= data.count - 8,
            let object = try JSONSerialization.jsonObject(with: data.subdata(in: 8..<(8 + length))) as? [String: Any]
        else { throw Failure(description: "\(url.lastPathComponent) has no readable header") }
        header = object
        start = 8 + length
    }

    func shape(_ name: String) throws -> [Int] {
        guard let entry = header[name] as? [String: Any], let shape = entry["shape"] as? [Int] else {
            throw Failure(description: "the golden tensor \(name) is missing")
        }
        return shape
    }

    /// The values of one row of the first axis.
    func row<Number>(_ name: String, _ index: Int, as type: Number.Type) throws -> [Number] {
        let shape = try shape(name)
        guard let entry = header[name] as? [String: Any], let offsets = entry["data_offsets"] as? [Int], offsets.count == 2, index < shape[0] else {
            throw Failure(description: "the golden tensor \(name) has no row \(index)")
        }
        let count = shape.dropFirst().reduce(1, *)
        let size = MemoryLayout<Number>.stride
        let from = start + offsets[0] + index * count * size
        guard from + count * size <= data.count else { throw Failure(description: "the golden tensor \(name) leaves the file") }
        return data.subdata(in: from..<(from + count * size)).withUnsafeBytes { Array($0.bindMemory(to: Number.self)) }
    }
}

func cosine(_ a: [Float], _ b: [Float]) -> Double {
    var dot = 0.0, left = 0.0, right = 0.0
    for (x, y) in zip(a, b) {
        dot += Double(x) * Double(y)
        left += Double(x) * Double(x)
        right += Double(y) * Double(y)
    }
    return dot / max(1e-12, (left * right).squareRoot())
}

func predict(_ model: MLModel, input: String, output: String, array: MLMultiArray) throws -> [Float] {
    let features = try MLDictionaryFeatureProvider(dictionary: [input: MLFeatureValue(multiArray: array)])
    guard let result = try model.prediction(from: features).featureValue(for: output)?.multiArrayValue else {
        throw Failure(description: "the model has no output \(output)")
    }
    return (0..<result.count).map { result[$0].floatValue }
}

func check(_ artefact: [String: Any], _ manifest: [String: Any], _ golden: Tensors, _ bundle: URL) throws -> Bool {
    guard let id = artefact["id"] as? String, let tower = artefact["tower"] as? String, let path = artefact["path"] as? String,
        let precision = artefact["precision"] as? String, let spec = manifest[tower] as? [String: Any],
        let input = spec["input"] as? String, let output = spec["output"] as? String
    else { throw Failure(description: "the manifest lacks a field of an artefact") }
    let compiled = try MLModel.compileModel(at: bundle.appendingPathComponent(path))
    defer { try? FileManager.default.removeItem(at: compiled) }
    let model = try MLModel(contentsOf: compiled)
    if model.modelDescription.inputDescriptionsByName[input]?.type == .image {
        print("--    \(id): takes a picture; check it with selfcheck.py")
        return true
    }
    let name = tower == "image" ? "pixels" : "tokens"
    let shape = try golden.shape(name)
    var worst = 1.0
    var milliseconds: [Double] = []
    for row in 0..<shape[0] {
        let dimensions = [1] + shape.dropFirst()
        let array = try MLMultiArray(shape: dimensions.map { NSNumber(value: $0) }, dataType: tower == "image" ? .float32 : .int32)
        if tower == "image" {
            for (place, value) in try golden.row(name, row, as: Float.self).enumerated() { array[place] = NSNumber(value: value) }
        } else {
            for (place, value) in try golden.row(name, row, as: Int32.self).enumerated() { array[place] = NSNumber(value: value) }
        }
        let begun = Date()
        let found = try predict(model, input: input, output: output, array: array)
        milliseconds.append(Date().timeIntervalSince(begun) * 1000)
        let value = cosine(found, try golden.row(tower + "_embedding", row, as: Float.self))
        worst = value.isFinite ? min(worst, value) : -1
    }
    let least = (artefact["threshold"] as? Double) ?? ["fp32": 0.99999, "fp16": 0.999][precision] ?? 0.9
    let good = worst >= least
    let median = milliseconds.sorted()[milliseconds.count / 2]
    print(String(format: "%@  %@: least cosine %.6f, expected at least %g, median %.2f ms", good ? "ok  " : "FAIL", id, worst, least, median))
    return good || (artefact["status"] as? String) != "proven"
}

do {
    let bundle = URL(fileURLWithPath: CommandLine.arguments.count > 1 ? CommandLine.arguments[1] : ".")
    let data = try Data(contentsOf: bundle.appendingPathComponent("manifest.json"))
    guard let manifest = try JSONSerialization.jsonObject(with: data) as? [String: Any], let artefacts = manifest["artefacts"] as? [[String: Any]],
        let facts = manifest["golden"] as? [String: Any], let vectors = facts["vectors"] as? String
    else { throw Failure(description: "manifest.json is not a bundle's") }
    let golden = try Tensors(contentsOf: bundle.appendingPathComponent(vectors))
    var good = true
    for artefact in artefacts where artefact["target"] as? String == "coreml" && artefact["path"] is String {
        good = try check(artefact, manifest, golden, bundle) && good
    }
    exit(good ? 0 : 1)
} catch {
    FileHandle.standardError.write(Data("error: \(error)\n".utf8))
    exit(1)
}
