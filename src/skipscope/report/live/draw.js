// Drawing: the network with its arcs, the chart below it, bars, curves. All are strings of SVG, made again for each change.

import { boundaryName, number, powerOfTen } from "./words.js";

const LEFT = 46, RIGHT = 22;
export const COLOURS = { with: "var(--s0)", without: "var(--s1)" };

// The part of the width that belongs to the layers, shared by the network and the chart below it.
export function layerScale(width, layers) {
  return (layer) => LEFT + 10 + (layer / layers) * (width - LEFT - RIGHT - 20);
}

// Size relative to the gradient at the last hidden layer, to a thickness and a colour, both on a log scale.
function thickness(ratio) {
  if (!(ratio > 0)) return 0.5;
  const decades = Math.log10(Math.min(ratio, 1e30));
  return Math.min(15, Math.max(0.5, 4.5 + (decades < 0 ? 0.62 : 1.9) * decades));
}

function colour(twin, ratio) {
  if (!(ratio > 0)) return "var(--hair)";
  const decades = Math.log10(Math.min(ratio, 1e30));
  if (decades <= 0) return `color-mix(in oklab, ${COLOURS[twin]} ${Math.max(0, 100 + decades * 13).toFixed(0)}%, var(--faint))`;
  return `color-mix(in oklab, var(--loud) ${Math.min(100, decades * 28).toFixed(0)}%, ${COLOURS[twin]})`;
}

const stroke = (twin, ratio, most = 15) => `style="stroke:${colour(twin, ratio)};stroke-width:${Math.min(most, thickness(ratio)).toFixed(2)}"`;

// One network as a line from the input to the loss, its shortcuts as arcs above.
function lineOfLayers(shape, twin, reading, x, y, lift) {
  const reference = reading.gradient.at(-2) || reading.gradient.at(-1) || 1, out = [];
  let layer = 0;
  shape.forEach((block, b) => {
    const from = x(layer), to = x(layer + block.layers), { branch, shortcut } = reading.arrivals[b];
    out.push(`<path class="wire" d="M${to.toFixed(1)} ${y}H${from.toFixed(1)}"/>`);
    out.push(`<path class="flow" d="M${to.toFixed(1)} ${y}H${from.toFixed(1)}" ${stroke(twin, branch / reference)}/>`);
    if (block.shortcut && shortcut > 0) {
      const half = (to - from) / 2, height = Math.min(lift, 14 + half * 0.9);
      out.push(`<path class="flow arc" d="M${to.toFixed(1)} ${y}C${(to - half * 0.3).toFixed(1)} ${y - height * 1.3} ${(from + half * 0.3).toFixed(1)} ${y - height * 1.3} ${from.toFixed(1)} ${y}" ${stroke(twin, shortcut / reference, Math.max(1.5, half * 0.6))}/>`);
    }
    layer += block.layers;
  });
  return { parts: out.join(""), reference };
}

export function networkPicture(view) {
  const { width, blocks, twins, twin, selected, names } = view, other = twin === "with" ? "without" : "with";
  const shape = [...blocks, { layers: 1, shortcut: false }];
  const layers = shape.reduce((sum, b) => sum + b.layers, 0), x = layerScale(width, layers), gap = x(1) - x(0);
  const lift = 38, y = 78, below = 128, height = 158, wide = width > 560, out = [];
  const main = lineOfLayers(shape, twin, twins[twin], x, y, lift), faint = lineOfLayers(shape, other, twins[other], x, below, 26);
  out.push(`<g class="twin">${faint.parts}</g>`, main.parts);
  let layer = 0;
  shape.forEach((block, b) => {
    for (let i = 0; i < block.layers; i++) {
      const size = Math.min(9, Math.max(2, gap * 0.26)), middle = x(layer + i + 0.5);
      out.push(`<rect class="unit" x="${(middle - size / 2).toFixed(1)}" y="${(y - size / 2).toFixed(1)}" width="${size.toFixed(1)}" height="${size.toFixed(1)}" rx="1"/>`);
    }
    layer += block.layers;
    if (block.shortcut && twin === "with" && gap > 13) out.push(`<circle class="merge" cx="${x(layer).toFixed(1)}" cy="${y}" r="${Math.min(3.4, gap / 4).toFixed(1)}"/>`);
  });
  out.push(`<text class="end" x="${x(0) - 9}" y="${y + 4}" text-anchor="end">input</text><text class="end" x="${x(layers) + 8}" y="${y + 4}">loss</text>`);
  out.push(`<text class="own" x="${x(0)}" y="16" style="fill:${COLOURS[twin]}">${names[twin]}</text>`);
  out.push(`<text class="own light" x="${x(0)}" y="${below + 24}" style="fill:${COLOURS[other]}">its twin, ${names[other]}</text>`);
  out.push(`<text class="note" x="${x(layers)}" y="16" text-anchor="end">${wide ? "← the gradient comes back; the thicker and darker, the larger (log scale)" : "← the gradient"}</text>`);
  if (selected !== null) out.push(marker(boundaryX(shape, x, selected), 26, height));
  return { height, svg: out.join("") };
}

function boundaryX(shape, x, index) {
  return x(shape.slice(0, index).reduce((sum, b) => sum + b.layers, 0));
}

const marker = (x, from, to) => `<path class="pick" d="M${x.toFixed(1)} ${from}V${to}"/>`;

// A log scale for these values, over at most so many decades from the largest: where each value lies, and labelled ticks.
function logScale(values, top, bottom, most = 60) {
  const logs = values.filter((v) => v > 0 && Number.isFinite(v)).map(Math.log10);
  let [low, high] = logs.length ? [Math.min(...logs), Math.max(...logs)] : [-1, 1];
  const narrow = high - low < 1.2;
  if (narrow) [low, high] = [low - 0.15, high + 0.15];
  else [low, high] = [Math.floor(low - 0.02), Math.ceil(high + 0.02)];
  low = Math.max(low, high - most);
  const stride = Math.max(1, Math.ceil((high - low) / 6)), ticks = [];
  for (let t = Math.ceil(Math.floor(low) / stride) * stride; t <= high; t += stride) {
    for (const leading of narrow ? [1, 2, 5] : [1]) if (t + Math.log10(leading) >= low && t + Math.log10(leading) <= high) ticks.push([leading, t]);
  }
  const at = (v) => bottom - ((Math.min(high, Math.max(low, v > 0 ? Math.log10(v) : low)) - low) / (high - low)) * (bottom - top);
  return { at, low, ticks: ticks.map(([leading, t]) => [leading * 10 ** t, tickLabel(leading, t)]) };
}

function tickLabel(leading, exponent) {
  if (exponent >= -3 && exponent <= 3) return String(Number((leading * 10 ** exponent).toPrecision(3)));
  return leading === 1 ? powerOfTen(exponent) : `${leading} × ${powerOfTen(exponent)}`;
}

function gridLines(ticks, at, left, right) {
  return ticks.map(([value, label]) => {
    const y = at(value).toFixed(1);
    return `<path class="grid" d="M${left} ${y}H${right}"/><text class="tick" x="${left - 6}" y="${y}" dy=".32em" text-anchor="end">${label}</text>`;
  });
}

const DOTS = {
  with: (x, y, r) => `<circle cx="${x.toFixed(1)}" cy="${y.toFixed(1)}" r="${r}"/>`,
  without: (x, y, r) => `<rect x="${(x - r).toFixed(1)}" y="${(y - r).toFixed(1)}" width="${2 * r}" height="${2 * r}"/>`,
};

const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

function seriesOf(twin, points, faint, joined = true) {
  const dots = points.length > 70 ? "" : points.map(([x, y]) => DOTS[twin](x, y, faint ? 1.7 : 3)).join("");
  const line = joined ? `<path class="series" d="${path(points)}"/>` : "";
  return `<g class="${faint ? "twin" : "shown"}" style="--own:${COLOURS[twin]}">${line}${dots}</g>`;
}

// The three readings, layer by layer, on the same scale of layers as the network above.
export function layerChart(view) {
  const { width, blocks, twins, twin, selected, reading } = view, other = twin === "with" ? "without" : "with";
  const shape = [...blocks, { layers: 1, shortcut: false }], layers = shape.reduce((sum, b) => sum + b.layers, 0);
  const x = layerScale(width, layers), height = 204, top = 12, bottom = height - 28, out = [];
  const valuesOf = (t) => (reading === "weights" ? twins[t].weights : reading === "factor" ? twins[t].factor.slice(0, -1) : twins[t].gradient);
  const products = (t) => twins[t].gradient.map((g) => g / (twins[t].gradient.at(-1) || 1));
  const all = [valuesOf(twin), valuesOf(other), ...(reading === "factor" ? [products(twin), [1]] : [])].flat();
  const scale = logScale(all, top, bottom);
  const place = reading === "weights" ? (i) => x(i + 0.5) : (i) => boundaryX(shape, x, i);
  out.push(...gridLines(scale.ticks, scale.at, LEFT, width - RIGHT + 12));
  const points = (values) => values.map((v, i) => [place(i), scale.at(v), v]).filter(([, , v]) => Number.isFinite(v) && v >= 10 ** scale.low * 0.99);
  if (reading === "factor") {
    out.push(`<path class="level" d="M${LEFT} ${scale.at(1).toFixed(1)}H${width - RIGHT + 12}"/>`);
    out.push(`<g class="product" style="--own:${COLOURS[twin]}"><path class="series" d="${path(points(products(twin)))}"/></g>`);
    const end = points(products(twin))[0];
    if (end) out.push(`<text class="note" x="${(end[0] + 8).toFixed(1)}" y="${Math.max(top + 10, Math.min(bottom - 4, end[1] - 8)).toFixed(1)}">their product</text>`);
  }
  out.push(seriesOf(other, points(valuesOf(other)), true, reading !== "factor"), seriesOf(twin, points(valuesOf(twin)), false, reading !== "factor"));
  const stride = layers > 30 ? 10 : layers > 12 ? 5 : 1;
  for (let l = 0; l <= layers - 1; l += stride) if (x(layers) - x(l) > 28) out.push(`<text class="tick" x="${x(l).toFixed(1)}" y="${height - 9}" text-anchor="middle">${l === 0 ? "input" : l}</text>`);
  out.push(`<text class="tick" x="${x(layers).toFixed(1)}" y="${height - 9}" text-anchor="middle">out</text>`);
  if (selected !== null) out.push(marker(boundaryX(shape, x, selected), 0, bottom));
  return { height, svg: out.join("") };
}

// The boundary nearest to a place on the screen.
export function boundaryAt(blocks, width, place) {
  const shape = [...blocks, { layers: 1, shortcut: false }], layers = shape.reduce((sum, b) => sum + b.layers, 0), x = layerScale(width, layers);
  let best = 0;
  for (let i = 0; i <= shape.length; i++) if (Math.abs(boundaryX(shape, x, i) - place) < Math.abs(boundaryX(shape, x, best) - place)) best = i;
  return best;
}

// Bars: the share of the gradient that passes k branches.
export function spectrumBars({ norms, meanLength }, width, height, twin) {
  const total = norms.reduce((a, b) => a + b, 0), left = 4, right = width - 4, top = 22, bottom = height - 34;
  if (!(total > 0) || !Number.isFinite(total)) return "";
  const most = Math.max(...norms), step = (right - left) / norms.length, out = [];
  norms.forEach((norm, k) => {
    const tall = Math.max(norm > 0 ? 0.7 : 0, (norm / most) * (bottom - top));
    out.push(`<rect class="bar" style="--own:${COLOURS[twin]}" x="${(left + k * step + step * 0.1).toFixed(2)}" y="${(bottom - tall).toFixed(2)}" width="${(step * 0.8).toFixed(2)}" height="${tall.toFixed(2)}"><title>${k} branches: ${number((100 * norm) / total, 3)} %</title></rect>`);
  });
  out.push(`<path class="axis" d="M${left} ${bottom}H${right}"/>`);
  const stride = norms.length > 40 ? 20 : norms.length > 16 ? 10 : norms.length > 8 ? 5 : 1;
  for (let k = 0; k < norms.length; k += stride) out.push(`<text class="tick" x="${(left + (k + 0.5) * step).toFixed(1)}" y="${bottom + 15}" text-anchor="middle">${k}</text>`);
  out.push(`<text class="note" x="${(left + right) / 2}" y="${height - 2}" text-anchor="middle">branches passed</text>`);
  const mean = left + (meanLength + 0.5) * step;
  out.push(`<path class="mean" d="M${mean.toFixed(1)} ${top - 6}V${bottom}"/><text class="note" x="${mean.toFixed(1)}" y="${top - 10}" text-anchor="${mean > width * 0.7 ? "end" : mean < width * 0.3 ? "start" : "middle"}">mean ${number(meanLength, 3)}</text>`);
  return out.join("");
}

// Curves of the training, of both twins.
// What lies above `most` times the first values is drawn at that height: an overflow would hide all else.
export function curves({ series, width, height, log, most, from, to, label }) {
  const left = 46, right = width - 14, top = 10, bottom = height - 24, out = [];
  const length = Math.max(10, ...Object.values(series).map((points) => (points.length ? points.at(-1)[0] : 0)));
  const x = (step) => left + (step / length) * (right - left);
  let y, ticks;
  if (log) {
    const limit = most * Math.max(...Object.values(series).map((points) => points[0]?.[1] ?? 0));
    const scale = logScale(Object.values(series).flat().map((p) => Math.min(p[1], limit)), top, bottom, 12);
    [y, ticks] = [scale.at, scale.ticks];
  } else {
    y = (v) => bottom - ((Math.min(to, Math.max(from, v)) - from) / (to - from)) * (bottom - top);
    ticks = [0, 0.25, 0.5, 0.75, 1].map((t) => [from + t * (to - from), label(from + t * (to - from))]);
  }
  out.push(...gridLines(ticks, y, left, right));
  for (const [twin, points] of Object.entries(series)) {
    const stride = Math.max(1, Math.ceil(points.length / 320)), kept = points.filter((p, i) => (i % stride === 0 || i === points.length - 1) && Number.isFinite(p[1]) && (!log || p[1] > 0));
    if (kept.length) out.push(`<g class="curve ${twin}" style="--own:${COLOURS[twin]}"><path class="series" d="${path(kept.map(([s, v]) => [x(s), y(v)]))}"/>${DOTS[twin](x(kept.at(-1)[0]), y(kept.at(-1)[1]), 2.6)}</g>`);
  }
  out.push(`<text class="tick" x="${left}" y="${height - 6}">0</text><text class="tick" x="${right}" y="${height - 6}" text-anchor="end">${length} steps</text>`);
  return out.join("");
}

// A slice through the loss, of both twins.
export function slicePicture({ along, slices }, width, height) {
  const left = 46, right = width - 14, top = 10, bottom = height - 24, x = (a) => left + ((a + 1) / 2) * (right - left), out = [];
  const scale = logScale(Object.values(slices).flat(), top, bottom, 12);
  out.push(...gridLines(scale.ticks, scale.at, left, right));
  out.push(`<path class="pick" d="M${x(0).toFixed(1)} ${top}V${bottom}"/>`);
  for (const twin of ["without", "with"]) {
    const points = slices[twin].map((v, i) => [x(along[i]), scale.at(v), v]).filter((p) => p[2] > 0 && Number.isFinite(p[2]));
    out.push(`<g class="curve ${twin}" style="--own:${COLOURS[twin]}"><path class="series" d="${path(points)}"/></g>`);
  }
  for (const a of [-1, 0, 1]) out.push(`<text class="tick" x="${x(a).toFixed(1)}" y="${height - 6}" text-anchor="middle">${a === 0 ? "the weights" : a}</text>`);
  return out.join("");
}

export { boundaryName };
