// Builds the page into dist/: our modules and the libraries bundled, WebAssembly copied beside them, and a
// service worker that knows every file. The same sources give the same bytes.
import { createHash } from "node:crypto";
import { cp, mkdir, readFile, readdir, rename, rm, writeFile } from "node:fs/promises";
import path from "node:path";
import { fileURLToPath } from "node:url";

import { build } from "esbuild";

const root = path.dirname(fileURLToPath(import.meta.url));
const modules = path.join(root, "node_modules");
const output = path.join(root, ".dist-being-made");

const packageOf = async (name) => JSON.parse(await readFile(path.join(modules, name, "package.json"), "utf8"));

await rm(output, { recursive: true, force: true });
await mkdir(output);

await build({
  absWorkingDir: root,
  entryPoints: ["src/app.js", "src/mlc-worker.js", "src/onnx-worker.js"],
  outdir: output,
  bundle: true,
  splitting: true,
  format: "esm",
  target: "es2022",
  minify: true,
  legalComments: "external",
  logLevel: "warning",
  define: { WEBLLM_VERSION: JSON.stringify((await packageOf("@mlc-ai/web-llm")).version) },
  // The page runs ONNX graphs in WebAssembly alone, and the build without WebGPU is half as large.
  alias: { "onnxruntime-web/webgpu": "onnxruntime-web/wasm" },
});

const copies = [
  ["src/index.html", "index.html"],
  ["src/style.css", "style.css"],
  ["src/icon.svg", "icon.svg"],
  ["src/manifest.webmanifest", "manifest.webmanifest"],
  ["node_modules/@wllama/wllama/esm/wasm/wllama.wasm", "wllama.wasm"],
  ["node_modules/@wllama/wllama-compat/wasm/wllama.wasm", "wllama-compat.wasm"],
  ["node_modules/@wllama/wllama-compat/wasm/wllama.js", "wllama-compat.js"],
  ["node_modules/onnxruntime-web/dist/ort-wasm-simd-threaded.wasm", "ort-wasm-simd-threaded.wasm"],
  ["node_modules/onnxruntime-web/dist/ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.mjs"],
];
for (const [from, to] of copies) await cp(path.join(root, from), path.join(output, to));

// What the page carries, with versions and licences: the licences ask for it and readers should know.
const carried = ["@wllama/wllama", "@wllama/wllama-compat", "@huggingface/transformers",
  "@huggingface/tokenizers", "@huggingface/jinja", "onnxruntime-web", "onnxruntime-common",
  "@mlc-ai/web-llm"];
const notices = [];
for (const name of carried) {
  const { version, license } = await packageOf(name);
  const files = (await readdir(path.join(modules, name))).filter((file) => /^licen[cs]e/i.test(file)).sort();
  const text = files.length ? await readFile(path.join(modules, name, files[0]), "utf8") : "";
  notices.push(`${name} ${version}, ${license ?? "MIT"}\n\n${text.trim()}`.trim());
}
await writeFile(path.join(output, "licences.txt"), notices.join("\n\n" + "-".repeat(80) + "\n\n") + "\n");

const files = (await readdir(output)).sort();
const digest = createHash("sha256");
for (const file of files) digest.update(file).update("\0").update(await readFile(path.join(output, file)));
// The worker's own text is part of the version: a change of its rules must reach installed pages.
const worker = await readFile(path.join(root, "src/service-worker.js"), "utf8");
const version = digest.update(worker).digest("hex").slice(0, 16);
// A runtime's WebAssembly, and WebLLM that has its own inside, is kept when it is first used, not before.
const shell = files.filter((file) => !/wllama-compat|mlc-worker|\.wasm$|licences|LEGAL/.test(file));
await writeFile(
  path.join(output, "service-worker.js"),
  `const VERSION = ${JSON.stringify(version)};\nconst SHELL = ${JSON.stringify(shell)};\n${worker}`,
);

await rm(path.join(root, "dist"), { recursive: true, force: true });
await rename(output, path.join(root, "dist"));
console.log(`web/dist: version ${version}, ${files.length + 1} files`);
