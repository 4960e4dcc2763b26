// What the page shows of a network on a batch: the same quantities, in the same units, as skipscope's.

import { gradients } from "./network.js";
import { l2 } from "./spectrum.js";

const rms = (values) => l2(values) / Math.sqrt(values.length);

// gradient: RMS of dL/d(activation) at each boundary, with |dL/d(output)| = 1. factor: over the next boundary's.
// weights: mean |dL/dW| of each linear map. share: the gradient at the first linear map's output, over that at the last
// hidden boundary (L2 norms).
export function readings(network, batch) {
  const { run, loss, gradient, boundaries, weights, preactivations, branches } = gradients(network, batch);
  const output = l2(gradient), unit = output || 1, size = boundaries.map((g) => rms(g) / unit);
  const factor = size.map((g, i) => (i + 1 < size.length && size[i + 1] ? g / size[i + 1] : null));
  const means = weights.flatMap(({ layers }) => layers.map(({ weight }) => mean(weight)));
  // The last hidden boundary: the one before the output, or the last one where an activation follows it.
  const hidden = boundaries.length - (network.blocks.at(-1).activation === "linear" ? 2 : 1);
  const share = l2(preactivations[0]) / l2(boundaries[hidden]);
  // How much gradient arrives at a block's input through its branch and through its shortcut (RMS, in the same unit).
  const arrivals = network.blocks.map((block, b) => ({
    branch: rms(branches[b]) / unit,
    shortcut: block.shortcut ? (Math.abs(network.strength) * rms(boundaries[b + 1])) / unit : 0,
  }));
  return { loss, gradient: size, factor, weights: means, unit, output, share, hidden, layers: layerFacts(network, run), arrivals };
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
      slope: rms(run.blocks[b].slopes[i]),
      gain: rms(layer.weight) * Math.sqrt(layer.outputs),
    })),
  );
}
