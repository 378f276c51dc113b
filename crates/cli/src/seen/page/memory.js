// The heat map of guest memory: a grid of cells of equal size, into which one can look deeper.

const COLUMNS = 64, ROWS = 16, CELLS = COLUMNS * ROWS, LEAST_CELL = 16;

function hex(x) { return `0x${x.toString(16)}`; }

function size(bytes) {
  for (const [unit, name] of [[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"], [1024, "KiB"]]) {
    if (bytes >= unit) return `${+(bytes / unit).toFixed(1)} ${name}`;
  }
  return `${bytes} B`;
}

/// `view` is the time shown by the timeline.
function Memory(data, shown, view) {
  const e = data.events;
  const canvas = document.getElementById("memory");
  const measure = document.getElementById("measure");
  const within = document.getElementById("within");
  const device = data.kinds.indexOf("device");
  const category = (name) => data.categories.indexOf(name);
  // What each measure counts, by event: the range and how often.
  const measures = {
    accesses: { category: category("actor"), lo: e.lo, size: e.size, of: () => 1 },
    notifications: { category: category("actor"), lo: e.lo, size: e.size, of: (n) => e.sets[e.set[n]].length },
    invalidations: { category: category("invalidation"), lo: e.lo, size: e.size, of: (n) => e.count[n] },
    traces: { category: category("establish"), lo: e.regionLo, size: e.regionSize, of: () => 1 },
  };
  let highest = 1;
  for (let n = 0; n < e.start.length; n++) {
    if (e.kind[n] === device) continue;
    highest = Math.max(highest, e.lo[n] + e.size[n], e.regionLo[n] + e.regionSize[n]);
  }
  let whole = LEAST_CELL * CELLS;
  while (whole < highest) whole *= 2;
  const levels = [{ lo: 0, size: whole }];
  let cells = { counts: new Float64Array(CELLS), most: 0, total: 0 };
  let pointed = -1;

  const level = () => levels[levels.length - 1];

  function count() {
    const { lo, size } = level(), cell = size / CELLS, m = measures[measure.value];
    const counts = new Float64Array(CELLS);
    let total = 0;
    for (let n = 0; n < e.start.length; n++) {
      if (e.category[n] !== m.category || e.kind[n] === device || !shown(e.kind[n])) continue;
      if (within.checked && (e.start[n] + e.length[n] < view.from || e.start[n] > view.to)) continue;
      const from = m.lo[n], to = from + m.size[n];
      if (to <= lo || from >= lo + size) continue;
      const weight = m.of(n);
      total += weight;
      const first = Math.max(0, Math.floor((from - lo) / cell));
      const last = Math.min(CELLS - 1, Math.floor((to - 1 - lo) / cell));
      for (let i = first; i <= last; i++) counts[i] += weight;
    }
    cells = { counts, most: counts.reduce((a, b) => Math.max(a, b), 0), total };
  }

  function heat() {
    const stops = [0, 1, 2].map((n) => color(`--heat${n}`).split(",").map(Number));
    return (x) => {
      const at = Math.min(x, 0.9999) * 2, i = Math.floor(at), part = at - i;
      return `rgb(${stops[i].map((v, c) => Math.round(v + (stops[i + 1][c] - v) * part)).join(",")})`;
    };
  }

  const share = (value) => (value === 0 ? 0 : 0.15 + 0.85 * (Math.log1p(value) / Math.log1p(Math.max(cells.most, 1))));

  function draw() {
    count();
    const row = Math.max(14, Math.min(26, Math.floor(canvas.clientWidth / COLUMNS)));
    const gutter = 118;
    const { context: c, width } = prepare(canvas, ROWS * row + 4);
    const paint = heat(), w = (width - gutter - 4) / COLUMNS;
    const { lo, size: length } = level();
    c.font = "11px ui-monospace, monospace";
    c.textBaseline = "middle";
    for (let r = 0; r < ROWS; r++) {
      c.fillStyle = color("--soft");
      c.textAlign = "right";
      c.fillText(hex(lo + (length / ROWS) * r), gutter - 8, r * row + row / 2 + 2);
      for (let x = 0; x < COLUMNS; x++) {
        const value = cells.counts[r * COLUMNS + x];
        c.fillStyle = paint(share(value));
        c.fillRect(gutter + x * w, r * row + 3, w - 1, row - 2);
        if (r * COLUMNS + x === pointed) {
          c.strokeStyle = color("--ink");
          c.lineWidth = 2;
          c.strokeRect(gutter + x * w, r * row + 3, w - 1, row - 2);
        }
      }
    }
    const scale = document.getElementById("scale");
    scale.replaceChildren();
    const bar = document.createElement("i");
    bar.style.background = `linear-gradient(to right, ${[0, 0.25, 0.5, 0.75, 1].map(paint).join(",")})`;
    scale.append("0", bar, `${cells.most} per cell of ${size(length / CELLS)}`);
    describe();
    const path = document.getElementById("path");
    path.replaceChildren();
    levels.forEach((l, n) => {
      const button = document.createElement("button");
      button.type = "button";
      button.disabled = n === levels.length - 1;
      button.textContent = n === 0 ? "all memory" : `${hex(l.lo)} + ${size(l.size)}`;
      button.onclick = () => { levels.length = n + 1; pointed = -1; draw(); };
      path.append(n === 0 ? "" : " › ", button);
    });
  }

  function describe() {
    const { lo, size: length } = level(), cell = length / CELLS;
    document.getElementById("cell").textContent = pointed < 0
      ? `${cells.total} in all. Point at a cell for its address, click to look into it.`
      : `[${hex(lo + pointed * cell)}, ${hex(lo + (pointed + 1) * cell)}): ${cells.counts[pointed]}`;
  }

  function under(event) {
    const box = canvas.getBoundingClientRect(), gutter = 118;
    const column = Math.floor(((event.clientX - box.left - gutter) / (box.width - gutter - 4)) * COLUMNS);
    const row = Math.floor(((event.clientY - box.top - 2) / (box.height - 4)) * ROWS);
    const inside = column >= 0 && column < COLUMNS && row >= 0 && row < ROWS;
    return inside ? row * COLUMNS + column : -1;
  }

  /// Shows what is around a range, two cells wide or more.
  function look(lo, length) {
    while (level().size / CELLS > Math.max(length, LEAST_CELL) && into(Math.floor((lo - level().lo) / (level().size / CELLS)))) { /* deeper */ }
    draw();
  }

  function into(cell) {
    const { lo, size: length } = level(), part = length / CELLS;
    if (part <= LEAST_CELL || cell < 0 || cell >= CELLS) return false;
    const next = Math.max(part, LEAST_CELL * CELLS), at = lo + cell * part;
    levels.push({ lo: next > part ? Math.floor(at / next) * next : at, size: next });
    pointed = -1;
    return true;
  }

  canvas.addEventListener("pointermove", (event) => {
    const cell = under(event);
    if (cell !== pointed) { pointed = cell; draw(); }
  });
  canvas.addEventListener("pointerleave", () => { if (pointed >= 0) { pointed = -1; draw(); } });
  canvas.addEventListener("click", (event) => {
    const cell = under(event);
    if (cell >= 0 && into(cell)) draw();
  });
  canvas.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -COLUMNS, ArrowDown: COLUMNS };
    if (event.key in steps) {
      pointed = (Math.max(pointed, 0) + steps[event.key] + CELLS) % CELLS;
    } else if (event.key === "Enter") {
      into(pointed);
    } else if (event.key === "Escape" && levels.length > 1) {
      levels.pop();
      pointed = -1;
    } else {
      return;
    }
    event.preventDefault();
    draw();
  });
  measure.addEventListener("change", draw);
  within.addEventListener("change", draw);
  let scheduled = false;
  function viewChanged() {
    if (!within.checked || scheduled) return;
    scheduled = true;
    requestAnimationFrame(() => { scheduled = false; draw(); });
  }
  return { draw, look, viewChanged };
}
