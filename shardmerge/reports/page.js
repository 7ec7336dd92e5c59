"use strict";
(() => {
  const root = document.documentElement;
  const data = JSON.parse(document.getElementById("data").textContent);

  // The theme: that of the system until somebody chooses.
  const theme = document.getElementById("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const remember = (value) => { try { localStorage.setItem("shardmerge-theme", value); } catch (_) { /* file: URLs */ } };
  const recall = () => { try { return localStorage.getItem("shardmerge-theme"); } catch (_) { return null; } };
  const chosen = recall();
  if (chosen === "light" || chosen === "dark") root.dataset.theme = chosen;
  theme.hidden = false;
  theme.addEventListener("click", () => {
    const now = root.dataset.theme || (dark.matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
    remember(root.dataset.theme);
  });

  // The table of tensors: filtered by what is typed, or by #q=... of the address.
  const table = document.querySelector("#tensors table");
  const search = document.getElementById("search");
  const count = document.getElementById("count");
  if (table) {
    const BYTES = 3;
    const body = table.tBodies[0];
    const rows = [...body.rows];
    // A row may stand for many numbers, so there any number finds any other.
    const folded = (text) => data.patterns ? text.replace(/\{\d+-\d+\}|\d+/g, "#") : text;
    const texts = new Map(rows.map((row) => [row, folded(row.textContent.toLowerCase())]));
    const show = (query) => {
      const words = folded(query.toLowerCase()).split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of rows) {
        const found = words.every((word) => texts.get(row).includes(word));
        row.hidden = !found;
        shown += found;
      }
      count.textContent = `${shown.toLocaleString("en")} of ${rows.length.toLocaleString("en")} rows`;
      root.dataset.rows = shown;
    };
    const asked = () => {
      const hash = location.hash.slice(1);
      if (!hash.startsWith("q=")) return null;
      try { return decodeURIComponent(hash.slice(2)); } catch (_) { return hash.slice(2); }
    };
    const follow = () => {
      const query = asked();
      if (query !== null) {
        search.value = query;
        document.getElementById("tensors").scrollIntoView();
      }
      show(search.value);
      const target = location.hash.length > 1 && document.getElementById(location.hash.slice(1));
      const closed = target && target.closest("details:not([open])");
      if (closed) { closed.open = true; target.scrollIntoView(); }
    };
    search.addEventListener("input", () => {
      show(search.value);
      history.replaceState(null, "", search.value ? `#q=${encodeURIComponent(search.value)}` : "#");
    });
    addEventListener("hashchange", follow);
    document.getElementById("find").hidden = false;
    follow();

    // A click on a head sorts by it, another one the other way.
    const units = ["B", "KB", "MB", "GB", "TB"];
    const key = (row, column) => {
      const text = row.cells[column].textContent;
      const [number, unit] = column === BYTES ? text.split(" ") : [];
      return unit ? Number(number) * 1000 ** units.indexOf(unit) : text;
    };
    const compare = (a, b) => typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        rows.sort((a, b) => compare(key(a, column), key(b, column)) * (down ? -1 : 1));
        body.append(...rows);
      });
    });
  }

  // The chart: a line under the pointer, and what was measured there.
  const readout = document.getElementById("readout");
  for (const chart of readout ? document.querySelectorAll("svg.chart") : []) {
    const hair = chart.querySelector(".hair");
    const { left, inner, end } = chart.dataset;
    const idle = readout.textContent;
    chart.addEventListener("pointermove", (event) => {
      const box = chart.getBoundingClientRect();
      const at = (event.clientX - box.left) * chart.viewBox.baseVal.width / box.width;
      const seconds = Math.min(Math.max((at - left) / inner, 0), 1) * end;
      const next = Math.max(data.points.findIndex((point) => point[0] >= seconds), 1);
      const [[t0, d0], [t1, d1, resident]] = [data.points[next - 1], data.points[next]];
      const rate = t1 > t0 ? (d1 - Math.max(d0, data.kept)) / (t1 - t0) / 1e9 : 0;
      hair.hidden = false;
      hair.removeAttribute("hidden");
      hair.setAttribute("x1", at);
      hair.setAttribute("x2", at);
      readout.textContent = `${seconds.toFixed(2)} s: ${(d1 / 1e9).toFixed(2)} GB done, ${Math.max(rate, 0).toFixed(2)} GB/s, ${(resident / 2 ** 20).toFixed(0)} MiB resident`;
    });
    chart.addEventListener("pointerleave", () => {
      hair.setAttribute("hidden", "");
      readout.textContent = idle;
    });
  }
})();
