"""The page in a real browser, against a real server: pointer, keyboard, phone, dark mode.

Every test also fails on a console error, a script error, or a request to another origin.
"""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.pictures import PNG, encoded, picture

playwright = pytest.importorskip("playwright.sync_api", reason="needs the dev extra")
expect = playwright.expect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path"),
]


@pytest.fixture(scope="module")
def server(models, preloaded):
    policy = {"defense": "reverse_sigmoid", "defense_params": {"beta": 0.4}}
    with preloaded.serving(model_dir=models, model="tiny", workers=1, **policy) as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield found
        found.close()


@pytest.fixture
def open_page(browser, server) -> Iterator:
    """`open_page(**options)` -> the console in a window of its own."""
    contexts, complaints = [], []

    def open_it(**options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else 0)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.extend(foreign(request.url)))
        page.goto(server.admin)
        expect(page.locator("#defense")).to_have_value("reverse_sigmoid")
        return page

    def foreign(url: str) -> list[str]:
        return [] if url.startswith((server.admin, "data:")) else [url]

    yield open_it
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def image(tmp_path) -> Path:
    file = tmp_path / "noise.png"
    file.write_bytes(encoded(picture(seed=5)))
    return file


def l1(page) -> float:
    return float(page.locator("#l1").text_content())


def shown(page) -> None:
    """Wait for the first preview, which loads the model."""
    expect(page.locator("#l1")).not_to_have_text("–", timeout=30_000)


def widths(page, side: str) -> list[str]:
    return page.locator(f".bar.{side}").evaluate_all("bars => bars.map((bar) => bar.style.width)")


def drop(page, content: bytes) -> None:
    """Drop a file on the page, as a file manager does."""
    transfer = page.evaluate_handle(
        """(bytes) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], "a.png", { type: "image/png" }));
            return transfer;
        }""",
        list(content),
    )
    page.dispatch_event("#drop", "dragover", {"dataTransfer": transfer})
    expect(page.locator("#drop")).to_have_class("drop over")
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})


def test_a_dropped_image_and_a_moved_slider_change_the_bars(open_page):
    page = open_page()
    drop(page, PNG)
    shown(page)
    expect(page.locator("#bars li")).to_have_count(4)
    expect(page.locator("#seen")).to_be_visible()
    expect(page.locator("#is-active")).to_have_text("This is the active policy.")
    weak, clean, defended = l1(page), widths(page, "clean"), widths(page, "defended")
    mean = page.locator("#mean-l1").text_content()
    page.locator("#strength").fill("2")
    expect(page.locator("#mean-l1")).not_to_have_text(mean)
    assert l1(page) > weak
    assert widths(page, "clean") == clean
    assert widths(page, "defended") != defended
    expect(page.locator("#is-active")).to_contain_text("Active: reverse_sigmoid, beta 0.4")
    page.locator("#defense").select_option("none")
    expect(page.locator("#l1")).to_have_text("0.000")
    expect(page.locator("#knob")).to_be_hidden()
    page.locator("#reset").click()
    expect(page.locator("#l1")).to_have_text(f"{weak:.3f}")


def test_an_image_that_was_chosen_before_the_page_was_ready_is_shown(browser, server, image):
    page = browser.new_page()
    held = []

    def hold(route):
        held.append(route)

    page.route("**/console/about", hold)
    with page.expect_request("**/console/about"):
        page.goto(server.admin)
    while not held:  # the request was made; its handler runs while the page waits
        page.wait_for_timeout(10)
    page.set_input_files("#file", image)
    held[0].continue_()
    shown(page)
    page.close()


def test_a_pasted_image_is_shown(open_page):
    page = open_page()
    page.evaluate(
        """(bytes) => {
            const clipboardData = new DataTransfer();
            const file = new File([new Uint8Array(bytes)], "p.png", { type: "image/png" });
            clipboardData.items.add(file);
            document.dispatchEvent(new ClipboardEvent("paste", { clipboardData }));
        }""",
        list(PNG),
    )
    shown(page)
    expect(page.locator("#picture-name")).to_have_text("p.png")


def test_the_last_of_many_moves_is_what_is_shown(open_page, image, server):
    page = open_page()
    page.set_input_files("#file", image)
    shown(page)
    slider = page.locator("#strength")
    for beta in range(30):
        slider.fill(str(beta / 10))
    answer = httpx2.post(
        f"{server.admin}/console/preview",
        params={"defense": "reverse_sigmoid", "params": '{"beta": 2.9}'},
        content=image.read_bytes(),
        headers={"X-Scumble-Console": "1", "Content-Type": "image/png"},
    )
    expect(page.locator("#l1")).to_have_text(f"{answer.json()['l1']:.3f}")


def test_all_of_it_by_keyboard(open_page):
    page = open_page()
    focused = page.locator(":focus")
    for href in ("/console/api", "/metrics"):
        page.keyboard.press("Tab")
        expect(focused).to_have_attribute("href", href)
    page.keyboard.press("Tab")
    expect(focused).to_have_id("file")
    page.keyboard.press("Tab")
    expect(focused).to_have_attribute("aria-label", "Golden input 1")
    page.keyboard.press("Enter")
    shown(page)
    expect(focused).to_have_attribute("aria-pressed", "true")
    for _ in range(6):
        page.keyboard.press("Tab")
    for policy in ("none", "dcp", "label (recommended)"):
        expect(focused).to_have_text(policy)
        page.keyboard.press("Tab")
    expect(focused).to_have_id("defense")
    page.keyboard.press("Tab")
    expect(focused).to_have_id("strength")
    weak = l1(page)
    page.keyboard.press("End")
    expect(page.locator("#strength-value")).to_have_text("3")
    expect(page.locator("#l1")).not_to_have_text(f"{weak:.3f}")
    assert l1(page) > weak
    page.keyboard.press("Tab")
    expect(focused).to_have_id("reset")
    page.keyboard.press("Enter")
    expect(page.locator("#l1")).to_have_text(f"{weak:.3f}")
    expect(focused).to_have_id("defense")
    names = page.locator("input, select, button, [role=region]").evaluate_all(
        "all => all.map((one) => one.labels?.[0]?.textContent || one.ariaLabel || one.textContent)"
    )
    assert all(name.strip() for name in names)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scroll(open_page, image, scheme):
    page = open_page(
        viewport={"width": 390, "height": 844}, color_scheme=scheme, reduced_motion="reduce"
    )
    page.set_input_files("#file", image)
    shown(page)
    page.locator(".wide summary").click()
    expect(page.locator("#settings tr").first).to_be_visible()
    expect(page.locator("#workers tr")).to_have_count(1)
    assert page.evaluate("() => document.documentElement.scrollWidth") == 390
    moves = page.locator(".bar").first.evaluate("bar => getComputedStyle(bar).transitionDuration")
    assert moves in ("0s", "0s, 0s")


# Relative luminance and contrast as WCAG 2.2 defines them, for all text on the page.
CONTRASTS = """() => {
    const channel = (c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) =>
        0.2126 * channel(r / 255) + 0.7152 * channel(g / 255) + 0.0722 * channel(b / 255);
    const behind = (element) => {
        for (let e = element; e; e = e.parentElement) {
            const colour = getComputedStyle(e).backgroundColor;
            if (colour !== "rgba(0, 0, 0, 0)") return colour;
        }
        return "rgb(255, 255, 255)";
    };
    const found = [];
    for (const element of document.querySelectorAll("body *")) {
        const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
        if (!own || !element.checkVisibility() || element.disabled) continue;
        const pair = [getComputedStyle(element).color, behind(element)].map((c) => light(rgb(c)));
        const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
        if (ratio < 4.5) found.push(`${element.outerHTML.slice(0, 90)}: ${ratio.toFixed(2)}`);
    }
    return found;
}"""


def test_dark_and_light_differ_and_both_can_be_read(open_page, image):
    backs = []
    for scheme in ("light", "dark"):
        page = open_page(color_scheme=scheme)
        page.locator("#golden button").first.click()
        shown(page)
        page.locator("#defense").select_option("label")
        page.locator(".wide summary").click()
        assert page.evaluate(CONTRASTS) == []
        backs.append(page.evaluate("() => getComputedStyle(document.body).backgroundColor"))
    assert backs[0] != backs[1]


def test_the_charts_follow_what_the_public_port_answers(open_page, server):
    page = open_page()
    requests = page.locator(".chart", has_text="Requests per second").locator(".now")
    expect(page.locator(".chart")).to_have_count(6)
    with httpx2.Client(headers={"Content-Type": "image/png"}) as client:
        for _ in range(28):
            for content in (PNG, b"x"):
                client.post(f"{server.url}/v1/predict", content=content)
            page.wait_for_timeout(250)
    expect(requests).to_contain_text("4xx")
    expect(page.locator("#stages tr")).to_have_count(6)
    expect(page.locator("#stages tr").nth(3)).to_contain_text("s")
    assert page.locator(".chart path[d*=L]").count() >= 4
    expect(page.locator("#status")).to_have_text("ready")
    expect(page.locator("#clients")).to_contain_text("API keys are off")


def test_rates_and_quantiles_are_right(open_page):
    page = open_page()
    found = page.evaluate(
        """async () => {
            const { mean, quantile, rate, share } = await import("/console/static/rates.js");
            const bounds = [1, 2, 4];
            const zero = { count: 0, sum: 0, bounds, below: [0, 0, 0] };
            const some = { count: 10, sum: 15, bounds, below: [5, 9, 9] };
            const still = { count: 30, sum: 45, bounds, below: [15, 29, 29] };
            const more = { count: 20, sum: 45, bounds, below: [5, 19, 19] };
            return [
                rate(10, 30, 2), rate(30, 10, 2), rate(1, 2, 0),
                mean(zero, some), mean(some, some), mean(some, more),
                quantile(0.5, zero, some), quantile(0.7, zero, some), quantile(0.99, zero, some),
                quantile(0.5, some, some), quantile(0.5, some, more), quantile(0.9, more, still),
                share(1, 4), share(0, 0), share(5, 4),
            ];
        }"""
    )
    assert found == [10, None, None, 1.5, None, 3, 1, 1.5, 4, None, 1.5, 0, 0.25, None, 1]


def altered(page, path, **changes):
    """Let the page see an endpoint's document with changes."""

    def alter(route):
        document = route.fetch().json()
        for name, value in changes.items():
            document[name] = value(document[name]) if callable(value) else value
        route.fulfill(json=document)

    page.route(f"**/console/{path}", alter)


def test_facts_are_read_again_after_a_reload_or_a_restart(open_page, image):
    page = open_page()
    page.set_input_files("#file", image)
    shown(page)
    expect(page.locator("#served")).to_contain_text("tiny 1")
    altered(page, "about", model=lambda model: model | {"version": "2"})
    altered(page, "metrics", served="of another process")
    expect(page.locator("#served")).to_contain_text("tiny 2")
    expect(page.locator("#card")).to_contain_text("version 2")
    page.locator("#golden button").first.click()
    shown(page)


def test_figures_are_marked_while_the_server_is_away_and_recover(browser, server):
    page = browser.new_page()
    page.route("**/console/metrics", lambda route: route.abort())
    page.goto(server.admin)
    expect(page.locator("#status")).to_have_text("not reached: figures are old")
    expect(page.locator("body")).to_have_class("stale")
    page.unroute("**/console/metrics")
    expect(page.locator("#status")).to_have_text("ready")
    expect(page.locator("body")).not_to_have_class("stale")
    expect(page.locator("#served")).to_contain_text("tiny 1")
    expect(page.locator("#now dt")).to_have_count(6)
    page.close()


def test_the_shown_settings_are_the_lines_of_an_environment(open_page):
    page = open_page()
    page.locator("#strength").fill("2")
    lines = page.locator("#lines")
    expect(lines).to_contain_text("SCUMBLE_DEFENSE=reverse_sigmoid")
    expect(lines).to_contain_text('"beta":2')
    page.locator("#defense").select_option("label")
    shell = f"{lines.text_content()}\nprintf '%s %s' $SCUMBLE_DEFENSE $SCUMBLE_DEFENSE_PARAMS"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)  # noqa: S607  # the bash on the path
    assert done.stdout == "label {}"
    page.locator("#copy").click()
    expect(page.locator("#copied")).to_contain_text("cop")


def copy(defense: str, copied: float, **params: float) -> dict:
    return {
        "precision": "float32", "defense": defense, "params": params, "attacker": "knockoff",
        "queries": 20000, "copied": copied, "served": 0.99, "seeds": 1,
    }  # fmt: skip


def test_what_a_copy_is_worth_follows_the_slider(open_page):
    page = open_page()
    best, by = page.locator("#best-copy"), page.locator("#copy-by")
    expect(best).to_have_text("–")
    expect(by).to_have_text("Not measured for this model.")
    curve = [copy("none", 0.9), copy("label", 0.6), copy("dcp", 0.7, beta=1.0)]
    curve += [copy("reverse_sigmoid", share, beta=beta) for beta, share in ((0.4, 0.8), (2, 0.5))]
    altered(page, "about", copies=curve)
    altered(page, "metrics", served="of another process")
    expect(best).to_have_text("80.0%")
    expect(page.locator("#copy-none")).to_have_text("90.0%")
    expect(page.locator("#copy-label")).to_have_text("60.0%")
    page.locator("#strength").fill("1.7")
    expect(best).to_have_text("50.0%")
    expect(by).to_contain_text("by knockoff, 20,000 queries, measured at beta 2. Honest users")
    page.locator("#defense").select_option("label")
    expect(best).to_have_text("60.0%")
    page.locator("#defense").select_option("round")
    expect(best).to_have_text("–")
    expect(by).to_have_text("Not measured under round.")


def test_presets_are_policies_for_the_model_and_one_is_recommended(open_page):
    page = open_page()
    page.locator("#golden button").first.click()
    shown(page)
    presets = page.locator("#presets button")
    expect(presets).to_have_text(["none", "dcp", "label (recommended)"])
    pressed = page.locator("#presets [aria-pressed=true]")
    expect(pressed).to_have_count(0)  # reverse_sigmoid is active
    presets.nth(1).click()
    expect(pressed).to_have_text("dcp")
    expect(page.locator("#strength-value")).to_have_text("1.2")
    expect(page.locator("#lines")).to_contain_text('{"beta":1.2}')
    page.locator("#strength").fill("2")
    expect(pressed).to_have_count(0)
    presets.nth(2).click()
    expect(page.locator("#defense")).to_have_value("label")
    expect(pressed).to_have_text("label (recommended)")
    page.locator("#reset").click()
    expect(pressed).to_have_count(0)
    expect(page.locator("#is-active")).to_have_text("This is the active policy.")


def test_a_withheld_answer_is_said_to_be_withheld(open_page):
    page = open_page()
    altered(page, "preview?*", abstained=True, withheld=True)
    page.locator("#golden button").first.click()
    expect(page.locator("#defended-label")).to_have_text("no answer", timeout=30_000)
    expect(page.locator("#top1")).to_have_text("withheld")
    expect(page.locator("#withheld")).to_have_text("0%")


def test_the_api_page_shows_every_route_of_the_public_port(browser, server):
    document = httpx2.get(f"{server.admin}/console/openapi.json").json()
    assert document == httpx2.get(f"{server.url}/openapi.json").json()
    page = browser.new_page(viewport={"width": 390, "height": 844})
    requested = []
    page.on("request", lambda request: requested.append(request.url))
    page.goto(f"{server.admin}/console/api")
    for path in document["paths"]:
        expect(page.locator("main")).to_contain_text(path)
    assert all(url.startswith(server.admin) for url in requested)
    assert page.evaluate("() => document.documentElement.scrollWidth") == 390
    page.close()


def test_a_refused_picture_is_said_in_words_and_clears_the_bars(browser, server, tmp_path):
    """Not with `open_page`: the browser itself logs every 4xx as an error."""
    file = tmp_path / "no.png"
    file.write_bytes(b"no picture")
    page = browser.new_page()
    page.goto(server.admin)
    expect(page.locator("#defense")).to_have_value("reverse_sigmoid")
    page.locator("#golden button").first.click()
    shown(page)
    page.set_input_files("#file", file)
    expect(page.locator("#refusal")).to_contain_text("unsupported or corrupt image", timeout=30_000)
    expect(page.locator("#refusal")).to_contain_text("formats")
    expect(page.locator("#bars li")).to_have_count(0)
    expect(page.locator("#l1")).to_have_text("–")
    expect(page.locator("#seen")).to_be_hidden()
    file.write_bytes(bytes(11 * 2**20))
    page.set_input_files("#file", file)
    expect(page.locator("#refusal")).to_contain_text("allowed: 10485760")
    page.locator("#golden button").first.click()
    shown(page)
    expect(page.locator("#refusal")).to_be_hidden()
    page.close()
