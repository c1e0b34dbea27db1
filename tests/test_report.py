"""The report: one page, complete in itself, that tells what the comparisons say and nothing else."""

import base64
import hashlib
import importlib
import io
import json
import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

import dpcache
from dpcache.judge.comparison import Comparison, Sample
from dpcache.judge.differences import HEAT, amplification, heat
from dpcache.judge.metrics import psnr, ssim
from dpcache.judge.report import write_report
from dpcache.judge.report.explorer import explorer_data, path_cost
from dpcache.judge.report.page import schedule_names
from dpcache.judge.report.pictures import PACKINGS, Packing, embed, embed_difference
from dpcache.judge.report.plots import trade_off
from dpcache.judge.report.timeline import timeline
from dpcache.measure.calibration import Calibration, Facts
from dpcache.plan.recipe import Recipe
from dpcache.plan.schedule import ModelIdentity, Schedule

REFERENCE = Path(__file__).parent / "reference"
STEPS = 50
PAPER = Recipe(method="paper", max_gap=15)
PROMPTS = ["a red cube", "<script>alert(1)</script>", 'a "quoted" & <b>bold</b> cat']
VOID = {"meta", "link", "img", "input"}


class Page(HTMLParser):
    """Every element with its attributes and the text inside it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text_of: list[list[str]] = []
        self._open: list[int] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self._open, f"elements left open: {[self.elements[n][0] for n in self._open]}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.text_of.append([])
        if tag not in VOID:
            self._open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.text_of.append([])

    def handle_endtag(self, tag):
        assert self.elements[self._open.pop()][0] == tag

    def handle_data(self, data):
        for number in self._open:
            self.text_of[number].append(data)

    def find(self, tag, **wanted):
        """[(attributes, text)] of the elements with this tag whose attributes contain the wanted words."""
        return [
            (attributes, " ".join("".join(text).split()))
            for (name, attributes), text in zip(self.elements, self.text_of, strict=True)
            if name == tag
            and all(word in (attributes.get(key.rstrip("_")) or "").split() for key, word in wanted.items())
        ]


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    facts = Facts(
        num_inference_steps=STEPS,
        boundary="blocks",
        order=2,
        model=ModelIdentity(denoiser="FluxTransformer2DModel"),
        pipeline="FluxPipeline",
        scheduler="FlowMatchEulerDiscreteScheduler",
        timesteps=tuple(np.linspace(1000, 20, STEPS)),
        num_inputs=5,
        num_branches=1,
        calls=None,
    )
    return published(facts, np.load(REFERENCE / "flux1_dev_t50_cost.npz")["cost"])


def published(facts: Facts, cost: np.ndarray) -> Calibration:
    """A calibration of which only the paper's cost is known."""
    unseen = np.empty((0, STEPS, STEPS))
    none = np.empty((0, STEPS))
    return Calibration(
        facts=facts,
        paper_cost=cost,
        gram=unseen,
        value_gram=unseen,
        influence=none,
        probes=none,
        tried=none,
        tried_error=np.empty(0),
    )


def comparison(schedule, noise, shape=(32, 32, 3), prompts=PROMPTS) -> Comparison:
    """Random pictures; input n is off by n x noise, so input 0 is identical and the last one worst."""
    samples = []
    for seed, prompt in enumerate(prompts):
        rng = np.random.default_rng(seed)
        full = rng.random(shape)
        cached = (full + seed * noise * rng.standard_normal(shape)).clip(0, 1)
        samples.append(Sample(prompt, seed, psnr(full, cached), ssim(full, cached), full, cached))
    count = len(prompts)
    share = schedule.num_key_steps / STEPS
    full_runs = 57 * STEPS * count
    return Comparison(
        schedule, tuple(samples), (2.0,) * count, (2.0 * share,) * count, full_runs, int(full_runs * share)
    )


@pytest.fixture(scope="module")
def comparisons(calibration) -> list[Comparison]:
    return [comparison(calibration.plan(keys, recipe=PAPER), noise) for keys, noise in ((13, 0.02), (9, 0.05))]


@pytest.fixture(scope="module")
def written(calibration, comparisons, tmp_path_factory) -> Path:
    return write_report(
        tmp_path_factory.mktemp("report") / "deep" / "report.html",
        title="Flux & <friends>",
        model="FLUX.1-dev",
        calibration=calibration,
        comparisons=comparisons,
        plans=calibration.plan_all(PAPER),
        recipe=PAPER,
        facts={"Hardware": "a <fast> machine"},
    )


@pytest.fixture(scope="module")
def page(written) -> Page:
    return Page(written)


def write(path, calibration, comparisons, plans=None) -> Page:
    written = write_report(
        path / "report.html",
        title="t",
        model="m",
        calibration=calibration,
        comparisons=comparisons,
        plans=calibration.plan_all(PAPER) if plans is None else plans,
        recipe=PAPER,
    )
    return Page(written)


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_page_loads_nothing(page):
    names = ("src", "srcset", "href", "xlink:href", "data", "action", "poster")
    links = [value for _, attributes in page.elements for name, value in attributes.items() if name in names]
    assert len(links) > 10
    assert [link[:60] for link in links if not link.startswith(("data:", "#"))] == []
    assert [tag for tag, _ in page.elements if tag in ("iframe", "object", "embed", "form")] == []
    assert re.findall(r"@import|url\((?!#|.\$)[^)]*\)", page.source) == []
    code = re.findall(r'<script type="module">(.*?)</script>', page.source, flags=re.DOTALL)
    (policy,) = [one["content"] for one, _ in page.find("meta") if "http-equiv" in one]
    digests = [f"'sha256-{base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()}'" for one in code]
    assert f"script-src {' '.join(digests)};" in policy
    assert policy.startswith("default-src 'none';") and len(code) == 6
    assert {attributes["type"] for attributes, _ in page.find("script")} == {"module", "application/json"}


def test_anchors_lead_somewhere_and_ids_are_unique(page):
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    anchors = {
        attributes[name][1:]
        for _, attributes in page.elements
        for name in ("href", "xlink:href")
        if attributes.get(name, "").startswith("#")
    }
    assert anchors and anchors <= set(ids)


def test_texts_from_outside_are_escaped(page):
    headings = [text for _, text in page.find("h3")]
    for prompt in PROMPTS:
        assert prompt in headings
    assert page.find("h1")[0][1] == "Flux & <friends>"
    assert any(text == "a <fast> machine" for _, text in page.find("dd"))
    assert page.find("b") == page.find("friends") == page.find("fast") == []


def test_every_input_with_its_quality_worst_first(page, comparisons):
    cases = [text for _, text in page.find("article", class_="case")]
    assert len(cases) == len(PROMPTS)
    for case, seed in zip(cases, (2, 1, 0), strict=True):
        assert case.startswith(f"{PROMPTS[seed]} seed {seed}")
        for number, one in enumerate(comparisons):
            sample = one.samples[seed]
            expected = f"{sample.psnr:.1f} dB" if seed else "identical"
            assert f"Cached, K = {(13, 9)[number]} {expected} · SSIM {sample.ssim:.3f}" in case
    assert "inf" not in re.sub(r"\binfer\w*", "", " ".join(cases))


def test_pictures_survive_exactly(page, comparisons):
    images = [attributes for attributes, _ in page.find("img", class_="as-made")]
    assert len(images) == len(PROMPTS) * (1 + len(comparisons))
    assert all(attributes["alt"] and "small" in attributes["class"] for attributes in images)
    worst = comparisons[1].samples[2]
    for attributes, picture in zip(images[:3:2], (worst.full, worst.cached), strict=True):
        shown = np.asarray(decoded(attributes["src"]))
        np.testing.assert_array_equal(shown, np.round(picture.astype(np.float32) * 255).astype(np.uint8))


def test_differences_are_amplified_alike_and_said_to_be(page, comparisons):
    maps = [attributes for attributes, _ in page.find("img", class_="difference")]
    assert len(maps) == len(PROMPTS) * len(comparisons)
    samples = [one.samples[2] for one in comparisons]
    amplified = amplification(samples[0].full, [sample.cached for sample in samples])
    assert page.find("span", class_="amplified")[0][1] == f"Difference × {amplified:g}: black is none"
    for attributes, sample in zip(maps[:2], samples, strict=True):
        expected = np.abs(sample.full - sample.cached).mean(axis=-1) * amplified
        shown = np.array(decoded(attributes["src"]))
        assert np.array_equal(shown, HEAT[(expected.astype(np.float32).clip(0, 1) * 255).round().astype(int)])
        assert np.mean(shown == heat(sample.full, sample.cached, amplified)) > 0.99  # but for rounding


@pytest.mark.parametrize(("difference", "expected"), [(0.0, 1), (0.9, 1), (0.04, 20), (0.0011, 500), (1e-7, 5e6)])
def test_amplification_is_a_round_number(difference, expected):
    full = np.full((20, 20, 3), 0.05)
    assert amplification(full, [full, full + difference]) == pytest.approx(expected)
    black = np.array(decoded(embed_difference(full, full, expected).uri))
    assert (black == HEAT[0]).all()


def test_timelines(page, comparisons):
    for (attributes, _), one in zip(page.find("ol", class_="timeline"), comparisons, strict=True):
        assert f"K = {one.schedule.num_key_steps}" in attributes["aria-label"]
    keys = comparisons[0].schedule
    cells = page.find("li", class_="key") + page.find("li", class_="skipped")
    assert len(cells) == STEPS * len(comparisons)
    marked = [int(attributes["data-step"]) for attributes, _ in page.find("li", class_="key")]
    assert marked == [step for one in comparisons for step in one.schedule.key_steps]
    assert all(text == f"{attributes['data-step']} computed" for attributes, text in page.find("li", class_="key"))
    about = [attributes["data-about"] for attributes, _ in page.find("button") if "data-about" in attributes]
    assert about[0] == "Step 0, timestep 1000: computed in full."
    assert about[3].startswith("Step 3, timestep 940: predicted as ")
    assert all(f"{abs(term.coefficient):.3g} × step {term.key_step}" in about[3] for term in keys.predictions[3])


def test_a_prediction_in_words():
    schedule = Schedule.from_key_steps([0, 2, 4], 8, order=1)
    said = [step.about for step in timeline(schedule)]
    assert said[:2] == ["Step 0: computed in full.", "Step 1: predicted as 1 × step 0."]
    assert said[7] == "Step 7: predicted as 2.5 × step 4 − 1.5 × step 2."


def test_table_of_results(page, comparisons):
    rows = [text for _, text in page.find("tr", role="row")][1:]
    assert len(rows) == len(comparisons) + 1
    for row, one in zip(rows, comparisons, strict=False):
        differing = [sample.psnr for sample in one.samples if math.isfinite(sample.psnr)]
        for figure in (
            f"{one.speedup:.2f}×",
            f"{one.schedule.ideal_speedup:.2f}×",
            f"{np.mean(differing):.1f} dB",
            "without 1 identical",
            f"{one.psnr_worst:.1f} dB",
            f"{one.cached_block_runs:,}",
            f"of {one.full_block_runs:,}",
        ):
            assert figure in row
    assert "3.85 times as fast; with 9, 5.56 times" in page.find("p", class_="lead")[0][1].replace("\xa0", " ")


def test_plots_follow_the_page_colours_and_mark_every_hop(page, comparisons):
    plots = page.find("svg", class_="plot")
    assert [attributes["id"] for attributes, _ in plots] == ["quality-curve", "cost-map", "trade-off", "curve"]
    assert all(attributes["aria-label"] for attributes, _ in plots)
    assert "currentColor" in page.source and "#01010" not in page.source
    for one in comparisons:
        name = f"K = {one.schedule.num_key_steps}"
        assert all(name in text for _, text in plots[1:3])
        assert f"{name}: {one.schedule.cost:,.4g}" in plots[2][0]["aria-label"]
    for number, one in enumerate(comparisons):
        marks = page.source.partition(f'id="cost-map-hops-{number}"')[2].partition(">\n   </g>")[0]
        assert marks.count("<use ") == one.schedule.num_key_steps


def test_all_identical_and_blocks_unknown(calibration, tmp_path):
    schedule = calibration.plan(13, recipe=PAPER)
    same = comparison(schedule, 0.0)
    page = write(tmp_path, calibration, [Comparison(schedule, same.samples, (1.0,), (1.0,), 0, 0)])
    row = page.find("tr", role="row")[1][1]
    assert row.count("identical") == 2 and "not counted" in row
    assert "inf" not in row and "without" not in row


def test_a_percentile_next_to_identical_pictures_stays_a_number(calibration, tmp_path):
    schedule = calibration.plan(13, recipe=PAPER)
    few = comparison(schedule, 0.1, prompts=PROMPTS[:2])
    page = write(tmp_path, calibration, [few])
    names = [attributes["data-name"] for attributes, _ in page.find("td", class_="figure")]
    assert names[:2] == ["PSNR, mean", "PSNR, worst"] and "percentile" not in page.source, "of two pictures"
    page = write(tmp_path, calibration, [replace(few, samples=few.samples * 10)])
    assert page.find("td", class_="figure")[1] == (
        {"role": "cell", "data-name": "PSNR, 5th percentile", "class": "figure"},
        f"{few.samples[1].psnr:.1f} dB",
    )


def test_clips_survive_frame_by_frame(calibration, tmp_path):
    schedule = calibration.plan(13, recipe=PAPER)
    clips = comparison(schedule, 0.05, shape=(5, 16, 24, 3), prompts=PROMPTS[:2])
    page = write(tmp_path, calibration, [clips])
    worst = clips.samples[1]
    sides = {"as-made": [worst.full, worst.cached], "difference": [None]}
    for layer, wanted in sides.items():
        carried = [json.loads(text) for attributes, text in page.find("script") if attributes.get("data-of") == layer]
        assert [len(frames) for frames in carried] == [5] * 2 * len(wanted)
        for frames, clip in zip(carried, wanted, strict=False):
            images = [decoded(frame) for frame in frames]
            assert {(image.format, image.size) for image in images} == {("WEBP", (24, 16))}
            if clip is not None:
                shown = np.stack([np.asarray(image) for image in images])
                np.testing.assert_array_equal(shown, np.round(clip.astype(np.float32) * 255).astype(np.uint8))
    still = np.asarray(decoded(page.find("img")[0][0]["src"]))
    np.testing.assert_array_equal(still, np.round(worst.full[0].astype(np.float32) * 255).astype(np.uint8))
    assert "makes a clip" in page.find("p", class_="lead")[0][1]


def test_same_number_of_key_steps_twice_and_hops_without_cost(calibration, tmp_path):
    schedules = [calibration.plan(10, recipe=PAPER), Schedule.uniform(10, STEPS)]
    page = write(tmp_path, calibration, [comparison(schedule, 0.05) for schedule in schedules])
    names = ["K = 10, planned", "K = 10, uniform"]
    assert [text for _, text in page.find("h3")][3:5] == names == schedule_names(schedules)
    (caption,) = [text for _, text in page.find("figcaption") if text.startswith("Cost against K")]
    assert caption.endswith("no cost for one of its hops: K = 10, uniform.")
    assert schedule_names([schedules[1]] * 2) == ["K = 10, no. 1", "K = 10, no. 2"]


def test_path_cost_is_what_the_planner_adds_up(calibration):
    for keys, plan in calibration.plan_all(PAPER).items():
        assert path_cost(calibration.paper_cost, plan.key_steps) == pytest.approx(plan.cost, rel=1e-12), keys


@pytest.mark.parametrize("most_values", [1_000_000, 2_000])
def test_the_explorer_carries_the_cost_tensor(calibration, most_values):
    cost = calibration.cost(PAPER)
    data = explorer_data(cost, {"K = 3": (0, 1, 2)}, most_values)
    values = np.frombuffer(base64.b64decode(data["cost"]), "<f4")
    widest = data["widest"]
    hops = [
        (i, j, k)
        for j in range(STEPS)
        for i in range(max(j - widest, 0), max(j, 1))
        for k in range(j + 1, min(j + widest, STEPS) + 1)
    ]
    assert len(values) == len(hops) <= most_values
    assert widest == STEPS if most_values > 500_000 else 5 < widest < STEPS
    np.testing.assert_allclose(values, [cost[hop] for hop in hops], rtol=1e-6)


def test_without_a_calibration_the_page_says_nothing_of_costs(comparisons, tmp_path):
    page = Page(write_report(tmp_path / "r.html", title="t", model="m", comparisons=comparisons))
    assert not page.find("section", id="costs")
    assert not [link for link, _ in page.find("a") if link["href"] == "#costs"]
    assert len(page.find("ol", class_="timeline")) == len(comparisons)


def test_the_curve_is_logarithmic_although_all_steps_cost_nothing():
    plans = {1: 100.0, 2: 1.0, 3: 0.01, 4: 0.0}
    drawn = trade_off(plans, {"K = 4": (4, 0.0), "K = 2": (2, 1.0)}, 4, "a curve")
    labels = set(re.findall(r">([\d.]+)</text>", drawn))
    assert {"0.01", "1", "100"} <= labels, labels
    assert {"1.5×", "2×", "3×"} <= set(re.findall(r">([\d.]+×)</text>", drawn))


def test_costs_all_zero_and_no_plans(calibration, tmp_path):
    flat = published(calibration.facts, np.zeros_like(calibration.paper_cost))
    page = write(tmp_path, flat, [comparison(flat.plan(13, recipe=Recipe(method="paper")), 0.05)], plans={})
    assert len(page.find("svg", class_="plot")) == 3
    assert [one.get("id") for one, _ in page.find("table", class_="plans")] == ["hop-costs"]


def crowd(schedule: Schedule, count: int, side: int) -> Comparison:
    """Pictures of coarse noise, the last one worst, hard to compress as photographs are."""
    rng = np.random.default_rng(0)
    samples = []
    for seed in range(count):
        coarse = Image.fromarray(rng.integers(256, size=(side // 16, side // 16, 3), dtype=np.uint8))
        full = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)) / 255.0
        cached = (full + 0.002 * (1 + seed) * rng.standard_normal(full.shape)).clip(0, 1)
        samples.append(Sample(f"picture {seed}", seed, psnr(full, cached), 0.9, full, cached))
    return Comparison(schedule, tuple(samples), (2.0,) * count, (1.0,) * count, 0, 0)


@pytest.mark.parametrize(
    ("megabytes", "said"),
    [(9.0, ""), (2.0, "quality"), (0.5, "reduced to 70 %"), (0.2, "worst of 24")],
)
def test_a_file_keeps_to_its_budget(tmp_path, megabytes, said):
    one = crowd(Schedule.uniform(13, STEPS), 24, 256)
    path = write_report(tmp_path / "r.html", title="t", model="m", comparisons=[one], megabytes=megabytes)
    assert path.stat().st_size <= megabytes * 1e6
    page = Page(path)
    (how,) = [text for text in (text for _, text in page.find("p", class_="how")) if "came out worst" in text]
    assert said in how and ("WebP" in how) == bool(said)
    cases = page.find("article", class_="case")
    assert (len(cases) < 24) == said.startswith("worst")
    assert cases[0][0]["data-number"] == "23"
    full, difference = (page.find("img", class_=name)[0][0] for name in ("as-made", "difference"))
    side = 179 if "70 %" in said or "worst" in said else 256
    assert decoded(full["src"]).size == (int(full["width"]), int(full["height"])) == (side, side)
    assert decoded(difference["src"]).size == decoded(full["src"]).size  # only large ones are halved
    assert page.find("h3")[0][0]["dir"] == "auto"
    assert "Over 24 pictures" in page.find("p", class_="how")[0][1]


def test_one_input_is_shown_whatever_it_weighs(tmp_path):
    one = crowd(Schedule.uniform(13, STEPS), 2, 256)
    page = Page(write_report(tmp_path / "r.html", title="t", model="m", comparisons=[one], megabytes=1e-3))
    assert len(page.find("article", class_="case")) == 1
    with pytest.raises(ValueError, match="megabytes must be above 0"):
        write_report(tmp_path / "r.html", title="t", model="m", comparisons=[one], megabytes=0)


def test_differences_of_large_compressed_pictures_are_halved():
    full, packing = np.zeros((32, 600, 3)), PACKINGS[1]
    assert decoded(embed(full, packing).uri).size == (600, 32)
    assert decoded(embed_difference(full, full, 1, packing).uri).size == (300, 16)
    assert decoded(embed_difference(full, full, 1).uri).size == (600, 32)
    assert min(packing.scale for packing in PACKINGS) == 0.7
    assert decoded(embed(np.zeros((1, 40_000, 1)), Packing(50)).uri).width == 16_383


def test_quality_by_k_and_picture_by_picture(tmp_path):
    many = crowd(Schedule.smooth(13, STEPS), 20, 32)
    fewer = crowd(Schedule.smooth(9, STEPS), 20, 32)
    page = Page(write_report(tmp_path / "r.html", title="t", model="m", comparisons=[many, fewer]))
    plots = {one["id"]: one["aria-label"] for one, _ in page.find("svg", class_="plot")}
    assert list(plots) == ["quality-curve", "histogram"]
    assert f"K = 13, smooth curve: {many.psnr_mean:.1f} dB, worst {many.psnr_worst:.1f} dB" in plots["quality-curve"]
    median = np.median([sample.psnr for sample in fewer.samples])
    assert f"K = 9: median {median:.1f} dB, from {fewer.psnr_worst:.1f} to" in plots["histogram"]
    alone = Page(
        write_report(tmp_path / "r.html", title="t", model="m", comparisons=[comparison(fewer.schedule, 0.05)])
    )
    assert not alone.find("section", id="quality") and not alone.find("svg", class_="plot")


def test_expected_errors_by_k(tmp_path):
    pipe = dpcache.load_pipeline("tiny-flux")
    call = {"num_inference_steps": 8, "max_sequence_length": 24, "output_type": "latent"}
    found = dpcache.calibrate(pipe, PROMPTS[:1], sensitivity="measured", progress=False, **call)
    schedule = found.plan(3)
    one = comparison(schedule, 0.05)
    path = write_report(
        tmp_path / "r.html", title="t", model="m", comparisons=[one], calibration=found, plans=found.plan_all()
    )
    plots = {attributes["id"]: attributes["aria-label"] for attributes, _ in Page(path).find("svg", class_="plot")}
    assert plots["expected-errors"].endswith(f"Marked: K = 3: {schedule.expected_error:.2%}.")


@pytest.mark.parametrize(("channels", "mode"), [(1, "RGB"), (3, "RGB"), (4, "RGBA")])
def test_channels(channels, mode):
    assert decoded(embed(np.full((12, 12, channels), 0.5)).uri).mode == mode


def test_not_a_picture():
    with pytest.raises(ValueError, match=r"\[H, W, C\].*got \[16, 8, 8\]"):
        embed(np.zeros((16, 8, 8)))


def test_comparisons_that_do_not_belong_together(calibration, comparisons, tmp_path):
    with pytest.raises(ValueError, match="nothing to report"):
        write(tmp_path, calibration, [])
    other = comparison(comparisons[1].schedule, 0.05, prompts=["another", *PROMPTS[1:]])
    with pytest.raises(ValueError, match="comparison 1 is over other inputs"):
        write(tmp_path, calibration, [comparisons[0], other])
    with pytest.raises(ValueError, match="schedule for 20 steps"):
        write(tmp_path, calibration, [comparison(Schedule.uniform(5, 20), 0.05)])
    assert list(tmp_path.iterdir()) == []


def test_user_settings_of_matplotlib_are_left_alone(calibration, comparisons, tmp_path, written, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would fail
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30, "svg.fonttype": "path"}):
        write_report(
            tmp_path / "again.html",
            title="Flux & <friends>",
            model="FLUX.1-dev",
            calibration=calibration,
            comparisons=comparisons,
            plans=calibration.plan_all(PAPER),
            recipe=PAPER,
            facts={"Hardware": "a <fast> machine"},
        )
        assert matplotlib.rcParams["font.size"] == 30
    assert (tmp_path / "again.html").read_bytes() == written.read_bytes()


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_missing_extra_is_named(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    for name in [name for name in sys.modules if name.startswith("dpcache.judge.report")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=rf'{missing}.*pip install "dpcache\[report\]"'):
        importlib.import_module("dpcache.judge.report")
