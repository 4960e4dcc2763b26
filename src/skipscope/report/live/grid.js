// A square grid of losses that is filled in from coarse to fine, for the surfaces that turn (../surface3d.js).

// Colours from dark to light, even in lightness (nine stops of viridis).
const RAMP = [[68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141], [39, 173, 129], [92, 200, 99], [170, 220, 50], [253, 231, 37]];

export class Grid {
  constructor(points) {
    const along = Array.from({ length: points }, (_, i) => (2 * i) / (points - 1) - 1);
    Object.assign(this, { points, x: along, y: along, z: along.map(() => along.map(() => null)) });
  }

  // The logarithm of a loss, at a point and at those after it that are not measured yet.
  add(a, b, stride, loss) {
    const height = loss > 0 && Number.isFinite(loss) ? Math.log10(loss) : null;
    for (let i = a; i < Math.min(this.points, a + stride); i++) {
      for (let j = b; j < Math.min(this.points, b + stride); j++) this.z[j][i] = height;
    }
  }
}

// The range of heights that these grids share, with ticks; the highest fiftieth is cut off.
export function heightsOf(grids) {
  const heights = grids.flatMap((grid) => grid.z.flat()).filter((z) => z !== null).sort((a, b) => a - b);
  const low = heights[0] ?? 0, high = Math.max(low + 0.1, heights[Math.floor(heights.length * 0.98)] ?? 1), ticks = [];
  for (let t = Math.floor(low); t <= high; t++) for (const leading of high - low < 2 ? [1, 2, 5] : [1]) ticks.push(t + Math.log10(leading));
  const cut = (z) => (z === null ? null : Math.min(z, high));
  const shown = grids.map((grid) => ({ ...grid, z: grid.z.map((row) => row.map(cut)) }));
  return { shown, look: { low, high, ticks, texts: ticks.map((t) => String(Number((10 ** t).toPrecision(1)))), ramp: RAMP } };
}
