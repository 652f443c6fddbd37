"""Attempt 63: a page tries every way that a browser has to reach a server which is not its own.

Each way has a name, by which it arrives at the listener; each is proved to arrive in a browser that nothing
holds back, from a page that an http server on this machine gave.
"""

from __future__ import annotations

import asyncio

import pytest
from playwright.async_api import Page, Route

from palaestra.sandboxes.browser import STRICT_POLICY, BrowserConfig, BrowserPool, Resource, Site
from palaestra.sandboxes.browser._launch import Isolation
from tests.sandboxes.pages import HTML, NO_POLICY, Answer, Listener, WebServer, require_chromium, unguarded

_SCRIPT = "text/javascript"
_SETTLE_S = 1.5

# Where the page is shown, `localhost`, it may do whatever a page from an https server may.
_WAYS = """{
  css: () => add('link', {rel: 'stylesheet', href: '{url}/css'}),
  img: () => add('img', {src: '{url}/img'}),
  script: () => add('script', {src: '{url}/script'}),
  iframe: () => add('iframe', {src: '{url}/iframe'}),
  fetch: () => fetch('{url}/fetch', {mode: 'no-cors'}),
  beacon: () => navigator.sendBeacon('{url}/beacon', 'x'),
  events: () => new EventSource('{url}/events'),
  websocket: () => new WebSocket('{socket}/websocket'),
  worker_fetch: () => new Worker(source("fetch('{url}/worker_fetch', {mode: 'no-cors'})")),
  worker_websocket: () => new Worker(source("new WebSocket('{socket}/worker_websocket')")),
  service_worker: () => navigator.serviceWorker.register('/service_worker.js'),
  prefetch: () => add('link', {rel: 'prefetch', href: '{url}/prefetch'}),
  popup: () => open('{url}/popup'),
  redirect: () => add('img', {src: '/hop/redirect'}),
  udp: () => { const peer = new RTCPeerConnection({iceServers: [{urls: 'stun:127.0.0.1:{port}'}]});
    peer.createDataChannel('x'); peer.createOffer().then((offer) => peer.setLocalDescription(offer)); },
  form: () => { const form = add('form', {action: '{url}/form'}); form.submit(); },
  navigation: () => { location = '{url}/navigation'; },
  navigation_redirect: () => { location = '/hop/navigation_redirect'; },
}"""
_PAGE = """<!DOCTYPE html><body><script>
const add = (name, attributes) => document.body.appendChild(Object.assign(document.createElement(name), attributes));
const source = (text) => URL.createObjectURL(new Blob([text], {type: 'text/javascript'}));
const ways = WAYS;
window.attempt = (names) => { for (const name of names) { try { Promise.resolve(ways[name]()).catch(() => {}); }
  catch (error) {} } return names.length; };
window.names = Object.keys(ways);
</script></body>"""
_WORKER = "addEventListener('install', (event) => event.waitUntil(fetch('{url}/service_worker', {mode: 'no-cors'})))"

_STAY = [
    *("css", "img", "script", "iframe", "fetch", "beacon", "events", "websocket", "worker_fetch", "worker_websocket"),
    *("service_worker", "prefetch", "popup", "redirect", "udp"),
]
_LEAVE = ["form", "navigation", "navigation_redirect"]
_ROUNDS = [_STAY, *([name] for name in _LEAVE)]


@pytest.fixture(autouse=True)
def _chromium() -> None:
    require_chromium()


def _aimed(text: str, listener: Listener) -> bytes:
    host = f"127.0.0.1:{listener.port}"
    for name, value in (("url", f"http://{host}"), ("socket", f"ws://{host}"), ("port", str(listener.port))):
        text = text.replace(f"{{{name}}}", value)
    return text.encode()


def _files(listener: Listener) -> dict[str, Resource]:
    return {
        "/": Resource(_aimed(_PAGE.replace("WAYS", _WAYS), listener), HTML),
        "/service_worker.js": Resource(_aimed(_WORKER, listener), _SCRIPT),
    }


def _hops(listener: Listener) -> dict[str, Answer]:
    names = ("redirect", "navigation_redirect")
    return {f"/hop/{name}": (302, {"Location": f"http://127.0.0.1:{listener.port}/{name}"}, b"") for name in names}


async def _redirect(page: Page, listener: Listener) -> None:
    """What a site of ours cannot do, done for it: so that it is the cage and not the site that holds."""
    hops = _hops(listener)

    async def answer(route: Route) -> None:
        status, headers, body = hops["/hop/" + route.request.url.rpartition("/")[2]]
        await route.fulfill(status=status, headers=headers, body=body)

    await page.route("**/hop/*", answer)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [STRICT_POLICY, NO_POLICY], ids=["strict", "no-policy"])
@pytest.mark.parametrize("isolation", ["bwrap", "flags"])
async def test_63_page_reaches_no_server_of_the_host(isolation: Isolation, policy: str) -> None:
    async with Listener() as listener:
        site = Site("http://localhost/", {"http://localhost": _files(listener).get}, policy)
        pool = await BrowserPool.start(site, BrowserConfig(isolation=isolation))
        try:
            for names in _ROUNDS:
                async with pool.lease() as tab:
                    await _redirect(tab.page, listener)
                    assert await tab.call("attempt", names) == len(names)
                    await asyncio.sleep(_SETTLE_S)
        finally:
            await pool.aclose()
        assert listener.hits == []


@pytest.mark.slow
async def test_63_every_way_works_in_an_unguarded_browser() -> None:
    async with Listener() as listener, unguarded() as browser:
        answers = {
            path: (200, {"Content-Type": file.content_type}, file.body) for path, file in _files(listener).items()
        }
        async with WebServer({**answers, **_hops(listener)}) as server:
            for names in _ROUNDS:
                page = await browser.new_page()
                await page.goto(server.url)
                assert await page.evaluate("window.names") == [*_STAY, *_LEAVE]
                await page.evaluate("(names) => attempt(names)", names)
                assert await listener.hears(set(names)), set(names) - listener.ways
                await page.close()
