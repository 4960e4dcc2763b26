// Training: one step of an optimizer, as torch.optim computes it.

import { forward, gradients } from "./network.js";
import { parameters } from "./build.js";
import { l2 } from "./spectrum.js";

const MOMENTUM = 0.9, BETA1 = 0.9, BETA2 = 0.999, EPSILON = 1e-8;

// Each takes the parameter, its gradient, what is remembered of it, the rate and the step (from 1), and changes it.
const UPDATES = {
  sgd(p, g, memory, rate) {
    for (let k = 0; k < p.length; k++) p[k] -= rate * g[k];
  },
  momentum(p, g, memory, rate, step) {
    memory.speed ??= new Float64Array(p.length);
    for (let k = 0; k < p.length; k++) {
      memory.speed[k] = step === 1 ? g[k] : MOMENTUM * memory.speed[k] + g[k];
      p[k] -= rate * memory.speed[k];
    }
  },
  adam(p, g, memory, rate, step) {
    memory.mean ??= new Float64Array(p.length);
    memory.square ??= new Float64Array(p.length);
    const stride = rate / (1 - BETA1 ** step), root = Math.sqrt(1 - BETA2 ** step);
    for (let k = 0; k < p.length; k++) {
      memory.mean[k] += (1 - BETA1) * (g[k] - memory.mean[k]);
      memory.square[k] = BETA2 * memory.square[k] + (1 - BETA2) * g[k] * g[k];
      p[k] -= stride * (memory.mean[k] / (Math.sqrt(memory.square[k]) / root + EPSILON));
    }
  },
};

export class Training {
  constructor(network, optimizer, rate) {
    Object.assign(this, { network, optimizer, rate, step: 0, memory: parameters(network).map(() => ({})) });
  }

  // One step; returns the loss before it, and how far each layer's weights moved as a share of their size.
  advance(batch) {
    const { loss, weights } = gradients(this.network, batch), moved = [];
    const flat = weights.flatMap(({ norm, layers }) => [...(norm ? [norm] : []), ...layers]);
    const given = flat.flatMap((group) => [group.weight, group.bias]);
    const matrices = new Set(this.network.blocks.flatMap((block) => block.layers.map((layer) => layer.weight)));
    this.step += 1;
    parameters(this.network).forEach((p, i) => {
      const before = matrices.has(p) ? p.slice() : null;
      UPDATES[this.optimizer](p, given[i], this.memory[i], this.rate, this.step);
      if (before) moved.push(l2(p.map((value, k) => value - before[k])) / l2(before));
    });
    return { loss, moved };
  }
}

// The share of samples whose greatest output is that of their class.
export function accuracy(network, data) {
  const { output } = forward(network, data.x, data.rows, false), size = output.length / data.rows;
  let right = 0;
  for (let r = 0; r < data.rows; r++) {
    const row = output.subarray(r * size, (r + 1) * size);
    if (row.every(Number.isFinite) && row.indexOf(Math.max(...row)) === data.target[r]) right += 1;
  }
  return right / data.rows;
}
