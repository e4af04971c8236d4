// Runs an MLC folder with WebLLM; messages as worker-engine.js says.
import { MLCEngine } from "@mlc-ai/web-llm";

const CONTEXT = 4096;
const NAME = "model";
// WebLLM knows files by address and keeps copies of its own. It gets ours, under an address that is nobody's.
const ADDRESS = "https://model.invalid/resolve/main/";

let engine;
let template; // MLC's conv_template
let ids = null; // token ids of the answer, where they are asked for
let kept = null; // what WebLLM's cache holds of a conversation whose last answer ended by itself: {messages, tokens}

self.onmessage = async ({ data }) => {
  if (data.stop) {
    engine?.interruptGenerate();
    return;
  }
  try {
    const result = await { load, chat, round }[data.what](data.request, (text) => self.postMessage({ id: data.id, text }));
    self.postMessage({ id: data.id, result });
  } catch (error) {
    self.postMessage({ id: data.id, error: readable(error) });
  }
};

function readable(error) {
  if (error?.name === "ContextWindowSizeExceededError") {
    return "The conversation is longer than the model can remember; start a new chat.";
  }
  return `WebLLM failed (${error?.message ?? error}); load it again.`;
}

async function load({ files, record }) {
  const cache = {
    match: async ({ url }) => {
      const file = files.get(url.slice(ADDRESS.length));
      return file && new Response(file);
    },
    add: async ({ url }) => Promise.reject(new Error(`${url.slice(ADDRESS.length)} is not in the release`)),
    keys: async () => [...files.keys()].map((path) => ({ url: ADDRESS + path })),
  };
  Object.defineProperty(self, "caches", { value: { open: async () => cache } });
  const started = performance.now();
  const config = JSON.parse(await files.get("mlc-chat-config.json").text());
  const library = [...files.keys()].find((path) => path.endsWith(".wasm"));
  template = config.conv_template;
  const ends = new Set(template.stop_token_ids);
  const recorder = {
    processLogits: (logits) => logits,
    processSampledToken: (id) => ends.has(id) || ids.push(id),
    resetState() {},
  };
  engine = new MLCEngine({
    appConfig: { model_list: [{ model_id: NAME, model: ADDRESS, model_lib: ADDRESS + library }] },
    logitProcessorRegistry: record ? new Map([[NAME, recorder]]) : undefined,
    logLevel: "WARN",
  });
  await engine.reload(NAME, {
    context_window_size: Math.min(CONTEXT, config.context_window_size),
    conv_template: { ...template, seps: [template.seps[0], ""], stop_str: [] },
  });
  // The page's thread only waits for the graphics processor.
  return { loadSeconds: (performance.now() - started) / 1000, threads: 1, runtime: `WebLLM ${WEBLLM_VERSION} on WebGPU` };
}

async function chat({ messages, maxTokens }, onText) {
  const cachedTokens = kept?.messages === JSON.stringify(messages.slice(0, -1)) ? kept.tokens : 0;
  kept = null;
  const request = { messages: messages.map(ended), max_tokens: maxTokens };
  const { finish, ...written } = await write(engine.chat.completions, request, (choice) => choice.delta.content, onText);
  // As WebLLM compares it. An answer that was cut off it reads again: its last token is not in the cache.
  const answer = { role: "assistant", content: await engine.getMessage() };
  if (finish === "stop") {
    const read = written.promptTokens + written.newTokens - 1; // without the token that ended the answer
    kept = { messages: JSON.stringify([...messages, answer]), tokens: cachedTokens + read };
  }
  return { ...written, text: answer.content, cachedTokens };
}

/**
 * A question with what ends the answer before it. Going on from its cache, WebLLM adds the question alone, and that
 * end would be left out; so it stands in the name of who asks, and not in the template (see load).
 */
function ended(message, place) {
  if (message.role !== "user" || place === 0) return message;
  return { ...message, name: template.seps.at(-1) + template.roles.user };
}

async function round({ text, newTokens }) {
  kept = null;
  const request = { prompt: text, max_tokens: newTokens + 1, ignore_eos: true };
  return write(engine.completions, request, (choice) => choice.text, () => {});
}

async function write(completions, request, textOf, onText) {
  ids = [];
  const started = performance.now();
  const times = [];
  let text = "";
  let usage;
  let finish;
  const stream = await completions.create({
    ...request, temperature: 0, repetition_penalty: 1, stream: true, stream_options: { include_usage: true },
  });
  for await (const chunk of stream) {
    usage = chunk.usage ?? usage;
    const choice = chunk.choices[0];
    finish = choice?.finish_reason ?? finish;
    const piece = choice && textOf(choice);
    if (!piece) continue;
    times.push(performance.now());
    onText((text += piece));
  }
  return {
    text,
    finish,
    tokenIds: ids,
    stopped: finish === "abort",
    promptTokens: usage.prompt_tokens,
    newTokens: usage.completion_tokens,
    ttft: times.length ? (times[0] - started) / 1000 : null,
    decodeSeconds: times.length ? (times.at(-1) - times[0]) / 1000 : null,
  };
}
