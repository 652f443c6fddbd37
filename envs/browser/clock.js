// A clock that only `palaestraClock.advance` moves: pages see the same time in every run, a slow agent costs
// nothing, and nothing runs between two steps. Loaded before every other script.
(() => {
  const EPOCH = Date.UTC(2026, 0, 1);
  const MAX_CALLS = 10000;  // a page that schedules itself without end must not hang the step
  const RealDate = Date, real = performance.now.bind(performance);
  let now = 0, nextId = 1, timers = new Map(), clickable = new WeakSet(), listeners = [];

  function FakeDate(...args) {
    if (!new.target) return new RealDate(EPOCH + now).toString();
    return Reflect.construct(RealDate, args.length ? args : [EPOCH + now], new.target);
  }
  FakeDate.prototype = RealDate.prototype;
  FakeDate.prototype.constructor = FakeDate;
  FakeDate.now = () => EPOCH + now;
  FakeDate.parse = RealDate.parse;
  FakeDate.UTC = RealDate.UTC;
  window.Date = FakeDate;
  performance.now = () => now;

  function schedule(callback, delay, every, args) {
    const run = typeof callback === 'function' ? callback : new Function(String(callback));
    const wait = Math.max(every === null ? 0 : 1, Number(delay) || 0);
    timers.set(nextId, {at: now + wait, every: every === null ? null : wait, run, args});
    return nextId++;
  }
  const cancel = (id) => { timers.delete(id); };
  window.setTimeout = (callback, delay, ...args) => schedule(callback, delay, null, args);
  window.setInterval = (callback, delay, ...args) => schedule(callback, delay, delay, args);
  window.requestAnimationFrame = (callback) => schedule(() => callback(now), 16, null, []);
  window.clearTimeout = window.clearInterval = window.cancelAnimationFrame = cancel;

  function next(until) {
    let first = null;
    for (const [id, timer] of timers) {
      if (timer.at <= until && (first === null || timer.at < timers.get(first).at)) first = id;
    }
    return first;
  }

  function advance(milliseconds) {
    const until = now + milliseconds;
    for (let calls = 0; calls < MAX_CALLS; calls++) {
      const id = next(until);
      if (id === null) break;
      const timer = timers.get(id);
      now = Math.max(now, timer.at);
      if (timer.every === null) timers.delete(id); else timer.at = now + timer.every;
      timer.run(...timer.args);
    }
    now = until;
  }

  // Which elements answer a click is part of what a user sees (MiniWoB's links are bare spans), and listeners on
  // window and document outlive an episode unless they are taken off.
  const add = EventTarget.prototype.addEventListener;
  EventTarget.prototype.addEventListener = function (type, listener, options) {
    if (this instanceof Element && type === 'click') clickable.add(this);
    if (this === window || this === document || this === document.documentElement) {
      listeners.push([this, type, listener, options]);
    }
    return add.call(this, type, listener, options);
  };

  function reset() {
    now = 0;
    nextId = 1;
    timers = new Map();
    clickable = new WeakSet();
    for (const [target, type, listener, options] of listeners) target.removeEventListener(type, listener, options);
    listeners = [];
  }

  window.palaestraClock = {
    advance, reset, real,
    isClickable: (element) => clickable.has(element) || typeof element.onclick === 'function',
    keepListeners: () => { listeners = []; },
    state: () => [now, nextId, Array.from(timers.values(), (timer) => timer.at), listeners.length],
  };
})();
