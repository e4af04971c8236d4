// A model that runs in a worker of its own, so that the page stays awake. The worker takes {id, what, request}
// and answers with {id, text} while it writes, then {id, result} or {id, error}; {stop: true} ends an answer.
export class WorkerEngine {
  /**
   * @param script the worker's file beside the page
   * @param name the runtime's, for people
   * @param kept whether the model's files stay on this device
   */
  constructor(script, name, kept) {
    this.kept = kept;
    this.waiting = new Map();
    this.asked = 0;
    this.worker = new Worker(script, { type: "module" });
    this.worker.onmessage = ({ data }) => {
      const entry = this.waiting.get(data.id);
      if (data.text !== undefined) return entry?.onText?.(data.text);
      this.waiting.delete(data.id);
      return data.error ? entry?.reject(new Error(data.error)) : entry?.resolve(data.result);
    };
    this.worker.onerror = (event) => {
      event.preventDefault();
      const error = new Error(`${name} stopped (${event.message || "no reason given"}); load it again.`);
      for (const entry of this.waiting.values()) entry.reject(error);
      this.waiting.clear();
    };
  }

  /** Has the worker load the model; what it answers becomes part of this object. */
  async load(request) {
    return Object.assign(this, await this.#ask("load", request));
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
