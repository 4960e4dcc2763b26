// The settings, their ranges, and what follows from them.

export const CHOICES = {
  activation: ["gelu", "relu", "tanh", "sigmoid", "linear"],
  init: ["default", "xavier", "he", "orthogonal"],
  norm: ["none", "layer"],
  shortcut: ["none", "identity", "scaled"],
  data: ["lecture", "digits", "spirals"],
  optimizer: ["sgd", "momentum", "adam"],
};

// Smallest, largest, step.
export const RANGES = {
  depth: [2, 60, 1],
  width: [3, 64, 1],
  gain: [0.1, 3, 0.05],
  strength: [0, 1.5, 0.05],
  span: [1, 4, 1],
  seed: [0, 9999, 1],
  batch: [1, 64, 1],
  rate: [-5, 0.5, 0.1], // as a power of ten
};

export const DEFAULTS = {
  depth: 30, width: 32, activation: "gelu", init: "default", gain: 1, norm: "none", shortcut: "none", strength: 1,
  span: 1, seed: 123, data: "digits", batch: 16, optimizer: "sgd", rate: -1.5,
};

// Settings with defaults for what is missing or unknown, and every number within its range.
export function valid(wanted) {
  const settings = { ...DEFAULTS };
  for (const [name, choices] of Object.entries(CHOICES)) {
    if (choices.includes(wanted[name])) settings[name] = wanted[name];
  }
  for (const [name, [low, high, step]] of Object.entries(RANGES)) {
    const value = Number(wanted[name] ?? NaN);
    if (Number.isFinite(value)) settings[name] = Number((Math.round(Math.min(high, Math.max(low, value)) / step) * step).toFixed(4));
  }
  if (settings.data === "lecture") settings.batch = 1;
  return settings;
}

export const learningRate = (settings) => Number((10 ** settings.rate).toPrecision(2));

// The factors on the shortcut and on the branch: without shortcuts 0 and 1.
export function factors(settings, withShortcuts) {
  if (!withShortcuts) return { strength: 0, scale: 1 };
  return { strength: settings.strength, scale: settings.shortcut === "scaled" ? 1 / Math.sqrt(settings.depth) : 1 };
}

// The widths from input to output, and whether the output has an activation: the lecture's has.
export function shape(settings) {
  const inputs = { lecture: 3, digits: 64, spirals: 2 }[settings.data];
  const hidden = settings.data === "lecture" ? settings.depth - 1 : settings.depth;
  const outputs = { lecture: 1, digits: 10, spirals: 2 }[settings.data];
  return { inputs, hidden, outputs, activeOutput: settings.data === "lecture" };
}

// The hidden blocks in order, as the number of layers in each, and whether a shortcut goes around it.
export function blocksOf(settings) {
  const { inputs, hidden } = shape(settings), blocks = [];
  let left = hidden;
  if (inputs !== settings.width) {
    blocks.push({ layers: 1, shortcut: false });
    left -= 1;
  }
  for (; left > 0; left -= settings.span) blocks.push({ layers: Math.min(left, settings.span), shortcut: true });
  return blocks;
}
