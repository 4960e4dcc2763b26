// The page: settings go to the workers, and their answers are drawn.

import { readAddress, writeAddress } from "./address.js";
import { listenToControls, showSettings } from "./controls.js";
import { boundaryAt, COLOURS, curves, layerChart, networkPicture, slicePicture, spectrumBars } from "./draw.js";
import { asPython } from "./python.js";
import { Grid, heightsOf } from "./grid.js";
import { DEFAULTS, blocksOf, valid } from "./settings.js";
import { STARTS } from "./starts.js";
import { ACTIVATION_NAMES, because, boundaryName, boundaryWords, headline, learning, number, spectrumWords, trainingWords, twinName } from "./words.js";

const $ = (selector) => document.querySelector(selector);
const FRAME = 1000 / 30, SPECTRUM_EVERY = 30;

// A worker made from the page's own source.
class WorkerClient {
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
  settings: readAddress(location.hash), shown: null, spectrum: null, selected: null, reading: "gradient",
  history: null, training: "idle", waiting: null, asked: null, around: null, grids: null, camera: { azimuth: -0.82, elevation: 0.52 },
};
let explorer, trainer;

const twinOf = (settings) => (settings.shortcut === "none" ? "without" : "with");
const names = (settings) => ({ with: twinName(settings, "with"), without: "without shortcuts" });

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
  clearTimeout(state.addressing); // browsers limit how often an address may change
  state.addressing = setTimeout(() => history.replaceState(null, "", writeAddress(state.settings)), 200);
  markStart();
  $("#code").textContent = asPython(settings);
  if (JSON.stringify(before) !== JSON.stringify(settings)) forgetTraining();
  askFlow();
}

function markStart() {
  const current = STARTS.findIndex((start) => writeAddress(valid(start.settings)) === writeAddress(state.settings));
  document.querySelectorAll("#starts a").forEach((link, i) => (i === current ? link.setAttribute("aria-current", "step") : link.removeAttribute("aria-current")));
  if (current >= 0) {
    $("#start-words").textContent = STARTS[current].words;
    $("#start-try").textContent = `${STARTS[current].tryThis}.`;
  }
  $("#start").classList.toggle("left", current < 0);
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
      state.shown = answer;
      draw();
    }
    if (!state.asked) askSpectrum(explorer, false);
  } else if (state.training === "idle") hearSpectrum(answer);
}

function askSpectrum(worker, trained) {
  state.spectrumAsked = performance.now();
  worker.ask("spectrum", { settings: state.settings, twin: twinOf(state.settings), trained });
}

function hearSpectrum(answer) {
  document.documentElement.dataset.spectrum = (performance.now() - state.spectrumAsked).toFixed(1);
  state.spectrum = answer;
  drawSpectrum();
}

// --- drawing

function draw() {
  if (!state.shown) return;
  const { settings, twins } = state.shown, twin = twinOf(settings);
  const [before, strong, after] = headline(settings, twins, twin);
  $("#headline").replaceChildren(before, Object.assign(document.createElement("b"), { textContent: strong }), after);
  $("#headline b").style.color = COLOURS[twin];
  $("#because").textContent = because(settings, twins, twin);
  const figure = $("#figure"), width = figure.clientWidth;
  const view = { width, settings, blocks: blocksOf(settings), twins, twin, selected: state.selected, reading: state.reading, names: names(settings) };
  for (const [id, picture] of [["#network", networkPicture(view)], ["#chart", layerChart(view)]]) {
    const svg = $(id);
    svg.setAttribute("viewBox", `0 0 ${width} ${picture.height}`);
    svg.style.height = `${picture.height}px`;
    svg.innerHTML = picture.svg;
  }
  $("#network").setAttribute("aria-label", `The network, input left, loss right. ${$("#headline").textContent}`);
  describeSelected(view);
  drawLecture(view);
  drawTable(view);
  speak();
  document.documentElement.dataset.drawn = Number(document.documentElement.dataset.drawn ?? 0) + 1;
}

// Announce the sentence on top to screen readers, once nothing has changed for a while.
function speak() {
  clearTimeout(state.speaking);
  if (state.training === "running") return;
  state.speaking = setTimeout(() => {
    $("#spoken").textContent = [$("#headline"), $("#training-words")].map((element) => element.textContent).join(" ");
  }, 700);
}

function describeSelected({ settings, blocks, twins, twin, selected }) {
  const slider = $("#figure");
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
  svg.innerHTML = spectrumBars(state.spectrum, width, height, state.spectrum.twin);
  const words = spectrumWords(state.spectrum);
  $("#spectrum-words").textContent = words;
  svg.setAttribute("aria-label", `How much gradient passes k branches. ${words}`);
}

function drawLecture({ settings, twins, names }) {
  $("#lecture").hidden = settings.data !== "lecture";
  if (settings.data !== "lecture") return;
  for (const twin of ["without", "with"]) {
    const lines = twins[twin].weights.map((v, i) => `layers.${i}.0.weight has gradient mean of ${Number(v.toPrecision(10))}`);
    $(`#lecture-${twin}`).textContent = lines.join("\n");
  }
  $("#lecture-with-name").textContent = names.with;
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
  state.grids = null;
  trainer.ask("stop");
  state.waiting = null;
  drawTraining();
}

function startTraining(running) {
  if (state.training === "idle") {
    state.since = trainer.ask("reset", { settings: state.settings });
    state.history = { steps: 0, with: emptyRecord(), without: emptyRecord() };
  }
  state.around = state.grids = null;
  state.training = running ? "running" : "paused";
  askStep();
}

function pauseTraining() {
  state.training = "paused";
  drawTraining();
  askSpectrum(trainer, true);
  speak();
}

const emptyRecord = () => ({ loss: [], moved: [], accuracy: [] });

function askStep() {
  if (state.waiting) return;
  state.waiting = performance.now();
  trainer.ask("step");
}

function hearTrainer({ kind, id, answer }) {
  // Answers to requests from before the reset are stale.
  if (state.training === "idle" || id < state.since) return;
  if (kind === "around") return hearAround(answer);
  if (kind === "spectrum") return hearSpectrum(answer);
  if (kind !== "step") return;
  const record = state.history;
  record.steps = answer.step + 1;
  for (const twin of ["with", "without"]) {
    const { loss, moved, accuracy } = answer.twins[twin];
    record[twin].loss.push(loss);
    record[twin].moved.push(moved[0]);
    if (accuracy !== undefined) record[twin].accuracy.push([answer.step, accuracy]);
  }
  state.shown = { settings: state.settings, twins: answer.flow };
  drawTraining();
  draw();
  const rest = Math.max(0, FRAME - (performance.now() - state.waiting));
  state.waiting = null;
  if (state.training === "paused" || record.steps % SPECTRUM_EVERY === 0) askSpectrum(trainer, true);
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
  const words = record ? trainingWords(settings, record, names(settings)) : "";
  $("#training-words").textContent = words;
  const differ = record && learning(settings, record.with) !== learning(settings, record.without);
  $("#after").textContent = differ ? words : "";
  if (!record) return;
  const width = $("#curve-loss").clientWidth, size = { width, height: 190 };
  const series = (pick) => Object.fromEntries(["without", "with"].map((twin) => [twin, pick(record[twin])]));
  const stepped = (values) => values.map((v, i) => [i, v]);
  put("#curve-loss", curves({ ...size, log: true, most: 100, series: series((r) => stepped(r.loss)) }), size, `Loss. ${words}`);
  put("#curve-moved", curves({ ...size, log: true, most: 1e4, series: series((r) => stepped(r.moved)) }), size, "How far the first layer's weights move in a step, as a share of their size.");
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

function measureAround() {
  const { settings, history: record } = state;
  for (const twin of ["with", "without"]) {
    const outcome = learning(settings, record[twin]);
    $(`#outcome-${twin}`).textContent = outcome === "learnt" ? "" : outcome === "overflowed" ? "overflowed: there is no surface" : `has ${outcome}: a flat surface says nothing`;
  }
  state.around = "asked";
  trainer.ask("around");
  $("#around").hidden = false;
}

function hearAround(answer) {
  if (!state.around) return;
  if (answer.slices) {
    state.around = answer;
    state.grids = { with: new Grid(answer.points), without: new Grid(answer.points) };
    drawSlice();
  }
  for (const [a, b, stride, ...losses] of answer.found ?? []) {
    ["with", "without"].forEach((twin, i) => state.grids[twin].add(a, b, stride, losses[i]));
  }
  drawSurfaces();
  $("#around-words").textContent = answer.done ? "Drag to turn; they turn together. Height and colour are the loss, on a log scale that both share." : "The surface fills in, from coarse to fine.";
  $("#around").dataset.done = answer.done ? "yes" : "no";
}

function drawSlice() {
  const size = { width: $("#slice").clientWidth, height: 210 };
  put("#slice", slicePicture(state.around, size.width, size.height), size, "The loss along a random direction through the trained weights, of both networks.");
}

function drawSurfaces() {
  if (!state.grids) return;
  const twins = Object.keys(state.grids), { shown, look } = heightsOf(Object.values(state.grids));
  const style = getComputedStyle(document.body), ink = { soft: style.getPropertyValue("--soft"), hair: style.getPropertyValue("--hair") };
  twins.forEach((twin, i) => Surface3D.draw($(`#surface-${twin}`), shown[i], look, state.camera, ink));
}

// Both turn together, by a drag or the arrow keys.
function makeTurnable(canvas) {
  let last = null;
  const turn = (across, up) => {
    state.camera.azimuth += across * 0.009;
    state.camera.elevation = Math.max(0.06, Math.min(Math.PI / 2, state.camera.elevation + up * 0.009));
    drawSurfaces();
  };
  canvas.addEventListener("pointerdown", (event) => {
    last = event;
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!last) return;
    turn(event.clientX - last.clientX, event.pointerType === "touch" ? 0 : event.clientY - last.clientY);
    last = event;
  });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => (last = null));
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [-12, 0], ArrowRight: [12, 0], ArrowUp: [0, 12], ArrowDown: [0, -12] }[event.key];
    if (!step) return;
    event.preventDefault();
    turn(...step);
  });
}

// --- events

function select(index) {
  if (index === state.selected) return;
  state.selected = index;
  draw();
}

function listen() {
  listenToControls(document, (name, value) => (name === "reading" ? ((state.reading = value), draw()) : change(name, value)));
  const figure = $("#figure"), most = () => blocksOf(state.shown.settings).length + 1;
  const point = (event) => state.shown && select(boundaryAt(blocksOf(state.shown.settings), figure.clientWidth, event.clientX - figure.getBoundingClientRect().left));
  figure.addEventListener("pointermove", point);
  figure.addEventListener("pointerdown", point);
  figure.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && select(null));
  figure.addEventListener("keydown", (event) => {
    if (!state.shown) return;
    const at = state.selected ?? 0, to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: most(), Escape: null }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    select(to === null ? null : Math.min(most(), Math.max(0, to)));
  });
  $("#train").addEventListener("click", () => (state.training === "running" ? pauseTraining() : startTraining(true)));
  $("#one").addEventListener("click", () => startTraining(false));
  $("#again").addEventListener("click", () => (forgetTraining(), askFlow()));
  $("#look").addEventListener("click", measureAround);
  $("#numbers").addEventListener("toggle", draw);
  $("#copy").addEventListener("click", copyCode);
  $("#more").addEventListener("click", () => {
    const open = $("#controls").classList.toggle("open");
    $("#more").setAttribute("aria-expanded", open);
    $("#more").textContent = open ? "Fewer controls" : "All controls";
  });
  for (const twin of ["with", "without"]) makeTurnable($(`#surface-${twin}`));
  addEventListener("hashchange", () => apply(readAddress(location.hash)));
  new ResizeObserver(drawSpectrum).observe($("#spectrum"));
  let resized = 0;
  addEventListener("resize", () => {
    cancelAnimationFrame(resized);
    resized = requestAnimationFrame(() => (draw(), drawSpectrum(), drawTraining(), state.around?.slices && drawSlice(), drawSurfaces()));
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
  explorer = new WorkerClient(source, digits);
  trainer = new WorkerClient(source, digits);
  explorer.hear = hearExplorer;
  trainer.hear = hearTrainer;
  $("#starts").innerHTML = STARTS.map((start, i) => `<li><a href="${writeAddress(valid(start.settings))}"><span>${i + 1}</span> ${start.name}</a></li>`).join("");
  listen();
  apply(readAddress(location.hash));
}

begin();
