// What this device says of itself.

/** Threads for a runtime: half of the processors, at most four, as phones have few fast ones. */
export const threadCount = () => Math.max(1, Math.min(4, Math.floor((navigator.hardwareConcurrency || 2) / 2)));

/** The device in its own words, as plain JSON values; null where the browser keeps a thing to itself. */
export async function describeDevice() {
  const agent = navigator.userAgentData;
  const detail = agent ? await agent.getHighEntropyValues(["model", "platformVersion", "architecture"]).catch(() => ({})) : {};
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  return {
    user_agent: navigator.userAgent,
    platform: agent?.platform ?? navigator.platform ?? null,
    platform_version: detail.platformVersion || null,
    model: detail.model || null,
    architecture: detail.architecture || null,
    mobile: agent?.mobile ?? /Mobi/.test(navigator.userAgent),
    processors: navigator.hardwareConcurrency ?? null,
    memory_gb: navigator.deviceMemory ?? null,
    screen: `${screen.width}x${screen.height}@${devicePixelRatio}`,
    webgpu: adapter ? [adapter.info?.vendor, adapter.info?.architecture].filter(Boolean).join(" ") || "yes" : null,
    threads_allowed: self.crossOriginIsolated,
  };
}

/** Bytes of memory of the page, its workers and their WebAssembly; null where the browser does not tell. */
export async function memoryBytes(patience = 30_000) {
  if (!self.crossOriginIsolated || !performance.measureUserAgentSpecificMemory) return null;
  const late = new Promise((resolve) => setTimeout(resolve, patience, null));
  const measured = performance.measureUserAgentSpecificMemory().then((result) => result.bytes).catch(() => null);
  return Promise.race([measured, late]);
}
