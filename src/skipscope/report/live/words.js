// What the page says in words: always true of what is shown.

const SUPERSCRIPTS = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };
export const ACTIVATION_NAMES = { gelu: "GELU", relu: "ReLU", tanh: "tanh", sigmoid: "sigmoid", linear: "linear" };

export const powerOfTen = (exponent) => `10${String(exponent).replace(/./g, (c) => SUPERSCRIPTS[c])}`;

// A number with two or three digits, in words where it is very large or small.
export function number(value, digits = 2) {
  if (value === null || value === undefined || Number.isNaN(value)) return "not a number";
  if (!Number.isFinite(value)) return "infinite";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e9 || size < 1e-4) {
    const exponent = Math.floor(Math.log10(size)), mantissa = (value / 10 ** exponent).toFixed(digits - 1);
    return Number.isFinite(Number(mantissa)) ? `${mantissa} × ${powerOfTen(exponent)}` : value.toExponential(digits - 1);
  }
  return Number(value.toPrecision(size >= 1 ? Math.max(digits, 2) : digits)).toLocaleString("en", { maximumFractionDigits: 8 });
}

function large(value) {
  return value >= 1e9 ? powerOfTen(Math.round(Math.log10(value))) : number(value);
}

export function twinName(settings, twin) {
  if (twin === "without") return "without shortcuts";
  const kind = settings.shortcut === "scaled" ? "scaled shortcuts" : "shortcuts";
  return `with ${kind}${settings.strength === 1 ? "" : ` of strength ${settings.strength}`}`;
}

const capital = (text) => text[0].toUpperCase() + text.slice(1);

// What becomes of the gradient from the last layer to the first: the number, and what is said of it.
function fate({ share, loss }) {
  if (!Number.isFinite(loss) || !Number.isFinite(share)) {
    return Number.isFinite(loss) ? ["no gradient", " leaves the loss"] : ["the numbers overflow", ": there is no gradient"];
  }
  if (share === 0) return ["nothing", " of the gradient reaches the first layer"];
  if (share < 1 / 3) return [`one part in ${large(1 / share)}`, " of the gradient reaches the first layer"];
  if (share <= 3) return [`${number(share)} times`, " the last layer's gradient reaches the first"];
  return [`${large(share)}-fold`, " the last layer's gradient arrives at the first: it explodes"];
}

// The sentence on top, as text before, a number that stands out, and text after.
export function headline(settings, twins, twin) {
  const [strong, rest] = fate(twins[twin]);
  const end = twins[twin].share > 3 && twins[twin].share < 100 ? rest.replace(": it explodes", ": it grows") : rest;
  return [`${capital(twinName(settings, twin))}, `, strong, `${end}.`];
}

// Why, and what the twin does.
export function because(settings, twins, twin) {
  const other = twin === "with" ? "without" : "with", shown = twins[twin];
  const [strong, rest] = fate(twins[other]);
  const aside = `${capital(twinName(settings, other))}: ${strong}${rest.replace(" of the gradient reaches the first layer", "").replace(/ the last layer's gradient.*/, "")}.`;
  if (!Number.isFinite(shown.loss)) return `Each layer enlarges what it is given until it is too large for a number. ${aside}`;
  if (!Number.isFinite(shown.share) || shown.share === 0) return `Somewhere on its way back it is multiplied by exactly zero. ${aside}`;
  const inner = shown.factor.slice(1, -1).filter((f) => f > 0), typical = geometric(inner);
  const slope = geometric(shown.layers.map((l) => l.slope)), gain = geometric(shown.layers.slice(0, -1).map((l) => l.gain));
  const count = inner.length;
  if (!count) return aside;
  const each = settings.span > 1 && twin === "with" ? "Each shortcut's stretch" : "Each layer";
  const parts = twin === "without" || settings.strength === 0 ? ` (slope of its ${ACTIVATION_NAMES[settings.activation]} ${number(slope)}, gain of its weights ${number(gain)})` : "";
  const product = typical < 0.95 ? "a product of small quantities is smaller still" : typical > 1.05 ? "a product of large ones is larger still" : "such a product neither shrinks nor grows much";
  return `${each} passes on ${number(typical)} of it${parts}, ${count} times over: ${product}. ${aside}`;
}

export function geometric(values) {
  return Math.exp(values.reduce((sum, v) => sum + Math.log(v), 0) / values.length);
}

// The name of a boundary: 0 is the input, the last one the output.
export function boundaryName(blocks, index) {
  if (index === 0) return "Input";
  if (index > blocks.length) return "Output";
  const before = blocks.slice(0, index - 1).reduce((sum, b) => sum + b.layers, 0), own = blocks[index - 1].layers;
  return own === 1 ? `Layer ${before + 1}` : `Layers ${before + 1} to ${before + own}`;
}

// One boundary in words.
export function boundaryWords(settings, blocks, twins, twin, index) {
  const shown = twins[twin], parts = [`gradient ${number(shown.gradient[index], 3)}`];
  if (index <= blocks.length && shown.factor[index] !== null) parts.push(`factor to the next ${number(shown.factor[index], 3)}`);
  if (index > 0) {
    const first = blocks.slice(0, index - 1).reduce((sum, b) => sum + b.layers, 0);
    const { slope, gain } = shown.layers[Math.min(first, shown.layers.length - 1)];
    const active = index <= blocks.length || settings.data === "lecture";
    if (active) parts.push(`slope of ${ACTIVATION_NAMES[settings.activation]} ${number(slope)}`);
    parts.push(`gain of the weights ${number(gain)}`, `a weight gets ${number(shown.weights[Math.min(first, shown.weights.length - 1)], 3)}`);
  }
  return `${boundaryName(blocks, index)}: ${parts.join("; ")}.`;
}

// How many branches the gradient passes.
export function spectrumWords({ norms, meanLength }) {
  const total = norms.reduce((a, b) => a + b, 0), most = norms.length - 1;
  if (!(total > 0) || !Number.isFinite(total)) return "There is no gradient to take apart.";
  if (most === 0) return "No shortcut: every path is the same.";
  let low = 0, high = most, sum = norms[0];
  while (sum < 0.05 * total) sum += norms[++low];
  sum = norms[most];
  while (sum < 0.05 * total) sum += norms[--high];
  const range = low === high ? `${low}` : `${low} to ${high}`;
  return `Nine tenths pass ${range} of ${most} branches; the mean is ${number(meanLength, 3)}.`;
}

// How the training goes: a twin has learnt where its loss has fallen well below the start's, or most samples are right.
export function trainingWords(settings, history, names) {
  const { steps } = history;
  if (!steps) return "";
  const learnt = {};
  for (const twin of ["with", "without"]) {
    const { loss, accuracy } = history[twin], last = loss.slice(-20).reduce((a, b) => a + b, 0) / Math.min(20, loss.length);
    const right = accuracy.length ? accuracy.at(-1)[1] : null, chance = settings.data === "digits" ? 0.1 : 0.5;
    learnt[twin] = !Number.isFinite(last) ? "broken" : right === null ? last < 0.1 * loss[0] : right > chance + (1 - chance) / 2 ? true : right > chance + (1 - chance) / 8 ? "partly" : false;
  }
  const verb = (twin) => ({ true: "has learnt", false: "has not learnt", partly: "has learnt a little", broken: "has overflowed" })[learnt[twin]];
  const right = (twin) => (history[twin].accuracy.length ? ` (${Math.round(100 * history[twin].accuracy.at(-1)[1])} % of test samples right)` : "");
  const join = learnt.with === learnt.without ? "and" : "while";
  return `After ${steps.toLocaleString("en")} steps the network ${names.with} ${verb("with")}${right("with")}, ${join} the one without ${verb("without")}${right("without")}.`;
}
