// The samples table: filters, sorting and paging. Only the visible page is in the document, and model text enters it
// by textContent alone, so that nothing a model wrote becomes markup.
"use strict";
(() => {
  const form = document.getElementById("filters");
  if (!form) return;
  const PAGE = 25;
  const samples = JSON.parse(document.getElementById("samples-data").textContent);
  const search = samples.map((s) => `${s.prompt}\n${s.completion}\n${s.answer}`.toLowerCase());
  const table = document.getElementById("sample-table");
  const body = table.tBodies[0];
  const count = document.getElementById("count");
  const pageNumber = document.getElementById("page-number");
  const state = { page: 0, sort: null, descending: false, found: [] };

  const field = (name) => form.elements[name].value;
  const limit = (name, otherwise) => (field(name) === "" ? otherwise : Number(field(name)));
  const pages = () => Math.max(1, Math.ceil(state.found.length / PAGE));

  function element(tag, text, className) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  }

  for (const name of ["stage", "split", "finish"]) {
    for (const value of new Set(samples.map((s) => s[name]))) {
      if (value === "") continue;
      const option = element("option", value);
      option.value = value;
      form.elements[name].append(option);
    }
  }

  // `number` between two limits; a sample without a reward passes only where no limit is set.
  function within(number, name) {
    if (field(`${name}-from`) === "" && field(`${name}-to`) === "") return true;
    return number !== null && number >= limit(`${name}-from`, -Infinity) && number <= limit(`${name}-to`, Infinity);
  }

  function filter() {
    const text = field("text").toLowerCase();
    const equal = ["stage", "split", "finish"].filter((name) => field(name) !== "");
    state.found = [...samples.keys()].filter((i) =>
      equal.every((name) => samples[i][name] === field(name)) &&
      within(samples[i].reward, "reward") && within(samples[i].step, "step") && search[i].includes(text));
    if (state.sort) {
      const sign = state.descending ? -1 : 1;
      const value = (i) => samples[i][state.sort];
      state.found.sort((a, b) => (value(a) === null) - (value(b) === null) || sign * (value(a) - value(b)) || a - b);
    }
    state.page = 0;
    show();
  }

  // A cell of long text with its newlines, cut by the style; the button that opens its row is added once it is laid out.
  function textCell(text, className) {
    const cell = element("td", undefined, className);
    cell.append(element("div", text, "text"));
    return cell;
  }

  function rewardCell(sample) {
    const cell = element("td", undefined, "reward");
    cell.append(element("div", sample.reward === null ? "–" : String(Number(sample.reward.toPrecision(4)))));
    for (const [name, value] of Object.entries(sample.rewards)) {
      cell.append(element("div", `${name} ${value === null ? "–" : Number(value.toPrecision(3))}`, "muted small"));
    }
    return cell;
  }

  function row(sample) {
    const made = element("tr");
    const stage = element("td");
    stage.append(element("div", sample.stage));
    for (const words of [sample.split, sample.finish]) if (words) stage.append(element("div", words, "muted small"));
    made.append(
      element("td", String(sample.step), "step"), stage, rewardCell(sample),
      textCell(sample.prompt, "prompt"), textCell(sample.completion, "completion"), textCell(sample.answer, "answer"));
    return made;
  }

  function addOpener(made) {
    const cut = [...made.querySelectorAll(".text")].filter((text) => text.scrollHeight > text.clientHeight + 1);
    if (!cut.length) return;
    cut.forEach((text) => text.classList.add("cut"));
    const button = element("button", "More", "more");
    button.type = "button";
    button.setAttribute("aria-expanded", "false");
    button.addEventListener("click", () => {
      const open = made.classList.toggle("open");
      button.setAttribute("aria-expanded", String(open));
      button.textContent = open ? "Less" : "More";
    });
    made.cells[0].append(button);
  }

  function show() {
    const start = state.page * PAGE;
    const rows = state.found.slice(start, start + PAGE).map((i) => row(samples[i]));
    body.replaceChildren(...rows);
    rows.forEach(addOpener);
    const total = samples.length.toLocaleString("en");
    const found = state.found.length.toLocaleString("en");
    count.textContent = state.found.length === samples.length ? `${total} samples` : `${found} of ${total} samples`;
    pageNumber.textContent = `Page ${state.page + 1} of ${pages()}`;
    for (const button of document.querySelectorAll("[data-page]")) {
      const back = button.dataset.page === "first" || button.dataset.page === "previous";
      button.disabled = back ? state.page === 0 : state.page >= pages() - 1;
    }
  }

  function sortBy(key) {
    if (state.sort === key && state.descending) state.sort = null; // the third press restores the order of the run
    else [state.descending, state.sort] = [state.sort === key, key];
    for (const button of table.querySelectorAll("[data-sort]")) {
      const order = state.descending ? "descending" : "ascending";
      button.parentElement.setAttribute("aria-sort", button.dataset.sort === state.sort ? order : "none");
    }
    filter();
  }

  const turns = {
    first: () => 0,
    previous: () => state.page - 1,
    next: () => state.page + 1,
    last: () => pages() - 1,
  };
  for (const button of document.querySelectorAll("[data-page]")) {
    button.addEventListener("click", () => {
      state.page = Math.min(Math.max(turns[button.dataset.page](), 0), pages() - 1);
      show();
    });
  }
  for (const button of table.querySelectorAll("[data-sort]")) {
    button.addEventListener("click", () => sortBy(button.dataset.sort));
  }
  for (const chooser of form.querySelectorAll("select")) chooser.addEventListener("change", filter);
  for (const box of form.querySelectorAll("input:not([name=full])")) box.addEventListener("input", filter);
  form.elements.full.addEventListener("change", () => {
    table.classList.toggle("full", form.elements.full.checked);
    show();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  document.getElementById("clear").addEventListener("click", () => {
    form.reset();
    table.classList.remove("full");
    filter();
  });
  filter();
})();
