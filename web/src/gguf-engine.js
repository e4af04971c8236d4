// GGUF files in llama.cpp, compiled to WebAssembly by wllama.
import { Wllama } from "@wllama/wllama";

import { fetchFiles } from "./files.js";
import { threadCount } from "./device.js";

const CONTEXT = 4096;

export class GgufEngine {
  /** Fetches and loads a model of models.json. */
  static async open(model, { onProgress, onReading, signal }) {
    const { blobs, kept } = await fetchFiles(model.files, onProgress, signal);
    onReading();
    // llama.cpp says why on its log; the exceptions that reach us do not.
    const complaint = { text: "" };
    const note = (...words) => (complaint.text = words.join(" ").trim() || complaint.text);
    const quiet = () => {};
    const wllama = new Wllama(
      { default: new URL("wllama.wasm", location.href).href },
      { logger: { debug: quiet, log: quiet, warn: quiet, error: note } },
    );
    // For browsers whose WebAssembly has no 64-bit memory yet (Safari); the default would come from a CDN.
    wllama.setCompat({
      worker: new URL("wllama-compat.js", location.href).href,
      wasm: new URL("wllama-compat.wasm", location.href).href,
    });
    const started = performance.now();
    try {
      await wllama.loadModel(blobs, {
        n_ctx: CONTEXT, n_threads: threadCount(), n_gpu_layers: 0, n_parallel: 1, jinja: true,
      });
    } catch (error) {
      throw new Error(`llama.cpp cannot load this file (${complaint.text || error.message}).`);
    }
    return new GgufEngine(wllama, complaint, kept, (performance.now() - started) / 1000);
  }

  constructor(wllama, complaint, kept, loadSeconds) {
    this.wllama = wllama;
    this.complaint = complaint;
    this.kept = kept;
    this.loadSeconds = loadSeconds;
    this.threads = wllama.getNumThreads();
    this.runtime = `llama.cpp ${Wllama.getLibllamaVersion()} in WebAssembly`;
  }

  /**
   * Answers a conversation greedily.
   * @param messages [{role, content}]
   * @param options {maxTokens, signal, onText, record}; onText gets the whole text so far
   * @returns {text, tokenIds or null, promptTokens, cachedTokens, newTokens, ttft, decodeSeconds, stopped}
   */
  async chat(messages, { maxTokens, signal, onText, record }) {
    const clock = new Clock();
    const ids = [];
    let text = "";
    let timings = null;
    let stopped = false;
    try {
      await this.wllama.createChatCompletion({
        messages, max_tokens: maxTokens, temperature: 0, cache_prompt: true, timings_per_token: true,
        stream: true, abortSignal: signal, ...(record ? { logprobs: true, top_logprobs: 1 } : {}),
        onData: (chunk) => {
          timings = chunk.timings ?? timings;
          const choice = chunk.choices?.[0];
          for (const entry of choice?.logprobs?.content ?? []) ids.push(entry.id);
          const piece = choice?.delta?.content;
          if (!piece) return;
          clock.token();
          text += piece;
          onText(text);
        },
      });
    } catch (error) {
      if (error.name !== "AbortError") throw readable(error, this.complaint.text);
      stopped = true;
    }
    return {
      text, tokenIds: record ? ids : null, stopped, ...clock.times(),
      promptTokens: timings?.prompt_n ?? null,
      cachedTokens: timings?.cache_n ?? null,
      newTokens: timings?.predicted_n ?? clock.count,
    };
  }

  /** One round of the check: the text as prompt with an empty cache, then so many tokens. */
  async round(text, newTokens) {
    const clock = new Clock();
    let timings = null;
    await this.wllama.createCompletion({
      prompt: text, max_tokens: newTokens + 1, temperature: 0, cache_prompt: false, ignore_eos: true,
      timings_per_token: true, stream: true,
      onData: (chunk) => {
        timings = chunk.timings ?? timings;
        if ((timings?.predicted_n ?? 0) > clock.count) clock.token(timings.predicted_n);
      },
    });
    return { promptTokens: timings.prompt_n, newTokens: clock.count, ...clock.times() };
  }

  close() {
    return this.wllama.exit();
  }
}

/** When the first and the last token came. */
class Clock {
  started = performance.now();
  first = null;
  last = null;
  count = 0;

  token(count = this.count + 1) {
    this.last = performance.now();
    this.first ??= this.last;
    this.count = count;
  }

  times() {
    return {
      ttft: this.first === null ? null : (this.first - this.started) / 1000,
      decodeSeconds: this.first === null ? null : (this.last - this.first) / 1000,
    };
  }
}

function readable(error, complaint) {
  if (/context size|context length|kv_cache_full|exceed/i.test(`${error.type} ${error.message} ${complaint}`)) {
    return new Error("The conversation is longer than the model can remember; start a new chat.");
  }
  return new Error(`The model stopped (${complaint || error.message}); load it again.`);
}
