// The timeline: one track per VCPU with a lane for each sort of event, drawn on a canvas.

const LANES = [
  { name: "acts", categories: ["actor"] },
  { name: "is told", categories: ["notification", "invalidation", "drop"] },
  { name: "stands still", categories: ["stall", "acknowledgement", "queue"] },
  { name: "traces", categories: ["establish", "remove", "revocation", "machine"] },
];
const GUTTER = 132, LANE = 17, GAP = 10, AXIS = 22;
const MOST_ARROWS = 500;

/// A length of time in nanoseconds, as text.
function time(ns) {
  const cut = (x) => (x >= 100 ? x.toFixed(0) : x >= 10 ? x.toFixed(1) : x.toFixed(2));
  if (ns < 1e3) return `${Math.round(ns)} ns`;
  if (ns < 1e6) return `${cut(ns / 1e3)} µs`;
  if (ns < 1e9) return `${cut(ns / 1e6)} ms`;
  return `${cut(ns / 1e9)} s`;
}

/// A point in time, exact enough for a step between two points.
function point(ns, step) {
  const [unit, name] = step >= 1e8 ? [1e9, "s"] : step >= 1e5 ? [1e6, "ms"] : step >= 100 ? [1e3, "µs"] : [1, "ns"];
  const digits = Math.max(0, Math.min(9, Math.ceil(-Math.log10(step / unit) - 1e-9)));
  return `${(ns / unit).toFixed(digits)} ${name}`;
}

/// The least number not below `x` of the form 1, 2 or 5 times a power of ten.
function niceStep(x) {
  const power = 10 ** Math.floor(Math.log10(x));
  return power * [1, 2, 5, 10].find((n) => n * power >= x * 0.999999);
}

/// The first index of a sorted list whose value is not below `x`.
function lowerBound(list, x, of) {
  let lo = 0, hi = list.length;
  while (lo < hi) {
    const middle = (lo + hi) >> 1;
    if (of(list[middle]) < x) lo = middle + 1; else hi = middle;
  }
  return lo;
}

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/// Makes a canvas as fine as the screen; its context, and its width and height in CSS pixels.
function prepare(canvas, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.style.height = `${height}px`;
  const width = canvas.clientWidth;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

/// `data` is the page's data with the events as columns; `shown` tells whether a kind is shown;
/// `changed` is called when another time is shown; `tell` with the event pointed at, or -1.
function Timeline(data, shown, changed, tell) {
  const e = data.events;
  const count = e.start.length;
  const canvas = document.getElementById("timeline");
  const overview = document.getElementById("overview");
  const end = Math.max(data.end * 1.002, 1000);
  const view = { from: 0, to: end };
  const laneOf = data.categories.map((category) => LANES.findIndex((lane) => lane.categories.includes(category)));
  let chosen = -1, pointed = -1;

  // Events by track and lane, in order of their starts, with the longest of each.
  const tracks = data.tracks.map((name, number) => ({
    name, number, top: 0, lanes: LANES.map((lane) => ({ lane, events: [], longest: 0 })),
  }));
  const actors = new Map();
  for (let n = 0; n < count; n++) {
    const lane = tracks[e.track[n]].lanes[laneOf[e.category[n]]];
    lane.events.push(n);
    lane.longest = Math.max(lane.longest, e.length[n]);
    // Accesses to devices' registers are counted apart, and nobody is notified of them.
    if (data.categories[e.category[n]] === "actor" && e.sequence[n] && e.sets[e.set[n]].length) {
      const known = actors.get(e.sequence[n]);
      if (known) known.push(n); else actors.set(e.sequence[n], [n]);
    }
  }
  const visible = tracks.filter((track) => track.number < data.vcpus || track.lanes.some((l) => l.events.length));
  for (const track of visible) {
    track.lanes = track.lanes.filter((l) => track.number < data.vcpus || l.events.length);
  }
  let height = AXIS;
  for (const track of visible) {
    track.top = height + GAP / 2;
    height += track.lanes.length * LANE + GAP;
  }

  const scale = (width) => (width - GUTTER) / (view.to - view.from);

  /// Calls `each` for the events of a lane that may be seen from `from` to `to`.
  function between(lane, from, to, each) {
    const first = lowerBound(lane.events, from - lane.longest, (n) => e.start[n]);
    for (let i = first; i < lane.events.length && e.start[lane.events[i]] <= to; i++) {
      const n = lane.events[i];
      if (e.start[n] + e.length[n] >= from && shown(e.kind[n])) each(n);
    }
  }

  function draw() {
    const { context: c, width } = prepare(canvas, height + 4);
    const k = scale(width), ink = color("--ink"), soft = color("--soft"), line = color("--line");
    const laneColor = color("--lane");
    const colors = data.kinds.map((_, n) => color(`--kind${n}`));
    const x = (t) => GUTTER + (t - view.from) * k;
    c.font = "12px system-ui, sans-serif";
    c.textBaseline = "middle";
    // Time.
    const step = niceStep(((view.to - view.from) / Math.max(width - GUTTER, 1)) * 110);
    for (let t = Math.ceil(view.from / step) * step; t <= view.to; t += step) {
      c.fillStyle = line;
      c.fillRect(Math.round(x(t)), AXIS - 5, 1, height);
      c.fillStyle = soft;
      if (x(t) < width - 60) c.fillText(point(t, step), x(t) + 4, AXIS / 2);
    }
    // Tracks.
    let arrows = [];
    for (const track of visible) {
      c.fillStyle = ink;
      c.font = "600 12px system-ui, sans-serif";
      c.fillText(track.name, 6, track.top + LANE / 2);
      c.font = "11px system-ui, sans-serif";
      track.lanes.forEach((lane, row) => {
        const y = track.top + row * LANE;
        c.fillStyle = laneColor;
        c.fillRect(GUTTER, y, width - GUTTER, LANE - 2);
        c.fillStyle = soft;
        c.textAlign = "right";
        c.fillText(lane.lane.name, GUTTER - 8, y + LANE / 2);
        c.textAlign = "left";
        // Of what falls onto the same pixels, once is enough.
        const drawn = new Map();
        between(lane, view.from, view.to, (n) => {
          const inner = data.categories[e.category[n]] === "invalidation";
          const left = Math.max(x(e.start[n]), GUTTER);
          const right = Math.min(Math.max(x(e.start[n] + e.length[n]), left + 1.2), width);
          const key = e.kind[n] * 2 + inner;
          if (Math.floor(right) > (drawn.get(key) ?? -1)) {
            drawn.set(key, Math.floor(right));
            c.fillStyle = colors[e.kind[n]];
            if (inner) {
              c.fillStyle = ink;
              c.fillRect(left, y + LANE - 7, right - left, 4);
            } else {
              c.globalAlpha = data.categories[e.category[n]] === "queue" ? 0.55 : 0.9;
              c.fillRect(left, y + 1, right - left, LANE - 4);
              c.globalAlpha = 1;
            }
          }
          if (n === chosen || n === pointed) {
            c.strokeStyle = ink;
            c.lineWidth = 2;
            c.strokeRect(left - 1, y, right - left + 2, LANE - 2);
          }
          if (arrows && data.categories[e.category[n]] === "notification") {
            if (arrows.length < MOST_ARROWS) arrows.push([n, y]); else arrows = null;
          }
        });
      });
    }
    for (const [n, y] of arrows ?? []) {
      const from = actorOf(n);
      if (from < 0 || e.track[from] === e.track[n]) continue;
      const track = tracks[e.track[from]];
      const x0 = x(e.start[from]), y0 = track.top + LANE / 2, x1 = x(e.start[n]), y1 = y + LANE / 2;
      if (x0 < GUTTER - 200 || x1 > width + 200) continue;
      c.save();
      c.beginPath();
      c.rect(GUTTER, 0, width - GUTTER, height);
      c.clip();
      c.strokeStyle = n === chosen || from === chosen ? ink : soft;
      c.globalAlpha = n === chosen || from === chosen ? 1 : 0.6;
      c.lineWidth = 1;
      c.beginPath();
      c.moveTo(x0, y0);
      c.bezierCurveTo(x0 + 24, y0, x1 - 24, y1, x1, y1);
      c.stroke();
      c.beginPath();
      c.moveTo(x1, y1);
      c.lineTo(x1 - 6, y1 - 3);
      c.lineTo(x1 - 6, y1 + 3);
      c.fillStyle = c.strokeStyle;
      c.fill();
      c.restore();
    }
    drawOverview();
    const length = view.to - view.from;
    document.getElementById("window").textContent =
      `${point(view.from, length / 100)} to ${point(view.to, length / 100)} (${time(length)})`;
  }

  /// The event that a notification tells of, or -1.
  function actorOf(n) {
    const list = actors.get(e.sequence[n]) ?? [];
    // Numbers begin anew when the machine does: the latest that had begun.
    let found = -1;
    for (const actor of list) if (e.start[actor] <= e.start[n]) found = actor;
    return found;
  }

  let density = null;
  function drawOverview() {
    const { context: c, width, height } = prepare(overview, 44);
    const columns = Math.max(1, Math.floor(width - GUTTER));
    if (density?.columns !== columns) {
      density = { columns, counts: new Float64Array(columns), most: 1 };
      for (let n = 0; n < count; n++) {
        if (!shown(e.kind[n])) continue;
        density.counts[Math.min(columns - 1, Math.floor((e.start[n] / end) * columns))]++;
      }
      density.most = Math.max(1, ...density.counts);
    }
    c.fillStyle = color("--soft");
    c.font = "11px system-ui, sans-serif";
    c.textBaseline = "middle";
    c.textAlign = "right";
    c.fillText("whole recording", GUTTER - 8, height / 2);
    c.fillStyle = color("--kind1");
    for (let x = 0; x < columns; x++) {
      if (density.counts[x] === 0) continue;
      const h = 2 + (Math.log1p(density.counts[x]) / Math.log1p(density.most)) * (height - 8);
      c.fillRect(GUTTER + x, height - 2 - h, 1, h);
    }
    const from = GUTTER + (view.from / end) * columns, to = GUTTER + (view.to / end) * columns;
    c.fillStyle = color("--shade");
    c.fillRect(from, 0, Math.max(to - from, 2), height);
    c.strokeStyle = color("--accent");
    c.strokeRect(from + 0.5, 0.5, Math.max(to - from, 2) - 1, height - 1);
  }

  function show(from, to) {
    const length = Math.min(Math.max(to - from, 50), end);
    const start = Math.min(Math.max((from + to) / 2 - length / 2, 0), end - length);
    view.from = start;
    view.to = start + length;
    schedule();
    changed();
  }

  function zoom(factor, at = (view.from + view.to) / 2) {
    show(at - (at - view.from) * factor, at + (view.to - at) * factor);
  }

  let scheduled = false;
  function schedule() {
    if (scheduled) return;
    scheduled = true;
    requestAnimationFrame(() => { scheduled = false; draw(); });
  }

  const timeAt = (event) => {
    const box = canvas.getBoundingClientRect();
    return view.from + (event.clientX - box.left - GUTTER) / scale(box.width);
  };

  /// The event under the pointer, the shortest of several, or -1.
  function under(event) {
    const box = canvas.getBoundingClientRect();
    const y = event.clientY - box.top;
    const track = visible.find((t) => y >= t.top && y < t.top + t.lanes.length * LANE);
    if (!track || event.clientX - box.left < GUTTER) return -1;
    const lane = track.lanes[Math.floor((y - track.top) / LANE)];
    const t = timeAt(event), slack = 3 / scale(box.width);
    let best = -1;
    between(lane, t - slack, t + slack, (n) => {
      if (best < 0 || e.length[n] <= e.length[best]) best = n;
    });
    return best;
  }

  let drag = null;
  canvas.addEventListener("pointerdown", (event) => {
    drag = { x: event.clientX, from: view.from, to: view.to, moved: false };
    canvas.setPointerCapture(event.pointerId);
    canvas.classList.add("moving");
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!drag) {
      const n = under(event);
      if (n !== pointed) { pointed = n; tell(n >= 0 ? n : chosen); schedule(); }
      return;
    }
    const by = event.clientX - drag.x;
    drag.moved ||= Math.abs(by) > 3;
    if (drag.moved) {
      const t = by / scale(canvas.clientWidth);
      show(drag.from - t, drag.to - t);
    }
  });
  canvas.addEventListener("pointerup", (event) => {
    if (drag && !drag.moved) { chosen = under(event); tell(chosen); schedule(); }
    drag = null;
    canvas.classList.remove("moving");
  });
  canvas.addEventListener("pointercancel", () => { drag = null; canvas.classList.remove("moving"); });
  canvas.addEventListener("pointerleave", () => {
    if (pointed >= 0) { pointed = -1; tell(chosen); schedule(); }
  });
  canvas.addEventListener("dblclick", (event) => zoom(0.25, timeAt(event)));
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && document.activeElement !== canvas) return;
    event.preventDefault();
    const aside = event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY);
    if (aside) {
      const by = (event.deltaX || event.deltaY) / scale(canvas.clientWidth);
      show(view.from + by, view.to + by);
    } else {
      zoom(Math.exp(Math.max(-300, Math.min(300, event.deltaY)) / 400), timeAt(event));
    }
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const step = (view.to - view.from) / 5;
    const keys = {
      ArrowLeft: () => show(view.from - step, view.to - step),
      ArrowRight: () => show(view.from + step, view.to + step),
      "+": () => zoom(0.5), "=": () => zoom(0.5), "-": () => zoom(2), 0: () => show(0, end),
    };
    if (keys[event.key]) { keys[event.key](); event.preventDefault(); }
  });
  let brush = null;
  const overviewTime = (event) => {
    const box = overview.getBoundingClientRect();
    return ((event.clientX - box.left - GUTTER) / (box.width - GUTTER)) * end;
  };
  overview.addEventListener("pointerdown", (event) => {
    brush = overviewTime(event);
    overview.setPointerCapture(event.pointerId);
  });
  overview.addEventListener("pointermove", (event) => {
    if (brush === null) return;
    const now = overviewTime(event);
    show(Math.min(brush, now), Math.max(brush, now));
  });
  overview.addEventListener("pointerup", (event) => {
    const now = overviewTime(event), length = view.to - view.from;
    // A click moves what is shown there.
    if (brush !== null && Math.abs(now - brush) < end / 500) show(now - length / 2, now + length / 2);
    brush = null;
  });

  return {
    view, show, zoom, draw: schedule, actorOf,
    all: () => show(0, end),
    refresh: () => { density = null; schedule(); },
  };
}
