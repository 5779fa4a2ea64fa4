"use strict";
// Values under the pointer: the nearest logged step of every line, and a thin cursor.
(function () {
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  document.body.appendChild(tip);

  function nearest(xs, x) {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) { low = middle; } else { high = middle; }
    }
    return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
  }

  function show(svg, chart, event) {
    const box = svg.getBoundingClientRect();
    const [x0, x1, , , left, right, top, bottom] = chart.frame;
    const width = svg.viewBox.baseVal.width, height = svg.viewBox.baseVal.height;
    const share = ((event.clientX - box.left) / box.width * width - left) / (width - left - right);
    const wanted = x0 + Math.min(1, Math.max(0, share)) * (x1 - x0);
    const first = chart.series[0].x;
    const at = first[nearest(first, wanted)];
    function place(x) { return chart.label + " " + (Number.isInteger(x) ? x : +x.toPrecision(3)); }
    const lines = chart.series.map(function (s) {
      const i = nearest(s.x, at);
      return s.name + "  " + s.y[i] + (s.x[i] === at ? "" : "  (" + place(s.x[i]) + ")");
    });
    tip.textContent = place(at) + "\n" + lines.join("\n");
    tip.hidden = false;
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = Math.max(8, Math.min(room, event.pageX + 14)) + "px";
    tip.style.top = (event.pageY - tip.offsetHeight - 12) + "px";
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
})();
