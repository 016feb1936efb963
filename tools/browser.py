"""Open every page of the built book in headless Chromium and check what it shows.

    python tools/browser.py _build/html
    python tools/browser.py _build/html --screenshots DIR [--pages theory/score ...]

The pages come from a server on 127.0.0.1, and no other host can be reached. Checked
on every page: no error on the console, no request to another host, every formula
rendered and within its column, no horizontal overflow on a phone, a text for every
image, no broken link.
"""

import argparse
import base64
import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path

import websocket

CHROMIUM = ["chromium", "chromium-browser", "google-chrome"]
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
# Parts of console errors that are no fault of a page.
ALLOWED = [
    "favicon.ico",
    "Got invalid theme mode",  # the theme's first visit, before it stores a mode
]
PHONE, DESKTOP = (390, 844), (1440, 900)
TILE = 4000  # pixels of a page in one picture

# Everything the checks need, read from the page in one go.
INSPECT = r"""
(async () => {
  await document.fonts.ready;
  if (window.MathJax && MathJax.startup) await MathJax.startup.promise;
  const article = document.querySelector("article") || document.body;
  const short = (e) => (e.textContent || "").trim().slice(0, 60);
  const bad = [];
  for (const e of document.querySelectorAll("span.math, div.math"))
    if (!e.querySelector("mjx-container")) bad.push("not rendered: " + short(e));
  for (const e of document.querySelectorAll("mjx-container[display]"))
    if (e.scrollWidth > e.clientWidth + 2)
      bad.push(`formula too wide for its column (${e.scrollWidth - e.clientWidth} px): `
        + (e.closest("div.math").id || short(e.closest("section"))));
  for (const e of document.querySelectorAll("mjx-merror, [data-mjx-error]"))
    bad.push("formula error: " + (e.getAttribute("data-mjx-error") || short(e)));
  for (const e of document.querySelectorAll("mjx-container *"))
    if (getComputedStyle(e).color === "rgb(255, 0, 0)" && e.tagName === "MJX-MTEXT")
      bad.push("undefined macro: " + (e.closest("mjx-container").parentElement.id));
  const texts = document.createTreeWalker(article, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const node = texts.currentNode;
    if (node.parentElement.closest("pre, code, script, style, mjx-container")) continue;
    if (/\\[(\[]|\$\$|\\(begin|frac|mathbf)\b|\{(eq|ref|cite|math)\}/.test(node.data))
      bad.push("raw markup: " + node.data.trim().slice(0, 60));
  }
  for (const e of document.images)
    if (!(e.getAttribute("alt") || "").trim()) bad.push("no alt text: " + e.src);
    else if (e.complete && !e.naturalWidth) bad.push("broken image: " + e.src);
  return {
    bad,
    ids: [...document.querySelectorAll("[id], a[name]")].map((e) => e.id || e.name),
    links: [...document.querySelectorAll("a[href]")].map((e) => e.href),
    formulas: document.querySelectorAll("mjx-container").length,
    images: document.images.length,
  };
})()
"""

# The widest elements that reach past the given width without scrolling on their own.
OVERFLOW = r"""
((width) => {
  const scrolls = (e) => e && e.tagName !== "BODY" &&
    (/auto|scroll|hidden/.test(getComputedStyle(e).overflowX)
    || scrolls(e.parentElement));
  const wide = [...document.querySelectorAll("article *")].filter((e) =>
    e.getBoundingClientRect().right > width + 1 && !scrolls(e.parentElement)
    && !e.matches(".headerlink"));
  wide.sort((a, b) =>
    b.getBoundingClientRect().right - a.getBoundingClientRect().right);
  const total = document.documentElement.scrollWidth;
  return total <= width + 1 ? null : [total, ...wide.slice(0, 3).map((e) =>
    e.tagName.toLowerCase() + "." + e.className + " '"
    + (e.textContent || "").trim().slice(0, 40) + "'")];
})
"""


def ensure_chromium():
    """Return the path of Chromium; install Debian's package when there is none."""
    for attempt in (1, 2):
        for name in CHROMIUM:
            if path := shutil.which(name):
                return path
        if attempt == 1 and shutil.which("apt-get"):
            sudo = [] if os.geteuid() == 0 else ["sudo"]
            subprocess.run([*sudo, "apt-get", "update", "-qq"], check=True)
            subprocess.run(
                [*sudo, "apt-get", "install", "-y", "-qq", "chromium"],
                check=True,
                stdout=subprocess.DEVNULL,
            )
    sys.exit("The browser test wants Chromium: install the package chromium.")


class Browser:
    """A Chromium page driven by the DevTools protocol."""

    def __init__(self, chromium, profile):
        self.process = subprocess.Popen(
            [chromium, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        opened = Path(profile) / "DevToolsActivePort"
        deadline = time.monotonic() + 60
        while not (opened.exists() and opened.read_text().strip()):
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise RuntimeError("Chromium did not start.")
            time.sleep(0.1)
        port = opened.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as reply:
            pages = [t for t in json.load(reply) if t["type"] == "page"]
        self.socket = websocket.create_connection(
            pages[0]["webSocketDebuggerUrl"], suppress_origin=True, timeout=60
        )
        self.count, self.events = 0, []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Network.setCacheDisabled", cacheDisabled=False)

    def call(self, method, **params):
        """Send a command and return its result; keep the events that come first."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        self.socket.send(json.dumps(message))
        while True:
            reply = json.loads(self.socket.recv())
            if reply.get("id") == self.count:
                if "error" in reply:
                    raise RuntimeError(f"{method}: {reply['error']['message']}")
                return reply["result"]
            self.events.append(reply)

    def evaluate(self, expression):
        """Return the value of a JavaScript expression, promises awaited."""
        result = self.call(
            "Runtime.evaluate",
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
        )
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"])
        return result["result"].get("value")

    def open(self, url):
        """Load a page and wait for its load event."""
        self.events = []
        self.call("Page.navigate", url=url)
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(json.loads(self.socket.recv()))

    def resize(self, size, mobile):
        """Set the size of the view."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=size[0],
            height=size[1],
            deviceScaleFactor=1,
            mobile=mobile,
        )

    def close(self):
        """Close the browser and wait for it."""
        self.socket.close()
        self.process.terminate()
        self.process.wait(timeout=30)


def console_errors(events, base):
    """List the errors on the console and the requests to other hosts."""
    found = []
    for event in events:
        method, params = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            found.append("exception: " + json.dumps(params["exceptionDetails"])[:300])
        elif method == "Runtime.consoleAPICalled" and params["type"] == "error":
            found.append("console: " + json.dumps(params["args"])[:300])
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            entry = params["entry"]
            found.append(f"log: {entry['text']} {entry.get('url', '')}")
        elif method == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if not url.startswith((base, "data:", "blob:", "about:")):
                found.append(f"request leaves the machine: {url}")
    return [text for text in found if not any(part in text for part in ALLOWED)]


def broken_links(pages, base, folder):
    """List (page, link) for links to a missing file or anchor of the book."""
    for name, page in pages.items():
        for link in sorted(set(page["links"])):
            if not link.startswith(base):
                continue
            address, _, anchor = link.removeprefix(base).partition("#")
            target = urllib.parse.unquote(address.partition("?")[0]) or "index.html"
            anchor = urllib.parse.unquote(anchor)
            if target in pages:
                if anchor and anchor not in pages[target]["ids"]:
                    yield name, f"no anchor '{anchor}' in {target}"
            elif not (folder / target).is_file():
                yield name, f"no page {target}"


def check(browser, base, folder, names):
    """Open the pages and return {page: problems}."""
    pages, problems = {}, {}
    for name in names:
        browser.resize(DESKTOP, mobile=False)
        browser.open(base + name)
        pages[name] = browser.evaluate(INSPECT)
        browser.resize(PHONE, mobile=True)
        wide = browser.evaluate(f"{OVERFLOW}({PHONE[0]})")
        problems[name] = console_errors(browser.events, base) + pages[name]["bad"]
        if wide:
            problems[name].append(f"overflow at {PHONE[0]} px: {wide}")
    for name, text in broken_links(pages, base, folder):
        problems[name].append(f"broken link: {text}")
    counts = {k: sum(p[k] for p in pages.values()) for k in ("formulas", "images")}
    links = sum(len(set(p["links"])) for p in pages.values())
    print(
        f"{len(pages)} pages, {counts['formulas']} formulas, "
        f"{counts['images']} images, {links} links"
    )
    return {name: found for name, found in problems.items() if found}


def screenshots(browser, base, names, out):
    """Save every page at desktop and phone width, in the light and dark theme."""
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        for theme in ("light", "dark"):
            for label, size in (("desktop", DESKTOP), ("phone", PHONE)):
                browser.resize(size, mobile=label == "phone")
                browser.open(base + name)
                browser.evaluate(
                    f"localStorage.setItem('mode', '{theme}');"
                    f"localStorage.setItem('theme', '{theme}')"
                )
                browser.open(base + name)
                browser.evaluate(INSPECT)
                height = browser.evaluate("document.documentElement.scrollHeight")
                # Beyond the view Chromium would lay the page out anew.
                browser.resize((size[0], height), mobile=label == "phone")
                stem = name.removesuffix(".html").replace("/", "-")
                for top in range(0, height, TILE):
                    clip = {"x": 0, "y": top, "width": size[0], "scale": 1}
                    clip["height"] = min(TILE, height - top)
                    image = browser.call("Page.captureScreenshot", clip=clip)
                    path = out / f"{stem}-{label}-{theme}-{top // TILE}.png"
                    path.write_bytes(base64.b64decode(image["data"]))


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serve files without a line on the terminal for each."""

    def log_message(self, *args):
        """Say nothing."""


def main(argv=None):
    """Check the pages, or save screenshots of them; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of the built pages")
    parser.add_argument("--screenshots", type=Path, help="save pictures here instead")
    parser.add_argument("--pages", nargs="*", help="only pages whose name holds this")
    args = parser.parse_args(argv)
    folder = args.folder.resolve()
    if not (folder / "index.html").is_file():
        parser.error(f"no built book in {args.folder}: run `make book`")
    names = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*.html")
        if "_static" not in path.relative_to(folder).parts
        and 'http-equiv="refresh"' not in path.read_text().lower()  # leads elsewhere
    )
    if args.pages:
        names = [name for name in names if any(part in name for part in args.pages)]
    handler = functools.partial(Handler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *args: None  # the browser hung up: no matter
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_address[1]}/"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(ensure_chromium(), profile)
        try:
            if args.screenshots:
                screenshots(browser, base, names, args.screenshots)
                return 0
            problems = check(browser, base, folder, names)
        finally:
            browser.close()
    for name, found in problems.items():
        for text in found:
            print(f"{name}: {text}", file=sys.stderr)
    print("browser test:", "failed" if problems else "passed")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
