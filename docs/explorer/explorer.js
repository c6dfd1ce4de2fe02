"use strict";
/* The page: inputs, what they are set to, the address that says so, and the drawing of what follows from it. */

(() => {
  const METHOD_WORDS = {
    flash: "One host attends to everything. What the others are measured against.",
    ring: "Exact. Keys and values go round the hosts; the last host has the most to attend to.",
    "ring-zigzag": "Exact. Each host holds an early and a late block, so that all have as much to do.",
    ulysses: "Exact. The hosts swap tokens for heads, attend, and swap back.",
    star: "Each block attends to the document's start and to itself. Nothing is sent.",
    ape: "Each block is read alone behind a shared prefix. Nothing is sent.",
    minference: "One host; each head attends to the few columns and diagonals that it picks from the text. " +
      "Counted is the most that can be: all of them.",
    apb: "Each host attends to the anchor, to what earlier blocks found worth passing on, and to its own block.",
    spava: "APB with zigzag blocks, an anchor that all see, and a question that runs along on every host.",
  };
  const TITLES = { "llama-3.1-8b": "Llama-3.1-8B", "qwen-2.5-14b": "Qwen-2.5-14B", "yi-34b": "Yi-34B", tiny: "Tiny" };
  const PRESETS = {
    "The paper, 128K": "method=apb&tokens=131072&hosts=8",
    "Anchor shared, zigzag": "method=apb&tokens=131072&hosts=8&layout=zigzag&split_anchor=true",
    "Star": "method=star&tokens=131072&hosts=8",
    "Contiguous ring": "method=ring&tokens=131072&hosts=8",
    "Spava": "method=spava&tokens=131072&hosts=8",
    "A million tokens": "method=apb&tokens=1048576&hosts=64",
  };
  /* Sliders run over powers of two, between these exponents; the lowest is 0 where `zero` says so. */
  const NUMBERS = {
    tokens: { label: "Document tokens", from: 10, to: 20 },
    hosts: { label: "Hosts", from: 1, to: 64, linear: true },
    anchor: { label: "Anchor tokens", from: 3, to: 18, zero: true, auto: true },
    passing: { label: "Passing tokens of a block", from: 3, to: 18, zero: true, auto: true },
    query: { label: "Question tokens", from: 0, to: 13, zero: true },
    query_offset: { label: "Prefix (BOS, system prompt)", from: 0, to: 13, zero: true },
  };
  const CHOICES = {
    method: { label: "Method", options: Object.entries(Plan.METHODS).map(([name, { title }]) => [name, title]) },
    shape: { label: "Model", options: Object.keys(Costs.SHAPES).map((name) => [name, TITLES[name]]) },
    query_in: { label: "The question", options: [["anchor", "stands in the anchor"],
      ["prefill", "runs along with the prefill"], ["after", "comes after the prefill"]] },
    layout: { label: "Layout", options: [["contiguous", "contiguous: a block a host"],
      ["zigzag", "zigzag: an early and a late block"]] },
    compressor: { label: "What is passed on is chosen", options: [["query-aware", "by the question (query-aware)"],
      ["snapkv", "without it (SnapKV, retaining heads)"]] },
  };
  const MOST = { hosts: 256 }; // what the page draws; of tokens it counts up to 2^40
  const START = { ...Plan.complete({ method: "apb" }), shape: "llama-3.1-8b", tokens: 131072, hosts: 8, query: 40,
    host: null };
  const ALWAYS = ["method", "shape", "tokens", "hosts"];

  const root = document.querySelector(".explorer");
  let state = { ...START };
  let soon = null;

  const find = (name) => root.querySelector(`[data-part="${name}"]`);
  const slid = (spec, i) => (spec.linear ? i : spec.zero && i === spec.from ? 0 : 2 ** i);
  const takes = (name) => ALWAYS.includes(name) || Plan.METHODS[state.method].takes.includes(name) ||
    (name === "query" && Plan.METHODS[state.method].takes.includes("query_in"));

  /* A number with its slider and, if it has a default, a box to leave it so. */
  function numberInput([name, { label, from, to, auto }]) {
    const check = `<input type="checkbox" id="x-${name}-auto" data-auto="${name}" />`;
    const box = auto ? `<label class="box">${check} the default</label>` : "";
    return `<div class="control" data-control="${name}"><label for="x-${name}">${label}</label>` +
      `<input type="number" id="x-${name}" data-number="${name}" inputmode="numeric" step="1" />` +
      `<input type="range" id="x-${name}-slider" data-slider="${name}" min="${from}" max="${to}" ` +
      `aria-label="${label}" />${box}</div>`;
  }

  /* A choice of a few. */
  function choiceInput([name, { label, options }]) {
    const lines = options.map(([value, text]) => `<option value="${value}">${text}</option>`);
    return `<div class="control" data-control="${name}"><label for="x-${name}">${label}</label>` +
      `<select id="x-${name}" data-choice="${name}">${lines.join("")}</select></div>`;
  }

  /* Put the page's parts in place. */
  function build() {
    const links = Object.entries(PRESETS).map(([text, hash]) => `<li><a href="#${hash}">${text}</a></li>`);
    const choices = Object.entries(CHOICES).map(choiceInput);
    const inputs = [...choices.slice(0, 2), ...Object.entries(NUMBERS).map(numberInput), ...choices.slice(2)];
    root.innerHTML = `
      <nav aria-label="Examples"><ul class="presets">${links.join("")}</ul></nav>
      <form aria-label="Settings">${inputs.join("")}
        <div class="control" data-control="split_anchor"><label class="box"><input type="checkbox" id="x-split_anchor"
          data-flag="split_anchor" /> the hosts share the anchor's rows</label></div>
      </form>
      <p class="words" data-part="method"></p>
      <div class="refused" data-part="refused" hidden><p id="x-why" data-part="why"></p>
        <button type="button" data-part="way-out"></button></div>
      <p class="unseen" role="status" data-part="status"></p>
      <div data-part="results">
        <p class="summary" data-part="summary"></p>
        <div class="look"><label for="x-host">Look at</label> <select id="x-host" data-part="host"></select>
          <ul class="key" aria-label="Colours" data-part="key"></ul></div>
        <div class="pictures">
          <figure><figcaption><strong>Who holds what.</strong> The keys on each host while a layer runs.</figcaption>
            <div data-part="bars"></div><p class="words" data-part="host-words"></p></figure>
          <figure class="tall"><figcaption><strong>Who sees what.</strong> Each line of the square is a token that
            attends, from the document's first (top) to its last; each column a token that it sees. On the left, the
            host.</figcaption><div data-part="mask"></div>
            <p class="words" id="x-mask-words" data-part="mask-words"></p></figure>
          <figure><figcaption><strong>What the others cost.</strong> The same document by every method, all but the
            chosen one with their defaults: TFLOP a layer on the busiest host.</figcaption>
            <div data-part="others"></div></figure>
        </div>
        <div class="scroll" role="region" tabindex="0" aria-label="Costs by host" data-part="table"></div>
        <p class="words">The same in Python, <code>apb.methods.make_method</code>:</p>
        <pre tabindex="0" aria-label="The same in Python"><code data-part="python"></code></pre>
      </div>`;
  }

  /* Read the address: what it does not say, or says wrongly, is as at the start. */
  function readAddress() {
    const said = new URLSearchParams(location.hash.slice(1));
    const known = (name, value) => CHOICES[name].options.some((option) => option[0] === value);
    const next = { ...START };
    if (known("method", said.get("method"))) Object.assign(next, ownSettings(said.get("method")));
    for (const name of Object.keys(CHOICES)) if (known(name, said.get(name))) next[name] = said.get(name);
    for (const name of [...Object.keys(NUMBERS), "host"])
      if (/^\d{1,15}$/.test(said.get(name))) next[name] = +said.get(name);
    next.split_anchor = said.get("split_anchor") === "true";
    state = next;
  }

  /* A method, with its own layout and place of the question. */
  function ownSettings(method) {
    const { query_in, layout } = Plan.complete({ method });
    return { method, query_in, layout };
  }

  /* Write what is set into the address, without a step in the browser's history. */
  function writeAddress() {
    const names = [...Object.keys(CHOICES), ...Object.keys(NUMBERS), "split_anchor"].filter(takes);
    const said = names.filter((name) => state[name] !== null).map((name) => [name, state[name]]);
    if (state.host !== null) said.push(["host", state.host]);
    history.replaceState(null, "", `#${new URLSearchParams(said)}`);
  }

  /* Take over what an input says. */
  function onInput({ target }) {
    const { slider, number, auto, choice, flag } = target.dataset;
    if (slider) state[slider] = slid(NUMBERS[slider], +target.value);
    if (number) state[number] = target.value === "" ? NaN : +target.value;
    if (auto) state[auto] = target.checked ? null : +root.querySelector(`#x-${auto}`).value;
    if (choice === "method") Object.assign(state, ownSettings(target.value));
    else if (choice) state[choice] = target.value;
    if (flag) state[flag] = target.checked;
    if (target === find("host")) state.host = target.value === "" ? null : +target.value;
    render();
  }

  /* Let the inputs show what is set, or follows; never the one that is being typed into. */
  function showInputs(plan) {
    for (const control of root.querySelectorAll("[data-control]")) control.hidden = !takes(control.dataset.control);
    for (const name of Object.keys(CHOICES)) root.querySelector(`#x-${name}`).value = state[name];
    for (const [name, spec] of Object.entries(NUMBERS)) {
      const [input, slider] = ["", "-slider"].map((end) => root.querySelector(`#x-${name}${end}`));
      const value = state[name] ?? plan?.[name] ?? "";
      if (document.activeElement !== input || state[name] === null) input.value = Number.isNaN(value) ? "" : value;
      const place = spec.linear ? value : value > 0 ? Math.round(Math.log2(value)) : spec.from;
      if (document.activeElement !== slider || slid(spec, +slider.value) !== value) slider.value = place;
      slider.setAttribute("aria-valuetext", `${value}`);
      if (spec.auto) root.querySelector(`#x-${name}-auto`).checked = state[name] === null;
    }
    root.querySelector("#x-split_anchor").checked = state.split_anchor;
    const label = state.method === "ape" ? "Prefix tokens, before all blocks" : NUMBERS.anchor.label;
    root.querySelector('label[for="x-anchor"]').textContent = label;
    find("method").textContent = METHOD_WORDS[state.method];
  }

  /* Offer all hosts to look at, and none. */
  function showHosts(plan) {
    const select = find("host");
    if (select.options.length !== plan.hosts + 1) {
      const lines = plan.host_plans.map(({ rank }) => `<option value="${rank}">host ${rank}</option>`);
      select.innerHTML = `<option value="">all hosts</option>${lines.join("")}`;
    }
    if (state.host >= plan.hosts) state.host = null;
    select.value = state.host ?? "";
  }

  /* Plan and count what is set; throws Plan.Refused. */
  function count() {
    for (const name of Object.keys(NUMBERS)) {
      const most = MOST[name] ?? 2 ** 40;
      if (takes(name) && state[name] > most)
        throw new Plan.Refused(name, `This page counts up to ${most}.`, { [name]: most });
    }
    const { shape, ...settings } = state;
    const plan = Plan.makePlan(settings);
    const flash = { method: "flash", tokens: state.tokens, hosts: 1 };
    const [exact] = Costs.hostCosts(flash, Plan.makePlan(flash), Costs.SHAPES[shape]);
    return { settings, plan, costs: Costs.hostCosts(settings, plan, Costs.SHAPES[shape]), exactFlops: exact.flops };
  }

  /* What the chosen document costs by every method, on as many hosts if it runs on several; 0 if it cannot. */
  function compare(view) {
    const { shape, tokens, hosts, query } = state;
    return Object.entries(Plan.METHODS).map(([method, { title, one_host }]) => {
      const settings = { method, tokens, hosts: one_host ? 1 : hosts, query };
      const here = method === state.method;
      let costs = here ? view.costs : [{ flops: 0n }];
      try {
        if (!here) costs = Costs.hostCosts(settings, Plan.makePlan(settings), Costs.SHAPES[shape]);
      } catch (error) {
        if (!(error instanceof Plan.Refused)) throw error;
      }
      const hash = new URLSearchParams({ ...settings, shape });
      return { title, hash, here, flops: Draw.most(costs.map((cost) => cost.flops)), least: method === "minference" };
    });
  }

  /* Show why there is no plan, and a way out. */
  function refuse({ setting, message, change }) {
    const [name, value] = Object.entries(change)[0];
    const options = CHOICES[name]?.options.find((option) => option[0] === value);
    const label = (NUMBERS[name] ?? CHOICES[name]).label;
    find("why").textContent = message;
    find("way-out").textContent = `Set “${label}” to ${options ? `“${options[1]}”` : value}`;
    find("way-out").onclick = () => {
      Object.assign(state, change);
      render();
      root.querySelector(`#x-${name}`).focus();
    };
    const input = root.querySelector(`#x-${setting}`);
    input.setAttribute("aria-invalid", "true");
    input.setAttribute("aria-describedby", "x-why");
    return `Not possible. ${message}`;
  }

  /* Draw a plan. */
  function draw(view) {
    showHosts(view.plan);
    view.chosen = state.host;
    for (const part of ["summary", "key", "bars", "mask", "table"]) find(part).innerHTML = Draw[part](view);
    find("others").innerHTML = Draw.others(compare(view));
    find("mask-words").textContent = Draw.maskWords(view);
    find("host-words").textContent = Draw.hostWords(view);
    find("python").textContent = Plan.pythonCall(view.settings);
    return find("summary").textContent;
  }

  /* Show everything anew; a moment later, when nothing changes any more, say it and write the address. */
  function render() {
    let view = null;
    let said;
    for (const input of root.querySelectorAll("[aria-invalid]"))
      for (const name of ["aria-invalid", "aria-describedby"]) input.removeAttribute(name);
    try {
      view = count();
      said = draw(view);
    } catch (error) {
      if (!(error instanceof Plan.Refused)) throw error;
      said = refuse(error);
    }
    find("refused").hidden = view !== null;
    find("results").hidden = view === null;
    showInputs(view?.plan);
    clearTimeout(soon);
    soon = setTimeout(() => {
      find("status").textContent = said;
      writeAddress();
    }, 400);
  }

  /* Begin again from the address. */
  function start() {
    readAddress();
    render();
  }

  build();
  root.addEventListener("input", onInput);
  root.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
  window.addEventListener("hashchange", start);
  start();
})();
