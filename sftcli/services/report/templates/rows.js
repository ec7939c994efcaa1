"use strict";
// Texts of rows are read from the page and written as text: nothing here makes markup of them.
for (const ledger of document.querySelectorAll(".ledger")) {
  const all = [...ledger.querySelectorAll(".row")], list = ledger.querySelector(".list");
  // What the rows were prepared with is written again, as the new file takes the place of the earlier one.
  const before = JSON.parse(ledger.dataset.fixes), fixes = new Map(before.map(fix => [fix.row, fix]));
  const find = name => ledger.querySelector(name);
  const number = (row, key) => row.dataset[key] === "" ? -Infinity : Number(row.dataset[key]);
  const orders = {
    doubt: (a, b) => number(a, "doubt") - number(b, "doubt"),
    after: (a, b) => number(b, "after") - number(a, "after"),
    before: (a, b) => number(b, "before") - number(a, "before"),
    rise: (a, b) => (number(b, "after") - number(b, "before")) - (number(a, "after") - number(a, "before")),
    place: (a, b) => a.dataset.place.localeCompare(b.dataset.place, undefined, {numeric: true}),
  };
  const show = () => {
    const why = find(".why").value, split = find(".split").value, text = find(".text").value.toLowerCase();
    let shown = 0;
    for (const row of all) {
      row.hidden = Boolean((why && !row.dataset.why.split(" ").includes(why)) || (split && row.dataset.split !== split)
        || (text && !(row.dataset.place + " " + row.textContent).toLowerCase().includes(text)));
      shown += !row.hidden;
    }
    find(".count").textContent = `${shown} of ${all.length} rows`;
  };
  const sort = () => list.append(...all.sort(orders[find(".order").value]));
  const told = () => {
    const ready = [...fixes.values()].filter(fix => fix.fix !== "replace" || fix.answer.trim());
    find(".download").disabled = !ready.length;
    const open = fixes.size - ready.length;
    const old = before.filter(fix => fixes.get(fix.row) === fix).length;
    find(".decided").textContent = fixes.size ? `${ready.length} decided${old ? `, ${old} of them before` : ""}${open ? `, ${open} without an answer` : ""}` : "nothing decided yet";
    return ready;
  };
  const decide = (row, button) => {
    const hash = row.dataset.row, fix = button.dataset.fix, area = row.querySelector("textarea");
    if (fixes.get(hash)?.fix === fix) fixes.delete(hash);
    else fixes.set(hash, {row: hash, fix, place: row.dataset.place});
    // One row of a file may be listed several times: its decision is the same everywhere.
    for (const same of all.filter(one => one.dataset.row === hash)) {
      for (const one of same.querySelectorAll("button")) one.setAttribute("aria-pressed", one.dataset.fix === fixes.get(hash)?.fix);
      same.querySelector("textarea").hidden = true;
    }
    if (fixes.get(hash)?.fix === "replace") {
      area.hidden = false;
      if (!area.value && !row.dataset.cut) area.value = row.querySelector(".answer").textContent;
      fixes.get(hash).answer = area.value;
      area.focus();
    }
    told();
  };
  const opened = new Set();
  for (const row of all) {
    const fix = fixes.get(row.dataset.row), area = row.querySelector("textarea");
    if (fix?.fix === "replace" && !opened.has(fix)) {
      opened.add(fix);
      area.hidden = false;
      area.value = fix.answer;
    }
    for (const button of row.querySelectorAll("button")) {
      button.setAttribute("aria-pressed", button.dataset.fix === fix?.fix);
      button.addEventListener("click", () => decide(row, button));
    }
    area?.addEventListener("input", event => {
      fixes.get(row.dataset.row).answer = event.target.value;
      told();
    });
  }
  find(".download").addEventListener("click", () => {
    const lines = told().map(fix => JSON.stringify(fix) + "\n"), link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob(lines, {type: "application/jsonl"}));
    link.download = "fixes.jsonl";
    link.click();
    URL.revokeObjectURL(link.href);
  });
  for (const name of [".why", ".split", ".text"]) find(name).addEventListener("input", show);
  find(".order").addEventListener("input", sort);
  for (const tools of ledger.querySelectorAll(".tools")) tools.hidden = false;
  show();
  told();
}
