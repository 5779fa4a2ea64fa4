"use strict";
// Shows a cursor and the values of all lines of a chart at the pointer, and the quantities of the
// token under the pointer. Shades tokens by the selected quantity.
(function () {
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  document.body.appendChild(tip);

  function shown(value) { return String(value).replace(/-/g, "\u2212"); }

  function nearest(xs, x) {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) { low = middle; } else { high = middle; }
    }
    return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
  }

  function say(text, event) {
    tip.textContent = text;
    tip.hidden = false;
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = Math.max(8, Math.min(room, event.pageX + 14)) + "px";
    tip.style.top = (event.pageY - tip.offsetHeight - 12) + "px";
  }

  function show(svg, chart, event) {
    const box = svg.getBoundingClientRect();
    const [x0, x1, , , left, right, top, bottom] = chart.frame;
    const width = svg.viewBox.baseVal.width, height = svg.viewBox.baseVal.height;
    const share = ((event.clientX - box.left) / box.width * width - left) / (width - left - right);
    const wanted = x0 + Math.min(1, Math.max(0, share)) * (x1 - x0);
    const first = chart.series[0].x;
    const at = first[nearest(first, wanted)];
    function place(x) { return chart.label + " " + shown(Number.isInteger(x) ? x : +x.toPrecision(3)); }
    const lines = chart.series.map(function (s) {
      const i = nearest(s.x, at);
      return s.name + "  " + shown(s.y[i]) + (s.x[i] === at ? "" : "  (" + place(s.x[i]) + ")");
    });
    say(place(at) + "\n" + lines.join("\n"), event);
    const x = left + (at - x0) / (x1 - x0) * (width - left - right);
    const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
    for (const [key, value] of [["x1", x], ["x2", x], ["y1", top], ["y2", height - bottom]]) {
      cursor.setAttribute(key, value);
    }
    svg.querySelector(".cursor").replaceChildren(cursor);
  }

  for (const svg of document.querySelectorAll("svg[data-chart]")) {
    const chart = JSON.parse(svg.dataset.chart);
    svg.addEventListener("pointermove", function (event) { show(svg, chart, event); });
    svg.addEventListener("pointerleave", function () {
      tip.hidden = true;
      svg.querySelector(".cursor").replaceChildren();
    });
  }

  // Quantities whose positive values are good.
  const SIGNED = new Set(
    ["advantage", "reward", "value", "gradient \u00d7 input", "integrated gradients", "Shapley value"]);

  function shade(box, name) {
    const values = JSON.parse(box.dataset.tokens)[name] || [];
    const largest = Math.max(...values.map(Math.abs)) || 1;
    const better = SIGNED.has(name);
    const [high, low] = better ? ["--good", "--bad"] : ["--proxy", "--c1"];
    for (const token of box.querySelectorAll("[data-at]")) {
      const value = values[token.dataset.at] || 0;
      const tone = "var(" + (value > 0 ? high : low) + ") " + 50 * Math.abs(value) / largest + "%";
      token.style.background = value ? "color-mix(in srgb, " + tone + ", transparent)" : "";
    }
  }

  for (const part of document.querySelectorAll(".shaded")) {
    const choice = part.querySelector("select"), boxes = part.querySelectorAll(".tokens");
    function repaint() { for (const box of boxes) { shade(box, choice.value); } }
    choice.addEventListener("change", repaint);
    repaint();
    for (const box of boxes) {
      box.addEventListener("pointerover", function (event) {
        const token = event.target.closest("[data-at]");
        tip.hidden = !token;
        if (!token) { return; }
        const known = Object.entries(JSON.parse(box.dataset.tokens));
        const lines = known.map(function (pair) { return pair[0] + "  " + shown(pair[1][token.dataset.at]); });
        say(JSON.stringify(token.textContent) + "\n" + lines.join("\n"), event);
      });
      box.addEventListener("pointerleave", function () { tip.hidden = true; });
    }
  }
})();
