"""Pages in a real Chromium: what a reader sees, hovers over and reaches with the keyboard."""

import itertools
import os
import shutil
from pathlib import Path

import pytest

from gkd_trainer.report import heat_map
from gkd_trainer.report.comparison import comparison_page
from gkd_trainer.report.document import run_page
from gkd_trainer.report.heat_maps import HeatMap
from gkd_trainer.report.pieces import readable
from gkd_trainer.report.run import read_run
from tests.report.samples import NASTY, record, token_map, write_records
from tests.report.test_comparison import STUDENTS

pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:playwright"),
]

SHAPES = {"light": ("light", 1280, 900), "dark": ("dark", 1280, 900), "narrow": ("light", 390, 844)}


@pytest.fixture(scope="module")
def chromium():
    """A running Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # As root, which containers are, Chromium has no sandbox.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
        yield browser
        browser.close()


@pytest.fixture(params=SHAPES)
def opened(request, chromium, tmp_path):
    """Open a page, and fail if it logs, loads or asks anything; GKD_SCREENSHOTS is a folder for pictures."""
    scheme, width, height = SHAPES[request.param]
    context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    found = {"messages": [], "requests": []}

    def open_page(name, source):
        path = tmp_path / f"{name}.html"
        path.write_text(source, encoding="utf-8")
        page = context.new_page()
        page.on("console", lambda message: found["messages"].append(message.text))
        page.on("pageerror", lambda error: found["messages"].append(str(error)))
        page.on("dialog", lambda dialog: found["messages"].append(dialog.message) or dialog.dismiss())
        page.on("request", lambda sent: found["requests"].append(sent.url))
        page.goto(path.as_uri())
        return page

    yield open_page
    for number, page in enumerate(context.pages):
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        if folder := os.environ.get("GKD_SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            page.screenshot(path=Path(folder) / f"{request.node.originalname}-{number}-{request.param}.png")
    assert found["messages"] == []
    assert [url for url in found["requests"] if not url.startswith("file:") or not url.endswith(".html")] == []
    assert len(found["requests"]) == len(context.pages)
    context.close()


def report(folder):
    """The report of two runs, of which the second was killed."""
    runs = []
    for name, last in (("off-policy", 40), ("on-policy", 36)):
        (folder / name).mkdir()
        samples = (token_map((*NASTY, *[" word"] * 60)), token_map(is_on_policy=False), token_map(()))
        metrics = {"divergence_off_policy": 0.5, "student_entropy": 2.0, "eval_loss": 0.3, "eval_acceptance": 0.5}
        write_records(
            folder / name, [record(step, samples=samples, acceptance=0.4, **metrics) for step in range(4, last + 1, 4)]
        )
        runs.append(read_run(folder / name))
    return run_page(runs)


def test_curves_are_drawn_and_read_with_pointer_and_keyboard(opened, tmp_path):
    page = opened("report", report(tmp_path))
    assert page.locator("figure.chart").count() == 6
    boxes = [line.bounding_box() for line in page.locator("svg.plot path.line").all()]
    assert len(boxes) >= 8
    assert all(box["width"] > 50 for box in boxes)
    plot, tip = page.locator("svg.plot").first, page.locator("#tip")
    assert tip.is_hidden()
    plot.hover(position={"x": 120, "y": 60})
    assert "optimizer step" in tip.inner_text()
    assert "on-policy" in tip.inner_text()
    page.mouse.move(0, 0)
    assert tip.is_hidden()
    plot.focus()
    page.keyboard.press("Home")
    assert tip.inner_text().startswith("optimizer step 4\n")
    page.keyboard.press("ArrowRight")
    assert tip.inner_text().startswith("optimizer step 8\n")
    page.keyboard.press("End")
    assert tip.inner_text().startswith("optimizer step 76")
    assert inside(tip.bounding_box(), page.viewport_size["width"])
    page.keyboard.press("Escape")
    assert tip.is_hidden()


def test_no_texts_of_a_chart_overlap(opened, tmp_path):
    page = opened("report", report(tmp_path))
    for figure in page.locator("figure.chart").all():
        texts = figure.locator("svg.plot text, figcaption h3, .unit, .legend li, .note").all()
        boxes = [(text.text_content(), text.bounding_box()) for text in texts]
        for (first, one), (second, other) in itertools.combinations(boxes, 2):
            assert not overlap(one, other), f"{first!r} and {second!r}"
        width = figure.bounding_box()["width"]
        assert all(0 <= box["x"] - figure.bounding_box()["x"] <= width - box["width"] for _, box in boxes)


def test_a_curve_with_a_long_name_does_not_widen_a_narrow_page(chromium, tmp_path):
    teacher = {f"divergence_teacher_{'a_long_name_' * 8}": 0.5}
    write_records(tmp_path, [record(step, **teacher) for step in (1, 2)])
    page = chromium.new_page(viewport={"width": 320, "height": 640})
    page.set_content(run_page([read_run(tmp_path)]))
    assert page.locator("#chart-teachers .legend li").count() == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    page.close()


def test_a_tokens_tooltip_has_both_models_top_tokens(opened, tmp_path):
    page = opened("report", report(tmp_path))
    tip, token = page.locator("#tip"), page.locator("#maps .t").first
    token.hover()
    text = tip.inner_text()
    for part in (
        "<script>alert(1)</script>",
        "divergence",
        "Student",
        "Teacher",
        "50.0%",
        "<b>",
        "25.0%",
        "acceptance",
    ):
        assert part in text
    assert inside(tip.bounding_box(), page.viewport_size["width"])
    page.mouse.move(0, 0)
    assert tip.is_hidden()
    token.focus()
    page.keyboard.press("ArrowRight")
    assert tip.inner_text().startswith("</script><!--")
    page.keyboard.press("End")
    assert tip.inner_text().startswith("␣word")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") in ("prompt", "one")  # not the next token


def test_only_the_token_itself_is_marked_among_top_tokens_of_the_same_text(opened):
    top = (("\ufffd", 0.5), ("\ufffd", 0.25), ("a", 0.125))
    fields = {"student_top": (top,) * 2, "teacher_top": (top,) * 2, "student_rank": (1, 2), "teacher_rank": (None, 0)}
    page = opened("heat-map", HeatMap(token_map(("\ufffd", "a"), **fields), "caption").to_html())
    for index, expected in ((0, [(0, 1)]), (1, [(0, 2), (1, 0)])):
        page.locator(".t").nth(index).hover()
        sides = page.locator("#tip .sides > div").all()
        marked = [[code.get_attribute("class") == "is" for code in side.locator("code").all()] for side in sides]
        found = [(side, rank) for side, codes in enumerate(marked) for rank, is_marked in enumerate(codes) if is_marked]
        assert found == expected


def test_a_completion_is_text_whatever_it_holds(opened, tmp_path):
    page = opened("report", report(tmp_path))
    shown = "".join(readable(text) or "∅" for text in NASTY).replace("\n", "↵\n")
    assert page.locator("#maps .tokens").first.text_content().startswith(shown)
    assert page.locator("#maps script").count() == 0
    assert "(empty)" in page.locator("#maps .tokens").nth(2).text_content()


def test_steps_and_colours_are_chosen_with_the_keyboard(opened, tmp_path):
    page = opened("report", report(tmp_path))
    step = page.locator("#step")
    assert step.text_content() == "76"
    page.locator("#entry").focus()
    page.keyboard.press("ArrowLeft")
    assert step.text_content() == "72"
    page.keyboard.press("Home")
    assert step.text_content() == "4"
    page.locator("#next").press("Enter")
    assert step.text_content() == "8"
    before = page.locator("#maps .t.h9").count()
    page.locator("#measure").select_option("1 − acceptance")
    assert page.locator("#maps .t.h2").count() > 0
    assert page.locator("#maps .t.h9").count() == 0 < before
    assert page.locator("#scale-high").text_content() == "1"


def test_what_is_shown_can_be_heard(opened, tmp_path):
    page = opened("report", report(tmp_path))
    slider = page.get_by_role("slider", name="Step", exact=True)
    assert slider.get_attribute("aria-valuetext") == "76"
    slider.press("Home")
    assert slider.get_attribute("aria-valuetext") == "4"
    described = page.locator("[aria-describedby=tip]")
    for owner in (page.locator("svg.plot").first, page.locator("#maps .t").first):
        assert described.count() == 0
        owner.focus()
        page.keyboard.press("End")
        assert described.count() == 1
        assert described.evaluate("element => element === document.activeElement")
        page.keyboard.press("Escape")


@pytest.mark.parametrize(("unit", "end"), [("nats", " nats"), ("", "")])
def test_a_divergence_has_its_unit_everywhere_and_entropies_are_in_nats(opened, unit, end):
    page = opened("heat-map", HeatMap(token_map(divergence=(0.5, 0.25)), "caption", unit).to_html())
    assert page.locator("#scale-high").text_content() == f"0.25{end} or more"
    assert page.locator(".numbers").text_content() == f"2 tokens, mean divergence 0.375{end}"
    page.locator(".t").first.hover()
    rows = page.locator("#tip tr").all_text_contents()
    assert rows[0] == f"divergence0.5{end}"
    assert "entropy1.5 nats" in rows
    page.locator("#measure").select_option("student entropy")
    assert page.locator("#scale-high").text_content() == "1.5 nats or more"


def test_the_tooltip_of_a_long_run_has_the_exact_step(opened, tmp_path):
    write_records(tmp_path, [record(1), record(123_456)])
    page = opened("report", run_page([read_run(tmp_path)]))
    page.locator("svg.plot").first.focus()
    page.keyboard.press("End")
    assert page.locator("#tip").inner_text().startswith("optimizer step 123456\n")


CONTRAST = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const rgb = (colour, under) => {
    for (const each of [under, colour]) { canvas.fillStyle = each; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = colour => {
    const [r, g, b] = colour.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = element => {
    const own = getComputedStyle(element).backgroundColor;
    return element === document.documentElement ? rgb(own, "white") : rgb(own, `rgb(${ground(element.parentElement)})`);
  };
  return [...document.querySelectorAll("h1,h2,h3,p,li,td,th,.t,.unit,.tick,.label,.hint,dt,dd,button")].map(element => {
    const style = getComputedStyle(element);
    const text = rgb(element instanceof SVGElement ? style.fill : style.color, "white");
    const [dark, bright] = [light(text), light(ground(element))].sort((a, b) => a - b);
    return [element.className.baseVal || element.className || element.tagName, (bright + 0.05) / (dark + 0.05)];
  });
}"""


def test_all_text_has_enough_contrast(opened, tmp_path):
    page = opened("report", report(tmp_path))
    found = page.evaluate(CONTRAST)
    assert len(found) > 100
    assert [each for each in found if each[1] < 4.5] == []


def test_colours_are_printed_and_survive_high_contrast(opened, tmp_path):
    page = opened("report", report(tmp_path))
    for coloured in (page.locator("#maps .t.h9").first, page.locator(".ramp i").last):
        assert coloured.evaluate("element => getComputedStyle(element).printColorAdjust") == "exact"
        colours = []
        for forced in ("none", "active"):
            page.emulate_media(forced_colors=forced)
            colours.append(coloured.evaluate("element => getComputedStyle(element).backgroundColor"))
        assert colours[0] == colours[1]
        page.emulate_media(forced_colors="none")


def test_a_comparison_shows_students_side_by_side(opened):
    page = opened("compare", comparison_page(STUDENTS, "teacher", 3))
    assert page.locator("[data-side] .map").count() == 6
    page.locator("[data-side='0-1'] .t").first.hover()
    assert "Teacher" in page.locator("#tip").inner_text()
    widths = [bar.bounding_box()["width"] for bar in page.locator(".bars").first.locator("rect.dot").all()]
    assert widths[0] == pytest.approx(2 * widths[1], rel=0.02)


def test_a_notebooks_frame_works_without_touching_the_notebook(opened, tiny_model, byte_level):
    shown = heat_map(
        tiny_model(),
        tiny_model(hidden=48, seed=1),
        "hello",
        " one <script>alert(1)</script> 😀",
        tokenizer=byte_level(),
    )
    page = opened("notebook", f"<!doctype html><p class=t>the notebook's own</p>{shown._repr_html_()}")
    frame = page.frame_locator("iframe")
    frame.locator(".t").nth(1).hover()
    assert "Teacher" in frame.locator("#tip").inner_text()
    frame_box, tip_box = page.locator("iframe").bounding_box(), frame.locator("#tip").bounding_box()
    assert tip_box["y"] + tip_box["height"] <= frame_box["y"] + frame_box["height"]
    assert page.locator("p.t").bounding_box()["height"] < 30
    assert "<script>alert(1)</script>" in frame.locator(".tokens").text_content()


def test_the_report_of_a_real_run_opens(opened, make_trainer):
    trainer = make_trainer(report_samples=2, lmbda=0.5, max_steps=4)
    trainer.train()
    page = opened("run", run_page([read_run(trainer.args.output_dir)]))
    assert page.locator("#maps .t").count() > 0
    assert page.locator("#chart-divergence path.line").count() >= 1


def inside(box, width):
    return box["x"] >= 0 and box["x"] + box["width"] <= width


def overlap(one, other):
    slack = 1
    return (
        one["x"] + slack < other["x"] + other["width"]
        and other["x"] + slack < one["x"] + one["width"]
        and one["y"] + slack < other["y"] + other["height"]
        and other["y"] + slack < one["y"] + one["height"]
    )
