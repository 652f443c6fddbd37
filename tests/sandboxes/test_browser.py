"""The browser pool: leases, failures with a name, no network, no leftovers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path

import pytest
from playwright.async_api import async_playwright

from palaestra.errors import ConfigError, SandboxError, TaskError
from palaestra.sandboxes.browser import BrowserConfig, BrowserPool, Resource, Site, Tab, find_chromium
from palaestra.sandboxes.browser._launch import Isolation, write_launcher
from tests.conftest import require
from tests.sandboxes.hostview import children_of, eventually

_HTML = "text/html; charset=utf-8"
_PAGE = b"<!DOCTYPE html><body>hello<script>function twice(x) { return 2 * x }</script></body>"
# Each way once: sub-resources, script, sockets, workers, forms, navigation, popups, WebRTC.
_ATTACK = """<!DOCTYPE html><body><img src="{url}/img"><script src="{url}/js"></script>
<link rel="stylesheet" href="{url}/css"><iframe src="{url}/frame"></iframe><form id="f" action="{url}/form"></form>
<script>
const tries = [
  () => fetch('{url}/fetch'), () => navigator.sendBeacon('{url}/beacon'), () => new WebSocket('{socket}/ws'),
  () => new EventSource('{url}/events'), () => new Image().src = '{url}/image', () => window.open('{url}/popup'),
  () => new Worker(URL.createObjectURL(new Blob(["new WebSocket('{socket}/worker'); fetch('{url}/worker')"]))),
  () => {{ const p = new RTCPeerConnection({{iceServers: [{{urls: 'stun:127.0.0.1:{port}'}}]}});
    p.createDataChannel('x'); p.createOffer().then((o) => p.setLocalDescription(o)); }},
];
const leave = [() => document.getElementById('f').submit(), () => {{ location = '{url}/navigation' }}];
function run(tries) {{ for (const attempt of tries) {{ try {{ attempt() }} catch (error) {{}} }} return tries.length; }}
function stay() {{ return run(tries) }}
function submit() {{ return run(leave.slice(0, 1)) }}
function navigate() {{ return run(leave.slice(1)) }}
</script></body>"""

# By what sets it off; the last two leave the page.
_EXPECTED = {
    "stay": {"img", "js", "css", "frame", "fetch", "beacon", "ws", "events", "image", "popup", "worker", "udp"},
    "submit": {"form"},
    "navigate": {"navigation"},
}


def _missing_chromium() -> str | None:
    try:
        find_chromium()
    except ConfigError as error:
        return str(error)
    return None


@pytest.fixture(autouse=True)
def _chromium() -> None:
    require("chromium", _missing_chromium())


def _site(body: bytes = _PAGE) -> Site:
    return Site("http://site.invalid", "/", {"/": Resource(body, _HTML)}.get)


@pytest.fixture
async def pool() -> AsyncIterator[BrowserPool]:
    pool = await BrowserPool.start(_site(), BrowserConfig(max_tabs=2, lease_timeout_s=0.5, call_timeout_s=2.0))
    yield pool
    await pool.aclose()


def _family(pid: int) -> list[int]:
    return [pid, *(one for child in children_of(pid) for one in _family(child))]


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def test_tab_answers_and_is_used_again(pool: BrowserPool) -> None:
    tab = await pool.acquire()
    assert await tab.call("twice", 21) == 42
    await pool.release(tab)
    await pool.release(tab)  # a second release of the same lease does nothing
    assert await pool.acquire() is tab


async def test_lease_waits_and_gives_up(pool: BrowserPool) -> None:
    first, _ = await pool.acquire(), await pool.acquire()
    with pytest.raises(SandboxError, match="no browser tab came free"):
        await pool.acquire()
    await pool.release(first)
    assert await pool.acquire() is first


async def test_code_that_throws_breaks_its_tab_only(pool: BrowserPool) -> None:
    tab = await pool.acquire()
    with pytest.raises(TaskError, match="nothing is not defined"):
        await tab.call("nothing")
    await pool.release(tab)
    other = await pool.acquire()
    assert other is not tab
    assert await other.call("twice", 1) == 2


async def test_hung_page_is_an_error_in_time(pool: BrowserPool) -> None:
    tab = await pool.acquire()
    with pytest.raises(SandboxError, match=r"terminated|did not answer"):
        await tab.call("eval", "while (true) {}")
    assert tab.is_broken


async def test_cancelled_call_breaks_its_tab(pool: BrowserPool) -> None:
    tab = await pool.acquire()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await tab.call("eval", "while (true) {}")
    assert tab.is_broken


async def test_renderer_crash_is_an_error_and_the_pool_goes_on(pool: BrowserPool) -> None:
    tab = await pool.acquire()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.5):
            await tab._session.send("Page.crash")  # which nobody answers any more
    with pytest.raises(SandboxError, match="crashed"):
        await tab.call("twice", 1)
    await pool.release(tab)
    assert await (await pool.acquire()).call("twice", 2) == 4


async def test_crash_during_a_call_is_an_error_at_once(pool: BrowserPool) -> None:
    tab = await pool.acquire()
    async with asyncio.timeout(1.5), asyncio.TaskGroup() as group:
        call = group.create_task(_error_of(tab.call("eval", "while (true) {}")))
        await asyncio.sleep(0.2)
        os.kill(_renderer_of(pool), signal.SIGKILL)
    assert "crashed" in str(call.result())


async def _error_of(call: Awaitable[object]) -> SandboxError:
    with pytest.raises(SandboxError) as caught:
        await call
    return caught.value


def _renderer_of(pool: BrowserPool) -> int:
    return next(pid for pid in _family(pool.pid) if b"--type=renderer" in Path(f"/proc/{pid}/cmdline").read_bytes())


async def test_killed_browser_is_an_error_and_another_starts(pool: BrowserPool) -> None:
    tab = await pool.acquire()
    os.kill(pool.pid, signal.SIGKILL)
    assert await eventually(lambda: not pool.is_alive)
    with pytest.raises(SandboxError):
        await tab.call("twice", 1)
    await pool.release(tab)
    with pytest.raises(SandboxError):
        await pool.acquire()
    again = await BrowserPool.start(_site())
    try:
        assert await (await again.acquire()).call("twice", 3) == 6
    finally:
        await again.aclose()


async def test_nothing_is_left_after_close(pool: BrowserPool) -> None:
    await pool.acquire()
    family = _family(pool.pid)
    assert len(family) > 2
    await pool.aclose()
    await pool.aclose()
    assert await eventually(lambda: not any(map(_is_running, family)))


@pytest.mark.slow
async def test_nothing_is_left_after_the_parent_is_killed() -> None:
    program = (
        "import asyncio\nfrom palaestra.sandboxes.browser import BrowserPool, Resource, Site\n"
        "async def main():\n"
        f"    site = Site('http://site.invalid', '/', {{'/': Resource({_PAGE!r}, {_HTML!r})}}.get)\n"
        "    pool = await BrowserPool.start(site)\n    await pool.acquire()\n"
        "    print(pool.pid, flush=True)\n    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
    assert parent.stdout is not None
    async with asyncio.timeout(60.0):
        family = _family(int(await parent.stdout.readline()))
    assert len(family) > 2
    parent.kill()
    await parent.wait()
    assert await eventually(lambda: not any(map(_is_running, family)), timeout_s=10.0)


@pytest.mark.slow
@pytest.mark.parametrize("isolation", ["bwrap", "flags"])
async def test_page_reaches_no_server_of_the_host(isolation: Isolation, tmp_path: Path) -> None:
    if isolation == "bwrap" and write_launcher(tmp_path, find_chromium()).isolation != "bwrap":
        require("bwrap", "this machine does not let bwrap run")
    async with _Listener() as listener:
        pool = await BrowserPool.start(_site(listener.attack()), isolation=isolation)
        try:
            for attempt, count in (("stay", 8), ("submit", 1), ("navigate", 1)):
                tab = await pool.acquire()  # each its own, since the last two leave the page
                assert await tab.call(attempt) == count
            await asyncio.sleep(1.5)
        finally:
            await pool.aclose()
        assert listener.hits == []


@pytest.mark.slow
async def test_the_attack_works_on_an_unguarded_browser() -> None:
    async with _Listener() as listener, async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        for attempt, expected in _EXPECTED.items():
            page = await browser.new_page()
            await page.set_content(listener.attack().decode())
            await page.evaluate(f"{attempt}()")
            assert await listener.hears(expected), expected - listener.ways
            await page.close()
        await browser.close()


@pytest.mark.parametrize(
    "code",
    [
        "localStorage.setItem('a', 'b')",
        "sessionStorage.setItem('a', 'b')",
        "document.cookie = 'a=b'",
        "indexedDB.open('a')",
    ],
)
async def test_page_cannot_keep_anything(pool: BrowserPool, code: str) -> None:
    tab = await pool.acquire()
    with pytest.raises(TaskError, match=r"SecurityError|sandboxed|denied"):
        await tab.call("eval", code)


async def test_popups_and_dialogs_do_nothing(pool: BrowserPool) -> None:
    tab = await pool.acquire()
    assert await tab.call("eval", "window.open('/') === null && confirm('sure?') === false && alert('x') === undefined")
    assert len(tab.page.context.pages) == 1


async def test_host_files_are_out_of_reach(pool: BrowserPool) -> None:
    tab = await Tab.open(pool._browser, _site(), call_timeout_s=2.0, load_timeout_s=10.0)
    with pytest.raises(Exception, match=r"ERR_BLOCKED_BY_CLIENT|ERR_FILE_NOT_FOUND|ERR_ABORTED"):
        await tab.page.goto("file:///etc/passwd", timeout=5000)
    await tab.close()


def test_missing_chromium_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="apt-get install chromium"):
        find_chromium({"PATH": str(tmp_path)})
    with pytest.raises(ConfigError, match="not an executable"):
        find_chromium({"PALAESTRA_CHROMIUM": str(tmp_path / "nothing")})


class _Listener(asyncio.DatagramProtocol):
    """A server on loopback that answers nobody and notes who came, by TCP or UDP."""

    def __init__(self) -> None:
        self.hits: list[str] = []

    @property
    def ways(self) -> set[str]:
        """The attempts that came through: the last part of a request's path, or `udp`."""
        return {hit.split()[1].strip("/?") if " " in hit else hit for hit in self.hits}

    async def hears(self, ways: set[str]) -> bool:
        """Whether all of these attempts come through in the end."""
        return await eventually(lambda: ways <= self.ways)

    async def __aenter__(self) -> _Listener:
        self._server = await asyncio.start_server(self._note, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        loop = asyncio.get_running_loop()
        self._udp, _ = await loop.create_datagram_endpoint(lambda: self, local_addr=("127.0.0.1", self.port))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._udp.close()
        self._server.close()
        await self._server.wait_closed()

    async def _note(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.hits.append((await reader.readline()).decode(errors="replace").strip())
        writer.close()

    def datagram_received(self, data: bytes, addr: object) -> None:
        """A datagram, such as WebRTC sends to find its address."""
        self.hits.append("udp")

    def attack(self) -> bytes:
        """The page that tries to reach this server."""
        host = f"127.0.0.1:{self.port}"
        return _ATTACK.format(url=f"http://{host}", socket=f"ws://{host}", port=self.port).encode()
