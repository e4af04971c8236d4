// The ONNX folder in transformers.js.
import { fetchFiles, MODELS, root } from "./files.js";
import { threadCount } from "./device.js";
import { WorkerEngine } from "./worker-engine.js";

export class OnnxEngine {
  /** Fetches and loads a model of models.json. */
  static async open(model, { onProgress, onReading, signal }) {
    const { kept } = await fetchFiles(model.files, onProgress, signal);
    onReading();
    return new WorkerEngine("onnx-worker.js", "ONNX Runtime", kept).load({
      folder: model.folder, dtype: model.dtype, root: root.pathname, cache: MODELS, threads: threadCount(),
    });
  }
}
