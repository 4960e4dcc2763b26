// The surface of the loss as a relief: squares seen from the side, the farthest drawn first. Drag or use the arrow keys to turn.

// Colours from dark to light, even in lightness (nine stops of viridis).
const STOPS = [[68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141], [39, 173, 129], [92, 200, 99], [170, 220, 50], [253, 231, 37]];

function heightColour(part) {
  const at = Math.min(0.9999, Math.max(0, part)) * (STOPS.length - 1), i = Math.floor(at), t = at - i;
  return `rgb(${STOPS[i].map((c, k) => Math.round(c + t * (STOPS[i + 1][k] - c))).join(" ")})`;
}

// A square grid that is filled in from coarse to fine; a point not yet known has the value of the coarse one before it.
export class Relief {
  constructor(points) {
    Object.assign(this, { points, values: new Float64Array(points * points).fill(NaN), known: 0 });
  }

  add(a, b, stride, value) {
    const { points, values } = this;
    this.known += 1;
    for (let i = a; i < Math.min(points, a + stride); i++) {
      for (let j = b; j < Math.min(points, b + stride); j++) if (i === a && j === b || stride > 1) values[i * points + j] = value;
    }
  }
}

// Draws on a canvas; heights are logarithms of the loss, on a scale shared with the neighbour.
export function drawRelief(canvas, relief, turn, range) {
  const density = Math.min(2, window.devicePixelRatio || 1), width = canvas.clientWidth, height = canvas.clientHeight;
  if (canvas.width !== Math.round(width * density)) [canvas.width, canvas.height] = [Math.round(width * density), Math.round(height * density)];
  const context = canvas.getContext("2d"), n = relief.points, [low, high] = range;
  context.setTransform(density, 0, 0, density, 0, 0);
  context.clearRect(0, 0, width, height);
  const cos = Math.cos(turn), sin = Math.sin(turn), scale = Math.min(width / 2.9, height / 1.9);
  const part = (v) => (v > 0 && Number.isFinite(v) ? (Math.log10(v) - low) / (high - low || 1) : 1);
  const place = (i, j) => {
    const a = (2 * i) / (n - 1) - 1, b = (2 * j) / (n - 1) - 1, p = part(relief.values[i * n + j]);
    const across = a * cos - b * sin, away = a * sin + b * cos;
    return [width / 2 + across * scale, height * 0.62 + away * scale * 0.45 - (p - 0.5) * scale * 0.8, away, p];
  };
  const corners = Array.from({ length: n * n }, (_, k) => place(Math.floor(k / n), k % n)), faces = [];
  for (let i = 0; i < n - 1; i++) {
    for (let j = 0; j < n - 1; j++) {
      const four = [corners[i * n + j], corners[(i + 1) * n + j], corners[(i + 1) * n + j + 1], corners[i * n + j + 1]];
      if (Number.isFinite(relief.values[i * n + j])) faces.push([four[0][2] + four[2][2], four]);
    }
  }
  faces.sort((p, q) => p[0] - q[0]);
  context.lineJoin = "round";
  for (const [, four] of faces) {
    const fill = heightColour(four.reduce((sum, c) => sum + c[3], 0) / 4);
    context.beginPath();
    four.forEach(([x, y], k) => (k ? context.lineTo(x, y) : context.moveTo(x, y)));
    context.closePath();
    context.fillStyle = context.strokeStyle = fill;
    context.fill();
    context.stroke();
    context.strokeStyle = "rgb(255 255 255 / .16)";
    context.stroke();
  }
}

export function reliefRange(reliefs) {
  const logs = reliefs.flatMap((r) => [...r.values]).filter((v) => v > 0 && Number.isFinite(v)).map(Math.log10).sort((a, b) => a - b);
  return logs.length ? [logs[0], Math.max(logs[0] + 0.05, logs[Math.floor(logs.length * 0.98)])] : [0, 1];
}
