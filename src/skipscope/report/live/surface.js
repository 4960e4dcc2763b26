// The loss around the weights: along random directions, each row as long as the row of the weights that it is added to
// (Li et al. 2018). Biases and norms stay as they are.

import { Generator, normal } from "./random.js";
import { copyNetwork } from "./build.js";
import { forward } from "./network.js";
import { lossOf } from "./layers.js";

// Random directions, in the order of the layers; both twins get the same draw, each at its own length.
export function directions(network, seed, count) {
  const generator = new Generator(seed);
  return Array.from({ length: count }, () =>
    network.blocks.flatMap((block) => block.layers).map((layer) => {
      const direction = new Float64Array(layer.weight.length);
      normal(generator, direction);
      for (let o = 0; o < layer.outputs; o++) {
        let own = 0, drawn = 0;
        for (let i = o * layer.inputs; i < (o + 1) * layer.inputs; i++) {
          own += layer.weight[i] ** 2;
          drawn += direction[i] ** 2;
        }
        for (let i = o * layer.inputs; i < (o + 1) * layer.inputs; i++) direction[i] *= Math.sqrt(own / drawn);
      }
      return direction;
    }),
  );
}

// A function of the distances along the directions: the loss there.
export function lossAround(network, directions, batch) {
  const moved = copyNetwork(network);
  const from = network.blocks.flatMap((block) => block.layers), to = moved.blocks.flatMap((block) => block.layers);
  return (...distances) => {
    to.forEach((layer, i) => {
      for (let k = 0; k < layer.weight.length; k++) {
        let value = from[i].weight[k];
        for (let d = 0; d < directions.length; d++) value += distances[d] * directions[d][i][k];
        layer.weight[k] = value;
      }
    });
    return lossOf(forward(moved, batch.x, batch.rows, false).output, batch.target, network.loss, batch.rows).loss;
  };
}

// Points of a square grid, coarse ones first, each with the spacing of its level.
export function progressive(points) {
  const order = [], seen = new Set();
  for (let stride = 8; stride >= 1; stride /= 2) {
    for (let a = 0; a < points; a += stride) {
      for (let b = 0; b < points; b += stride) {
        if (seen.has(a * points + b)) continue;
        seen.add(a * points + b);
        order.push([a, b, stride]);
      }
    }
  }
  return order;
}
