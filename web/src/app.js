// The page: choose a file, load it, talk with it, measure it. `?phone` is set by `martlet phone`, which waits
// for the measurements; `?record` writes each answer's token ids into the page, for tests.
import { describeDevice, memoryBytes } from "./device.js";
import { GgufEngine } from "./gguf-engine.js";
import { isKept, readModels } from "./files.js";
import { MlcEngine } from "./mlc-engine.js";
import { OnnxEngine } from "./onnx-engine.js";

const ENGINES = { gguf: GgufEngine, mlc: MlcEngine, onnx: OnnxEngine };
const RUNTIMES = { gguf: "llama.cpp in WebAssembly", mlc: "WebLLM on WebGPU", onnx: "transformers.js" };
const IDEAS = ["What is a swallow?", "Name three colours.", "Tell me a short story."];
const LONGEST_ANSWER = 512;
const CHECK_TOKENS = 32;
const CHECK_ROUNDS = 3;
const INSTALLED_WITHIN = 10_000; // milliseconds that the page waits for its worker
// Plain English of our own, about 130 tokens in most vocabularies.
const CHECK_TEXT =
  "The swallow builds its nest of mud under the roof of a barn and comes back to it every spring. Before the " +
  "rain it flies low over the meadow, because the insects that it eats stay near the ground. In autumn it " +
  "gathers with others on the wires along the road, and one morning all of them are gone. They cross the sea " +
  "and the desert and spend the winter where it is warm. People have watched this for thousands of years " +
  "and still do not know everything about how such a small bird finds its way. Some say that it remembers the " +
  "shape of the coast, others that it feels where north is. Perhaps it does both, and";

const at = (id) => document.getElementById(id);
const parameters = new URLSearchParams(location.search);
const forPhone = parameters.has("phone");
const recording = parameters.has("record");

let release;
let webgpu = false;
let engine = null;
let current = null;
let messages = [];
let answering = null; // AbortController of the answer that is being written
let ready = "";

const size = (bytes) => (bytes < 1e6 ? `${Math.round(bytes / 1e3)} kB` : bytes < 1e9 ? `${(bytes / 1e6).toFixed(bytes < 1e8 ? 1 : 0)} MB` : `${(bytes / 1e9).toFixed(2)} GB`);
const number = (value, digits = 3) => (Number.isFinite(value) ? String(Number(value.toPrecision(digits))) : "–");

function say(text) {
  at("state").textContent = text;
}

function complain(error) {
  at("problem").textContent = error.message;
  at("problem").hidden = false;
}

async function start() {
  at("late").hidden = true;
  await takeServiceWorker();
  try {
    release = await readModels();
    webgpu = release.models.some((model) => model.format === "mlc") && (await MlcEngine.possible());
  } catch (error) {
    say("Nothing to load");
    complain(error);
    return;
  }
  at("name").textContent = release.name;
  document.title = `${release.name} · martlet chat`;
  for (const idea of IDEAS) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = idea;
    button.addEventListener("click", () => answer(idea));
    at("ideas").append(button);
  }
  await showModels();
  at("facts").textContent = self.crossOriginIsolated
    ? `This browser allows threads; ${navigator.hardwareConcurrency} processors.`
    : "This browser allows one thread only here; it will be slower than it could be.";
  at("load").disabled = false;
  say("Choose a file");
}

/** Installs the worker that keeps the page; reloads once where only its headers allow threads. */
async function takeServiceWorker() {
  if (!navigator.serviceWorker) return;
  let registration;
  try {
    registration = await navigator.serviceWorker.register("service-worker.js");
  } catch {
    return; // no HTTPS, or a certificate that the browser only tolerates: works, but not without a network
  }
  if (!(await isInstalled(registration))) return;
  if (!navigator.serviceWorker.controller) {
    await new Promise((resolve) => {
      navigator.serviceWorker.addEventListener("controllerchange", resolve, { once: true });
      setTimeout(resolve, 3000);
    });
  }
  if (!self.crossOriginIsolated && self.isSecureContext && !sessionStorage.getItem("martlet-reloaded")) {
    sessionStorage.setItem("martlet-reloaded", "1");
    location.reload();
    await new Promise(() => {});
  }
}

/** Whether the worker is there in time. `serviceWorker.ready` would wait for ever for one that fails. */
function isInstalled(registration) {
  const worker = registration.installing ?? registration.waiting;
  if (registration.active || !worker) return Boolean(registration.active);
  return new Promise((resolve) => {
    worker.addEventListener("statechange", () => {
      if (worker.state === "activated") resolve(true);
      if (worker.state === "redundant") resolve(false);
    });
    setTimeout(resolve, INSTALLED_WITHIN, false);
  });
}

async function showModels() {
  at("models").replaceChildren();
  const wanted = release.models.findIndex((model) => model.id === (current?.id ?? release.default));
  for (const [place, model] of release.models.entries()) {
    const label = document.createElement("label");
    label.className = "model";
    const possible = webgpu || model.format !== "mlc";
    const radio = Object.assign(document.createElement("input"), {
      type: "radio", name: "model", value: String(place), checked: place === Math.max(wanted, 0), disabled: !possible,
    });
    const title = document.createElement("b");
    title.textContent = `${model.format.toUpperCase()} ${model.quantization}`;
    const bytes = document.createElement("span");
    bytes.className = "size";
    bytes.textContent = size(model.bytes);
    const runtime = document.createElement("small");
    const kept = await isKept(model.files);
    runtime.textContent = RUNTIMES[model.format] + (possible ? "" : ", which this browser lacks") + (kept ? " · kept on this device" : "");
    label.append(radio, title, bytes, runtime);
    at("models").append(label);
  }
}

async function load(event) {
  event.preventDefault();
  const chosen = at("choice").elements.model;
  const model = release.models[Number(chosen.value ?? 0)];
  at("problem").hidden = true;
  at("load").disabled = true;
  at("loading").hidden = false;
  at("loading").scrollIntoView({ block: "nearest" }); // below the list of files, and so often below the screen
  say("Loading");
  let toldAt = 0;
  try {
    await engine?.close();
    engine = null;
    engine = await ENGINES[model.format].open(model, {
      record: recording,
      onProgress(done, total) {
        at("progress").value = done / total;
        // Not more often than eyes follow; the last one always.
        if (performance.now() - toldAt < 100 && done < total) return;
        toldAt = performance.now();
        at("loading-text").textContent = `${size(done)} of ${size(total)}`;
      },
      onReading() {
        at("progress").removeAttribute("value");
        at("loading-text").textContent = "Making it ready";
      },
    });
  } catch (error) {
    say("Not loaded");
    complain(error);
    return;
  } finally {
    at("load").disabled = false;
    at("loading").hidden = true;
    at("progress").value = 0;
  }
  current = model;
  const offline = engine.kept && navigator.serviceWorker?.controller;
  // As much as stands beside the buttons on a narrow phone.
  ready = `${model.format.toUpperCase()} ${model.quantization} · ${offline ? "works offline" : "needs network"}`;
  newChat();
  show("talk");
  navigator.storage?.persist?.();
}

function show(section) {
  at("choose").hidden = section !== "choose";
  for (const id of ["talk", "composer", "new-chat", "change", "check"]) at(id).hidden = section !== "talk";
  if (section === "talk") {
    say(ready);
    // On a phone the keyboard would hide half of the page before it was seen.
    if (matchMedia("(pointer: fine)").matches) at("message").focus();
    else at("main").focus();
  }
}

function newChat() {
  answering?.abort();
  messages = [];
  at("log").replaceChildren();
  at("welcome").hidden = false;
  at("loaded").textContent = `${ready} · ${engine.threads} ${engine.threads === 1 ? "thread" : "threads"}`;
  say(ready);
}

function addTurn(role, text) {
  const turn = document.createElement("article");
  turn.className = `turn ${role}`;
  const who = document.createElement("span");
  who.className = "who";
  who.textContent = role === "user" ? "You: " : "Model: ";
  const body = document.createElement("div");
  body.className = "text";
  body.textContent = text;
  turn.append(who, body);
  at("log").append(turn);
  return { turn, body };
}

async function answer(text) {
  if (answering || !engine) return;
  const controller = (answering = new AbortController());
  const conversation = messages;
  conversation.push({ role: "user", content: text });
  at("welcome").hidden = true;
  addTurn("user", text);
  const { turn, body } = addTurn("assistant", "");
  turn.setAttribute("aria-busy", "true");
  at("send").hidden = true;
  at("stop").hidden = false;
  say("Writing");
  follow(true);
  try {
    const result = await engine.chat(conversation, {
      maxTokens: LONGEST_ANSWER, signal: controller.signal, record: recording,
      onText(whole) {
        const follows = nearEnd();
        body.textContent = whole;
        follow(follows);
      },
    });
    body.textContent = result.text;
    if (result.text) conversation.push({ role: "assistant", content: result.text });
    else conversation.pop(); // stopped before its first word: as if it had not been asked
    body.hidden = !result.text;
    if (recording) {
      turn.dataset.tokenIds = JSON.stringify(result.tokenIds);
      turn.dataset.numbers = JSON.stringify(result);
    }
    turn.append(numbersOf(result));
  } catch (error) {
    conversation.pop();
    turn.remove();
    const problem = document.createElement("p");
    problem.className = "problem";
    problem.textContent = error.message;
    at("log").append(problem);
  } finally {
    turn.setAttribute("aria-busy", "false");
    answering = null;
    at("send").hidden = false;
    at("stop").hidden = true;
    say(ready);
    follow(true);
  }
}

function numbersOf(result) {
  const row = document.createElement("p");
  row.className = "numbers";
  const parts = [];
  if (result.stopped) parts.push("stopped");
  if (result.ttft !== null) parts.push(`first token ${number(result.ttft, 2)} s`);
  if (result.ttft && result.promptTokens) {
    const cached = result.cachedTokens ? `, ${result.cachedTokens} from cache` : "";
    parts.push(`read ${result.promptTokens} tokens at ${number(result.promptTokens / result.ttft)}/s${cached}`);
  }
  if (result.decodeSeconds && result.newTokens > 1) parts.push(`wrote ${result.newTokens} at ${number((result.newTokens - 1) / result.decodeSeconds)}/s`);
  for (const part of parts) row.append(Object.assign(document.createElement("span"), { textContent: part }));
  return row;
}

const nearEnd = () => at("main").scrollHeight - at("main").scrollTop - at("main").clientHeight < 120;

function follow(wanted) {
  // To the conversation's end, not to the check below it.
  if (wanted) at("log").lastElementChild?.scrollIntoView({ block: "end" });
}

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

function deviation(values) {
  const middle = mean(values);
  return values.length < 2 ? 0 : Math.sqrt(values.reduce((sum, value) => sum + (value - middle) ** 2, 0) / (values.length - 1));
}

async function check() {
  if (answering || !engine) return;
  answering = new AbortController();
  at("run-check").disabled = true;
  at("send").disabled = true;
  try {
    const rounds = [];
    for (let round = 0; round <= CHECK_ROUNDS; round++) {
      at("check-state").textContent = round ? `Round ${round} of ${CHECK_ROUNDS}` : "Warming up";
      const result = await engine.round(CHECK_TEXT, CHECK_TOKENS);
      if (round) rounds.push(result);
    }
    at("check-state").textContent = "Counting memory";
    const prefill = rounds.map((round) => round.promptTokens / round.ttft);
    const decode = rounds.map((round) => (round.newTokens - 1) / round.decodeSeconds);
    const measured = {
      file: current.file, format: current.format, quantization: current.quantization, bytes: current.bytes,
      runtime: engine.runtime, threads: engine.threads, load_s: engine.loadSeconds,
      ttft_s: mean(rounds.map((round) => round.ttft)),
      prefill_tokens_per_s: mean(prefill), prefill_std: deviation(prefill),
      decode_tokens_per_s: mean(decode), decode_std: deviation(decode),
      memory_bytes: await memoryBytes(), repetitions: CHECK_ROUNDS,
      prompt_tokens: rounds[0].promptTokens, generated_tokens: rounds[0].newTokens - 1,
    };
    showCheck(measured);
    at("check-state").textContent = forPhone ? await send(measured) : "Done";
  } catch (error) {
    at("check-state").textContent = `Not measured: ${error.message}`;
  } finally {
    answering = null;
    at("run-check").disabled = false;
    at("send").disabled = false;
  }
}

function showCheck(measured) {
  const rows = [
    ["File", `${measured.file}, ${size(measured.bytes)}`],
    ["Ready after", `${number(measured.load_s)} s`],
    ["First token", `${number(measured.ttft_s)} s`],
    [`Reading ${measured.prompt_tokens} tokens`, `${number(measured.prefill_tokens_per_s)} ± ${number(measured.prefill_std, 2)} tok/s`],
    ["Writing", `${number(measured.decode_tokens_per_s)} ± ${number(measured.decode_std, 2)} tok/s`],
    ["Memory", measured.memory_bytes === null ? "this browser does not tell" : size(measured.memory_bytes)],
    ["Threads", String(measured.threads)],
    ["Runtime", measured.runtime],
  ];
  at("check-result").querySelector("tbody").replaceChildren(...rows.map(([head, value]) => {
    const row = document.createElement("tr");
    const heading = Object.assign(document.createElement("th"), { scope: "row", textContent: head });
    row.append(heading, Object.assign(document.createElement("td"), { textContent: value }));
    return row;
  }));
  at("check-result").hidden = false;
}

async function send(measured) {
  const body = JSON.stringify({ device: await describeDevice(), measurement: measured });
  const response = await fetch(new URL("../results", location.href), {
    method: "POST", headers: { "Content-Type": "application/json" }, body,
  }).catch(() => null);
  if (response?.ok) return "Done, and sent to the computer: it is in the report.";
  return `Done, but the computer did not take it (${response ? (await response.text()).slice(0, 200) : "no connection"}).`;
}

at("choice").addEventListener("submit", load);
at("new-chat").addEventListener("click", () => {
  newChat();
  at("message").focus();
});
at("change").addEventListener("click", async () => {
  answering?.abort();
  await showModels();
  show("choose");
  say("Choose a file");
});
at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = at("message").value.trim();
  if (!text || answering) return;
  at("message").value = "";
  answer(text);
});
at("message").addEventListener("keydown", (event) => {
  // Enter that ends a Japanese or Chinese composition is not ours.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("composer").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") answering?.abort();
});
at("stop").addEventListener("click", () => answering?.abort());
at("run-check").addEventListener("click", check);
if (forPhone) at("check").querySelector("details").open = true;

start().catch((error) => {
  say("Nothing to load");
  complain(error);
});
