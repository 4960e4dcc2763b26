// A network as torch makes it from these settings and this seed, and its twin.

import { Generator } from "./random.js";
import { INITIALISATIONS, newLayerNorm, newLinear } from "./layers.js";
import { blocksOf, factors, shape } from "./settings.js";

// With shortcuts or without, from the same weights.
export function buildNetwork(settings, withShortcuts) {
  const { inputs, outputs, activeOutput } = shape(settings), generator = new Generator(settings.seed);
  const blocks = [];
  let width = inputs;
  for (const { layers, shortcut } of blocksOf(settings)) {
    const norm = shortcut && settings.norm === "layer" ? newLayerNorm(settings.width) : null;
    const block = { shortcut, norm, activation: settings.activation, layers: [] };
    for (let i = 0; i < layers; i++) {
      block.layers.push(newLinear(generator, width, settings.width));
      width = settings.width;
    }
    blocks.push(block);
  }
  const activation = activeOutput ? settings.activation : "linear";
  blocks.push({ shortcut: false, norm: null, activation, layers: [newLinear(generator, width, outputs)] });
  const chosen = (activeOutput ? blocks : blocks.slice(0, -1)).flatMap((block) => block.layers);
  for (const layer of chosen) {
    if (settings.init !== "default") {
      INITIALISATIONS[settings.init](generator, layer);
      layer.bias.fill(0);
    }
    for (let k = 0; k < layer.weight.length; k++) layer.weight[k] *= settings.gain;
  }
  return { blocks, loss: settings.data === "lecture" ? "squared" : "classes", ...factors(settings, withShortcuts) };
}

// The same network with weights of its own, and with these factors.
export function copyNetwork(network, { strength, scale } = network) {
  const copy = (layer) => layer && { ...layer, weight: layer.weight.slice(), bias: layer.bias.slice() };
  const blocks = network.blocks.map((b) => ({ ...b, norm: copy(b.norm), layers: b.layers.map(copy) }));
  return { ...network, blocks, strength, scale };
}

// Every parameter, in the order in which torch lists them.
export function parameters(network) {
  const groups = network.blocks.flatMap((block) => [...(block.norm ? [block.norm] : []), ...block.layers]);
  return groups.flatMap((group) => [group.weight, group.bias]);
}
