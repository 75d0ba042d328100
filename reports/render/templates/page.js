// Charts, sortable tables and the save button of a page. Every number comes from the records that it embeds.
"use strict";
(() => {
  const read = (id) => {
    const element = document.getElementById(id);
    return element ? JSON.parse(element.textContent) : null;
  };
  const record = read("record");
  const verdict = read("verdict");
  const base = read("base"); // the record that this one is compared with
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const charts = [];

  function axis(label, size = 54) {
    return {
      label, labelSize: 20, labelFont: "12px system-ui", font: "11px system-ui", stroke: color("soft"),
      grid: { stroke: color("rule"), width: 1 }, ticks: { stroke: color("rule"), width: 1 }, size,
    };
  }

  // Horizontal or vertical reference lines with their names, and a shaded span, all in the plot's own units.
  function marks({ lines = [], uprights = [], shade = null }) {
    const scaled = (px) => px * devicePixelRatio;
    return {
      hooks: {
        drawClear: (u) => {
          if (!shade) return;
          const left = u.valToPos(Math.max(shade[0], u.scales.x.min), "x", true);
          const right = u.valToPos(Math.min(shade[1], u.scales.x.max), "x", true);
          u.ctx.fillStyle = color("shade");
          u.ctx.fillRect(left, u.bbox.top, right - left, u.bbox.height);
        },
        draw: (u) => {
          const { ctx, bbox } = u;
          ctx.save();
          ctx.font = `${scaled(11)}px system-ui`;
          const drawn = (text, stroke, path, x, y, align) => {
            ctx.strokeStyle = ctx.fillStyle = stroke;
            ctx.setLineDash([scaled(6), scaled(4)]);
            ctx.lineWidth = scaled(1.5);
            ctx.stroke(path);
            ctx.setLineDash([]);
            ctx.lineWidth = scaled(4);
            ctx.strokeStyle = color("card");
            ctx.textAlign = align;
            ctx.strokeText(text, x, y);
            ctx.fillText(text, x, y);
          };
          for (const { value, name, stroke, below } of lines) {
            const y = u.valToPos(value, "y", true);
            const path = new Path2D();
            path.moveTo(bbox.left, y);
            path.lineTo(bbox.left + bbox.width, y);
            drawn(name, color(stroke), path, bbox.left + bbox.width + scaled(5), y + scaled(below ? 9 : 3), "left");
          }
          // The left label stands at its top left, the right one at its bottom right, where no cumulative curve passes.
          [...uprights].sort((a, b) => a.value - b.value).forEach(({ value, name, stroke }, i) => {
            const x = u.valToPos(value, "x", true);
            const path = new Path2D();
            path.moveTo(x, bbox.top);
            path.lineTo(x, bbox.top + bbox.height);
            const is_right = i > 0 || x < bbox.left + scaled(90);
            const y = is_right ? bbox.top + bbox.height - scaled(8) : bbox.top + scaled(14);
            const room = bbox.left + bbox.width - x;
            if (is_right && room < u.ctx.measureText(name).width + scaled(8)) drawn(name, color(stroke), path, x - scaled(5), y, "right");
            else drawn(name, color(stroke), path, x + scaled(is_right ? 5 : -5), y, is_right ? "left" : "right");
          });
          ctx.restore();
        },
      },
    };
  }

  function draw(id, make) {
    const element = document.getElementById(id);
    if (!element) return;
    const { options, data } = make();
    element.replaceChildren();
    const chart = new uPlot({ width: element.clientWidth, height: 250, ...options }, data, element);
    charts.push({ chart, element });
  }

  const line = (label, stroke, more = {}) => ({
    label, stroke: color(stroke), width: 2, points: { show: false },
    value: (_, v) => (v == null ? "" : v.toLocaleString("en", { maximumFractionDigits: 1 })), ...more,
  });

  function throughput() {
    const uprights = (record.adaptation?.events ?? []).map((event) => ({
      value: event.at_s,
      name: `${event.kind} ${event.node}${event.peer ? ` \u2192 ${event.peer}` : ""}`,
      stroke: "bad",
    }));
    const starts = [0, ...record.timeline.map((count) => count[0])];
    const ends = record.timeline.map((count) => count[0]);
    const rate = (of) => record.timeline.map((count, i) => of(count) / (ends[i] - starts[i]));
    const total = rate((count) => count[1] + count[2]);
    const bound = verdict.bound_tokens_per_s;
    const expected = verdict.expected_tokens_per_s;
    const top = Math.max(bound, ...total) * 1.12;
    const lines = [{ value: bound, name: "bound", stroke: "ink" }];
    if (expected != null) lines.push({ value: expected, name: "expected", stroke: "soft", below: bound - expected < top * 0.06 });
    return {
      options: {
        scales: { x: { time: false, range: [0, ends.at(-1)] }, y: { range: [0, top] } },
        axes: [axis("seconds since the run began", 34), axis("tokens/s")],
        series: [{ label: "until, s" }, line("total tokens/s", "line0"), line("output tokens/s", "line1", { width: 1.5 })],
        padding: [null, 62, null, null], // room for the names of the lines beside the plot
        plugins: [marks({ lines, uprights, shade: [record.window.start_s, record.window.end_s] })],
      },
      data: [ends, total, rate((count) => count[2])],
    };
  }

  // Offline requests all arrive at the start, so their TTFT counts from admission, as in the record's own `began_s`.
  const beganAt = (run, r) => (run.arrivals === "offline" ? r.admitted_s ?? r.arrival_s : r.arrival_s);

  // Sorted seconds of the requests that finished in the window.
  function latenciesOf(run, kind) {
    const { start_s: start, end_s: end } = run.window;
    return run.requests
      .filter((r) => start <= r.finish_s && r.finish_s < end && (kind === "ttft" || r.output_tokens > 1))
      .map((r) => (kind === "ttft" ? r.first_token_s - beganAt(run, r) : (r.finish_s - r.first_token_s) / (r.output_tokens - 1)))
      .sort((a, b) => a - b);
  }

  // Cumulative shares of the sorted values, from 0.
  const shares = (values) => [[0, ...values], [0, ...values.map((_, i) => ((i + 1) * 100) / values.length)]];

  function latency(kind) {
    const values = latenciesOf(record, kind);
    const others = base ? latenciesOf(base, kind) : [];
    const found = verdict.latencies.find((l) => l.kind === kind);
    const uprights = [{ value: found.mean_s, name: "mean", stroke: "ink" }];
    if (found.predicted_mean_s != null) uprights.push({ value: found.predicted_mean_s, name: "predicted mean", stroke: "line1" });
    const far = Math.max(values.at(-1), others.at(-1) ?? 0, found.predicted_mean_s ?? 0) * 1.05;
    if (uprights.length === 2 && Math.abs(uprights[0].value - uprights[1].value) < far * 0.02) uprights[0].name = "";
    const curve = (label, stroke) => line(label, stroke, { paths: uPlot.paths.stepped({ align: 1 }), spanGaps: true });
    return {
      options: {
        scales: { x: { time: false, range: [0, far] }, y: { range: [0, 100] } },
        axes: [axis("seconds", 34), axis("% of requests")],
        legend: { show: base != null },
        series: [{ label: "seconds", value: (_, v) => (v == null ? "" : v.toPrecision(3)) },
          curve(base ? "new" : "% of requests", "line0"), ...(base ? [curve("base", "line2")] : [])],
        plugins: [marks({ uprights })],
      },
      data: base ? uPlot.join([shares(values), shares(others)]) : shares(values),
    };
  }

  function series(of, label, top) {
    const names = Object.keys(record.node_timeline);
    const tables = names.map((name) => [
      record.node_timeline[name].map((point) => point[0]),
      record.node_timeline[name].map((point) => of(point, name)),
    ]);
    return {
      options: {
        scales: { x: { time: false }, y: { range: (_, low, high) => [0, top ?? high * 1.1] } },
        axes: [axis("seconds since the run began", 34), axis(label)],
        series: [{ label: "until, s" },
          ...names.map((name, i) => line(name, `line${i % 6}`, { dash: i < 6 ? [] : [6, 3], spanGaps: true }))],
        plugins: [marks({ shade: [record.window.start_s, record.window.end_s] })],
      },
      data: uPlot.join(tables),
    };
  }

  function drawAll() {
    for (const { chart } of charts.splice(0)) chart.destroy();
    if (!verdict) return;
    if (record.timeline.length) draw("throughput-chart", throughput);
    draw("ttft-chart", () => latency("ttft"));
    draw("tpot-chart", () => latency("tpot"));
    draw("batch-chart", () => series((point) => point[1], "decode tokens"));
    draw("busy-chart", () => series((point) => 100 * point[3], "% of time", 100));
    draw("kv-chart", () => series((point, name) => (100 * point[2]) / (record.nodes[name]?.kv_capacity_tokens || 1), "% of KV cache"));
  }

  function sortable(table) {
    const body = table.tBodies[0];
    const columns = table.tHead.rows[table.tHead.rows.length - 1].cells; // the row above, if any, names groups
    const key = (row, i) => {
      const cell = row.cells[i];
      const raw = cell?.dataset.value ?? cell?.textContent ?? "";
      return raw !== "" && Number.isFinite(Number(raw)) ? Number(raw) : raw;
    };
    [...columns].forEach((head, i) => {
      if (!head.textContent.trim()) return;
      const button = document.createElement("button");
      button.className = "sort";
      button.type = "button";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
        for (const other of columns) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
        const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
        body.append(...[...body.rows].sort((a, b) => sign * compare(key(a, i), key(b, i))));
      });
    });
  }

  function offerSave() {
    const button = document.getElementById("save");
    button.hidden = false;
    button.addEventListener("click", () => {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([JSON.stringify(record, null, 1)], { type: "application/json" }));
      link.download = `${record.schema.split(".")[1].split("/")[0]}.json`;
      link.click();
      URL.revokeObjectURL(link.href);
    });
  }

  document.querySelectorAll("table.sortable").forEach(sortable);
  offerSave();
  drawAll();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  addEventListener("resize", () => charts.forEach(({ chart, element }) => chart.setSize({ width: element.clientWidth, height: 250 })));
})();
