"""What is taken away from every page before its own scripts run: the clipboard, and what it may tell the console.

All contexts of a browser share one clipboard, and its driver keeps what pages write to the console.
Covers: copying and cutting by key, by `execCommand` and by `navigator.clipboard`, in every frame and after
`document.open`, so nothing is there to be pasted; the console of every frame, and its uncaught errors. Does not
cover: the console of workers, and requests by the thousand; for what they cost the driver has a memory limit.
"""

from __future__ import annotations

from typing import Final

GUARD: Final = """(() => {
  const {apply} = Reflect;
  const prevent = Event.prototype.preventDefault, stop = Event.prototype.stopImmediatePropagation;
  const listen = EventTarget.prototype.addEventListener;
  const viewOf = Object.getOwnPropertyDescriptor(Document.prototype, 'defaultView').get;

  // A cancelled copy writes what the event holds, which is nothing: it empties the clipboard.
  const deny = (event) => { apply(prevent, event, []); apply(stop, event, []); };
  // Nobody is told of an error that was cancelled; the page's own listeners run.
  const hush = (event) => { apply(prevent, event, []); };
  const guard = (view) => {
    for (const type of ['copy', 'cut']) apply(listen, view, [type, deny, true]);
    for (const type of ['error', 'unhandledrejection']) apply(listen, view, [type, hush, true]);
  };
  guard(window);
  for (const name of ['open', 'write', 'writeln']) {  // which take all listeners off
    const original = Document.prototype[name];
    Document.prototype[name] = function (...args) {
      const view = apply(viewOf, this, []);
      try { return apply(original, this, args); } finally { if (view) guard(view); }
    };
  }
  delete Navigator.prototype.clipboard;
  for (const name of Object.keys(console)) if (typeof console[name] === 'function') console[name] = () => {};
})()"""
