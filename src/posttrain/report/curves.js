// Draws the figures that Python made; what is folded away is drawn when it is opened.
"use strict";
(() => {
  const { axes, figures } = JSON.parse(document.getElementById("curves-data").textContent);
  const config = { responsive: true, displayModeBar: false };
  const controls = document.getElementById("curve-controls");

  const isCurve = (plot) => plot.dataset.figure.startsWith("curve-");
  const drawn = () => document.querySelectorAll(".plot.js-plotly-plot");

  function draw(root) {
    for (const plot of root.querySelectorAll(".plot:not(.js-plotly-plot)")) {
      if (plot.closest("details:not([open])")) continue;
      const { data, layout } = figures[plot.dataset.figure];
      Plotly.newPlot(plot, data, layout, config);
      if (isCurve(plot)) choose(plot);
    }
  }

  // The chosen axis and stages, put on a curve that is drawn; one that belongs to no chosen stage goes out of sight.
  function choose(plot) {
    if (!controls) return;
    const chosen = new FormData(controls);
    const axis = axes[chosen.get("axis") ?? "step"];
    const hidden = [...controls.querySelectorAll("[name=stage]:not(:checked)")].map((box) => Number(box.value));
    const x = plot.data.map((trace) => trace.customdata.map((row) => axis.values[row]));
    const visible = plot.data.map((trace) => !hidden.includes(trace.meta));
    plot.closest("figure").hidden = !visible.includes(true);
    Plotly.update(plot, { x, visible }, { "xaxis.title.text": axis.title, "xaxis.autorange": true, "yaxis.autorange": true });
  }

  controls?.addEventListener("change", () => [...drawn()].filter(isCurve).forEach(choose));
  controls?.addEventListener("submit", (event) => event.preventDefault());
  for (const details of document.querySelectorAll("details")) {
    details.addEventListener("toggle", () => draw(details));
  }

  // Plotly fixes a figure's width in pixels, so paper, which is narrower than the screen, needs its own.
  window.addEventListener("beforeprint", () => {
    for (const plot of drawn()) Plotly.relayout(plot, { width: isCurve(plot) ? 320 : 640, autosize: false });
  });
  window.addEventListener("afterprint", () => {
    for (const plot of drawn()) Plotly.relayout(plot, { width: null, autosize: true });
  });

  draw(document);
})();
