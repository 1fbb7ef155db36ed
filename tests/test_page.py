"""The page at `/`, in a real browser: Chromium without a screen, driven by selenium."""

import json
import re
import shutil
from dataclasses import replace

import pytest
from conftest import serve_many, serve_scripted, until

from page import PAGE, hashes, read_page, wants_page

try:
    from selenium import webdriver
    from selenium.common.exceptions import StaleElementReferenceException
except ImportError:
    webdriver = None

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"


def test_browsers_get_the_page_and_everyone_else_json(tmp_path):
    with serve_scripted(tmp_path, page=read_page()) as served:
        status, body, headers = served.request("GET", "/", headers={"Accept": BROWSER})
        assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8" and body == PAGE.read_bytes()
        assert headers["Vary"] == "Accept" and "unsafe" not in headers["Content-Security-Policy"]
        for accept in ({}, {"Accept": "*/*"}, {"Accept": "application/json"}):
            status, body, headers = served.request("GET", "/", headers=accept)
            assert status == 200 and body["service"] == "openai_api_endpoint" and headers["Vary"] == "Accept"


def test_without_the_page_there_is_json(tmp_path):
    with serve_scripted(tmp_path) as served:
        assert served.request("GET", "/", headers={"Accept": BROWSER})[1]["service"] == "openai_api_endpoint"


def test_the_page_is_small_and_whole():
    text = PAGE.read_text()
    assert len(text.encode()) < 60_000
    assert "innerHTML" not in text and "insertAdjacentHTML" not in text and "document.write" not in text
    assert not re.findall(r'(?:src|href|action)="(?!#|data:)[^"]*"|@import|\burl\((?!url)', text.partition("<script>")[0])
    assert not re.findall(r"\s(?:style|on[a-z]+)=\"", text.partition("<script>")[0])  # the policy would drop them
    assert text.count("<script>") == text.count("<style>") == 1
    assert hashes("<p><style>a</style>", "style") == "'sha256-ypeBEsobvcr6wjGzmiPcTaeG7/gUfE5yuYB3ha/uSLs='"


@pytest.mark.parametrize("accept, page", [(BROWSER, True), ("TEXT/HTML", True), ("*/*", False), ("", False)])
def test_wants_page(accept, page):
    assert wants_page(accept) == page


# ── in a browser ──


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if not webdriver:
        pytest.skip("selenium is not installed")
    paths = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if not all(paths):
        pytest.skip("chromium and chromedriver are not installed (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    for flag in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "window-size=1280,900", f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(paths[1]))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


class Tab:
    """What a person does with the page."""

    def __init__(self, driver, url):
        self.driver = driver
        driver.get(f"{url}/health")  # this server's origin, to begin with nothing kept
        driver.execute_script("localStorage.clear(); sessionStorage.clear()")
        driver.get(f"{url}/")
        self.errors = []

    def js(self, script, *arguments):
        return self.driver.execute_script(f"return {script}", *arguments)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def text(self, selector):
        return self.js("[...document.querySelectorAll(arguments[0])].map(each => each.innerText).join('\\n')", selector)

    def until(self, condition):
        until(condition)

    def click(self, selector, containing=""):
        def clicked():
            try:
                found = next((e for e in self.all(selector) if e.is_displayed() and containing in e.text), None)
                return found and (found.click() or True)
            except StaleElementReferenceException:  # made anew in between
                return False

        self.until(clicked)

    def type(self, selector, text):
        self.all(selector)[0].send_keys(text)

    def ask(self, text):
        self.until(lambda: self.js("models.length > 0"))
        self.type("#say", text + "\n")

    def answered(self, count=1):
        """The text of the answers, once there are `count` and none is being written."""
        self.until(
            lambda: (
                len(self.all(".turn.assistant .foot button"))
                and len(self.all(".turn.assistant")) == count
                and not self.js("running")
            )
        )
        return self.text(".turn.assistant:last-of-type > .md")

    def loud(self):
        """What the browser has complained of, but for errors of the server's, which the page shows itself."""
        return [entry for entry in self.driver.get_log("browser") if "responded with a status of" not in entry["message"]]


@pytest.fixture
def tab(chromium, tmp_path):
    with serve_scripted(tmp_path, page=read_page()) as served:
        tab = Tab(chromium, served.url)
        tab.served = served
        yield tab
        assert tab.loud() == []


def test_send_and_stream(tab):
    tab.served.script("hold")
    tab.ask("echo Some **bold** words and `code`.")
    tab.until(lambda: tab.all("#stop")[0].is_displayed())
    tab.served.script("hold", on=False)
    assert tab.answered() == "Some bold words and code."
    assert tab.text(".turn.assistant strong") == "bold" and tab.text(".turn.assistant .md code") == "code"
    assert tab.text(".turn.user .said") == "echo Some **bold** words and `code`."
    assert re.search(r"tokens/s · first after .*s · \d+ tokens", tab.text(".turn.assistant .figures"))
    assert tab.text("#live") == "Some **bold** words and `code`."  # what a screen reader is told
    tab.ask("echo and more")
    assert tab.answered(2) == "and more"
    assert "and more" in tab.js("localStorage.getItem('chats')")
    tab.driver.refresh()
    tab.click("#chats .name", "echo Some")
    assert tab.answered(2) == "and more"


def test_a_script_that_the_model_says_stays_text(tab):
    said = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> [a](javascript:document.title='owned')"
    tab.ask(f"echo {said}")
    assert tab.answered() == said
    assert not tab.all("#log script, #log img, #log a")
    tab.ask("echo ```html\n".replace("\n", " ") + said)
    tab.answered(2)
    assert tab.js("document.title") != "owned" and not tab.all("#log script, #log img")
    # were it HTML, the policy would still not let it run
    assert (
        tab.js("(() => { try { document.body.innerHTML = '<b>'; return 'set' } catch (error) { return error.name } })()")
        == "TypeError"
    )
    assert tab.loud()  # which the browser has told
    assert not tab.js("performance.getEntriesByType('resource').filter(each => !each.name.startsWith(location.origin))")


def test_stop(tab):
    tab.ask("forever")
    tab.until(lambda: "xx" in tab.text(".turn.assistant .md"))
    tab.served.script("hold")
    tab.click("#stop")
    assert set(tab.answered()) == {"x"} and "stopped" in tab.text(".turn.assistant .figures")
    tab.served.script("hold", on=False)
    tab.until(lambda: any(line.startswith("cancel 1 ") for line in tab.served.calls()))  # the engine is free again
    tab.ask("forever")
    tab.until(lambda: tab.js("running"))
    tab.driver.switch_to.active_element.send_keys("\ue00c")  # Escape
    tab.answered(2)


def test_an_error_is_told_and_can_be_tried_again(tab):
    tab.ask("badencode")
    assert tab.answered() == ""
    assert "cannot encode" in tab.text(".fault") and "500 · engine_failed" in tab.text(".fault small")
    tab.ask("x" * 3000)
    tab.answered(2)
    assert "context_length_exceeded" in tab.text(".turn.assistant:last-of-type .fault small")
    tab.click(".foot button", "Try again")
    tab.answered(2)
    tab.ask("die")  # after the first token: an error event inside the stream
    tab.answered(3)
    assert "engine" in tab.text(".turn.assistant:last-of-type .fault")
    tab.served.wait_ready()
    tab.ask("echo well again")
    assert tab.answered(4) == "well again"


def test_a_wrong_key_is_asked_for_again(chromium, tmp_path):
    with serve_scripted(tmp_path, page=read_page(), api_key="secret") as served:
        tab = Tab(chromium, served.url)
        tab.until(lambda: tab.all("#ask")[0].is_displayed())
        tab.type("#key", "wrong\n")
        tab.until(lambda: tab.text("#ask-why") == "That key is wrong.")
        tab.type("#key", "secret\n")
        tab.until(lambda: not tab.all("#ask")[0].is_displayed())
        tab.ask("echo let in")
        assert tab.answered() == "let in"
        assert "secret" not in tab.js("JSON.stringify(localStorage)")  # the tab's alone
        tab.click(".turn.assistant .foot button", "curl")
        command = tab.text(".turn.assistant .code code")
        assert "$API_KEY" in command and "secret" not in command
        body = json.loads(command.partition("-d '")[2].rstrip("'\n"))
        assert body["messages"] == [{"role": "user", "content": "echo let in"}] and body["stream"] is True


def test_models_are_switched_and_loaded(chromium, tmp_path):
    with serve_many(tmp_path, ["one", "two"]) as served:
        served.server.page = read_page()
        tab = Tab(chromium, served.url)
        tab.until(lambda: tab.text("#model .name") == "one")
        tab.ask("echo first")
        assert tab.answered() == "first"
        (served.at["two"] / "slow").touch()
        tab.click("#model")
        tab.click("#models .pick", "two")
        tab.until(lambda: tab.all("#loading")[0].is_displayed() and tab.js("progress.two") == 0.5)
        (served.at["two"] / "slow").unlink()
        tab.until(lambda: tab.js("chosen().status") == "loaded" and not tab.all("#loading")[0].is_displayed())
        tab.ask("echo second")
        assert tab.answered(2) == "second"
        assert "start 1 echo second" in (served.at["two"] / "log").read_text()
        tab.click("#model")
        assert "unloaded" in tab.text("#models .pick:first-of-type")
        tab.click("#models .act", "Unload")
        tab.until(lambda: tab.js("models.every(each => each.status === 'unloaded')"))
        assert tab.loud() == []


def test_a_model_that_is_not_in_memory_is_waited_for(chromium, tmp_path):
    with serve_many(tmp_path, ["one", "two"], load_wait=0) as served:
        served.server.page, served.server.access.admin = read_page(), None
        (served.at["two"] / "slow").touch()
        tab = Tab(chromium, served.url)
        tab.until(lambda: tab.js("models.length"))
        tab.click("#model")
        assert not tab.all("#models .act")
        tab.click("#models .pick", "two")
        tab.ask("echo not now")
        tab.until(lambda: "Loading two" in tab.text(".turn.assistant .note"))
        tab.click("#stop")  # nobody has to wait for it
        tab.click("#new")
        tab.ask("echo at last")
        tab.until(lambda: "Loading two" in tab.text(".turn.assistant .note"))
        (served.at["two"] / "slow").unlink()
        assert tab.answered() == "at last"


def test_models_that_do_not_chat_are_not_offered(chromium, tmp_path):
    with serve_many(tmp_path, ["embedder", "one"]) as served:
        served.server.page = read_page()
        found = served.models.catalog.found
        found["embedder"] = replace(found["embedder"], task="embed")
        tab = Tab(chromium, served.url)
        tab.until(lambda: tab.text("#model .name") == "one")
        assert tab.js("models.map(each => each.id)") == ["one"]


def test_settings_are_sent_and_refused_by_name(tab):
    tab.driver.execute_script("if (document.getElementById('settings').hidden) toggle('settings')")
    tab.type("[name=max_tokens]", "3")
    tab.type("[name=seed]", "7")
    tab.type("[name=stop]", "zz")
    tab.type("#system", "Be brief.")
    tab.ask("echo abcdef")
    assert tab.answered() == "abc" and "cut at its limit" in tab.text(".turn.assistant .figures")
    assert any("seed=7" in line for line in tab.served.calls())
    body = tab.js("requestBody(1)")
    assert body["messages"][0] == {"role": "system", "content": "Be brief."} and body["stop"] == ["zz"]
    tab.click("#form")
    tab.driver.execute_script(
        "const form = document.getElementById('form'); form.value = 'schema'; form.dispatchEvent(new Event('input'))"
    )
    tab.type("#schema", '{"type": "obj')
    tab.ask("echo nothing")
    assert "not whole" in tab.text("#hint") and len(tab.all(".turn")) == 2
    tab.type("#schema", 'ect"}')
    assert tab.js("requestBody(1)")["response_format"]["json_schema"]["schema"] == {"type": "object"}


def test_thoughts_calls_and_probabilities(tab):
    """Deltas as other engines and models send them, put into the page where the stream would."""
    tab.until(lambda: tab.js("models.length > 0"))
    deltas = [
        {"reasoning_content": "The sum "}, {"reasoning_content": "is simple."}, {"content": "I shall look."},
        {"tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"city":'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"Rome"}'}}]},
    ]  # fmt: skip
    tab.driver.execute_script(
        """
        const message = {role: "assistant", content: "", model: "m"};
        chat.messages.push({role: "user", content: "hello"}, message);
        for (const delta of arguments[0]) take({choices: [{delta, finish_reason: null}]}, message, {sent: 0});
        take({choices: [{delta: {}, finish_reason: "tool_calls", logprobs: {content: [
            {token: "I", bytes: [73], logprob: -0.1, top_logprobs: [{token: "We", bytes: [87, 101], logprob: -2.3}]},
            {token: " shall", bytes: [32], logprob: -3, top_logprobs: []}]}}]}, message, {sent: 0});
        showLog();
        """,
        deltas,
    )
    assert not tab.all("details.thought")[0].get_attribute("open")
    tab.click("details.thought summary")
    assert tab.text("details.thought .md") == "The sum is simple."
    assert tab.text("details.call summary") == "Calls weather" and '"city": "Rome"' in tab.text("details.call code")
    tab.click(".foot button", "Probabilities")
    tab.driver.switch_to.active_element.send_keys("\ue014")  # →
    assert tab.text(".odds") == " shall 5.0 %"
    tab.driver.switch_to.active_element.send_keys("\ue012")  # ←
    assert tab.text(".odds") == "I 90.5 %   instead: We 10.0 %"
    assert len({span.value_of_css_property("background-color") for span in tab.all(".tokens span")}) == 2
    tab.driver.execute_script("server.engine = 'x'; caps = {}")
    tab.type("details.call input", "echo sunny\n")  # the result is the last message, which the scripted engine renders
    assert tab.answered(2) == "sunny"
    sent = tab.js("requestBody(3).messages")
    assert sent[1]["tool_calls"] == [
        {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Rome"}'}}
    ]
    assert sent[2] == {"role": "tool", "tool_call_id": "call_1", "content": "echo sunny"} and "reasoning" not in json.dumps(
        sent
    )


MARKDOWN = {
    "# A\n\ntext": "<h1>A</h1><p>text</p>",
    "a\nb *c* __d__ ~~e~~ \\*f\\*": "<p>a\nb <em>c</em> <strong>d</strong> <s>e</s> *f*</p>",
    "snake_case_name 2*3*4": "<p>snake_case_name 2<em>3</em>4</p>",
    "**a *b* c**": "<p><strong>a <em>b</em> c</strong></p>",
    "- a\n- b\n  - c\n\n    d": "<ul><li>a</li><li>b<ul><li><p>c</p><p>d</p></li></ul></li></ul>",
    "3. a\n4. b": '<ol start="3"><li>a</li><li>b</li></ol>',
    "1. a\n   ```\n   x\n   ```\n2. b": "<ol><li>a[x]</li><li>b</li></ol>",
    "> q\n> > r": "<blockquote><p>q</p><blockquote><p>r</p></blockquote></blockquote>",
    "a\n\n---\n\nb": "<p>a</p><hr><p>b</p>",
    "| a | b |\n|---|:-:|\n| `c` | d \\| e |": "<table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td><code>c</code></td><td>d | e</td></tr></tbody></table>",
    "[x](https://a.b/c_(d)) ![p](http://e.f/g.png)": "<p><a>x</a> <a>p</a></p>",
    "see https://a.b/c_d, or <mailto:e@f>": "<p>see <a>https://a.b/c_d</a>, or <a>mailto:e@f</a></p>",
    "[x](data:text/html,y) [z](JavaScript:1)": "<p>[x](data:text/html,y) [z](JavaScript:1)</p>",
    "``a`b`` `<i>`": "<p><code>a`b</code> <code>&lt;i&gt;</code></p>",
    "```py\nprint('*x*')": "[print('*x*')]",
    "&lt;b&gt; <b>": "<p>&amp;lt;b&amp;gt; &lt;b&gt;</p>",
}  # fmt: skip
SHOWN = """
const made = document.createElement("div");
render(made, arguments[0]);
for (const code of made.querySelectorAll(".code")) code.replaceWith(`[${code.querySelector("code").textContent}]`);
for (const wide of made.querySelectorAll(".wide")) wide.replaceWith(...wide.childNodes);
for (const each of made.querySelectorAll("*")) for (const name of each.getAttributeNames()) if (name !== "start" || each.start === 1) each.removeAttribute(name);
return made.innerHTML;
"""


def test_markdown(tab):
    made = {source: tab.driver.execute_script(SHOWN, source) for source in MARKDOWN}
    assert made == MARKDOWN
    # a text that comes in pieces looks as one that came whole, wherever it was cut
    whole = "\n\n".join(MARKDOWN)
    in_pieces = """
        const text = arguments[0], node = document.createElement("div"), whole = document.createElement("div");
        for (let end = 1; end <= text.length; end++) render(node, text.slice(0, end));
        render(whole, text);
        return node.isEqualNode(whole);
    """
    assert tab.driver.execute_script(in_pieces, whole)


def test_hostile_markdown_does_not_stop_the_page(tab):
    for text in (
        "*" * 5000,
        "**a" * 3000,
        "`" * 5000,
        "[" * 5000,
        "_a" * 4000,
        "> " * 2000 + "x",
        "- " * 400 + "x",
        "|" * 3000 + "\n|-" * 1000,
        "~~a" * 3000,
        "\\" * 5000,
    ):
        tab.driver.execute_script("render(document.createElement('div'), arguments[0])", text)  # or the script times out


def test_the_keyboard_is_enough(tab):
    active = lambda: tab.driver.switch_to.active_element  # noqa: E731
    tab.ask("echo one")
    tab.answered()
    alt = "\ue00a"
    active().send_keys(alt + "n")
    tab.until(lambda: not tab.all(".turn"))
    active().send_keys("echo two\n")
    tab.answered()
    assert len(tab.all("#chats li")) == 2
    active().send_keys("\ue013")  # ↑: edit the last message
    assert active().get_attribute("value") == "echo two" and not tab.all(".turn")
    active().send_keys("\ue009a\ue009", "echo three\n")
    assert tab.answered() == "three"
    active().send_keys(alt + "m")
    tab.until(lambda: tab.all("#models")[0].is_displayed())
    active().send_keys("\ue007")
    tab.until(lambda: not tab.all("#models")[0].is_displayed() and active().get_attribute("id") == "say")
    active().send_keys(alt + "s")
    assert active().get_attribute("id") == "system"


def test_every_control_has_a_name(tab):
    tab.ask("echo hello")
    tab.answered()
    tab.driver.execute_script("if (document.getElementById('settings').hidden) toggle('settings')")
    nameless = """
        return [...document.querySelectorAll("button, input, textarea, select, progress")].filter(each => !(
            each.getAttribute("aria-label") || each.innerText.trim() || each.textContent.trim() && each.tagName === "BUTTON" || each.labels?.length
            || each.title || each.getAttribute("aria-labelledby"))).map(each => each.outerHTML)
    """
    assert tab.driver.execute_script(nameless) == []
    assert (
        tab.all("[role=log]")
        and tab.all("#live[role=status][aria-live=polite]")
        and tab.all("main")
        and tab.all("nav[aria-label]")
    )


def test_phone(tab):
    tab.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 375, "height": 700, "deviceScaleFactor": 2, "mobile": True}
    )
    try:
        tab.driver.refresh()
        tab.ask("echo " + "wide" * 60)
        tab.answered()
        assert tab.js("document.documentElement.scrollWidth") <= 375
        assert not tab.all("#past")[0].is_displayed() and not tab.all("#settings")[0].is_displayed()
        tab.click("#show-past")
        tab.click("#chats .name", "echo wide")
        tab.until(lambda: not tab.all("#past")[0].is_displayed())
    finally:
        tab.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_export_and_import(tab):
    tab.ask("echo kept")
    tab.answered()
    script = "const done = arguments[0], file = new File([JSON.stringify(chats)], 'x'); chats = []; importFile(file).then(() => done(chats.length))"
    assert tab.driver.execute_async_script(script) == 1
    script = "const done = arguments[0]; importFile(new File(['[{}]'], 'x')).then(() => done(document.getElementById('hint').textContent))"
    assert "0 conversations" in tab.driver.execute_async_script(script)
