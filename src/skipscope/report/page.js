// Tips under the pointer, the slider, and the surfaces that turn: the page is whole without it.
"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("js");

  // Tips: a chart's own titles, shown at once and on touch too. Only ever as text.
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  document.body.append(tip);
  for (const title of document.querySelectorAll("svg title")) {
    title.parentElement.dataset.tip = title.textContent;
    title.remove();
  }
  document.addEventListener("pointerover", (event) => {
    const owner = event.target.closest && event.target.closest("[data-tip]");
    tip.hidden = !owner;
    if (!owner) return;
    tip.textContent = owner.dataset.tip;
    const width = root.clientWidth;
    tip.style.left = Math.max(4, Math.min(event.pageX + 12, width - tip.offsetWidth - 8)) + "px";
    tip.style.top = event.pageY + 16 + "px";
  });

  // The slider: one line strong, the others in the background.
  for (const slider of document.querySelectorAll(".slider")) {
    const input = slider.querySelector("input");
    const output = slider.querySelector("output");
    const labels = JSON.parse(slider.dataset.labels);
    const frames = slider.closest("figure").querySelectorAll("g.frame");
    const show = () => {
      output.textContent = labels[input.value];
      for (const frame of frames) {
        const on = frame.dataset.frame === input.value;
        frame.classList.toggle("on", on);
        if (on) frame.parentElement.append(frame);
      }
    };
    input.addEventListener("input", show);
    show();
  }

  // Surfaces: drawn when they come into sight; turning one turns its neighbours.
  const canDraw = () => {
    try {
      return Boolean(window.Plotly && document.createElement("canvas").getContext("webgl"));
    } catch {
      return false;
    }
  };
  const all = document.querySelectorAll(".scenes");
  if (all.length && !canDraw()) {
    for (const scenes of all) scenes.remove();
    return;
  }
  const colour = (name) => getComputedStyle(document.body).getPropertyValue(name).trim();
  const draw = (scenes) => {
    const data = JSON.parse(scenes.querySelector("script").textContent);
    // A surface without any height has nothing to draw, and would stop its neighbours.
    const shown = [...scenes.querySelectorAll(".canvas")]
      .map((canvas, i) => [canvas, data.surfaces[i]])
      .filter(([, surface]) => surface.z.flat().some((height) => height !== null));
    const side = { title: { text: "" }, showticklabels: false, showspikes: false, gridcolor: colour("--hair"), zeroline: false, showbackground: false };
    const drawn = shown.map(([canvas, heights]) => {
      const surface = {
        type: "surface", ...heights, cmin: data.low, cmax: data.high, colorscale: data.scale, showscale: false,
        hoverinfo: "skip", connectgaps: false,
        lighting: { ambient: 0.62, diffuse: 0.7, specular: 0.12, roughness: 0.8, fresnel: 0.1 },
        contours: { z: { show: true, start: data.low, end: data.high, size: (data.high - data.low) / 12 || 1, color: "rgba(255,255,255,.3)", width: 1 } },
      };
      const layout = {
        margin: { l: 0, r: 0, t: 0, b: 0 }, paper_bgcolor: "rgba(0,0,0,0)", showlegend: false,
        font: { family: "system-ui, sans-serif", size: 11, color: colour("--soft") },
        scene: {
          aspectmode: "manual", aspectratio: { x: 1, y: 1, z: 0.8 },
          xaxis: side, yaxis: side,
          zaxis: { ...side, range: [data.low, data.high], showticklabels: true, tickvals: data.ticks, ticktext: data.texts },
          camera: { eye: { x: 1.27, y: -1.37, z: 0.92 }, center: { x: 0, y: 0, z: -0.16 } },
          dragmode: "turntable",
        },
      };
      const config = { displayModeBar: false, showSendToCloud: false, responsive: true, scrollZoom: false };
      return window.Plotly.newPlot(canvas, [surface], layout, config);
    });
    Promise.all(drawn).then((plots) => {
      scenes.dataset.drawn = "yes";
      // Only the surface under the hand leads; the latest camera wins, also when the others are slow to follow.
      let leader = null;
      let wanted = null;
      let busy = false;
      const sync = () => {
        if (busy || !wanted) return;
        const camera = wanted;
        wanted = null;
        busy = true;
        const others = plots.filter((plot) => plot !== leader);
        requestAnimationFrame(() => {
          Promise.all(others.map((plot) => window.Plotly.relayout(plot, { "scene.camera": camera }))).finally(() => {
            busy = false;
            sync();
          });
        });
      };
      // A turned surface glides on for a moment after its last event: follow it until it rests.
      let still = Infinity;
      let last = "";
      const glide = () => {
        const camera = leader._fullLayout.scene._scene.getCamera();
        const now = JSON.stringify(camera);
        still = now === last ? still + 1 : 0;
        last = now;
        if (still === 0) {
          wanted = camera;
          sync();
        }
        if (still < 20) requestAnimationFrame(glide);
      };
      for (const plot of plots) {
        const lead = () => { leader = plot; };
        plot.addEventListener("pointerdown", lead, true);
        plot.addEventListener("wheel", lead, { capture: true, passive: true });
        const follow = (change) => {
          if (plot !== leader || !change["scene.camera"]) return;
          if (still >= 20) requestAnimationFrame(glide);
          still = 0;
        };
        plot.on("plotly_relayouting", follow);
        plot.on("plotly_relayout", follow);
      }
    });
  };
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      seen.unobserve(entry.target);
      draw(entry.target);
    }
  }, { rootMargin: "300px" });
  for (const scenes of all) seen.observe(scenes);
})();
