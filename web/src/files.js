// Files of a release: fetched with progress, kept for use without a network.

export const MODELS = "martlet-models";

/** The releases' root: the page lies in a folder of it. */
export const root = new URL("../", location.href);

/** What can be loaded: `models.json` beside the page. */
export async function readModels() {
  const response = await fetch("models.json").catch(() => null);
  if (!response?.ok) throw new Error("This page finds no models.json beside it; open it inside a release.");
  return response.json();
}

/** The cache of models, or null where the browser keeps none for this page (no HTTPS, private window). */
export async function modelCache() {
  try {
    return await caches.open(MODELS);
  } catch {
    return null;
  }
}

// The digest in the address: a new release's file of the same name is another file.
const addressOf = (file) => new URL(`${file.path}?sha256=${file.sha256.slice(0, 16)}`, root).href;

/** Whether all files of a model are kept already. */
export async function isKept(files) {
  const cache = await modelCache();
  if (!cache) return false;
  const found = await Promise.all(files.map((file) => cache.match(addressOf(file))));
  return found.every(Boolean);
}

/**
 * Fetches what is not kept yet, one file after the other.
 * @param files [{path, bytes, sha256}], paths from the release's root
 * @param onProgress told the bytes done and the bytes of all
 * @returns {blobs, kept}: one Blob a file; kept is false where the browser has no room or no cache
 * @throws an Error with a sentence if a file is missing or cut short, an AbortError if signal says so
 */
export async function fetchFiles(files, onProgress, signal) {
  const total = files.reduce((sum, file) => sum + file.bytes, 0);
  const cache = await modelCache();
  const blobs = [];
  let done = 0;
  let kept = cache !== null;
  for (const file of files) {
    let response = await cache?.match(addressOf(file));
    if (!response) {
      const before = done;
      const fetched = await fetchCounted(file, (count) => onProgress(before + count, total), signal);
      if (cache) kept = (await keep(cache, file, fetched)) && kept;
      response = new Response(fetched);
    }
    blobs.push(await response.blob());
    done += file.bytes;
    onProgress(done, total);
  }
  return { blobs, kept };
}

async function fetchCounted(file, onCount, signal) {
  let response;
  try {
    // The bytes go into our own cache; a second copy in the browser's would only take room.
    response = await fetch(addressOf(file), { signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(`${file.path} cannot be fetched; check the connection and try again.`);
  }
  if (!response.ok) throw new Error(`${file.path} is not there (HTTP ${response.status}).`);
  let count = 0;
  const counting = new TransformStream({
    transform(chunk, controller) {
      count += chunk.byteLength;
      onCount(count);
      controller.enqueue(chunk);
    },
  });
  const blob = await new Response(response.body.pipeThrough(counting)).blob();
  if (blob.size !== file.bytes) {
    throw new Error(`${file.path} has ${blob.size} bytes instead of ${file.bytes}; load it again.`);
  }
  return blob;
}

async function keep(cache, file, blob) {
  const address = addressOf(file);
  try {
    for (const request of await cache.keys(address, { ignoreSearch: true })) {
      if (request.url !== address) await cache.delete(request);
    }
    const headers = { "Content-Length": String(blob.size), "Content-Type": "application/octet-stream" };
    await cache.put(address, new Response(blob, { headers }));
    return true;
  } catch {
    return false; // no room left: the model runs all the same, it only has to be fetched again
  }
}
