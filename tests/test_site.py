"""The rendered site in a real Chromium: every page and every slide, at two sizes, in light and dark.

`pytest tests/test_site.py --site DIR` tests any rendered site, Quarto's too. Pages and decks are found by themselves.
"""
from __future__ import annotations

import itertools
from pathlib import Path
from urllib.parse import urljoin, urlparse

import axe_playwright_python
import pytest
from conftest import ROOT

from nbs_lib.course import notebooks
from nbs_lib.course.render import configuration, sources

pytestmark = pytest.mark.browser
AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text()
SIZES = [(1280, 720), (1920, 1080)]
ALL = sources(ROOT, configuration(ROOT))
DECKS = [str(p) for p in ALL if p.parts[0] == "slides"]
PAGES = [str(p) for p in ALL if p.parts[0] != "slides"]
KNOWN: set[str] = set()  # links that were answered: every page has those of the navigation
LABS = [p for p in PAGES if notebooks.lab_of(notebooks.read(ROOT / p))]


# The contrast of a token is measured in the first code block that has a token of its kind: a long page has ten thousand tokens.
FINDINGS = """async ([contrast, others]) => {
  const rule = 'color-contrast', runs = [], kinds = new Set();
  for (const block of document.querySelectorAll('pre')) {
    if (!block.getClientRects().length) continue;
    const own = [...block.querySelectorAll('span[class]')].map(e => e.className).filter(k => !kinds.has(k));
    block.toggleAttribute('data-again', kinds.size > 0 && !own.length);
    own.forEach(k => kinds.add(k));
  }
  if (contrast) runs.push(await axe.run({exclude: ['[data-again]']}, {runOnly: [rule], resultTypes: ['violations']}));
  if (others) runs.push(await axe.run({rules: {[rule]: {enabled: false}}, resultTypes: ['violations']}));
  return runs.flatMap(r => r.violations).map(v => [v.impact, v.id, v.nodes.slice(0, 3).map(n => n.html.slice(0, 160))]);
}"""
# axe walks through all that a document has, hidden slides too: twenty times as long. The others leave it while the shown one is looked at. So does
# reveal.js's layer of backgrounds, empty in these decks: axe takes it to lie over the slide and then judges no contrast.
ALONE = f"""async (args) => {{
  const others = [...document.querySelectorAll('.slides > section, .reveal > .backgrounds')].filter(s => s !== Reveal.getCurrentSlide());
  const places = others.map(s => {{ const place = document.createComment(''); s.replaceWith(place); return place; }});
  try {{ return await ({FINDINGS})(args); }} finally {{ places.forEach((place, i) => place.replaceWith(others[i])); }}
}}"""


class Visit:
    """A page opened in the browser, with everything that it asked for and complained about."""

    def __init__(self, browser, address: str, notebook: str, size=SIZES[0], scheme="light"):
        self.address, self.size, self.scheme, self.requests, self.complaints = address, size, scheme, [], []
        self.page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, reduced_motion="reduce")
        self.page.on("request", lambda r: self.requests.append(r.url))
        self.page.on("requestfailed", lambda r: self.complaints.append(f"request failed: {r.url}"))
        self.page.on("response", lambda r: r.status >= 400 and self.complaints.append(f"{r.status} {r.url}"))
        self.page.on("console", lambda m: m.type in ("error", "warning") and self.complaints.append(f"console: {m.text}"))
        self.page.on("pageerror", lambda e: self.complaints.append(f"error: {e}"))
        self.page.goto(urljoin(address, notebook.replace(".ipynb", ".html")), wait_until="load")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.page.close()

    def look(self, size, scheme):
        """The same page in a window of another size, in another scheme."""
        self.size, self.scheme = size, scheme
        self.page.set_viewport_size({"width": size[0], "height": size[1]})
        self.page.emulate_media(color_scheme=scheme)

    def check_quiet(self):
        assert not self.complaints
        outside = [u for u in self.requests if not u.startswith((self.address, "data:"))]
        assert not outside, "requests that leave the machine"

    def axe(self, where: str = "", script: str = FINDINGS):
        """No serious or critical finding of axe-core on what is shown now: contrast at the small size, in both schemes; all else in light."""
        if not self.page.evaluate("typeof axe === 'object'"):
            self.page.evaluate(AXE)
        if self.size != SIZES[0] and self.scheme != "light":
            return
        found = self.page.evaluate(script, [self.size == SIZES[0], self.scheme == "light"])
        assert not [f for f in found if f[0] in ("serious", "critical")], where


def test_there_is_a_site_to_test():
    assert PAGES and DECKS and LABS


def links_lead_somewhere(page, address: str) -> None:
    """Every link within the site is answered, and every anchor is there."""
    links = page.evaluate("[...document.querySelectorAll('a[href]')].map(a => a.href)")
    for link in {u.split("#")[0] for u in links if u.startswith(address)} - KNOWN:
        assert page.request.get(link).ok, link
        KNOWN.add(link)
    anchors = page.evaluate("[...document.querySelectorAll('main a[href^=\"#\"]')].map(a => a.getAttribute('href').slice(1)).filter(i => i && !document.getElementById(i))")
    assert not anchors


@pytest.mark.parametrize("notebook", PAGES)
def test_page(browser, address, notebook):
    with Visit(browser, address, notebook) as visit:
        page = visit.page
        assert page.title() and page.locator("h1").count() == 1
        assert page.evaluate("document.documentElement.lang") == "en"
        assert page.locator("img:not([alt]), img[alt='']").count() == 0
        assert page.locator("figure.plot svg:not([aria-label])").count() == 0
        assert ":::" not in page.locator("main").inner_text(), "a div's markup was left in the page"
        assert "#|" not in page.locator("main").inner_text(), "a directive was left in the page"
        for size, scheme in itertools.product(SIZES, ("light", "dark")):
            visit.look(size, scheme)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{size}: the page is wider than the window"
            visit.axe(f"{notebook}, {size}, {scheme}")
        visit.check_quiet()
        links_lead_somewhere(page, address)


@pytest.mark.parametrize("notebook", LABS)
def test_lab_page_offers_the_worksheet_without_solutions(browser, address, notebook):
    with Visit(browser, address, notebook) as visit:
        link = visit.page.locator("a[download]")
        sheet = visit.page.request.get(urljoin(visit.page.url, link.get_attribute("href"))).json()
        text = "\n".join(notebooks.text_of(c) for c in sheet["cells"])
        assert "SOLUTION" not in text and "..." in text
        assert not any(c.get("outputs") for c in sheet["cells"])
        assert urlparse(visit.page.locator("a.button").first.get_attribute("href")).path.endswith(f"/{Path(notebook).name}")


SLIDE = """() => {
  const slide = Reveal.getCurrentSlide(), seen = (e) => e.getClientRects().length && getComputedStyle(e).visibility !== 'hidden';
  const out = [], name = (e) => e.tagName + ': ' + e.textContent.trim().slice(0, 60);
  for (const e of slide.querySelectorAll('*')) {
    if (e.closest('aside.notes') || !seen(e)) continue;
    const r = e.getBoundingClientRect();
    if (r.left < -1 || r.top < -1 || r.right > innerWidth + 1 || r.bottom > innerHeight + 1) out.push('outside the window: ' + name(e));
    if (['PRE', 'TABLE', 'P', 'LI', 'H2'].includes(e.tagName) && e.scrollWidth > e.clientWidth + 1 && e.clientWidth) out.push('wider than its box: ' + name(e));
    const svg = e.closest('svg');
    if (svg && e.tagName === 'text') {
      const box = svg.getBoundingClientRect();
      if (r.left < box.left - 3 || r.right > box.right + 3 || r.top < box.top - 3 || r.bottom > box.bottom + 3) out.push('cut off in the figure: ' + name(e));
      if (r.height < 11 * innerHeight / 720) out.push('too small to read: ' + name(e));
    }
  }
  const footer = document.querySelector('.deck-footer').getBoundingClientRect().top;
  const low = Math.max(...[...slide.children].filter(e => seen(e) && !e.matches('aside.notes')).map(e => e.getBoundingClientRect().bottom));
  if (low > footer + 2) out.push('runs into the footer by ' + Math.round(low - footer) + ' px');
  const notes = slide.querySelector('aside.notes');
  return {problems: out, notes: notes ? notes.textContent.trim() : '', heading: slide.querySelector('h2')?.textContent || ''};
}"""


@pytest.mark.parametrize("size,scheme", [(SIZES[0], "light"), (SIZES[0], "dark"), (SIZES[1], "light")], ids=["720-light", "720-dark", "1080-light"])
@pytest.mark.parametrize("deck", DECKS)
def test_every_slide(browser, address, deck, size, scheme):
    with Visit(browser, address, deck, size, scheme) as visit:
        page = visit.page
        page.wait_for_function("Reveal.isReady()")
        total = page.evaluate("Reveal.getTotalSlides()")
        assert total >= 8, "a deck is a talk of 20 to 30 minutes"
        for number in range(total):
            page.evaluate(f"Reveal.slide({number}, 0, 99)")
            page.wait_for_timeout(30)
            found = page.evaluate(SLIDE)
            where = f"{deck}, slide {number + 1}: {found['heading']}"
            assert not found["problems"], where
            assert len(found["notes"].split()) >= 15, f"{where}: speaker notes say what to say"
            assert found["heading"], where
            visit.axe(where, ALONE)
        visit.axe(deck)
        assert page.locator("figure.plot svg:not([aria-label]), img:not([alt])").count() == 0
        assert page.locator(".slides section").evaluate_all("all => all.every(s => ![...s.attributes].some(a => a.name.startsWith('data-background')))")
        visit.check_quiet()


@pytest.mark.parametrize("notebook,script,pale", [(DECKS[0], ALONE, ".slides section.present h2"), (PAGES[0], FINDINGS, "main h1")])
def test_a_pale_heading_would_be_noticed(browser, address, notebook, script, pale):
    for scheme, colour in (("light", "#ddd"), ("dark", "#333")):
        with Visit(browser, address, notebook, scheme=scheme) as visit:
            visit.page.wait_for_timeout(400)  # reveal.js has moved the first slide in
            visit.axe("as it is", script)
            visit.page.locator(pale).evaluate("(e, colour) => { e.style.color = colour; }", colour)
            with pytest.raises(AssertionError, match="color-contrast"):
                visit.axe("pale", script)


@pytest.mark.parametrize("deck", DECKS)
def test_keyboard_walks_through_the_deck(browser, address, deck):
    with Visit(browser, address, deck) as visit:
        page = visit.page
        page.wait_for_function("Reveal.isReady()")
        seen = [page.evaluate("Reveal.getIndices().h")]
        for _ in range(400):
            if page.evaluate("Reveal.isLastSlide() && !Reveal.availableFragments().next"):
                break
            page.keyboard.press("ArrowRight")
            seen.append(page.evaluate("Reveal.getIndices().h"))
        assert sorted(set(seen)) == list(range(page.evaluate("Reveal.getTotalSlides()")))
        assert seen == sorted(seen)
        page.keyboard.press("Home")
        page.wait_for_function("Reveal.getIndices().h === 0")


@pytest.mark.parametrize("deck", DECKS)
def test_code_steps_light_up_line_by_line(browser, address, deck):
    with Visit(browser, address, deck) as visit:
        page = visit.page
        page.wait_for_function("Reveal.isReady()")
        blocks = page.locator("div.sourceCode[data-steps*='|']")
        assert blocks.count() >= 1, "a deck walks through some code"
        for i in range(blocks.count()):
            block = blocks.nth(i)
            steps = block.get_attribute("data-steps").split("|")
            slide = block.evaluate("e => Reveal.getIndices(e.closest('section')).h")
            shown = []
            for step in range(len(steps)):
                page.evaluate(f"Reveal.slide({slide}, 0, {step - 1})")
                page.wait_for_timeout(20)
                shown.append(block.evaluate("e => [...e.querySelectorAll('code > span')].map((l, i) => l.classList.contains('dimmed') ? 0 : i + 1).filter(Boolean).join()"))
            assert len(set(shown)) == len(steps) and all(shown), f"steps {steps} showed the lines {shown}"


def test_tabs_by_keyboard(browser, site, tmp_path):
    """The tabset pattern itself, on a page of its own."""
    page = browser.new_page()
    page.set_content('<main><div class="tabs"><div class="tab"><p class="tab-title">PyTorch</p><p>one</p></div><div class="tab"><p class="tab-title">JAX</p><p>two</p></div></div></main>')
    page.evaluate((site / "slides" / "theme" / "page.js").read_text())
    assert page.get_by_text("one").is_visible() and not page.get_by_text("two").is_visible()
    page.get_by_role("tab", name="PyTorch").press("ArrowRight")
    assert page.get_by_text("two").is_visible() and not page.get_by_text("one").is_visible()
    page.close()
