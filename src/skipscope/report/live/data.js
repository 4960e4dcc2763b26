// The data: the lecture's single input, handwritten digits, or two spirals.

import { Generator, permutation } from "./random.js";

const SPIRAL_TRAIN = 512, SPIRAL_TEST = 256;
const DIGITS_TRAIN = 1437;

// All digits, from the page: 64 bytes an image, then a byte for each class.
export function decodeDigits(bytes) {
  const count = bytes.length / 65;
  return { pixels: Float64Array.from(bytes.subarray(0, count * 64), (v) => v / 16), classes: bytes.subarray(count * 64) };
}

// The samples to learn from in a shuffled order, and those to test on.
export function loadData(settings, digits) {
  if (settings.data === "lecture") {
    return { train: { x: Float64Array.of(1, 0, -1), target: Float64Array.of(0), rows: 1, inputs: 3 }, test: null };
  }
  if (settings.data === "spirals") {
    const all = spirals(settings.seed);
    return { train: part(all, 0, SPIRAL_TRAIN), test: part(all, SPIRAL_TRAIN, SPIRAL_TEST) };
  }
  const all = { x: digits.pixels, target: digits.classes, inputs: 64 };
  const order = permutation(new Generator(settings.seed), DIGITS_TRAIN);
  const test = part(all, DIGITS_TRAIN, digits.classes.length - DIGITS_TRAIN);
  return { train: pick(all, order), test };
}

function spirals(seed) {
  const count = SPIRAL_TRAIN + SPIRAL_TEST, generator = new Generator(seed);
  const unit = Float64Array.from({ length: 3 * count }, () => generator.unit());
  const x = new Float64Array(2 * count), target = new Uint8Array(count);
  for (let r = 0; r < count; r++) {
    target[r] = r % 2;
    const radius = Math.sqrt(unit[r]), angle = 3 * Math.PI * radius + Math.PI * target[r];
    x[2 * r] = radius * Math.cos(angle) + 0.1 * (unit[count + r] - 0.5);
    x[2 * r + 1] = radius * Math.sin(angle) + 0.1 * (unit[2 * count + r] - 0.5);
  }
  return { x, target, inputs: 2 };
}

function pick({ x, target, inputs }, order) {
  const chosen = { x: new Float64Array(order.length * inputs), target: target.slice(0, order.length), rows: order.length, inputs };
  order.forEach((from, to) => {
    chosen.x.set(x.subarray(from * inputs, (from + 1) * inputs), to * inputs);
    chosen.target[to] = target[from];
  });
  return chosen;
}

function part({ x, target, inputs }, from, rows) {
  return { x: x.slice(from * inputs, (from + rows) * inputs), target: target.slice(from, from + rows), rows, inputs };
}

// The batch of a step: one after the other, from the start again at the end.
export function batchOf(train, step, size) {
  const order = Array.from({ length: Math.min(size, train.rows) }, (_, i) => (step * size + i) % train.rows);
  return pick(train, order);
}
