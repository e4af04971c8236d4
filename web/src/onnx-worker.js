// Runs an ONNX folder with transformers.js. Messages: {id, what, request} in; {id, text}, {id, result} or
// {id, error} out; {stop: true} ends the answer that is being written.
import {
  AutoModelForCausalLM, AutoTokenizer, BaseStreamer, env, StoppingCriteria, Tensor,
} from "@huggingface/transformers";

let tokenizer;
let model;
let kept = { ids: [], cache: null }; // token ids of the conversation so far that the key-value cache holds
let stopping = false;

self.onmessage = async ({ data }) => {
  if (data.stop) {
    stopping = true;
    return;
  }
  try {
    const result = await { load, chat, round }[data.what](data.request, (text) => self.postMessage({ id: data.id, text }));
    self.postMessage({ id: data.id, result });
  } catch (error) {
    self.postMessage({ id: data.id, error: `ONNX Runtime failed (${error?.message ?? error}); load it again.` });
  }
};

async function load({ folder, dtype, root, cache, threads }) {
  env.allowRemoteModels = false;
  env.allowLocalModels = true;
  env.localModelPath = root;
  env.useBrowserCache = false;
  env.useWasmCache = false;
  const store = await caches.open(cache).catch(() => null);
  if (store) {
    env.useCustomCache = true;
    env.customCache = { match: (name) => store.match(name, { ignoreSearch: true }), put: async () => {} };
  }
  const beside = (name) => new URL(name, self.location.href).href;
  const wasm = env.backends.onnx.wasm;
  wasm.wasmPaths = { mjs: beside("ort-wasm-simd-threaded.mjs"), wasm: beside("ort-wasm-simd-threaded.wasm") };
  wasm.numThreads = self.crossOriginIsolated ? threads : 1;
  const started = performance.now();
  tokenizer = await AutoTokenizer.from_pretrained(folder);
  model = await AutoModelForCausalLM.from_pretrained(folder, { dtype, device: "wasm" });
  return {
    loadSeconds: (performance.now() - started) / 1000,
    threads: wasm.numThreads,
    runtime: `ONNX Runtime ${env.backends.onnx.versions?.web ?? ""} in WebAssembly, transformers.js ${env.version}`,
  };
}

async function chat({ messages, maxTokens }, onText) {
  const ids = tokenizer.apply_chat_template(messages, { add_generation_prompt: true, return_tensor: false, return_dict: false });
  const reused = kept.cache && kept.ids.length < ids.length && kept.ids.every((id, place) => id === ids[place]);
  return generate(ids, maxTokens, { reuse: reused, onText });
}

async function round({ text, newTokens }) {
  kept = { ids: [], cache: null };
  const ids = tokenizer(text, { return_tensor: false, add_special_tokens: false }).input_ids;
  const result = await generate(ids, newTokens + 1, { exactly: true });
  kept = { ids: [], cache: null };
  return { ...result, promptTokens: ids.length };
}

async function generate(ids, maxTokens, { reuse = false, onText = () => {}, exactly = false }) {
  stopping = false;
  const cached = reuse ? kept.ids.length : 0;
  const started = performance.now();
  const times = [];
  const written = [];
  let shown = "";
  const ends = new Set([model.generation_config.eos_token_id].flat().map(Number));
  class Streamer extends BaseStreamer {
    isPrompt = true;
    put(value) {
      if (this.isPrompt) {
        this.isPrompt = false;
        return;
      }
      times.push(performance.now());
      written.push(Number(value[0].at(-1)));
      const text = tokenizer.decode(written, { skip_special_tokens: true });
      // A character may be spread over several tokens; it is shown when it is whole.
      if (!text.endsWith("\ufffd") && text !== shown) onText((shown = text));
    }
    end() {}
  }
  class Stop extends StoppingCriteria {
    _call(sequences) {
      return sequences.map(() => stopping);
    }
  }
  // The stop message is read only when the worker's loop comes to rest between two tokens.
  const forward = model.forward.bind(model);
  model.forward = async (inputs) => {
    await new Promise((resolve) => setTimeout(resolve));
    return forward(inputs);
  };
  let output;
  try {
    output = await model.generate({
      input_ids: new Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]),
      attention_mask: new Tensor("int64", new BigInt64Array(ids.length).fill(1n), [1, ids.length]),
      ...(reuse ? { past_key_values: kept.cache } : {}),
      max_new_tokens: maxTokens, ...(exactly ? { min_new_tokens: maxTokens } : {}), do_sample: false,
      streamer: new Streamer(), stopping_criteria: new Stop(), return_dict_in_generate: true,
    });
  } finally {
    model.forward = forward;
  }
  const answer = written.filter((id) => !ends.has(id));
  // The last token that was chosen has not been run, so the cache does not hold it.
  kept = { ids: [...ids, ...written].slice(0, -1), cache: output.past_key_values };
  return {
    text: tokenizer.decode(answer, { skip_special_tokens: true }),
    tokenIds: answer,
    stopped: stopping,
    promptTokens: ids.length - cached,
    cachedTokens: cached,
    newTokens: written.length,
    ttft: times.length ? (times[0] - started) / 1000 : null,
    decodeSeconds: times.length ? (times.at(-1) - times[0]) / 1000 : null,
  };
}
