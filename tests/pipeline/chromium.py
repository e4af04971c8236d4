"""Debian's Chromium, and what is asked of a page in it."""

from pathlib import Path

CHROMIUM = Path("/usr/bin/chromium")
CHROMIUM_FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)

# Pixels of the smallest letters in the pictures that are shown.
LETTERS = """() => Math.min(...[...document.querySelectorAll('svg text')]
  .filter((text) => text.checkVisibility() && text.textContent.trim())
  .map((text) => {
    const scale = text.getScreenCTM();  // of words that run upwards b is the scale and d is nothing
    return parseFloat(getComputedStyle(text).fontSize) * Math.hypot(scale.b, scale.d);
  }))"""

# WCAG 2.1 contrast of every text against the first opaque ground behind it; below 4.5 is listed.
CONTRAST = """() => {
  const parse = (c) => { const n = c.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const low = [];
  for (const element of document.querySelectorAll('body *')) {
    if (![...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
    if (element.tagName === 'title' || element.tagName === 'STYLE') continue;
    let ground = element;
    while (ground && parse(getComputedStyle(ground).backgroundColor)[3] === 0) ground = ground.parentElement;
    const style = getComputedStyle(element);
    const ink = parse(element.namespaceURI.endsWith('svg') ? style.fill : style.color);
    const [a, b] = [light(ink), light(parse(getComputedStyle(ground || document.body).backgroundColor))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push(`${element.tagName} ${element.textContent.slice(0, 30)} ${ratio.toFixed(2)}`);
  }
  return low;
}"""
