// The interactive figure of llmbook.precision.show_bits: flip the bits of a number, see its value.
// Plain JavaScript without a library, a kernel or a network. It may run several times on one page,
// once with each figure; every run serves the figures that have no buttons yet.
(function () {
  "use strict";

  function element(name, attributes, parent, text) {
    const node = document.createElement(name);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    if (text !== undefined) node.textContent = text;
    parent.appendChild(node);
    return node;
  }

  // Arrow keys move within a row of buttons, and only one of them is a stop for the Tab key.
  function moveByArrows(buttons, moved) {
    function stopAt(index) {
      buttons.forEach(function (button, at) { button.tabIndex = at === index ? 0 : -1; });
    }
    buttons.forEach(function (button, index) {
      button.addEventListener("focus", function () { stopAt(index); });
      button.addEventListener("keydown", function (event) {
        const steps = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 };
        let next = index + (steps[event.key] || 0);
        if (event.key === "Home") next = 0;
        if (event.key === "End") next = buttons.length - 1;
        if (next === index || next < 0 || next >= buttons.length) return;
        event.preventDefault();
        buttons[next].focus();
        if (moved) moved(next);
      });
    });
    stopAt(0);
  }

  // The value of a code; the same rules as FloatFormat.decode.
  function decode(format, code) {
    const m = format.fraction, span = Math.pow(2, format.exponent + m);
    const magnitude = code % span, sign = code >= span ? -1 : 1;
    const exponent = Math.floor(magnitude / Math.pow(2, m)), fraction = magnitude % Math.pow(2, m);
    const bias = Math.pow(2, format.exponent - 1) - 1;
    const number = {
      sign: sign, exponent: exponent, fraction: fraction, power: Math.max(exponent, 1) - bias,
      lead: exponent > 0 ? 1 : 0
    };
    const last = exponent === Math.pow(2, format.exponent) - 1;
    if (format.top === "infinity" && last) number.value = fraction ? NaN : sign * Infinity;
    else if (format.top === "nan" && magnitude === span - 1) number.value = NaN;
    else number.value = sign * (number.lead + fraction / Math.pow(2, m)) * Math.pow(2, number.power);
    return number;
  }

  function shown(value) {
    if (Number.isNaN(value)) return "not a number (NaN)";
    if (!Number.isFinite(value)) return value > 0 ? "infinity" : "−infinity";
    if (Object.is(value, -0)) return "−0";
    return String(Number(value.toPrecision(8))).replace("-", "−");
  }

  function start(figure) {
    figure.setAttribute("data-ready", "");
    const data = JSON.parse(figure.querySelector("script[type='application/json']").textContent);
    const stage = element("div", { class: "stage" }, figure);
    figure.insertBefore(stage, figure.firstChild);
    figure.querySelector("details").open = false; // the table is open where no script runs
    const choices = element(
      "div", { class: "formats", role: "toolbar", "aria-label": "Format" }, stage);
    const row = element("div", { class: "bits", role: "toolbar", "aria-label": "Bits" }, stage);
    const report = element("p", { class: "report", "aria-live": "polite" }, stage);
    const formatButtons = data.formats.map(function (format) {
      return element("button", { type: "button" }, choices, format.name);
    });
    let format, code, bitButtons;

    function bitsOf() { return 1 + format.exponent + format.fraction; }

    // Codes of the sign bit run away from zero; -1 steps toward it and over it.
    function ordered(from) {
      const half = Math.pow(2, bitsOf() - 1);
      return from >= half ? half - from : from;
    }
    function codeOf(place) { return place < 0 ? Math.pow(2, bitsOf() - 1) - place : place; }

    function show() {
      const number = decode(format, code), count = bitsOf();
      bitButtons.forEach(function (button, at) {
        const bit = Math.floor(code / Math.pow(2, count - 1 - at)) % 2;
        const field = at === 0 ? "sign" : at <= format.exponent ? "exponent" : "fraction";
        button.textContent = String(bit);
        button.className = field;
        button.setAttribute("aria-pressed", String(bit === 1));
        button.setAttribute("aria-label", field + ", bit " + (count - 1 - at) + ": " + bit);
      });
      report.textContent = "";
      element("strong", {}, report, shown(number.value));
      let text = "";
      if (Number.isFinite(number.value)) {
        text = " = " + (number.sign < 0 ? "−" : "") + "(" + number.lead + " + " + number.fraction +
          "/" + Math.pow(2, format.fraction) + ") × 2^" + String(number.power).replace("-", "−");
        text += number.lead ? ", a normal number" :
          number.fraction ? ", a subnormal number: no leading one" : ", zero";
        const place = ordered(code);
        const next = decode(format, codeOf(Math.abs(place) + 1)).value;
        if (Math.abs(place) + 1 < Math.pow(2, count - 1) && Number.isFinite(next)) {
          text += ". The next one away from zero is " +
            shown(number.sign * next) + ", " + shown(next - Math.abs(number.value)) + " away.";
        } else text += ". It is the largest of its sign.";
      } else text = ", by the largest exponent";
      element("span", {}, report, text);
    }

    function flip(at) {
      const weight = Math.pow(2, bitsOf() - 1 - at);
      code += Math.floor(code / weight) % 2 ? -weight : weight;
      show();
    }

    function step(by) {
      const place = ordered(code) + by, most = Math.pow(2, bitsOf() - 1) - 1;
      if (place > most || place < -most) return;
      code = codeOf(place);
      show();
    }

    function choose(index) {
      format = data.formats[index];
      code = format.code;
      formatButtons.forEach(function (button, at) {
        button.setAttribute("aria-pressed", String(at === index));
      });
      row.textContent = "";
      bitButtons = [];
      for (let at = 0; at < bitsOf(); at++) {
        const button = element("button", { type: "button" }, row);
        button.addEventListener("click", function () { flip(at); });
        bitButtons.push(button);
      }
      const down = element("button", { type: "button", class: "step" }, row, "next down");
      const up = element("button", { type: "button", class: "step" }, row, "next up");
      down.addEventListener("click", function () { step(-1); });
      up.addEventListener("click", function () { step(1); });
      moveByArrows(bitButtons.concat([down, up]));
      show();
    }

    formatButtons.forEach(function (button, index) {
      button.addEventListener("click", function () { choose(index); });
    });
    moveByArrows(formatButtons, choose);
    choose(data.chosen);
    formatButtons.forEach(function (button, at) { button.tabIndex = at === data.chosen ? 0 : -1; });
  }

  document.querySelectorAll(".llmbook-bits:not([data-ready])").forEach(start);
})();
