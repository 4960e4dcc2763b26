// The page's sentences, made from the numbers that are shown.

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

// What becomes of the gradient between the last hidden layer and the first, as text, a number that stands out, and text.
function gradientWords({ share, loss, output }) {
  if (!Number.isFinite(loss)) return ["", "the numbers overflow", ": there is no gradient to follow"];
  if (output === 0) return ["the loss passes ", "no gradient", " on"];
  if (!Number.isFinite(share)) return ["", "no gradient", " reaches the last layer"];
  if (share === 0) return ["", "nothing", " of the gradient reaches the first layer"];
  if (share < 1 / 3) return ["", `one part in ${large(1 / share)}`, " of the gradient reaches the first layer"];
  if (share <= 3) return ["the first layer gets ", `${number(share)} times`, " the gradient of the last"];
  return ["the first layer gets ", `${large(share)} times`, ` the gradient of the last: it ${share < 100 ? "grows" : "explodes"}`];
}

// The sentence on top.
export function headline(settings, twins, twin) {
  const [before, strong, after] = gradientWords(twins[twin]);
  return [`${capital(twinName(settings, twin))}, ${before}`, strong, `${after}.`];
}

// The same about the twin, in short.
function twinWords(settings, { share, loss, output }, twin) {
  const name = capital(twinName(settings, twin));
  if (!Number.isFinite(loss)) return `${name}, the numbers overflow.`;
  if (output === 0) return `${name}, the loss passes no gradient on.`;
  if (!(share > 0)) return `${name}, nothing arrives.`;
  return share < 1 / 3 ? `${name}, one part in ${large(1 / share)} arrives.` : `${name}, ${number(share)} times as much arrives as left.`;
}

// Why, and what the twin does.
export function because(settings, twins, twin) {
  const other = twin === "with" ? "without" : "with", shown = twins[twin], last = twinWords(settings, twins[other], other);
  if (!Number.isFinite(shown.loss)) return `Each layer enlarges what it is given, until it is too large for a number. ${last}`;
  if (shown.output === 0) return `Every sample is right beyond rounding, or the output is saturated. ${last}`;
  if (!(shown.share > 0)) return `Somewhere on its way back it is multiplied by exactly zero. ${last}`;
  const factors = shown.factor.slice(1, shown.hidden).filter((f) => f > 0);
  if (!factors.length) return last;
  const typical = geometric(factors), plain = twin === "without" || settings.strength === 0;
  const each = settings.span > 1 && !plain ? "Each stretch with its shortcut" : "Each layer";
  const slope = geometric(shown.layers.map((l) => l.slope)), gain = geometric(shown.layers.slice(0, -1).map((l) => l.gain));
  const parts = plain ? ` (slope of its ${ACTIVATION_NAMES[settings.activation]} ${number(slope)}, gain of its weights ${number(gain)})` : "";
  return `${each} passes on ${number(typical, typical > 0.9 && typical < 1.1 ? 3 : 2)} of it${parts}${factors.length === 1 ? "" : `, ${factors.length} times over: ${productWords(typical, factors.length)}`}. ${last}`;
}

function productWords(factor, count) {
  const product = factor ** count;
  if (product < 1 / 3) return "a product of small quantities is smaller still";
  return product > 3 ? "a product of quantities above one is larger still" : "their product stays near one";
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
  const shown = twins[twin], name = boundaryName(blocks, index), gradient = `gradient ${number(shown.gradient[index], 3)}`;
  const factor = shown.factor[index] === null ? "" : `, factor ${number(shown.factor[index], 3)}`;
  if (index === 0) return `${name}: ${gradient}${factor}.`;
  const first = Math.min(shown.layers.length - 1, blocks.slice(0, index - 1).reduce((sum, b) => sum + b.layers, 0));
  const active = index <= blocks.length || settings.data === "lecture", { slope, gain } = shown.layers[first];
  const parts = `${active ? `slope of ${ACTIVATION_NAMES[settings.activation]} ${number(slope)}, ` : ""}weights’ gain ${number(gain)}`;
  return `${name}: ${gradient}${factor} (${parts}); a weight gets ${number(shown.weights[first])}.`;
}

// How many branches the gradient passes.
export function spectrumWords({ norms, meanLength }) {
  const total = norms.reduce((a, b) => a + b, 0), most = norms.length - 1;
  if (!(total > 0) || !Number.isFinite(total)) return "There is no gradient to take apart.";
  if (most === 0) return "No shortcut: there is one path.";
  if (norms[most] > 0.999 * total) return `All of it passes ${most === 1 ? "the one branch" : `all ${most} branches`}: there is no other path.`;
  let low = 0, high = most, sum = norms[0];
  while (sum < 0.05 * total) sum += norms[++low];
  sum = norms[most];
  while (sum < 0.05 * total) sum += norms[--high];
  const range = low === high ? `${low}` : `${low} to ${high}`;
  return `Nine tenths pass ${range} of ${most} branch${most === 1 ? "" : "es"}; the mean is ${number(meanLength, 3)}.`;
}

// Whether a network has learnt: its loss has fallen to a tenth, or it is at least half as far above chance as it can be.
export function learning(settings, { loss, accuracy }) {
  const last = loss.slice(-20).reduce((a, b) => a + b, 0) / Math.min(20, loss.length);
  if (!Number.isFinite(last)) return "overflowed";
  if (!accuracy.length) return last < 0.1 * loss[0] ? "learnt" : "not learnt";
  const chance = settings.data === "digits" ? 0.1 : 0.5, part = (accuracy.at(-1)[1] - chance) / (1 - chance);
  return part > 0.5 ? "learnt" : part > 0.12 ? "learnt a little" : "not learnt";
}

const LEARNING_WORDS = {
  learnt: "has learnt", "learnt a little": "has learnt a little", "not learnt": "has not learnt", overflowed: "has overflowed",
};

export function trainingWords(settings, history, names) {
  const state = { with: learning(settings, history.with), without: learning(settings, history.without) };
  const right = (twin) => {
    const { accuracy } = history[twin];
    return accuracy.length && state[twin] !== "overflowed" ? ` (${Math.round(100 * accuracy.at(-1)[1])} % of test samples right)` : "";
  };
  const join = state.with === state.without ? "and" : "while";
  const steps = `${history.steps.toLocaleString("en")} step${history.steps === 1 ? "" : "s"}`;
  return `After ${steps} the network ${names.with} ${LEARNING_WORDS[state.with]}${right("with")}, ${join} the one without ${LEARNING_WORDS[state.without]}${right("without")}.`;
}
