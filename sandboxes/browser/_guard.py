"""What is taken away from every page before its own scripts run: the clipboard and the console.

All contexts of a browser share one clipboard, and Playwright's driver keeps what pages write to the console.
Covers: copying and cutting by key, by `execCommand` and by `navigator.clipboard`, in every frame and after
`document.open`, so nothing is there to be pasted; the console of every frame. Does not cover: the console of
workers, and errors that nobody catches; the driver has a memory limit for those.
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
  const guard = (view) => { for (const type of ['copy', 'cut']) apply(listen, view, [type, deny, true]); };
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
