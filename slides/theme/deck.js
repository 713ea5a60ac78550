// Reveal.js with two habits of the course: code that is walked through line by line, and a theme that can be switched (T).
const CodeSteps = {
  id: "code-steps",
  init(deck) {
    const lines = (step) => new Set(step.split(",").flatMap((part) => {
      const [from, to = from] = part.split("-").map(Number);
      return Array.from({ length: to - from + 1 }, (_, i) => from + i);
    }));
    for (const block of document.querySelectorAll("div.sourceCode[data-steps]")) {
      const steps = block.dataset.steps.split("|").map(lines);
      const fragments = steps.slice(1).map(() => {
        const mark = document.createElement("span");
        mark.className = "fragment code-step";
        block.append(mark);
        return mark;
      });
      const light = () => {
        const now = steps[fragments.filter((f) => f.classList.contains("visible")).length];
        block.querySelectorAll("code > span").forEach((line, i) => line.classList.toggle("dimmed", !now.has(i + 1)));
      };
      for (const event of ["ready", "slidechanged", "fragmentshown", "fragmenthidden"]) deck.on(event, light);
    }
  },
};
Reveal.initialize({
  width: 1280, height: 720, margin: 0.04, center: false, hash: true, transition: "none", slideNumber: "c/t",
  keyboard: { 84: () => {
    const dark = getComputedStyle(document.documentElement).getPropertyValue("--is-dark").trim() === "1";
    document.documentElement.dataset.theme = dark ? "light" : "dark";
  } },
  plugins: [RevealNotes, CodeSteps],
});
