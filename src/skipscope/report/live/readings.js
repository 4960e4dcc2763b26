// What the page shows of a network on a batch: the same quantities, in the same units, as skipscope's.

import { backThroughBranch, gradients } from "./network.js";
import { ACTIVATIONS, linearBack } from "./layers.js";
import { l2 } from "./spectrum.js";

const rms = (values) => l2(values) / Math.sqrt(values.length);

// gradient: RMS of dL/d(activation) at each boundary, with |dL/d(output)| = 1. factor: over the next boundary's.
// weights: mean |dL/dW| of each linear map. fall: decades lost from the last hidden boundary to the first layer.
export function readings(network, batch) {
  const { run, loss, gradient, boundaries, weights, firstSums } = gradients(network, batch);
  const unit = l2(gradient) || 1, size = boundaries.map((g) => rms(g) / unit);
  const factor = size.map((g, i) => (i + 1 < size.length && size[i + 1] ? g / size[i + 1] : null));
  const means = weights.flatMap(({ layers }) => layers.map(({ weight }) => mean(weight)));
  const head = network.blocks.at(-1).activation === "linear" && network.blocks.at(-1).layers.length === 1;
  const last = l2(boundaries[boundaries.length - (head ? 2 : 1)]), first = l2(firstSums[0]);
  const arrivals = network.blocks.map((block, b) => arrivalsAt(network, block, run.blocks[b], boundaries[b + 1], batch.rows, unit));
  return { loss, gradient: size, factor, weights: means, unit, share: first / last, layers: layerFacts(network, run), arrivals };
}

// How much gradient arrives at a block's input through its branch and through its shortcut (RMS, in the same unit).
function arrivalsAt(network, block, seen, gradient, rows, unit) {
  if (!block.shortcut) return { branch: rms(linearBack(gradient, block.layers[0], rows)) / unit, shortcut: 0 };
  const branch = backThroughBranch(block, seen, gradient.map((g) => network.scale * g), rows, rows);
  return { branch: rms(branch) / unit, shortcut: (Math.abs(network.strength) * rms(gradient)) / unit };
}

function mean(values) {
  let sum = 0;
  for (const value of values) sum += Math.abs(value);
  return sum / values.length;
}

// Of each linear map: the RMS slope of its activation, and its weights' gain on a gradient (RMS weight times
// sqrt(outputs)): their product is the factor that a random gradient would get on its way through.
function layerFacts(network, run) {
  return network.blocks.flatMap((block, b) =>
    block.layers.map((layer, i) => ({
      slope: rms(run.blocks[b].sums[i].map(ACTIVATIONS[block.activation][1])),
      gain: rms(layer.weight) * Math.sqrt(layer.outputs),
      size: rms(run.blocks[b].sums[i]),
    })),
  );
}
