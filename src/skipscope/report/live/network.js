// The network: forward, and the chain rule going back. All other numbers on the page come from these two.
//
// A network is a row of blocks. A block is a branch F (layer norm if asked for, then linear maps with activations) with
// a shortcut around it, or a branch alone where the widths differ:
//     y = strength * x + scale * F(x)        y = F(x)
// A boundary is where skipscope reads the gradient: the input, each block's output, and the linear map's output of a
// block without a shortcut.

import { ACTIVATIONS, layerNorm, layerNormBack, layerNormGradient, linear, linearBack, lossOf, weightGradient } from "./layers.js";

// Runs the network; returns its output, and for each block what the way back needs.
export function forward(network, x, rows, withSlopes = true) {
  const blocks = network.blocks.map((block) => {
    const seen = { x, norm: block.norm ? layerNorm(x, block.norm, rows) : null, inputs: [], slopes: [] };
    const [activation, slope] = ACTIVATIONS[block.activation];
    let value = seen.norm ? seen.norm.y : x;
    for (const layer of block.layers) {
      const preactivation = linear(value, layer, rows);
      seen.inputs.push(value);
      seen.slopes.push(withSlopes ? preactivation.map(slope) : null);
      value = preactivation.map(activation);
    }
    if (block.shortcut) {
      for (let k = 0; k < value.length; k++) value[k] = network.strength * x[k] + network.scale * value[k];
    }
    x = value;
    return seen;
  });
  return { output: x, blocks, rows };
}

// The chain rule through a block's branch, from its output to its input. Row r of the gradient belongs to sample
// r % samples. `each` is given the gradient at every linear map's output, and `atNorm` the one at the norm's output.
export function backThroughBranch(block, seen, gradient, rows, samples, each = null, atNorm = null) {
  for (let i = block.layers.length - 1; i >= 0; i--) {
    const slopes = seen.slopes[i], atPreactivation = new Float64Array(gradient.length);
    for (let start = 0; start < gradient.length; start += slopes.length) {
      for (let k = 0; k < slopes.length; k++) atPreactivation[start + k] = gradient[start + k] * slopes[k];
    }
    if (each) each(i, atPreactivation);
    gradient = linearBack(atPreactivation, block.layers[i], rows);
  }
  if (!block.norm) return gradient;
  if (atNorm) atNorm(gradient);
  return layerNormBack(gradient, block.norm, seen.norm, rows, samples);
}

// The gradient at every boundary, of every weight, at the first linear map's output of each block
// (preactivations) and out of each branch (branches), from the gradient at the output.
export function backward(network, { blocks, rows }, gradient) {
  const boundaries = [], weights = [], preactivations = [], branches = [];
  for (let b = network.blocks.length - 1; b >= 0; b--) {
    const block = network.blocks[b], seen = blocks[b], own = { norm: null, layers: [] };
    const here = gradient;
    const toBranch = block.shortcut ? here.map((g) => network.scale * g) : here;
    if (block.shortcut) boundaries.unshift(here);
    const each = (i, atPreactivation) => {
      own.layers[i] = weightGradient(atPreactivation, seen.inputs[i], block.layers[i], rows);
      if (i === 0) preactivations[b] = atPreactivation;
      if (!block.shortcut) boundaries.unshift(atPreactivation);
    };
    const atNorm = (g) => (own.norm = layerNormGradient(g, seen.norm, block.norm.inputs, rows));
    branches[b] = backThroughBranch(block, seen, toBranch, rows, rows, each, atNorm);
    gradient = block.shortcut ? branches[b].map((g, k) => g + network.strength * here[k]) : branches[b];
    weights[b] = own;
  }
  boundaries.unshift(gradient);
  return { boundaries, weights, preactivations, branches };
}

// Loss and gradients of one batch.
export function gradients(network, batch) {
  const run = forward(network, batch.x, batch.rows);
  const { loss, gradient } = lossOf(run.output, batch.target, network.loss, batch.rows);
  return { run, loss, gradient, ...backward(network, run, gradient) };
}
