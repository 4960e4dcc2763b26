// The page: settings go to the workers, what they answer is drawn. Nothing else is kept.

import { readAddress, writeAddress } from "./address.js";
import { listenToControls, showSettings } from "./controls.js";
import { boundaryAt, COLOURS, curves, layerChart, networkPicture, slicePicture, spectrumBars } from "./draw.js";
import { asPython } from "./python.js";
import { drawRelief, Relief, reliefRange } from "./relief.js";
import { DEFAULTS, blocksOf, valid } from "./settings.js";
import { STARTS } from "./starts.js";
import { ACTIVATION_NAMES, because, boundaryName, boundaryWords, headline, number, spectrumWords, trainingWords, twinName } from "./words.js";

const $ = (selector) => document.querySelector(selector);
const FRAME = 1000 / 30;

// A worker, and the answers that are awaited from it.
class Helper {
  constructor(source, digits) {
    this.worker = new Worker(URL.createObjectURL(new Blob([source], { type: "text/javascript" })));
    this.worker.onmessage = ({ data }) => this.hear?.(data);
    this.worker.onerror = (event) => console.error(event.message);
    this.worker.postMessage({ kind: "digits", bytes: digits });
    this.id = 0;
  }

  ask(kind, request = {}) {
    this.worker.postMessage({ id: ++this.id, kind, ...request });
    return this.id;
  }
}

const state = {
  settings: readAddress(location.hash), twins: null, spectrum: null, selected: null, reading: "gradient",
  history: null, training: "idle", waiting: null, asked: null, around: null, reliefs: null, turn: 0.7,
};
let explorer, trainer;

const shownTwin = () => (state.settings.shortcut === "none" ? "without" : "with");
const names = () => ({ with: twinName(state.settings, "with"), without: "without shortcuts" });

// --- settings

function change(name, value) {
  const settings = valid({ ...state.settings, [name]: value });
  if (name === "data" && value !== "lecture" && state.settings.data === "lecture") settings.batch = DEFAULTS.batch;
  apply(settings);
}

function apply(settings) {
  const before = state.settings;
  state.settings = settings;
  state.selected = null;
  showSettings(document, settings);
  history.replaceState(null, "", writeAddress(settings));
  markStart();
  $("#code").textContent = asPython(settings);
  if (JSON.stringify(before) !== JSON.stringify(settings) || !state.twins) forgetTraining();
  askFlow();
}

function markStart() {
  const current = STARTS.findIndex((start) => writeAddress(valid(start.settings)) === writeAddress(state.settings));
  document.querySelectorAll("#starts a").forEach((link, i) => (i === current ? link.setAttribute("aria-current", "step") : link.removeAttribute("aria-current")));
  if (current >= 0) {
    $("#start-words").textContent = STARTS[current].words;
    $("#start-try").textContent = `${STARTS[current].attempt}.`;
  }
  $("#start").classList.toggle("left", current < 0);
  $("#lecture").hidden = !(state.settings.data === "lecture");
}

// --- the flow and the spectrum, at the weights as drawn

function askFlow() {
  if (state.asked) {
    state.again = true;
    return;
  }
  state.asked = performance.now();
  explorer.ask("flow", { settings: state.settings });
}

function hearExplorer({ kind, answer }) {
  if (kind === "flow") {
    document.documentElement.dataset.flow = (performance.now() - state.asked).toFixed(1);
    state.asked = null;
    if (state.again) {
      state.again = false;
      askFlow();
    }
    if (state.training === "idle") {
      state.twins = answer.twins;
      draw();
    }
    if (!state.asked) explorer.ask("spectrum", { settings: state.settings, twin: shownTwin() });
    state.spectrumAsked = performance.now();
  } else {
    document.documentElement.dataset.spectrum = (performance.now() - state.spectrumAsked).toFixed(1);
    state.spectrum = answer;
    drawSpectrum();
  }
}

// --- drawing

function draw() {
  if (!state.twins) return;
  const { settings, twins } = state, twin = shownTwin();
  const [before, strong, after] = headline(settings, twins, twin);
  $("#headline").replaceChildren(before, Object.assign(document.createElement("b"), { textContent: strong }), after);
  $("#headline b").style.color = COLOURS[twin];
  $("#because").textContent = because(settings, twins, twin);
  const figure = $("#figure"), width = figure.clientWidth;
  const view = { width, blocks: blocksOf(settings), twins, twin, selected: state.selected, reading: state.reading, names: names() };
  for (const [id, picture] of [["#network", networkPicture(view)], ["#chart", layerChart(view)]]) {
    const svg = $(id);
    svg.setAttribute("viewBox", `0 0 ${width} ${picture.height}`);
    svg.style.height = `${picture.height}px`;
    svg.innerHTML = picture.svg;
  }
  $("#network").setAttribute("aria-label", `The network, input left, loss right. ${$("#headline").textContent}`);
  describeSelected(view);
  drawLecture();
  drawTable(view);
  document.documentElement.dataset.drawn = Number(document.documentElement.dataset.drawn ?? 0) + 1;
}

function describeSelected({ blocks, twins, twin }) {
  const { selected, settings } = state, slider = $("#figure");
  slider.setAttribute("aria-valuemax", blocks.length + 1);
  slider.setAttribute("aria-valuenow", selected ?? 0);
  const words = selected === null ? "" : boundaryWords(settings, blocks, twins, twin, selected);
  slider.setAttribute("aria-valuetext", words || "No layer chosen; use the arrow keys.");
  $("#layer-words").textContent = words || "Point at a layer, tap it, or use the arrow keys.";
  $("#layer-words").classList.toggle("empty", !words);
}

function drawSpectrum() {
  if (!state.spectrum) return;
  const svg = $("#spectrum"), width = svg.clientWidth, height = svg.clientHeight;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.innerHTML = spectrumBars(state.spectrum, width, height, shownTwin());
  const words = spectrumWords(state.spectrum);
  $("#spectrum-words").textContent = words;
  svg.setAttribute("aria-label", `How much gradient passes k branches. ${words}`);
}

function drawLecture() {
  if ($("#lecture").hidden) return;
  for (const twin of ["without", "with"]) {
    const lines = state.twins[twin].weights.map((v, i) => `layers.${i}.0.weight has gradient mean of ${Number(v.toPrecision(10))}`);
    $(`#lecture-${twin}`).textContent = lines.join("\n");
  }
  $("#lecture-with-name").textContent = names().with;
}

function drawTable({ blocks, twins, twin }) {
  if (!$("#numbers").open) return;
  const rows = twins[twin].gradient.map((_, i) => {
    const cells = [boundaryName(blocks, i), ...["with", "without"].flatMap((t) => [twins[t].gradient[i], twins[t].factor[i]]).map((v) => (v === null ? "" : number(v, 4)))];
    return `<tr>${cells.map((c, k) => (k ? `<td class="n">${c}</td>` : `<th scope="row">${c}</th>`)).join("")}</tr>`;
  });
  $("#numbers tbody").innerHTML = rows.join("");
}

// --- training

function forgetTraining() {
  state.training = "idle";
  state.history = null;
  state.around = null;
  state.reliefs = null;
  trainer.ask("stop");
  state.waiting = null;
  drawTraining();
}

function startTraining(running) {
  if (state.training === "idle") {
    trainer.ask("reset", { settings: state.settings });
    state.history = { steps: 0, with: emptyRecord(), without: emptyRecord() };
  }
  state.around = state.reliefs = null;
  state.training = running ? "running" : "paused";
  askStep();
}

const emptyRecord = () => ({ loss: [], moved: [], accuracy: [] });

function askStep() {
  if (state.waiting) return;
  state.waiting = performance.now();
  trainer.ask("step");
}

function hearTrainer({ kind, id, answer }) {
  if (kind === "around") return hearAround(answer);
  if (kind !== "step" || state.training === "idle" || id !== trainer.id) return;
  const record = state.history;
  record.steps = answer.step + 1;
  for (const twin of ["with", "without"]) {
    const { loss, moved, accuracy } = answer.twins[twin];
    record[twin].loss.push(loss);
    record[twin].moved.push(moved[0]);
    if (accuracy !== undefined) record[twin].accuracy.push([answer.step, accuracy]);
  }
  state.twins = answer.flow;
  drawTraining();
  draw();
  const rest = Math.max(0, FRAME - (performance.now() - state.waiting));
  state.waiting = null;
  if (state.training === "running") setTimeout(() => state.training === "running" && askStep(), rest);
}

function drawTraining() {
  const { history: record, settings, training } = state, running = training === "running";
  $("#train").textContent = running ? "Pause" : record ? "Go on" : "Train both";
  $("#train").setAttribute("aria-pressed", running);
  $("#again").disabled = !record;
  $("#training").classList.toggle("empty", !record);
  $("#look").disabled = !record || running;
  if (!state.around) $("#around").hidden = true;
  const words = record ? trainingWords(settings, record, names()) : "";
  $("#training-words").textContent = words;
  $("#after").textContent = words && record.steps > 1 ? words : "";
  if (!record) return;
  const width = $("#curve-loss").clientWidth, size = { width, height: 190 };
  const series = (pick) => Object.fromEntries(["without", "with"].map((twin) => [twin, pick(record[twin])]));
  const stepped = (values) => values.map((v, i) => [i, v]);
  put("#curve-loss", curves({ ...size, log: true, series: series((r) => stepped(r.loss)) }), size, `Loss. ${words}`);
  put("#curve-moved", curves({ ...size, log: true, series: series((r) => stepped(r.moved)) }), size, "How far the first layer's weights move in a step, as a share of their size.");
  $("#accuracy").hidden = settings.data === "lecture";
  if (settings.data !== "lecture") put("#curve-accuracy", curves({ ...size, from: 0, to: 1, label: (v) => `${100 * v} %`, series: series((r) => r.accuracy) }), size, "Share of test samples that are right.");
}

function put(selector, svg, { width, height }, label) {
  const element = $(selector);
  element.setAttribute("viewBox", `0 0 ${width} ${height}`);
  element.innerHTML = svg;
  element.setAttribute("aria-label", label);
}

// --- the loss around the weights

function look() {
  state.around = "asked";
  trainer.ask("around");
  $("#around").hidden = false;
}

function hearAround(answer) {
  if (!state.around) return;
  if (answer.slices) {
    state.around = answer;
    state.reliefs = { with: new Relief(answer.points), without: new Relief(answer.points) };
    drawSlice();
  }
  for (const [a, b, stride, ...losses] of answer.found ?? []) {
    ["with", "without"].forEach((twin, i) => state.reliefs[twin].add(a, b, stride, losses[i]));
  }
  drawReliefs();
  $("#around-words").textContent = answer.done ? "Drag to turn; they turn together. Height and colour are the loss, on a log scale that both share." : "The surface fills in, from coarse to fine.";
  $("#around").dataset.done = answer.done ? "yes" : "no";
}

function drawSlice() {
  const size = { width: $("#slice").clientWidth, height: 210 };
  put("#slice", slicePicture(state.around, size.width, size.height), size, "The loss along a random direction through the trained weights, of both networks.");
}

function drawReliefs() {
  if (!state.reliefs) return;
  const range = reliefRange(Object.values(state.reliefs));
  for (const twin of ["with", "without"]) drawRelief($(`#relief-${twin}`), state.reliefs[twin], state.turn, range);
}

function turnable(canvas) {
  let last = null;
  canvas.addEventListener("pointerdown", (event) => {
    last = event.clientX;
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (last === null) return;
    state.turn += (event.clientX - last) / 140;
    last = event.clientX;
    drawReliefs();
  });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => (last = null));
  canvas.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -0.1, ArrowRight: 0.1 }[event.key];
    if (!by) return;
    state.turn += by;
    event.preventDefault();
    drawReliefs();
  });
}

// --- hands on the page

function select(index) {
  if (index === state.selected) return;
  state.selected = index;
  draw();
}

function listen() {
  listenToControls(document, (name, value) => (name === "reading" ? ((state.reading = value), draw()) : change(name, value)));
  const figure = $("#figure"), most = () => blocksOf(state.settings).length + 1;
  const point = (event) => select(boundaryAt(blocksOf(state.settings), figure.clientWidth, event.clientX - figure.getBoundingClientRect().left));
  figure.addEventListener("pointermove", point);
  figure.addEventListener("pointerdown", point);
  figure.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && select(null));
  figure.addEventListener("keydown", (event) => {
    const at = state.selected ?? 0, to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: most(), Escape: null }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    select(to === null ? null : Math.min(most(), Math.max(0, to)));
  });
  $("#train").addEventListener("click", () => (state.training === "running" ? ((state.training = "paused"), drawTraining()) : startTraining(true)));
  $("#one").addEventListener("click", () => startTraining(false));
  $("#again").addEventListener("click", () => (forgetTraining(), askFlow()));
  $("#look").addEventListener("click", look);
  $("#numbers").addEventListener("toggle", draw);
  $("#copy").addEventListener("click", copyCode);
  $("#more").addEventListener("click", () => {
    const open = $("#controls").classList.toggle("open");
    $("#more").setAttribute("aria-expanded", open);
    $("#more").textContent = open ? "Fewer controls" : "All controls";
  });
  for (const twin of ["with", "without"]) turnable($(`#relief-${twin}`));
  addEventListener("hashchange", () => apply(readAddress(location.hash)));
  let resized = 0;
  addEventListener("resize", () => {
    cancelAnimationFrame(resized);
    resized = requestAnimationFrame(() => (draw(), drawSpectrum(), drawTraining(), state.around?.slices && drawSlice(), drawReliefs()));
  });
}

async function copyCode() {
  try {
    await navigator.clipboard.writeText($("#code").textContent);
  } catch {
    const range = document.createRange();
    range.selectNodeContents($("#code"));
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    document.execCommand("copy");
  }
  $("#copy").textContent = "Copied";
  setTimeout(() => ($("#copy").textContent = "Copy"), 1500);
}

async function unpack(element) {
  const packed = Uint8Array.from(atob(element.textContent.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function begin() {
  const source = $("#mathematics").textContent, digits = await unpack($("#digits"));
  explorer = new Helper(source, digits);
  trainer = new Helper(source, digits);
  explorer.hear = hearExplorer;
  trainer.hear = hearTrainer;
  $("#starts").innerHTML = STARTS.map((start, i) => `<li><a href="${writeAddress(valid(start.settings))}"><span>${i + 1}</span> ${start.name}</a></li>`).join("");
  listen();
  apply(state.settings);
}

begin();
