// Fills the page from its data block. Text from the data enters the page as text only.

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return made;
}

function plural(count, noun) { return `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`; }

function facts(data) {
  document.getElementById("source").textContent = data.source;
  document.title = `${data.source}: trace events`;
  const list = [
    ["Events", data.total.toLocaleString("en")], ["Recorded", time(data.end)],
    ["VCPUs", data.vcpus], ["Guest memory", size(data.memory)], ["Written by", data.tool],
  ];
  document.getElementById("facts").append(
    ...list.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
  const notices = [];
  if (data.dropped) notices.push(`${plural(data.dropped, "event")} found no room and are missing: every count is too low.`);
  if (data.stopped) notices.push(`The recording ended before the machine did: ${data.stopped}.`);
  if (data.omitted) notices.push(`${plural(data.omitted, "event")} are left out of the timeline and the map, so that browsers can draw them; the tables count all.`);
  const notice = document.getElementById("notice");
  notice.textContent = notices.join(" ");
  notice.hidden = notices.length === 0;
}

/// A table whose first `left` columns are words.
function plainTable(into, table, left, address = false) {
  const side = (n) => (n < left ? { class: n === 0 && address ? "l mono" : "l" } : {});
  const head = element("tr", {}, ...table.head.map((cell, n) => element("th", { scope: "col", ...(n < left ? { class: "l" } : {}) }, cell)));
  const rows = table.rows.map((row) => element("tr", {}, ...row.map((cell, n) => element("td", side(n), cell))));
  const place = document.getElementById(into);
  place.append(element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows)));
  more(place, table.others);
}

function more(place, others) {
  if (others) place.append(element("p", { class: "hint" }, `and ${others.toLocaleString("en")} more, less busy`));
}

function rolesTable(data) {
  const vcpus = [...Array(data.vcpus).keys()];
  const head = element("tr", {},
    element("th", { scope: "col", class: "l", rowspan: 2 }, "Memory"), element("th", { scope: "col", class: "l", rowspan: 2 }, "Kinds"),
    element("th", { scope: "col", rowspan: 2 }, "Accesses"),
    ...vcpus.map((n) => element("th", { scope: "colgroup", colspan: 3, class: "vcpu" }, `VCPU ${n}`)));
  const letters = element("tr", {}, ...vcpus.flatMap(() => ["A", "C", "B"].map((role, n) =>
    element("th", { scope: "col", title: ["actor", "consumer", "bystander"][n], ...(n ? {} : { class: "first" }) }, role))));
  const rows = data.roles.rows.map((row) => element("tr", {},
    element("td", { class: "l mono" }, row.range), element("td", { class: "l" }, row.kinds.join(", ")), element("td", {}, row.accesses),
    ...row.roles.flatMap((roles) => roles.map((count, n) => {
      const strong = count === 0 ? "zero" : n < 2 ? "played" : "";
      return element("td", { class: `${n ? "" : "first "}${strong}` }, count);
    }))));
  const place = document.getElementById("roles");
  place.append(element("table", {}, element("thead", {}, head, letters), element("tbody", {}, ...rows)));
  if (rows.length === 0) place.append(element("p", { class: "hint" }, "Nobody accessed traced memory."));
  more(place, data.roles.others);
}

function waitHistograms(data) {
  const place = document.getElementById("waits");
  for (const wait of data.waits) {
    const most = Math.max(...wait.bars.map(([, count]) => count), 1);
    const bars = element("div", { class: "hist" });
    for (const [below, count] of wait.bars) {
      const bar = element("i");
      bar.style.width = `${(count / most) * 100}%`;
      if (count === 0) bar.style.visibility = "hidden";
      bars.append(element("span", {}, `< ${below}`), element("span", {}, count.toLocaleString("en")), bar);
    }
    place.append(element("div", {}, element("h3", {}, wait.what),
      element("p", { class: "hint" }, `${plural(wait.count, "wait")}: p50 ${wait.p50}, p90 ${wait.p90}, p99 ${wait.p99}, max ${wait.max}`), bars));
  }
  if (data.waits.length === 0) place.append(element("p", { class: "hint" }, "Nobody waited."));
}

/// What is known of an event, as a line.
function details(data, n, actorOf) {
  const place = document.getElementById("details");
  place.replaceChildren();
  if (n < 0) {
    place.append(element("span", { class: "hint" }, "Point at an event to read about it; click to keep it here."));
    return;
  }
  const e = data.events, category = data.categories[e.category[n]];
  const bytes = (lo, length) => `[${hex(lo)}, ${hex(lo + length)})`;
  const add = (name, value) => place.append(element("span", {}, element("b", {}, `${name} `), value), " ");
  const kind = e.kind[n] ? `${data.kinds[e.kind[n]]} ` : "";
  const acts = category === "actor" ? (e.read[n] ? "read" : "write") : category;
  add(data.tracks[e.track[n]], `${kind}${acts}`);
  add("at", `${(e.start[n] / 1000).toFixed(3)} µs`);
  if (e.length[n]) add("for", time(e.length[n]));
  if (e.semantics[n]) add("semantics", data.semantics[e.semantics[n]]);
  if (e.size[n]) add("bytes", bytes(e.lo[n], e.size[n]));
  if (e.regionSize[n]) add("region", bytes(e.regionLo[n], e.regionSize[n]));
  const consumers = e.sets[e.set[n]];
  if (category === "actor") {
    add("consumers", consumers.length ? consumers.map((v) => `VCPU ${v}`).join(", ") : "none");
    if (e.awaited[n]) add("waited", `${time(e.waited[n])} for ${e.awaited[n]} that ran`);
  } else if (category === "establish" && consumers.length) {
    add("for", consumers.map((v) => `VCPU ${v}`).join(", "));
  } else if (category === "notification") {
    const actor = actorOf(n);
    if (actor >= 0) add("from", `${data.tracks[e.track[actor]]}, ${time(e.start[n] - e.start[actor])} before`);
  }
  if (e.count[n]) add("count", e.count[n]);
}

function main() {
  const data = JSON.parse(document.getElementById("data").textContent);
  const e = data.events;
  const columns = ["start", "length", "track", "category", "kind", "semantics", "read", "lo", "size",
    "regionLo", "regionSize", "sequence", "set", "awaited", "waited", "count"];
  for (const column of columns) e[column] = Float64Array.from(e[column]);
  for (let n = 1; n < e.start.length; n++) e.start[n] += e.start[n - 1];
  facts(data);
  rolesTable(data);
  waitHistograms(data);
  plainTable("regions", data.regions, 2, true);
  plainTable("totals", data.totals, 2);

  const hidden = new Set();
  const shown = (kind) => !hidden.has(kind);
  const present = [...new Set(e.kind)].sort();
  let memory = null;
  const timeline = Timeline(data, shown, () => memory?.viewChanged(), (n) => details(data, n, timeline.actorOf));
  memory = Memory(data, shown, timeline.view);
  for (const kind of present) {
    const box = element("input", { type: "checkbox" });
    box.checked = true;
    box.onchange = () => {
      if (box.checked) hidden.delete(kind); else hidden.add(kind);
      timeline.refresh();
      memory.draw();
    };
    const swatch = element("i");
    swatch.style.background = `var(--kind${kind})`;
    document.getElementById("kinds").append(element("label", {}, box, swatch, kind ? data.kinds[kind] : "other"));
  }
  document.getElementById("zoom-in").onclick = () => timeline.zoom(0.5);
  document.getElementById("zoom-out").onclick = () => timeline.zoom(2);
  document.getElementById("zoom-all").onclick = () => timeline.all();
  const redraw = () => { timeline.draw(); memory.draw(); };
  new ResizeObserver(redraw).observe(document.querySelector("main"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

  // A link may say what to show: #time=FROM-TO in microseconds, #memory=ADDRESS+BYTES.
  const wanted = new URLSearchParams(location.hash.slice(1).replaceAll("+", "%2B"));
  const [from, to] = (wanted.get("time") ?? "").split("-").map(Number);
  if (from < to) timeline.show(from * 1000, to * 1000);
  const [at, length] = (wanted.get("memory") ?? "").split("+").map(Number);
  if (at >= 0 && length > 0) memory.look(at, length);
  details(data, -1);
  timeline.draw();
  memory.draw();
  requestAnimationFrame(() => requestAnimationFrame(() => {
    document.documentElement.dataset.ready = String(e.start.length);
  }));
}

window.addEventListener("error", (event) => {
  document.documentElement.dataset.failed = event.message;
  const notice = document.getElementById("notice");
  notice.textContent = `This page does not work in this browser: ${event.message}`;
  notice.hidden = false;
});
main();
