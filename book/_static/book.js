// Code and tables that do not fit can be scrolled by keyboard, also where they were folded when the page was opened.
document.addEventListener("DOMContentLoaded", () => {
  const watch = new ResizeObserver((changes) => {
    for (const { target } of changes) target.tabIndex = target.scrollWidth > target.clientWidth ? 0 : -1;
  });
  document.querySelectorAll("article pre, article div.output").forEach((part) => watch.observe(part));
});

// Formulas in the running text break after relations and operators, as TeX breaks them, where a line is too short
// for them; and no line starts with the punctuation that follows a formula.
document.addEventListener("DOMContentLoaded", async () => {
  const formulas = [...document.querySelectorAll("article span.math")];
  if (formulas.length === 0) return;
  while (!(window.MathJax && MathJax.startup && MathJax.startup.promise))
    await new Promise((done) => setTimeout(done, 50));
  await MathJax.startup.promise;

  const shares = formulas.map((formula) => {
    const line = formula.parentElement.getBoundingClientRect().width;
    return line > 0 ? formula.getBoundingClientRect().width / line : 1; // no line: it is folded away
  });
  formulas.forEach((formula, i) => {
    keepPunctuation(formula);
    if (shares[i] > 0.25) offerBreaks(formula, shares[i] > 0.7); // within brackets only where nothing else helps
  });
});

function keepPunctuation(formula) {
  const { previousSibling: before, nextSibling: after } = formula;
  const opening = before && before.nodeType === Node.TEXT_NODE && before.data.match(/[([“]+$/);
  const closing = after && after.nodeType === Node.TEXT_NODE && after.data.match(/^[.,;:!?)\]’”%]+/);
  if (opening) {
    formula.prepend(opening[0]);
    before.data = before.data.slice(0, -opening[0].length);
  }
  if (closing) {
    formula.append(closing[0]);
    after.data = after.data.slice(closing[0].length);
  }
}

function offerBreaks(formula, within) {
  let row = formula.querySelector("mjx-math");
  if (!row) return;
  while (row.children.length === 1 && /^MJX-(MROW|TEXATOM|MSTYLE)$/.test(row.firstElementChild.tagName)) {
    row = row.firstElementChild;
    row.style.display = "inline";
  }
  const spaced = (part) => ["3", "4"].includes(part.getAttribute("space")); // of operators and of relations
  let depth = 0;
  for (const part of [...row.children]) {
    const next = part.nextElementSibling;
    depth += bracket(part);
    if (part.tagName === "MJX-MO" && next && spaced(part) && spaced(next) && (within || depth === 0))
      part.after(document.createElement("wbr"));
  }
}

// 1 for an opening bracket, -1 for a closing one. MathJax names its glyphs by their code points.
function bracket(part) {
  if (part.hasAttribute("texclass")) return { OPEN: 1, CLOSE: -1 }[part.getAttribute("texclass")] || 0;
  const glyph = part.tagName === "MJX-MO" && part.querySelector("mjx-c");
  const code = glyph ? glyph.className.match(/mjx-c([0-9A-F]+)/)[1] : "";
  return ["28", "5B", "7B", "27E8"].includes(code) ? 1 : ["29", "5D", "7D", "27E9"].includes(code) ? -1 : 0;
}
