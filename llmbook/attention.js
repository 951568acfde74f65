// The interactive figure of llmbook.attention.show_attention: choose a head and a token, see where it
// attends. Plain JavaScript without a library, a kernel or a network. It may run several times on one
// page, once with each figure; every run serves the figures that have no buttons yet.
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
  function moveByArrows(buttons, choose) {
    buttons.forEach(function (button, index) {
      button.addEventListener("keydown", function (event) {
        const steps = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 };
        let next = index + (steps[event.key] || 0);
        if (event.key === "Home") next = 0;
        if (event.key === "End") next = buttons.length - 1;
        if (next === index || next < 0 || next >= buttons.length) return;
        event.preventDefault();
        choose(next);
        buttons[next].focus();
      });
    });
  }

  function press(buttons, chosen) {
    buttons.forEach(function (button, index) {
      button.setAttribute("aria-pressed", String(index === chosen));
      button.tabIndex = index === chosen ? 0 : -1;
    });
  }

  function drawThumbnail(canvas, rows) {
    const size = rows.length;
    canvas.width = canvas.height = size;
    const context = canvas.getContext("2d");
    rows.forEach(function (row, query) {
      row.forEach(function (percent, key) {
        context.fillStyle = "rgba(58, 143, 208, " + Math.sqrt(percent / 100) + ")";
        context.fillRect(key, query, 1, 1);
      });
    });
  }

  function start(figure) {
    figure.setAttribute("data-ready", "");
    const data = JSON.parse(figure.querySelector("script[type='application/json']").textContent);
    const stage = element("div", { class: "stage" }, figure);
    figure.insertBefore(stage, figure.firstChild);
    figure.querySelector("details").open = false; // the table is open where no script runs
    const heads = element(
      "div", { class: "heads", role: "toolbar", "aria-label": "Layer and head" }, stage);
    const row = element(
      "div", { class: "tokens", role: "toolbar", "aria-label": "Token that attends" }, stage);
    const report = element("p", { class: "report", "aria-live": "polite" }, stage);
    const matrices = [], names = [], headButtons = [];
    let head = data.layer * data.weights[0].length + data.head, token = data.token;

    data.weights.forEach(function (layer, l) {
      layer.forEach(function (matrix, h) {
        const name = "layer " + (l + 1) + ", head " + (h + 1);
        const button = element("button", { type: "button" }, heads);
        drawThumbnail(element("canvas", { "aria-hidden": "true" }, button), matrix);
        element("span", {}, button, name);
        matrices.push(matrix);
        names.push(name);
        headButtons.push(button);
      });
    });
    const tokenButtons = data.tokens.map(function (text) {
      return element("button", { type: "button" }, row, text);
    });

    function show(query) {
      const weights = matrices[head][query];
      tokenButtons.forEach(function (button, key) {
        const weight = (weights[key] || 0) / 100;
        button.style.setProperty("--weight", weight);
        button.classList.toggle("query", key === query);
      });
      const order = weights.map(function (percent, key) { return [percent, key]; });
      order.sort(function (a, b) { return b[0] - a[0] || b[1] - a[1]; });
      const best = order.filter(function (pair) { return pair[0] > 0; }).slice(0, 3);
      const where = best.map(function (pair) {
        return "“" + data.tokens[pair[1]] + "” at " + pair[1] + " (" + pair[0] + " %)";
      });
      report.textContent = "In " + names[head] + ", “" + data.tokens[query] + "” at " + query +
        (where.length ? " attends to " + where.join(", ") + "." : " attends to nothing.");
    }

    function chooseHead(index) { head = index; press(headButtons, head); show(token); }
    function chooseToken(index) { token = index; press(tokenButtons, token); show(token); }

    headButtons.forEach(function (button, index) {
      button.addEventListener("click", function () { chooseHead(index); });
    });
    tokenButtons.forEach(function (button, index) {
      button.addEventListener("click", function () { chooseToken(index); });
      button.addEventListener("mouseenter", function () { show(index); });
      button.addEventListener("mouseleave", function () { show(token); });
    });
    moveByArrows(headButtons, chooseHead);
    moveByArrows(tokenButtons, chooseToken);
    press(tokenButtons, token);
    chooseHead(head);
  }

  document.querySelectorAll(".llmbook-attention:not([data-ready])").forEach(start);
})();
