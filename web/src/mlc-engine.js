// The MLC folder in WebLLM, on WebGPU.
import { fetchFiles } from "./files.js";
import { WorkerEngine } from "./worker-engine.js";

export class MlcEngine {
  /** Whether this browser lets a page use a graphics processor. */
  static async possible() {
    // A browser that never answers has none.
    const late = new Promise((resolve) => setTimeout(resolve, 3000, null));
    return Boolean(await Promise.race([navigator.gpu?.requestAdapter().catch(() => null), late]));
  }

  /** Fetches and loads a model of models.json; record: its answers bring their token ids. */
  static async open(model, { onProgress, onReading, signal, record }) {
    const { blobs, kept } = await fetchFiles(model.files, onProgress, signal);
    onReading();
    const files = new Map(model.files.map(({ path }, place) => [path.slice(model.folder.length + 1), blobs[place]]));
    return new WorkerEngine("mlc-worker.js", "WebLLM", kept).load({ files, record });
  }
}
