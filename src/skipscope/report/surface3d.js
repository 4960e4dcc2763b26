// Loss surfaces in three dimensions on a plain 2-D canvas: no WebGL, no library.
//
// A height field over a grid hides nothing wrongly when its cells are painted from the farthest to the nearest
// (the painter's algorithm). Units: the plane is the square [-1/2, 1/2]^2, heights run from 0 to HEIGHT.
"use strict";
const Surface3D = (() => {
  const HEIGHT = 0.62;
  const FIRST = { azimuth: -0.82, elevation: 0.52 };
  const LIGHT = normalised([-0.5, -0.35, 0.9]);
  const LEVELS = 11;
  const TURN = 0.009; // radians a pixel
  const ROOM = 34; // pixels at the left for the labels of the height axis

  function normalised(v) {
    const length = Math.hypot(...v) || 1;
    return v.map((part) => part / length);
  }

  // Turn about the vertical axis, then tilt towards the eye: screen x, screen y (up), and depth (away from the eye).
  function projector(camera, width, height) {
    const [ca, sa] = [Math.cos(camera.azimuth), Math.sin(camera.azimuth)];
    const [ce, se] = [Math.cos(camera.elevation), Math.sin(camera.elevation)];
    const scale = Math.min((width - ROOM) / 1.44, height / 1.3);
    return (x, y, z) => {
      const across = ca * x - sa * y;
      const away = sa * x + ca * y;
      const up = (z - HEIGHT / 2) * ce + away * se;
      return [(width + ROOM) / 2 + across * scale, height / 2 - up * scale];
    };
  }

  // The colour of a height between 0 and 1, darker where the cell turns away from the light.
  function colourOf(ramp, part, shade) {
    const at = Math.max(0, Math.min(1, part)) * (ramp.length - 1);
    const i = Math.min(ramp.length - 2, Math.floor(at));
    const mixed = ramp[i].map((low, k) => Math.round((low + (ramp[i + 1][k] - low) * (at - i)) * shade));
    return `rgb(${mixed[0]},${mixed[1]},${mixed[2]})`;
  }

  function draw(canvas, surface, look, camera, ink) {
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    const brush = canvas.getContext("2d");
    brush.scale(ratio, ratio);
    brush.lineJoin = "round";
    const project = projector(camera, width, height);
    const part = (value) => (value - look.low) / (look.high - look.low || 1);
    floor(brush, project, ink);
    cells(brush, project, surface, look, part, camera);
    axis(brush, project, look, part, ink);
    canvas.dataset.camera = JSON.stringify(camera);
  }

  function floor(brush, project, ink) {
    brush.strokeStyle = ink.hair;
    brush.lineWidth = 1;
    for (let i = 0; i <= 4; i++) {
      const at = i / 4 - 0.5;
      for (const [from, to] of [[[at, -0.5], [at, 0.5]], [[-0.5, at], [0.5, at]]]) {
        brush.beginPath();
        brush.moveTo(...project(...from, 0));
        brush.lineTo(...project(...to, 0));
        brush.stroke();
      }
    }
  }

  function cells(brush, project, surface, look, part, camera) {
    const [columns, rows] = [surface.x.length, surface.y.length];
    const place = (values, i) => (values[i] - values[0]) / (values[values.length - 1] - values[0] || 1) - 0.5;
    const points = surface.z.map((row, j) =>
      row.map((value, i) => {
        if (value === null) return null;
        const [x, y, z] = [place(surface.x, i), place(surface.y, j), part(value) * HEIGHT];
        return { x, y, z, part: part(value), screen: project(x, y, z) };
      }),
    );
    // Which ends of the grid are far from the eye decides the order of painting.
    const xs = ordered(columns - 1, Math.sin(camera.azimuth) > 0);
    const ys = ordered(rows - 1, Math.cos(camera.azimuth) > 0);
    for (const j of ys) {
      for (const i of xs) {
        const corners = [points[j][i], points[j][i + 1], points[j + 1][i + 1], points[j + 1][i]];
        if (corners.some((corner) => corner === null)) continue;
        cell(brush, corners, look.ramp);
        levels(brush, corners);
      }
    }
  }

  function ordered(count, descending) {
    const indices = Array.from({ length: count }, (_, i) => i);
    return descending ? indices.reverse() : indices;
  }

  function cell(brush, corners, ramp) {
    const [a, b, c, d] = corners;
    // The cross product of the diagonals is the cell's normal.
    const u = [c.x - a.x, c.y - a.y, c.z - a.z];
    const v = [d.x - b.x, d.y - b.y, d.z - b.z];
    const normal = normalised([u[1] * v[2] - u[2] * v[1], u[2] * v[0] - u[0] * v[2], u[0] * v[1] - u[1] * v[0]]);
    const facing = Math.abs(normal[0] * LIGHT[0] + normal[1] * LIGHT[1] + normal[2] * LIGHT[2]);
    const mean = (a.part + b.part + c.part + d.part) / 4;
    brush.fillStyle = brush.strokeStyle = colourOf(ramp, mean, 0.62 + 0.38 * facing);
    brush.lineWidth = 0.5; // closes the seams between neighbours
    brush.beginPath();
    brush.moveTo(...a.screen);
    for (const corner of [b, c, d]) brush.lineTo(...corner.screen);
    brush.closePath();
    brush.fill();
    brush.stroke();
  }

  // The level lines that cross one cell, drawn with it so that nearer cells hide them.
  function levels(brush, corners) {
    const heights = corners.map((corner) => corner.part * LEVELS);
    const [low, high] = [Math.min(...heights), Math.max(...heights)];
    for (let level = Math.ceil(low); level <= high; level++) {
      if (level <= 0 || level >= LEVELS) continue;
      const crossed = [];
      for (let k = 0; k < 4; k++) {
        const [from, to] = [heights[k], heights[(k + 1) % 4]];
        if (from < level === to < level) continue;
        const share = (level - from) / (to - from);
        const [p, q] = [corners[k].screen, corners[(k + 1) % 4].screen];
        crossed.push([p[0] + (q[0] - p[0]) * share, p[1] + (q[1] - p[1]) * share]);
      }
      if (crossed.length < 2) continue;
      brush.strokeStyle = "rgba(255,255,255,.38)";
      brush.lineWidth = 0.9;
      brush.beginPath();
      brush.moveTo(...crossed[0]);
      brush.lineTo(...crossed[1]);
      brush.stroke();
    }
  }

  // The height axis stands at the corner that is leftmost on the screen, where nothing covers it.
  function axis(brush, project, look, part, ink) {
    const corners = [[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]];
    const [x, y] = corners.reduce((best, corner) => (project(...corner, 0)[0] < project(...best, 0)[0] ? corner : best));
    brush.strokeStyle = brush.fillStyle = ink.soft;
    brush.lineWidth = 1;
    brush.beginPath();
    brush.moveTo(...project(x, y, 0));
    brush.lineTo(...project(x, y, HEIGHT));
    brush.stroke();
    brush.font = "11px system-ui, sans-serif";
    brush.textAlign = "right";
    brush.textBaseline = "middle";
    let last = Infinity;
    look.ticks.forEach((tick, i) => {
      const [px, py] = project(x, y, part(tick) * HEIGHT);
      if (part(tick) < -0.02 || part(tick) > 1.02 || last - py < 13) return;
      last = py;
      brush.fillRect(px - 4, py - 0.5, 4, 1);
      brush.fillText(look.texts[i], px - 7, py);
    });
  }

  // Surfaces that share one camera: turning one turns all.
  function group(holders, data) {
    const look = { ...data, ramp: data.scale.map(([, rgb]) => rgb.match(/\d+/g).map(Number)) };
    const camera = { ...FIRST };
    const shown = holders.map((holder, i) => {
      const canvas = document.createElement("canvas");
      canvas.tabIndex = 0;
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", `${holder.dataset.label}, in three dimensions; arrow keys turn it`);
      holder.append(canvas);
      return [canvas, data.surfaces[i]];
    });
    let waiting = false;
    const redraw = () => {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => {
        waiting = false;
        const style = getComputedStyle(document.body);
        const ink = { soft: style.getPropertyValue("--soft").trim(), hair: style.getPropertyValue("--hair").trim() };
        for (const [canvas, surface] of shown) draw(canvas, surface, look, camera, ink);
      });
    };
    const turn = (across, up) => {
      camera.azimuth += across * TURN;
      camera.elevation = Math.max(0.06, Math.min(Math.PI / 2, camera.elevation + up * TURN));
      redraw();
    };
    for (const [canvas] of shown) {
      let at = null;
      canvas.addEventListener("pointerdown", (event) => {
        at = [event.clientX, event.clientY];
        canvas.setPointerCapture(event.pointerId);
      });
      canvas.addEventListener("pointermove", (event) => {
        if (!at) return;
        turn(event.clientX - at[0], event.clientY - at[1]);
        at = [event.clientX, event.clientY];
      });
      for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { at = null; });
      canvas.addEventListener("dblclick", () => { Object.assign(camera, FIRST); redraw(); });
      canvas.addEventListener("keydown", (event) => {
        const step = { ArrowLeft: [-12, 0], ArrowRight: [12, 0], ArrowUp: [0, 12], ArrowDown: [0, -12] }[event.key];
        if (!step) return;
        event.preventDefault();
        turn(...step);
      });
    }
    new ResizeObserver(redraw).observe(holders[0]);
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
    redraw();
  }

  return { group, draw };
})();
