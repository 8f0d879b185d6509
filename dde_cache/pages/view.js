// Draws one pair at a time. What a stranger wrote reaches the page as textContent alone.
"use strict";
(() => {
  const { about, pairs } = JSON.parse(document.getElementById("page-data").textContent);
  const weightOf = Float32Array.from({ length: 256 }, (_, level) => (level / about.levels) ** 2);
  const byId = (id) => document.getElementById(id);
  // Which directions the cache has; of what it lacks the page keeps one sentence.
  const [hasWords, hasPatches] = ["t2i", "i2t"].map((one) => about.directions.includes(one));
  const has = hasWords && hasPatches ? "both" : about.directions[0];
  const state = { pair: 0, head: null, word: 0, slot: 0, token: 1, overWord: null, overPatch: null };
  const unpacked = new Map(); // numbers of the last few pairs, by pair
  let shown = null; // what is drawn now: the pair's numbers and its words

  const make = (tag, text, properties = {}) => {
    const element = Object.assign(document.createElement(tag), properties);
    if (text !== undefined && text !== null) element.textContent = text;
    return element;
  };
  const percent = (weight) => (weight >= 0.0995 ? Math.round(weight * 100) : (weight * 100).toFixed(1)) + " %";
  const nats = (value) => value.toFixed(3);

  // --- numbers

  async function inflate(text) {
    const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  async function readPair(number) {
    if (unpacked.has(number)) return unpacked.get(number);
    const pair = pairs[number];
    const tokens = [...pair.words, ...pair.special].reduce((sum, unit) => sum + unit.tokens.length, 0);
    const images = [];
    for (const [slot, image] of pair.images.entries()) {
      const bytes = await inflate(byId(`maps-${number}-${slot}`).textContent);
      const picture = new Image();
      picture.src = image.picture;
      await picture.decode();
      const places = image.grid[0] * image.grid[1] + 1;
      let start = 0;
      const take = (size) => bytes.subarray(start, (start += size));
      const steps = (count, unit) => {
        const part = take(2 * count);
        return Float32Array.from({ length: count }, (_, n) => (part[2 * n] + 256 * part[2 * n + 1]) * unit);
      };
      const direction = (rows, keys) => ({
        rows,
        keys,
        teacher: take(about.heads * rows * keys),
        student: image.student ? take(about.heads * rows * keys) : null,
        kl: image.student ? steps(about.heads * rows, about.kl_unit) : null,
        kept: image.kept ? steps(about.heads * rows, about.kept_unit) : null,
      });
      const maps = {};
      for (const one of about.directions) maps[one] = one === "t2i" ? direction(tokens, places) : direction(places, tokens);
      images.push({ ...image, picture, places, ...maps });
    }
    unpacked.set(number, images);
    if (unpacked.size > 8) unpacked.delete(unpacked.keys().next().value);
    return images;
  }

  const headsOf = (head) => (head === null ? Array.from({ length: about.heads }, (_, n) => n) : [head]);

  // Mean over heads and rows of a direction: the weight of every key.
  function meanRow(map, levels, head, rows) {
    const sums = new Float32Array(map.keys);
    const heads = headsOf(head);
    for (const one of heads)
      for (const row of rows) {
        const start = (one * map.rows + row) * map.keys;
        for (let key = 0; key < map.keys; key++) sums[key] += weightOf[levels[start + key]];
      }
    return sums.map((sum) => sum / (heads.length * rows.length));
  }

  function meanFact(map, facts, head, rows) {
    if (facts === null) return null;
    const heads = headsOf(head);
    let sum = 0;
    for (const one of heads) for (const row of rows) sum += facts[one * map.rows + row];
    return sum / (heads.length * rows.length);
  }

  const factsOf = (map, head, rows) => {
    const kept = meanFact(map, map.kept, head, rows);
    const kl = meanFact(map, map.kl, head, rows);
    return { kept: kept === null ? 1 : kept, kl };
  };
  const factText = ({ kept, kl }) =>
    `kept mass ${kept.toFixed(3)}` + (kl === null ? "" : `; KL of the student ${nats(kl)} nats`);

  function tokenName(image, token) {
    if (token === 0) return "CLS";
    const columns = image.grid[1];
    return `row ${Math.floor((token - 1) / columns) + 1}, column ${((token - 1) % columns) + 1}`;
  }
  const longName = (image, slot, token) =>
    (shown.images.length > 1 ? `image ${slot + 1}, ` : "") + tokenName(image, token);

  const strongest = (row, count) =>
    [...row.keys()].sort((one, other) => row[other] - row[one]).slice(0, count);

  // --- what is chosen, or pointed at for a moment

  const wordNow = () => shown.units[state.overWord ?? state.word];
  const patchNow = () => state.overPatch ?? { slot: state.slot, token: state.token };

  // --- drawing

  const cellOf = (image) => Math.max(20, Math.min(96, Math.floor(270 / Math.max(...image.grid))));

  // The picture, with a word's row over it where there is one, and the patch that is asked.
  function drawMap(canvas, image, row, scale) {
    const [rows, columns] = image.grid;
    const cell = cellOf(image);
    const ratio = window.devicePixelRatio || 1;
    canvas.width = columns * cell * ratio;
    canvas.height = rows * cell * ratio;
    canvas.style.width = `${columns * cell}px`;
    canvas.style.height = `${rows * cell}px`;
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.imageSmoothingEnabled = image.sides[0] > columns * cell;
    pen.drawImage(image.picture, 0, 0, columns * cell, rows * cell);
    if (row) {
      pen.fillStyle = "rgba(128, 128, 128, 0.35)";
      pen.fillRect(0, 0, columns * cell, rows * cell);
    }
    pen.font = `600 ${cell >= 60 ? 15 : cell >= 40 ? 12 : 10}px sans-serif`;
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    const patch = patchNow();
    for (let token = 1; token < image.places; token++) {
      const x = ((token - 1) % columns) * cell;
      const y = Math.floor((token - 1) / columns) * cell;
      const side = row ? Math.sqrt(row[token] / scale) * cell * 0.94 : 0;
      if (side >= 1) {
        const place = [x + (cell - side) / 2, y + (cell - side) / 2, side, side];
        pen.fillStyle = "rgba(255, 190, 60, 0.5)";
        pen.fillRect(...place);
        pen.strokeStyle = "#000";
        pen.lineWidth = 1;
        pen.strokeRect(...place);
      }
      if (row && cell >= 24 && row[token] >= 0.01) {
        pen.lineWidth = 3;
        pen.strokeStyle = "#fff";
        pen.fillStyle = "#000";
        pen.strokeText(Math.round(row[token] * 100), x + cell / 2, y + cell / 2);
        pen.fillText(Math.round(row[token] * 100), x + cell / 2, y + cell / 2);
      }
      if (hasPatches && image === shown.images[patch.slot] && token === patch.token)
        for (const [colour, dashes] of [["#fff", []], ["#000", [4, 3]]]) {
          pen.strokeStyle = colour;
          pen.lineWidth = 3;
          pen.setLineDash(dashes);
          pen.strokeRect(x + 2, y + 2, cell - 4, cell - 4);
          pen.setLineDash([]);
        }
    }
  }

  function fill(table, head, rows) {
    const line = (cells, tag, className = "") => {
      const row = make("tr", null, { className });
      for (const cell of cells) row.append(cell instanceof Node ? cell : make(tag, cell));
      return row;
    };
    table.tHead.replaceChildren(line(head, "th"));
    table.tBodies[0].replaceChildren(...rows.map(({ cells, now }) => line(cells, "td", now ? "now" : "")));
  }

  const sides = () => (shown.images[0].student ? ["teacher", "student"] : ["teacher"]);
  // Without rows of words both would show the same picture.
  const figureSides = () => (hasWords ? sides() : ["picture"]);

  function drawWord() {
    const word = wordNow();
    const rows = shown.images.map((image) =>
      Object.fromEntries(sides().map((side) => [side, meanRow(image.t2i, image.t2i[side], state.head, word.tokens)]))
    );
    const scale = Math.max(1e-6, ...rows.flatMap((row) => Object.values(row).flatMap((one) => [...one])));
    for (const figure of byId("figures").querySelectorAll("figure")) {
      const { slot, side } = figure.dataset;
      const row = rows[slot][side];
      drawMap(figure.querySelector("canvas"), shown.images[slot], row, scale);
      figure.querySelector(".cls").textContent = `CLS ${percent(row[0])}`;
    }
    const parts = (word.pieces ?? [word.text]).join(" ");
    const pieces = parts === word.text ? "" : ` (${parts})`;
    byId("word-title").textContent = `Word “${word.text}”${pieces} to the picture, ${headName(state.head)}`;
    byId("row-facts").textContent = shown.images
      .map((image, slot) => (shown.images.length > 1 ? `image ${slot + 1}: ` : "") +
        factText(factsOf(image.t2i, state.head, word.tokens)))
      .join(" · ");
    const found = shown.images.flatMap((image, slot) =>
      strongest(rows[slot].teacher, 6).map((token) => ({ image, slot, token, weight: rows[slot].teacher[token] })));
    found.sort((one, other) => other.weight - one.weight);
    fill(byId("patches"), ["patch", ...sides()], found.slice(0, 6).map(({ image, slot, token }) => ({
      cells: [longName(image, slot, token), ...sides().map((side) => percent(rows[slot][side][token]))],
    })));
    drawHeads(word);
    for (const button of document.querySelectorAll("#words button, #special button"))
      button.setAttribute("aria-pressed", shown.units[button.dataset.unit] === word);
    return `${word.text}: ${longName(found[0].image, found[0].slot, found[0].token)}, ${percent(found[0].weight)}`;
  }

  const headName = (head) => (about.heads === 1 ? "mean of the heads" : head === null ? "mean of the heads" : `head ${head + 1}`);

  function drawHeads(word) {
    // Of two pictures, the one that is pointed at; where none can be, both.
    const slots = hasPatches ? [patchNow().slot] : [...shown.images.keys()];
    const top = (image, side, head) => {
      const row = meanRow(image.t2i, image.t2i[side], head, word.tokens);
      const [token] = strongest(row, 1);
      return `${tokenName(image, token)} (${percent(row[token])})`;
    };
    const heads = about.heads === 1 ? [null] : [null, ...headsOf(null)];
    fill(
      byId("heads"),
      ["head", "kept mass", ...(shown.images[0].student ? ["KL"] : []), ...sides().map((side) => `${side}: strongest`)],
      slots.flatMap((slot) => heads.map((head) => {
        const image = shown.images[slot];
        const { kept, kl } = factsOf(image.t2i, head, word.tokens);
        const name = (slots.length > 1 ? `image ${slot + 1}, ` : "") + (head === null ? "mean" : String(head + 1));
        const cells = [name, kept.toFixed(3), ...(kl === null ? [] : [nats(kl)])];
        return { cells: [...cells, ...sides().map((side) => top(image, side, head))], now: head === state.head };
      }))
    );
  }

  function drawPatch() {
    const { slot, token } = patchNow();
    const image = shown.images[slot];
    const rows = sides().map((side) => meanRow(image.i2t, image.i2t[side], state.head, [token]));
    const weights = shown.units.map((unit) => rows.map((row) => unit.tokens.reduce((sum, key) => sum + row[key], 0)));
    const scale = Math.max(1e-6, ...weights.flat());
    byId("patch-title").textContent = `Patch ${longName(image, slot, token)} to the sentence, ${headName(state.head)}`;
    byId("patch-facts").textContent = factText(factsOf(image.i2t, state.head, [token]));
    const bar = (weight, side) => {
      const cell = make("td", null, { className: "barred" });
      const block = make("span", null, { className: `bar ${sides()[side]}` });
      block.style.width = `${(weight / scale) * 60}px`;
      cell.append(block, percent(weight));
      return cell;
    };
    fill(byId("links"), ["word", ...sides()], shown.units.map((unit, number) => ({
      cells: [unit.text, ...weights[number].map(bar)],
      now: hasWords && unit === wordNow(),
    })));
    for (const figure of byId("figures").querySelectorAll("figure")) {
      const own = Number(figure.dataset.slot);
      if (!hasWords) drawMap(figure.querySelector("canvas"), shown.images[own], null, 1);
      figure.querySelector(".cls").setAttribute("aria-pressed", slot === own && token === 0);
    }
    const best = strongest(Float32Array.from(weights, (one) => one[0]), 1)[0];
    return `${longName(image, slot, token)}: ${shown.units[best].text}, ${percent(weights[best][0])}`;
  }

  let asked = false;
  function draw(say = null) {
    if (say) state.say = say;
    if (asked || !shown) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      if (!shown) return;
      const spoken = { word: hasWords ? drawWord() : null, patch: hasPatches ? drawPatch() : null };
      if (state.say) byId("spoken").textContent = spoken[state.say];
      state.say = null;
    });
  }

  // --- pointing and keys

  const chooseWord = (unit, focus = false) => {
    state.word = (unit + shown.units.length) % shown.units.length;
    state.overWord = null;
    if (focus) document.querySelector(`button[data-unit="${state.word}"]`).focus();
    draw("word");
  };

  const choosePatch = (slot, token) => {
    Object.assign(state, { slot, token, overPatch: null });
    draw("patch");
  };

  function wordButton(unit, number) {
    const button = make("button", unit.text, { type: "button" });
    button.dataset.unit = number;
    button.addEventListener("click", () => chooseWord(number));
    button.addEventListener("focus", () => chooseWord(number));
    button.addEventListener("pointerenter", () => { state.overWord = number; draw(); });
    button.addEventListener("pointerleave", () => { state.overWord = null; draw(); });
    button.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step) { event.preventDefault(); chooseWord(number + step, true); }
    });
    return button;
  }

  function patchAt(event, image) {
    const cell = cellOf(image);
    const [rows, columns] = image.grid;
    const column = Math.min(columns - 1, Math.max(0, Math.floor(event.offsetX / cell)));
    const row = Math.min(rows - 1, Math.max(0, Math.floor(event.offsetY / cell)));
    return row * columns + column + 1;
  }

  function figureOf(image, slot, side) {
    const figure = make("figure");
    Object.assign(figure.dataset, { slot, side });
    const caption = make("figcaption");
    caption.append(make("b", side, { className: side }), shown.images.length > 1 ? `, image ${slot + 1}` : "");
    const what = side === "picture" ? "the picture" : `${side}'s map over the picture`;
    const canvas = make("canvas");
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${what}, ${image.grid[0]} x ${image.grid[1]} patches`);
    // A patch has nothing to say without a row of its own.
    const cls = hasPatches ? make("button", "CLS", { type: "button", className: "cls" }) : make("p", "CLS", { className: "cls" });
    figure.append(caption, canvas, cls);
    if (hasPatches) askable(canvas, cls, image, slot);
    return figure;
  }

  // Lets patches be pointed at, clicked and walked through.
  function askable(canvas, cls, image, slot) {
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "application");
    canvas.setAttribute("aria-label", `${canvas.getAttribute("aria-label")}; arrow keys choose a patch`);
    canvas.addEventListener("pointermove", (event) => {
      const token = patchAt(event, image);
      if (state.overPatch?.token === token && state.overPatch?.slot === slot) return;
      state.overPatch = { slot, token };
      draw();
    });
    canvas.addEventListener("pointerleave", () => { state.overPatch = null; draw(); });
    canvas.addEventListener("click", (event) => choosePatch(slot, patchAt(event, image)));
    canvas.addEventListener("keydown", (event) => {
      const columns = image.grid[1];
      const place = state.slot === slot && state.token > 0 ? state.token - 1 : 0;
      const [row, column] = [Math.floor(place / columns), place % columns];
      const moves = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] };
      if (!(event.key in moves)) return;
      event.preventDefault();
      const [down, right] = moves[event.key];
      const nextRow = Math.min(image.grid[0] - 1, Math.max(0, row + down));
      const nextColumn = Math.min(columns - 1, Math.max(0, column + right));
      choosePatch(slot, nextRow * columns + nextColumn + 1);
    });
    cls.title = "the image's CLS token: choose it as the patch that is asked";
    cls.addEventListener("click", () => choosePatch(slot, 0));
  }

  async function showPair(number) {
    state.pair = number;
    for (const [place, button] of [...byId("pairs").querySelectorAll("button")].entries()) {
      button.setAttribute("aria-current", place === number);
      button.tabIndex = place === number ? 0 : -1;
    }
    let images;
    try {
      images = await readPair(number);
    } catch (error) {
      shown = null;
      byId("problem").hidden = false;
      byId("problem").textContent = typeof DecompressionStream === "undefined"
        ? "This browser is too old for this page: it lacks DecompressionStream. Any browser since 2023 has it."
        : `This pair cannot be drawn, the file may be damaged: ${error.message}`;
      return;
    }
    if (state.pair !== number) return; // another one was chosen while this one was unpacked
    byId("problem").hidden = true;
    const pair = pairs[number];
    const units = [...pair.words, ...pair.special];
    shown = { images, units };
    Object.assign(state, { word: 0, slot: 0, token: images[0].places > 1 ? 1 : 0, overWord: null, overPatch: null });
    byId("key").textContent = `${pair.key}, text ${pair.slot}`;
    const facts = [["text", pair.text], ["kind", pair.kind], ["label", pair.label], ["teacher", pair.teacher],
      ["student", pair.student]];
    byId("answers").replaceChildren(...facts.filter(([, value]) => value !== null).map(([name, value]) => {
      const line = make("div");
      line.append(make("dt", name), make("dd", value));
      return line;
    }));
    if (hasWords) {
      const buttons = units.map(wordButton);
      byId("words").replaceChildren(...buttons.slice(0, pair.words.length));
      byId("special").replaceChildren("special tokens: ", ...buttons.slice(pair.words.length));
    }
    byId("figures").replaceChildren(...images.map((image, slot) => {
      const line = make("div", null, { className: "side-by-side" });
      line.append(...figureSides().map((side) => figureOf(image, slot, side)));
      return line;
    }));
    draw();
    document.body.dataset.pair = number;
  }

  function begin() {
    for (const part of document.querySelectorAll("[data-has]")) {
      if (!part.dataset.has.split(" ").includes(has)) part.remove();
    }
    byId("chosen").textContent = [
      about.run === null ? "" : `Student ${about.run}`,
      `layer ${about.layer}`,
      about.learnt,
      about.view,
      `Shown: ${about.chosen}`,
    ].filter(Boolean).join(" · ");
    const names = about.heads === 1 ? ["mean"] : ["mean", ...headsOf(null).map((head) => String(head + 1))];
    byId("head").append(...names.map((name, place) => make("option", name, { value: place })));
    byId("head").addEventListener("change", (event) => {
      state.head = Number(event.target.value) ? Number(event.target.value) - 1 : null;
      draw(hasWords ? "word" : "patch");
    });
    document.addEventListener("keydown", (event) => {
      if (event.key !== "h" || event.ctrlKey || event.altKey || event.metaKey || event.target.tagName === "SELECT") return;
      byId("head").selectedIndex = (byId("head").selectedIndex + 1) % names.length;
      byId("head").dispatchEvent(new Event("change"));
    });
    if (pairs[0].images[0].kept)
      document.querySelector(".scale").append(" What the cache has not kept of a row shows nothing: see its kept mass.");
    const score = { divergence: "KL", "kept mass": "lost mass" }[about.order];
    byId("pairs").append(...pairs.map((pair, number) => {
      const button = make("button", `${number + 1}. ${pair.text}`, { type: "button" });
      button.append(make("small", pair.key + (pair.score === null ? "" : ` · ${score} ${nats(pair.score)}`)));
      button.addEventListener("click", () => showPair(number));
      button.addEventListener("keydown", (event) => {
        const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
        const next = number + step;
        if (!step || next < 0 || next >= pairs.length) return;
        event.preventDefault();
        byId("pairs").querySelectorAll("button")[next].focus();
        showPair(next);
      });
      const item = make("li");
      item.append(button);
      return item;
    }));
    showPair(0);
  }

  begin();
})();
