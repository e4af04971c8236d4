// The ONNX folder in transformers.js, in a worker so that the page stays awake.
import { fetchFiles, MODELS, root } from "./files.js";
import { threadCount } from "./device.js";

export class OnnxEngine {
  /** Fetches and loads a model of models.json. */
  static async open(model, { onProgress, onReading, signal }) {
    const { kept } = await fetchFiles(model.files, onProgress, signal);
    onReading();
    const engine = new OnnxEngine(kept);
    const loaded = await engine.#ask("load", {
      folder: model.folder, dtype: model.dtype, root: root.pathname, cache: MODELS, threads: threadCount(),
    });
    return Object.assign(engine, loaded);
  }

  constructor(kept) {
    this.kept = kept;
    this.waiting = new Map();
    this.asked = 0;
    this.worker = new Worker("onnx-worker.js", { type: "module" });
    this.worker.onmessage = ({ data }) => {
      const entry = this.waiting.get(data.id);
      if (data.text !== undefined) return entry?.onText?.(data.text);
      this.waiting.delete(data.id);
      return data.error ? entry?.reject(new Error(data.error)) : entry?.resolve(data.result);
    };
    this.worker.onerror = (event) => {
      event.preventDefault();
      const error = new Error(`ONNX Runtime stopped (${event.message || "no reason given"}); load it again.`);
      for (const entry of this.waiting.values()) entry.reject(error);
      this.waiting.clear();
    };
  }

  /** See GgufEngine.chat. */
  async chat(messages, { maxTokens, signal, onText }) {
    const stop = () => this.worker.postMessage({ stop: true });
    signal.addEventListener("abort", stop, { once: true });
    try {
      return await this.#ask("chat", { messages, maxTokens }, onText);
    } finally {
      signal.removeEventListener("abort", stop);
    }
  }

  /** See GgufEngine.round. */
  round(text, newTokens) {
    return this.#ask("round", { text, newTokens });
  }

  close() {
    this.worker.terminate();
  }

  #ask(what, request, onText) {
    const id = ++this.asked;
    return new Promise((resolve, reject) => {
      this.waiting.set(id, { resolve, reject, onText });
      this.worker.postMessage({ id, what, request });
    });
  }
}
