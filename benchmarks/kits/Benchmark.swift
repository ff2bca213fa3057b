// Times the Core ML towers of plan.json on this device and writes results.jsonl into Documents. Built and driven by ios.sh.
import CoreML
import Foundation
import UIKit

struct Step: Decodable {
    let artefact: String, tower: String, file: String, input: String, output: String
    let cosine_min: Double
}

struct Plan: Decodable {
    let steps: [Step]
    let seconds: Double
    let warmup: Int, settle: Int, min_samples: Int, max_samples: Int
}

struct Inputs: Decodable {
    let shape: [Int]
    let rows: [[Double]]
    let expected: [[Double]]
}

func resource(_ name: String) -> URL { Bundle.main.bundleURL.appendingPathComponent("plan").appendingPathComponent(name) }

func array(_ row: [Double], _ shape: [Int], _ integers: Bool) throws -> MLMultiArray {
    let made = try MLMultiArray(shape: shape.map { NSNumber(value: $0) }, dataType: integers ? .int32 : .float32)
    for (index, value) in row.enumerated() { made[index] = NSNumber(value: value) }
    return made
}

func cosine(_ found: MLMultiArray, _ wanted: [Double]) -> Double {
    var dot = 0.0, first = 0.0, second = 0.0
    for (index, value) in wanted.enumerated() {
        let other = found[index].doubleValue
        dot += value * other
        first += value * value
        second += other * other
    }
    return dot / max((first * second).squareRoot(), 1e-30)
}

func footprint() -> UInt64 {
    var info = task_vm_info_data_t()
    var count = mach_msg_type_number_t(MemoryLayout<task_vm_info_data_t>.size / MemoryLayout<natural_t>.size)
    let result = withUnsafeMutablePointer(to: &info) { pointer in
        pointer.withMemoryRebound(to: integer_t.self, capacity: Int(count)) { task_info(mach_task_self_, task_flavor_t(TASK_VM_INFO), $0, &count) }
    }
    return result == KERN_SUCCESS ? UInt64(info.ledger_phys_footprint_peak) : 0
}

func thermal() -> String {
    switch ProcessInfo.processInfo.thermalState {
    case .nominal: return "nominal"
    case .fair: return "fair"
    case .serious: return "serious"
    case .critical: return "critical"
    @unknown default: return "unknown"
    }
}

func measure(_ step: Step, _ plan: Plan) throws -> [String: Any] {
    let inputs = try JSONDecoder().decode(Inputs.self, from: Data(contentsOf: resource("inputs-\(step.tower).json")))
    let clock = { DispatchTime.now().uptimeNanoseconds }
    let configuration = MLModelConfiguration()
    configuration.computeUnits = .all
    let before = clock()
    let compiled = try MLModel.compileModel(at: resource(step.file))
    let built = clock()
    let model = try MLModel(contentsOf: compiled, configuration: configuration)
    let loaded = clock()
    let rows = try inputs.rows.map { try MLDictionaryFeatureProvider(dictionary: [step.input: array($0, inputs.shape, step.tower == "text")]) }
    var least = 1.0
    for (index, row) in rows.enumerated() {
        guard let found = try model.prediction(from: row).featureValue(for: step.output)?.multiArrayValue else { throw CocoaError(.featureUnsupported) }
        least = min(least, cosine(found, inputs.expected[index]))
    }
    guard least >= step.cosine_min else { return ["artefact": step.artefact, "error": "wrong answers here (cosine \(least))"] }
    let heat = thermal()
    for turn in 0..<(plan.warmup + plan.settle) { _ = try model.prediction(from: rows[turn % rows.count]) }
    var samples: [UInt64] = []
    let started = clock()
    while samples.count < plan.max_samples {
        if Double(clock() - started) / 1e9 >= plan.seconds && samples.count >= plan.min_samples { break }
        let now = clock()
        _ = try model.prediction(from: rows[samples.count % rows.count])
        samples.append(max(1, clock() - now))
    }
    return [
        "artefact": step.artefact, "samples": samples, "cosine_min": least, "compile_ns": built - before, "load_ns": loaded - built,
        "thermal_before": heat, "thermal_after": thermal(), "peak_bytes": footprint(), "system": UIDevice.current.systemVersion,
    ]
}

@main
final class Benchmark: UIResponder, UIApplicationDelegate {
    func application(_ application: UIApplication, didFinishLaunchingWithOptions options: [UIApplication.LaunchOptionsKey: Any]?) -> Bool {
        application.isIdleTimerDisabled = true
        DispatchQueue.global(qos: .userInitiated).async {
            let out = FileManager.default.urls(for: .documentDirectory, in: .userDomainMask)[0].appendingPathComponent("ios.jsonl")
            FileManager.default.createFile(atPath: out.path, contents: nil)
            do {
                let plan = try JSONDecoder().decode(Plan.self, from: Data(contentsOf: resource("plan.json")))
                let file = try FileHandle(forWritingTo: out)
                for step in plan.steps {
                    var row: [String: Any]
                    do { row = try measure(step, plan) } catch { row = ["artefact": step.artefact, "error": "\(error)"] }
                    file.write(try JSONSerialization.data(withJSONObject: row) + Data("\n".utf8))
                }
                try file.close()
            } catch { print("error: \(error)") }
            print("mclip done")
            exit(0)
        }
        return true
    }
}
