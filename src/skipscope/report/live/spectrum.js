// How much gradient passes exactly k branches: the gradient is kept apart by that number on its way back.
// At a block, G_k <- strength * G_k + scale * J^T G_(k-1). All paths are counted, 2^blocks of them, none is sampled.

import { forward, backThroughBranch } from "./network.js";
import { lossOf } from "./layers.js";

// The L2 norm of each G_k at the input, and the mean length; pauses after every block, for other work.
export async function spectrum(network, batch, pause = async () => {}) {
  const rows = batch.rows, run = forward(network, batch.x, rows);
  let stack = lossOf(run.output, batch.target, network.loss, rows).gradient, lengths = 1;
  for (let b = network.blocks.length - 1; b >= 0; b--) {
    const block = network.blocks[b], through = backThroughBranch(block, run.blocks[b], stack, lengths * rows, rows);
    if (block.shortcut) {
      const size = stack.length / lengths, next = new Float64Array(size * (lengths + 1));
      for (let k = 0; k < stack.length; k++) {
        next[k] += network.strength * stack[k];
        next[k + size] += network.scale * through[k];
      }
      stack = next;
      lengths += 1;
    } else stack = through;
    await pause();
  }
  const size = stack.length / lengths;
  const norms = Array.from({ length: lengths }, (_, k) => l2(stack.subarray(k * size, (k + 1) * size)));
  const total = norms.reduce((a, b) => a + b, 0);
  return { norms, meanLength: total ? norms.reduce((sum, norm, k) => sum + k * norm, 0) / total : NaN };
}

// The L2 norm, also where the squares underflow or overflow.
export function l2(values) {
  let most = 0, sum = 0;
  for (const value of values) {
    const size = Math.abs(value);
    if (!(size <= most)) most = size;
  }
  if (!(most > 0) || !Number.isFinite(most)) return most;
  for (const value of values) sum += (value / most) ** 2;
  return most * Math.sqrt(sum);
}
