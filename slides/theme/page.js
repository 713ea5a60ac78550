// Where we are in the navigation, boxes that scroll reachable by keyboard, and tabsets (the WAI-ARIA tabs pattern). Pages read well without this script.
for (const link of document.querySelectorAll("header.site li a")) {
  if (link.pathname === location.pathname) link.setAttribute("aria-current", "page");
}
const reachable = () => document.querySelectorAll("main pre, main .cell-output").forEach((box) => {
  if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
  else box.removeAttribute("tabindex");
});
reachable();
addEventListener("resize", reachable);
document.querySelectorAll(".tabs").forEach((box, n) => {
  const panels = [...box.querySelectorAll(":scope > .tab")];
  const list = document.createElement("div");
  list.setAttribute("role", "tablist");
  const tabs = panels.map((panel, i) => {
    const title = panel.querySelector(".tab-title");
    const tab = Object.assign(document.createElement("button"), { id: `tab-${n}-${i}`, textContent: title.textContent, type: "button" });
    panel.id = `panel-${n}-${i}`;
    title.remove();
    tab.setAttribute("role", "tab");
    tab.setAttribute("aria-controls", panel.id);
    panel.setAttribute("role", "tabpanel");
    panel.setAttribute("aria-labelledby", tab.id);
    list.append(tab);
    return tab;
  });
  const show = (chosen) => tabs.forEach((tab, i) => {
    tab.setAttribute("aria-selected", tab === chosen);
    tab.tabIndex = tab === chosen ? 0 : -1;
    panels[i].hidden = tab !== chosen;
  });
  tabs.forEach((tab, i) => {
    tab.addEventListener("click", () => show(tab));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = tabs[(i + step + tabs.length) % tabs.length];
      show(next);
      next.focus();
    });
  });
  box.prepend(list);
  if (tabs.length) show(tabs[0]);
});
