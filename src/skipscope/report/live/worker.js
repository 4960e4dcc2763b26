// Computes outside the page's own thread. One instance answers every change of a setting, another trains. A newer request
// of a kind cancels the older one.

import { buildNetwork, copyNetwork } from "./build.js";
import { batchOf, decodeDigits, loadData } from "./data.js";
import { readings } from "./readings.js";
import { factors, learningRate } from "./settings.js";
import { spectrum } from "./spectrum.js";
import { directions, lossAround, progressive } from "./surface.js";
import { accuracy, Training } from "./training.js";

const TWINS = ["with", "without"];
const SLICE = 61, SURFACE = 25, SURFACE_SAMPLES = 64, TEST_EVERY = 10;
const weights = { key: "", network: null };
let digits = null, training = null, latest = {};

// Lets waiting messages be handled; nested timeouts would each take at least four milliseconds.
const channel = new MessageChannel();
const pause = () =>
  new Promise((resolve) => {
    channel.port1.onmessage = resolve;
    channel.port2.postMessage(null);
  });

// The network with shortcuts or without; the weights are drawn once for both, and for every strength.
function networkOf(settings, twin) {
  const { depth, width, activation, init, gain, norm, span, seed, data } = settings;
  const key = JSON.stringify({ depth, width, activation, init, gain, norm, span, seed, data });
  if (weights.key !== key) Object.assign(weights, { key, network: buildNetwork(settings, true) });
  return { ...weights.network, ...factors(settings, twin === "with") };
}

const firstBatch = (settings) => batchOf(loadData(settings, digits).train, 0, settings.batch);

const ANSWERS = {
  // The flow of both twins, at the weights as drawn.
  flow({ settings }) {
    const started = performance.now(), batch = firstBatch(settings);
    const twins = Object.fromEntries(TWINS.map((twin) => [twin, readings(networkOf(settings, twin), batch)]));
    return { settings, twins, milliseconds: performance.now() - started };
  },

  // Of the network as drawn, or as trained so far. Throws once a newer request has come.
  async spectrum({ settings, twin, trained }, current) {
    const started = performance.now();
    const network = trained ? copyNetwork(training.twins[twin].network) : networkOf(settings, twin);
    const result = await spectrum(network, firstBatch(settings), async () => {
      await pause();
      if (!current()) throw new Superseded();
    });
    return { ...result, twin, milliseconds: performance.now() - started };
  },

  // New twins, not yet trained.
  reset({ settings }) {
    const { train, test } = loadData(settings, digits);
    const twins = Object.fromEntries(
      TWINS.map((twin) => [twin, new Training(copyNetwork(networkOf(settings, twin)), settings.optimizer, learningRate(settings))]),
    );
    training = { settings, train, test, twins };
    return null;
  },

  // One step of both, on the same batch.
  step() {
    const step = training.twins.with.step, batch = batchOf(training.train, step, training.settings.batch);
    const twins = Object.fromEntries(TWINS.map((twin) => [twin, training.twins[twin].advance(batch)]));
    if (training.test && step % TEST_EVERY === 0) {
      for (const twin of TWINS) twins[twin].accuracy = accuracy(training.twins[twin].network, training.test);
    }
    const first = firstBatch(training.settings);
    const flow = Object.fromEntries(TWINS.map((twin) => [twin, readings(training.twins[twin].network, first)]));
    return { step, twins, flow };
  },

  // The loss around the current weights: a slice, then a surface from coarse to fine, reported in parts.
  async around(request, current) {
    const batch = batchOf(training.train, 0, SURFACE_SAMPLES);
    const losses = Object.fromEntries(
      TWINS.map((twin) => {
        const { network } = training.twins[twin];
        return [twin, lossAround(network, directions(network, training.settings.seed, 2), batch)];
      }),
    );
    const along = Array.from({ length: SLICE }, (_, i) => (2 * i) / (SLICE - 1) - 1);
    const slices = Object.fromEntries(TWINS.map((twin) => [twin, along.map((a) => losses[twin](a, 0))]));
    report(request, { along, slices, points: SURFACE });
    let found = [], last = performance.now();
    for (const [a, b, stride] of progressive(SURFACE)) {
      const at = [a, b].map((i) => (2 * i) / (SURFACE - 1) - 1);
      found.push([a, b, stride, ...TWINS.map((twin) => losses[twin](...at))]);
      if (performance.now() - last > 60) {
        report(request, { found });
        [found, last] = [[], performance.now()];
        await pause();
        if (!current()) throw new Superseded();
      }
    }
    return { found, done: true };
  },

  stop: () => (training = null),
};

class Superseded extends Error {}

const report = (request, answer) => postMessage({ id: request.id, kind: request.kind, answer });

onmessage = async ({ data: request }) => {
  if (request.kind === "digits") {
    digits = decodeDigits(request.bytes);
    return;
  }
  // Training and measuring the surface share a slot: either cancels the other.
  const slot = request.kind === "flow" || request.kind === "spectrum" ? request.kind : "training";
  latest[slot] = request.id;
  if (request.kind === "flow") latest.spectrum = request.id;
  try {
    report(request, await ANSWERS[request.kind](request, () => latest[slot] === request.id));
  } catch (error) {
    if (!(error instanceof Superseded)) throw error;
  }
};
