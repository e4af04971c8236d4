// VERSION and SHELL stand above: the build writes them. The page is kept whole when the worker is installed,
// a runtime's WebAssembly when it is first used; models are kept by the page itself (src/files.js).
const PAGE = `martlet-page-${VERSION}`;
const MODELS = "martlet-models";
const base = new URL("./", self.location).href;

self.addEventListener("install", (event) => {
  event.waitUntil(keepShell());
});

async function keepShell() {
  const cache = await caches.open(PAGE);
  // Past the browser's own cache: it may hold files of an earlier build under the same names.
  await cache.addAll(SHELL.map((file) => new Request(base + file, { cache: "reload" })));
  await self.skipWaiting();
}

self.addEventListener("activate", (event) => {
  event.waitUntil(takeOver());
});

async function takeOver() {
  for (const name of await caches.keys()) {
    if (name.startsWith("martlet-page-") && name !== PAGE) await caches.delete(name);
  }
  await self.clients.claim();
}

self.addEventListener("fetch", (event) => {
  const url = new URL(event.request.url);
  if (event.request.method !== "GET" || url.origin !== self.location.origin) return;
  event.respondWith(answer(event.request, url).then(isolated));
});

async function answer(request, url) {
  const inPage = url.href.startsWith(base);
  const name = url.href.slice(base.length).replace(/[?#].*$/, "");
  if (!inPage) {
    const models = await caches.open(MODELS);
    return (await models.match(request, { ignoreSearch: true, ignoreVary: true })) ?? fetch(request);
  }
  const page = await caches.open(PAGE);
  if (name === "models.json") {
    // What is released may change under a page that is already kept.
    try {
      const fresh = await fetch(request, { cache: "no-cache" });
      if (fresh.ok) await page.put(base + name, fresh.clone());
      return fresh;
    } catch (error) {
      return (await page.match(base + name)) ?? Promise.reject(error);
    }
  }
  const kept = await page.match(base + (name || "index.html"));
  if (kept) return kept;
  const fetched = await fetch(request);
  if (/\.(wasm|m?js)$/.test(name) && fetched.ok && !name.startsWith("service-worker")) {
    await page.put(base + name, fetched.clone());
  }
  return fetched;
}

// Threads need a page that is cross-origin isolated; with these headers it is one on any static server.
function isolated(response) {
  if (response.status === 0 || response.type === "opaque") return response;
  const headers = new Headers(response.headers);
  headers.set("Cross-Origin-Opener-Policy", "same-origin");
  headers.set("Cross-Origin-Embedder-Policy", "require-corp");
  headers.set("Cross-Origin-Resource-Policy", "same-origin");
  const empty = [204, 205, 304].includes(response.status);
  return new Response(empty ? null : response.body, {
    status: response.status, statusText: response.statusText, headers,
  });
}
