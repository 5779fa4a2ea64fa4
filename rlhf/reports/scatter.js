// Scatter plots: one point for each run, redrawn when another quantity is chosen for an axis.
(function () {
  const SVG = "http://www.w3.org/2000/svg";

  function element(name, attributes, text) {
    const node = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) { node.setAttribute(key, value); }
    if (text !== undefined) { node.textContent = text; }
    return node;
  }

  function shown(value) { return String(+value.toPrecision(3)).replace(/-/g, "\u2212"); }

  // Return four to six round numbers, the first at most `low` and the last at least `high`.
  function ticks(low, high) {
    if (low === high) { const half = Math.abs(low) / 10 || 1; low -= half; high += half; }
    const rough = (high - low) / 4, power = Math.pow(10, Math.floor(Math.log10(rough)));
    const step = power * [1, 2, 2.5, 5, 10].find(function (size) { return size * power >= rough; });
    const marks = [];
    for (let i = Math.floor(low / step); (i - 1) * step < high; i += 1) { marks.push(i * step); }
    return marks;
  }

  function draw(figure, data, chosen) {
    const svg = figure.querySelector("svg");
    const [width, height, left, right, top, bottom] = data.frame;
    const known = data.points.filter(function (point) {
      return chosen.x in point.values && chosen.y in point.values;
    });
    svg.replaceChildren();
    if (!known.length) {
      svg.append(element("text", { class: "tick", x: left, y: top + 16 }, "no run logged both"));
      return;
    }
    const marks = {}, place = {};
    for (const axis of ["x", "y"]) {
      const values = known.map(function (point) { return point.values[chosen[axis]]; });
      marks[axis] = ticks(Math.min(...values), Math.max(...values));
      const low = marks[axis][0], span = marks[axis][marks[axis].length - 1] - low;
      place[axis] = axis === "x"
        ? function (value) { return left + (value - low) / span * (width - left - right); }
        : function (value) { return height - bottom - (value - low) / span * (height - top - bottom); };
    }
    for (const value of marks.y) {
      const y = place.y(value);
      svg.append(element("line", { class: "grid", x1: left, x2: width - right, y1: y, y2: y }));
      svg.append(element("text", { class: "tick", x: left - 6, y: y + 3.5, "text-anchor": "end" }, shown(value)));
    }
    for (const value of marks.x) {
      const x = place.x(value);
      svg.append(element("line", { class: "grid", x1: x, x2: x, y1: top, y2: height - bottom }));
      svg.append(element("text", { class: "tick", x: x, y: height - bottom + 16, "text-anchor": "middle" }, shown(value)));
    }
    for (const point of known) {
      const x = point.values[chosen.x], y = point.values[chosen.y];
      const dot = element("circle", { class: "dot " + point.color, cx: place.x(x), cy: place.y(y), r: 4 });
      dot.append(element("title", {}, point.label + "\n" + chosen.y + "  " + shown(y) + "\n" + chosen.x + "  " + shown(x)));
      svg.append(dot);
    }
  }

  for (const figure of document.querySelectorAll("[data-scatter]")) {
    const data = JSON.parse(figure.dataset.scatter), chosen = {};
    for (const choice of figure.querySelectorAll("select")) {
      chosen[choice.dataset.axis] = choice.value;
      choice.addEventListener("change", function () {
        chosen[choice.dataset.axis] = choice.value;
        draw(figure, data, chosen);
      });
    }
    draw(figure, data, chosen);
  }
})();
