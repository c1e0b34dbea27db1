"""The report in a browser: real pipelines' pictures and clips, and everything on the page used as a reader would."""

import importlib.util
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import dpcache
from dpcache.judge.comparison import compare_all
from dpcache.judge.report import write_report
from dpcache.plan.schedule import Schedule
from dpcache.zoo import BUNDLED, load_pipeline

from .conftest import PROMPT, QUICK, STEPS
from .test_report import crowd

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason='needs pip install "dpcache[dev]"'),
    pytest.mark.skipif(BROWSER is None, reason="needs a Chromium on the PATH: apt-get install chromium"),
]
#: What breaks out of a script, an attribute or an element that was not escaped.
EVIL = "a red ring </script><script>broken=1</script> \"'><img src=x onerror=broken=1> <!--<script> & &lt;"
PROMPTS = [PROMPT, EVIL, "a large blue star on a white background, center"]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pictures(loaded_flux: Any, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A report on tiny-flux, one of its schedules so coarse that anybody sees the difference."""
    calibration = dpcache.calibrate(loaded_flux, [PROMPT], **{**QUICK, "output_type": "latent"}, progress=False)
    coarse = calibration.plan(2)
    schedules = [calibration.plan(5), coarse.model_copy(update={"source": f"{EVIL.replace(' ', '')} x"})]
    # A schedule's name takes the first word of its source where K alone does not tell it from others.
    schedules.append(Schedule.uniform(2, STEPS))
    arguments = {name: value for name, value in QUICK.items() if name != "num_inference_steps"}
    comparisons = compare_all(loaded_flux, schedules, PROMPTS, progress=False, **arguments)
    path = write_report(
        tmp_path_factory.mktemp("pictures") / "report.html",
        title=f"Flux {EVIL}",
        model=f"tiny-flux {EVIL}",
        calibration=calibration,
        comparisons=comparisons,
        plans=calibration.plan_all(),
        facts={EVIL: EVIL},
    )
    return SimpleNamespace(path=path, calibration=calibration, comparisons=comparisons)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A report on tiny-hunyuan-video, written without a calibration."""
    bundled = BUNDLED["tiny-hunyuan-video"]
    comparisons = compare_all(
        load_pipeline("tiny-hunyuan-video", device="cpu"),
        [Schedule.uniform(2, 6)],
        bundled.held_out_inputs(2),
        progress=False,
        **bundled.call_defaults,
    )
    path = tmp_path_factory.mktemp("clips") / "report.html"
    return SimpleNamespace(
        path=write_report(path, title="Clips", model="tiny-hunyuan-video", comparisons=comparisons),
        comparisons=comparisons,
    )


LONG = "a harbour at dawn with fishing boats and gulls, long exposure, " * 20
ARABIC = "قطة سوداء تجلس على سور قديم في ضوء الغروب، صورة فوتوغرافية مفصلة، " * 20


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A report on 45 pictures of 600 pixels, compressed, the worst two of them with long prompts."""
    one = crowd(Schedule.uniform(3, STEPS), 45, 600)
    labels = {44: LONG, 43: ARABIC}
    one = replace(one, samples=tuple(replace(s, label=labels.get(s.seed, s.label)) for s in one.samples))
    path = tmp_path_factory.mktemp("many") / "report.html"
    write_report(path, title="Many", model="a model", comparisons=[one], megabytes=5)
    return SimpleNamespace(path=path, comparisons=[one])


@pytest.fixture
def show(chromium: Any) -> Iterator[Any]:
    """Opens a report; whatever is then complained of on the console, or asked of the network, fails the test."""
    opened, complaints, requests = [], [], []

    def open_page(report: SimpleNamespace, **settings: Any) -> Any:
        page = chromium.new_page(**{"viewport": {"width": 1200, "height": 900}, **settings})
        page.set_default_timeout(120_000)  # many pictures, on a busy machine
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(report.path.as_uri())
        opened.append((page, report))
        return page

    yield open_page
    for page, _ in opened:
        page.close()
    assert complaints == []
    files = {report.path.as_uri() for _, report in opened}
    assert {url for url in requests if not url.startswith("data:")} == files


def levels(picture: np.ndarray) -> np.ndarray:
    return np.round(picture.astype(np.float32) * 255).clip(0, 255).astype(np.uint8)


def worst_first(report: SimpleNamespace) -> list[int]:
    quality = [[sample.psnr for sample in one.samples] for one in report.comparisons]
    return np.argsort(np.min(quality, axis=0), kind="stable").tolist()


def seen(stage: Any, picture: np.ndarray) -> np.ndarray:
    """What a reader sees of a picture shown enlarged: the colour in the middle of each of its pixels."""
    image = np.asarray(Image.open(io.BytesIO(stage.screenshot())).convert("RGB"))
    rows, columns = (
        ((np.arange(count) + 0.5) * size / count).astype(int)
        for count, size in zip(picture.shape[:2], image.shape[:2], strict=True)
    )
    return image[rows][:, columns]


def test_it_loads_nothing(show, pictures, clips):
    for report in (pictures, clips):
        assert show(report).locator("#tools").is_visible()


def test_it_could_load_nothing_nor_run_another_script(chromium, pictures):
    page = chromium.new_page()
    page.goto(pictures.path.as_uri())
    refused = page.evaluate(
        """async () => {
          const refused = [];
          document.addEventListener("securitypolicyviolation", (event) => refused.push(event.effectiveDirective));
          await fetch("data:,x").catch(() => {});
          document.body.append(Object.assign(document.createElement("script"), { textContent: "broken = 1" }));
          document.body.append(Object.assign(document.createElement("img"), { src: "http://localhost/x.png" }));
          await new Promise((resolve) => setTimeout(resolve, 100));
          return [refused.sort(), typeof broken];
        }"""
    )
    page.close()
    assert refused == [["connect-src", "img-src", "script-src-elem"], "undefined"]


def test_texts_from_outside_do_nothing(show, pictures):
    page = show(pictures)
    assert page.evaluate("typeof broken") == "undefined"
    assert page.title() == f"Flux {EVIL}"
    assert EVIL in page.locator("#pictures h3").all_text_contents()
    assert page.locator(f"img[alt*={json.dumps(EVIL)}]").count() == 2 * len(pictures.comparisons) + 1 + 3
    assert page.locator("img[src=x]").count() == 0
    assert page.locator("script").count() == 6 + 1  # its own and the costs
    # The explorer puts a schedule's name into its words and its figure.
    name = page.locator("#hops-of option").nth(1).text_content()
    assert "</script><script>broken=1</script>" in name
    page.locator("#hops-of").select_option(index=1)
    assert name in page.locator("#hop").text_content()
    assert name in page.locator("#curve .name").all_text_contents()
    assert page.locator("#curve script, #hop script").count() == 0


def test_worst_first_and_other_orders(show, pictures):
    page = show(pictures)
    worst = worst_first(pictures)
    assert worst != sorted(worst)
    for choice, expected in ((None, worst), ("best", worst[::-1]), ("given", sorted(worst)), ("worst", worst)):
        if choice:
            page.locator("#sort").select_option(choice)
        numbers = [int(case.get_attribute("data-number")) for case in page.locator(".case").all()]
        assert numbers == expected, choice


def test_twenty_at_a_time(show, many):
    page = show(many)

    def shown() -> list[int]:
        return [int(case.get_attribute("data-number")) for case in page.locator(".case:visible").all()]

    upper, lower = page.locator(".pager").all()
    assert shown() == list(range(44, 24, -1))
    assert upper.locator("output").inner_text() == "1 to 20 of 45"
    assert upper.locator("button").first.is_disabled()
    lower.get_by_label("The next pictures").click()
    assert shown() == list(range(24, 4, -1))
    assert page.locator(".case:visible").first.bounding_box()["y"] >= 0  # back to the first of them
    upper.get_by_label("The next pictures").press("Enter")
    assert shown() == [4, 3, 2, 1, 0]
    assert upper.locator("output").inner_text() == lower.locator("output").inner_text() == "41 to 45 of 45"
    assert lower.locator("button").last.is_disabled()
    page.locator("#sort").select_option("given")
    assert shown() == list(range(20))


def test_long_prompts_are_cut_short_and_open(show, many):
    for width in (1200, 390):
        page = show(many, viewport={"width": width, "height": 900})
        latin, arabic = page.locator(".case h3").all()[:2]
        for text in (latin, arabic):
            lines = text.bounding_box()["height"] / 24
            assert 3 < lines < 5
        assert page.locator(".more:visible").count() == 2  # the other prompts are short
        assert arabic.evaluate("(e) => getComputedStyle(e).direction") == "rtl"
        assert latin.evaluate("(e) => getComputedStyle(e).direction") == "ltr"
        more = page.locator(".more").first
        more.press("Enter")
        assert latin.bounding_box()["height"] > 200 and more.get_attribute("aria-expanded") == "true"
        more.press("Enter")
        arabic.click()
        assert latin.bounding_box()["height"] < 130 < 200 < arabic.bounding_box()["height"]
        assert page.evaluate("document.documentElement.scrollWidth") == width


def test_zoom_shows_every_pixel(show, many):
    page = show(many)
    case = page.locator(".case").first
    case.get_by_role("button", name="Zoom").click()
    dialog, pane, wipe = page.locator("#zoom"), page.locator("#pane"), page.locator("#wipe")
    assert dialog.locator("#zoom-title").inner_text() == LONG.strip()
    box = dialog.locator(".cached").bounding_box()
    assert (box["width"], box["height"]) == (600, 600)  # although they are carried reduced
    dialog.locator("[name=zoom][value='200']").check(force=True)
    box = dialog.locator(".cached").bounding_box()
    assert (box["width"], box["height"]) == (1200, 1200)
    # The line stays where it is in the window, the picture moves beneath it.
    wipe.fill("25")
    window, line = pane.bounding_box(), dialog.locator(".line")
    middle = pane.evaluate("(e) => e.clientWidth") / 4 - 1
    assert line.bounding_box()["x"] == pytest.approx(window["x"] + middle, abs=1)
    before = pane.evaluate("(e) => e.scrollTop")
    page.mouse.move(window["x"] + 300, window["y"] + 300)
    page.mouse.down()
    page.mouse.move(window["x"] + 300, window["y"] + 200)
    page.mouse.up()
    assert pane.evaluate("(e) => e.scrollTop") == before + 100
    assert line.bounding_box()["x"] == pytest.approx(window["x"] + middle, abs=1)
    assert not dialog.locator(".difference").is_visible()
    dialog.get_by_label("Difference").check()
    assert dialog.locator(".difference").is_visible() and wipe.is_disabled()
    page.keyboard.press("Escape")
    assert not dialog.is_visible()


def test_zoom_of_a_clip_plays(show, tmp_path):
    one = crowd(Schedule.uniform(3, STEPS), 1, 400)

    def clip(picture: np.ndarray) -> np.ndarray:
        return np.stack([np.roll(picture, 100 * frame, axis=0) for frame in range(3)])

    moving = [replace(s, full=clip(s.full), cached=clip(s.cached)) for s in one.samples]
    path = write_report(
        tmp_path / "report.html", title="c", model="c", comparisons=[replace(one, samples=tuple(moving))]
    )
    page = show(SimpleNamespace(path=path))
    page.get_by_role("button", name="Zoom").click()
    dialog = page.locator("#zoom")
    box = dialog.locator(".cached").bounding_box()
    assert (box["width"], box["height"]) == (400, 400)
    seen_frames = """(e) => {
      window.frames_seen ??= new Set();
      window.frames_seen.add(e.toDataURL());
      return window.frames_seen.size >= 3;
    }"""
    for layer in (".full", ".cached", ".difference"):
        page.evaluate("delete window.frames_seen")
        page.wait_for_function(f"() => ({seen_frames})(document.querySelector('#zoom {layer}'))")
    page.keyboard.press("Escape")
    assert not dialog.is_visible() and dialog.locator("canvas").count() == 0


def test_the_slider_divides_full_from_cached(show, pictures):
    page = show(pictures)
    sample = pictures.comparisons[1].samples[worst_first(pictures)[0]]
    full, cached = levels(sample.full), levels(sample.cached)
    assert np.abs(full.astype(int) - cached).max() > 20  # the coarse schedule is to be seen
    stage = page.locator(".case").first.locator(".cached .stage").nth(1)
    slider = stage.get_by_role("slider")
    page.add_style_tag(content=".handle, .side { visibility: hidden }")
    slider.focus()
    page.keyboard.press("Home")
    np.testing.assert_array_equal(seen(stage, full), cached)
    page.keyboard.press("End")
    np.testing.assert_array_equal(seen(stage, full), full)
    assert slider.get_attribute("aria-valuetext") == "100 % full, 0 % cached"
    for _ in range(25):
        page.keyboard.press("ArrowLeft")
    width = full.shape[1]
    here = seen(stage, full)
    np.testing.assert_array_equal(here[:, : width * 3 // 4], full[:, : width * 3 // 4])
    np.testing.assert_array_equal(here[:, width * 3 // 4 :], cached[:, width * 3 // 4 :])
    # By pointer, from anywhere on the picture; the other sliders of the input follow.
    box = stage.bounding_box()
    page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 10)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 40)
    page.mouse.up()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 40)  # let go of
    sliders = page.locator(".case").first.locator(".divide")
    assert [one.input_value() for one in sliders.all()] == ["25"] * 3
    here = seen(stage, full)
    np.testing.assert_array_equal(here[:, : width // 4], full[:, : width // 4])
    np.testing.assert_array_equal(here[:, width // 4 :], cached[:, width // 4 :])


def test_views(show, pictures):
    page = show(pictures)
    case = page.locator(".case").first

    def visible(layer: str) -> list[bool]:
        return [one.is_visible() for one in case.locator(f"img.{layer}").all()]

    assert (visible("as-made"), visible("under")) == ([False, True, True, True], [True] * 3)
    page.get_by_role("radio", name="Slider").focus()
    page.keyboard.press("ArrowRight")
    assert (visible("as-made"), visible("under"), visible("difference")) == ([True] * 4, [False] * 3, [False] * 3)
    page.keyboard.press("ArrowRight")
    assert (visible("as-made"), visible("difference")) == ([True, False, False, False], [True] * 3)
    assert case.get_by_text("black is none").first.is_visible()


FRAMES = """(article) => [...article.querySelectorAll("canvas")].map((canvas) => {
  const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
  copy.drawImage(canvas, 0, 0);
  const { data } = copy.getImageData(0, 0, canvas.width, canvas.height);
  return [canvas.className, Array.from(data).filter((_, n) => n % 4 < 3)];
})"""


def drawn(case: Any, shape: tuple[int, ...]) -> dict[str, list[np.ndarray]]:
    """What the canvases of a case hold, by the last word of their class."""
    found: dict[str, list[np.ndarray]] = {}
    for name, values in case.evaluate(FRAMES):
        layer = next(word for word in ("under", "as-made", "difference") if word in name.split())
        found.setdefault(layer, []).append(np.array(values, dtype=np.uint8).reshape(shape))
    return found


def test_clips_play_in_step(show, clips):
    page = show(clips)
    sample = clips.comparisons[0].samples[worst_first(clips)[0]]
    full, cached = levels(sample.full), levels(sample.cached)
    case = page.locator(".case").first
    case.scroll_into_view_if_needed()
    page.locator(".case[data-frame='2']").first.wait_for()  # plays by itself
    numbers = set()
    for _ in range(6):
        layers = drawn(case, full.shape[1:])
        shown = layers["as-made"]  # full, cached
        (number,) = [n for n in range(len(full)) if np.array_equal(full[n], shown[0])]
        np.testing.assert_array_equal(shown[1], cached[number])
        np.testing.assert_array_equal(layers["under"][0], full[number])
        numbers.add(number)
        page.wait_for_timeout(150)
    assert len(numbers) > 1
    page.get_by_role("button", name="Pause").click()
    frame = page.locator("#frame")
    frame.focus()
    page.keyboard.press("Home")
    for number in range(len(full)):
        assert page.locator("#frame-number").inner_text() == f"{number + 1} of {len(full)}"
        np.testing.assert_array_equal(drawn(case, full.shape[1:])["as-made"], [full[number], cached[number]])
        page.keyboard.press("ArrowRight")
    page.wait_for_timeout(300)
    assert case.get_attribute("data-frame") == str(len(full) - 1)  # it stays where it was put
    slider = case.get_by_role("slider")
    page.add_style_tag(content=".handle, .side { visibility: hidden }")
    slider.focus()
    page.keyboard.press("Home")
    np.testing.assert_array_equal(seen(case.locator(".cached .stage"), full[-1]), cached[-1])
    page.keyboard.press("End")
    np.testing.assert_array_equal(seen(case.locator(".cached .stage"), full[-1]), full[-1])
    page.get_by_role("button", name="Play").click()
    page.locator(f".case[data-number='{case.get_attribute('data-number')}'][data-frame='3']").wait_for()


def test_clips_stand_still_for_readers_who_asked_for_it(show, clips):
    page = show(clips, reduced_motion="reduce")
    page.locator(".case").first.scroll_into_view_if_needed()
    page.locator(".case[data-frame='0']").first.wait_for()
    page.wait_for_timeout(400)
    assert page.locator(".case").first.get_attribute("data-frame") == "0"
    assert page.get_by_role("button", name="Play").is_visible()


def test_timeline_tells_of_every_step(show, pictures):
    page = show(pictures)
    schedule = page.locator(".schedule").first
    about, steps = schedule.locator(".about"), schedule.locator(".timeline button")
    keys = pictures.comparisons[0].schedule.key_steps
    hint = f"Key steps: {', '.join(map(str, keys))}"
    assert about.inner_text() == hint
    steps.first.focus()
    for number in range(STEPS):
        said = about.inner_text()
        timestep = pictures.calibration.facts.timesteps[number]
        assert said.startswith(f"Step {number}, timestep {timestep:.5g}: ")
        assert said.endswith("computed in full.") == (number in keys)
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Home")
    assert about.inner_text().startswith("Step 0,")
    page.keyboard.press("Tab")  # one stop for the whole timeline
    assert about.inner_text() == hint
    assert page.evaluate("document.activeElement.closest('.schedule') !== document.querySelector('.schedule')")
    steps.nth(3).hover()
    assert about.inner_text().startswith("Step 3,")


def picked(page: Any) -> tuple[int, ...]:
    """The hop (i, j, k) that the explorer is at."""
    return tuple(int(page.locator(f"#{name}").input_value()) for name in ("before", "key", "next"))


def test_the_explorer_by_keyboard(show, pictures):
    page = show(pictures)
    cost = pictures.calibration.cost()
    before, key, after = (page.get_by_label(name) for name in ("Key step before, i", "Key step, j", "Next key step, k"))
    hop = page.locator("#hop")

    def check() -> None:
        i, j, k = picked(page)
        said = float(hop.inner_text().partition("cost ")[2].split(" ")[0].rstrip("."))
        assert said == pytest.approx(cost[i, j, k], rel=6e-3, abs=1e-30), (i, j, k)
        rows = page.locator("#hop-costs tbody tr").all_text_contents()
        assert len(rows) == STEPS - j

    key.focus()
    page.keyboard.press("End")
    assert picked(page)[1:] == (STEPS - 1, STEPS)
    for _ in range(5):
        page.keyboard.press("ArrowLeft")
    j = STEPS - 6
    before.focus()
    page.keyboard.press("Home")
    after.focus()
    page.keyboard.press("Home")
    assert picked(page) == (0, j, j + 1)
    check()
    for k in range(j + 2, STEPS + 1):
        page.keyboard.press("ArrowRight")
        assert picked(page) == (0, j, k)
        check()
    before.focus()
    for i in range(1, j):
        page.keyboard.press("ArrowRight")
        assert picked(page) == (i, j, STEPS)
        check()
    least = int(np.argmin(cost[:j, j, STEPS]))
    assert ("It would cost least" in hop.inner_text()) == (least != j - 1)
    assert page.locator("#curve .line").count() == j  # one for every key step that may come before
    page.locator("#explorer summary").click()
    assert page.locator("#hop-costs tbody tr").last.inner_text().split("\t")[0] == f"{STEPS} (the end)"


def test_the_explorer_walks_the_hops_of_a_schedule(show, pictures):
    page = show(pictures)
    cost, schedule = pictures.calibration.cost(), pictures.comparisons[0].schedule
    stops = [0, *schedule.key_steps, STEPS]
    hops = [(i, j, k) for (i, j), (_, k) in pairwise(pairwise(stops))]
    total = sum(cost[hop] for hop in hops)
    assert picked(page) == max(hops, key=lambda hop: cost[hop])
    page.locator("#key").press("Home")
    earlier, later = page.locator("#earlier"), page.locator("#later")
    for _ in hops:
        earlier.press("Enter")
    for hop in hops:
        assert picked(page) == hop
        share = float(page.locator("#hop").inner_text().partition("makes this hop, ")[2].partition(" %")[0])
        assert share == pytest.approx(100 * cost[hop] / total, rel=6e-3)
        assert "K = 5, planned" in page.locator("#curve .name").all_text_contents()
        ring, point = page.locator("#curve .real"), page.locator("#curve .here")
        places = [(one.get_attribute("cx"), one.get_attribute("cy")) for one in ring.all()]
        assert (point.get_attribute("cx"), point.get_attribute("cy")) in places
        later.press("Enter")
    assert picked(page) == hops[-1]


def test_the_map_picks_a_hop(show, pictures):
    page = show(pictures)
    cost = pictures.calibration.cost()
    j, k = 4, 9
    cell = page.locator("#cost-map .cell")
    page.locator("#cost-map").scroll_into_view_if_needed()
    box = page.locator("#cost-map").bounding_box()
    _, _, wide, high = page.evaluate(
        "document.querySelector('#cost-map').getAttribute('viewBox').split(' ').map(Number)"
    )
    left, top, width, height = json.loads(page.locator("#cost-data").text_content())["map_area"]
    x, y = left + (k + 0.5) * width / (STEPS + 1), top + (j + 0.5) * height / STEPS
    page.mouse.click(box["x"] + x / wide * box["width"], box["y"] + y / high * box["height"])
    assert picked(page) == (int(np.argmin(cost[:j, j, k])), j, k)
    assert float(cell.get_attribute("x")) < x < float(cell.get_attribute("x")) + float(cell.get_attribute("width"))
    assert float(cell.get_attribute("y")) < y < float(cell.get_attribute("y")) + float(cell.get_attribute("height"))
    # The curve does likewise.
    page.locator("#curve").click(position={"x": page.locator("#curve").bounding_box()["width"] * 0.97, "y": 100})
    assert page.locator("#next").input_value() == str(STEPS)


CONTRAST = """() => {
  const probe = document.body.appendChild(document.createElement("span"));
  const luminance = (colour) => {
    probe.style.color = colour;
    const parts = getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255);
    const [r, g, b] = parts.map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => {
    const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  const found = {
    text: ["ink", "muted", "accent", "mark"].map((name) => contrast(`var(--${name})`, "var(--page)")),
    onFaint: contrast("var(--muted)", "var(--faint)"),
    onAccent: contrast("var(--on-accent)", "var(--accent)"),
    border: contrast("var(--border)", "var(--page)"),
    page: luminance("var(--page)"),
  };
  probe.remove();
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(show, pictures, scheme):
    page = show(pictures, color_scheme=scheme)

    def check(dark: bool) -> None:
        found = page.evaluate(CONTRAST)
        assert (found["page"] < 0.1) == dark
        assert min(*found["text"], found["onAccent"], found["onFaint"]) >= 4.5
        assert found["border"] >= 3

    check(scheme == "dark")
    page.locator("#theme").press("Enter")
    check(scheme == "light")
    page.locator("#theme").press("Enter")
    check(scheme == "dark")


@pytest.mark.parametrize("width", [360, 768, 1920])
def test_no_sideways_scrolling(show, pictures, clips, width):
    for report in (pictures, clips):
        page = show(report, viewport={"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") == width


def test_everything_is_reached_by_tab_has_a_name_and_shows_that_it_is_there(show, pictures):
    page = show(pictures)
    # Radio buttons, like the steps of a timeline, are one stop together.
    controls = page.locator(
        "button:visible:not(.timeline button), select:visible, input:visible:enabled:not([name=view]), summary:visible"
    ).count()
    stops = controls + 1 + len(pictures.comparisons) + page.locator("nav a").count()
    here = """() => {
      const at = document.activeElement;
      if (at === document.body) return null;
      const rim = at.matches(".divide, [name=view]") ? at.parentElement.closest(".stage, .choices") : at;
      const said = at.labels?.[0]?.textContent || at.getAttribute("aria-label") || at.textContent;
      return [said.trim(), getComputedStyle(rim).outlineStyle, rim.getBoundingClientRect().width];
    }"""
    reached = []
    while (page.keyboard.press("Tab"), page.evaluate(here))[1]:
        reached.append(page.evaluate(here))
        assert len(reached) <= stops
    assert len(reached) == stops
    for name, outline, width in reached:
        assert name and outline == "solid" and width > 10, name


def test_without_scripts_it_shows_everything_side_by_side(show, pictures, clips):
    for report in (pictures, clips):
        page = show(report, java_script_enabled=False)
        count = len(report.comparisons[0].samples) * (1 + len(report.comparisons))
        images = page.locator("img.as-made")
        assert [one.is_visible() for one in images.all()] == [True] * count
        assert not page.locator("#tools").is_visible()
        assert page.locator("noscript p").is_visible()
