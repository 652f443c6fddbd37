// Everything that a script of this page could find: values, functions and prototypes reachable from `window`,
// the document with what its fields hold, listeners, timers, scroll, focus and selection. One line for each.
// Left out are jQuery's books: a random key, a counter of handlers, memos of the names of events and properties it
// met and of what the browser can do, and the cache of what belongs to elements: its number of entries is compared.
(() => {
  const seen = new Map(), lines = [];
  const books = new Set(['expando', 'guid', 'cache', 'cssProps', 'cssHooks', 'event.global', 'event.fixHooks',
    'event.mouseHooks', 'event.keyHooks'].map((key) => `window.$.${key}`));
  const hash = (text) => { let h = 0; for (let i = 0; i < text.length; i++) h = (h * 31 + text.charCodeAt(i)) | 0; return h; };
  const nodeType = Object.getOwnPropertyDescriptor(Node.prototype, 'nodeType').get;
  const isNode = (value) => { try { return nodeType.call(value) > 0; } catch { return false; } };  // no prototype is
  function walk(path, value, depth) {
    if (value === null || (typeof value !== 'object' && typeof value !== 'function')) {
      lines.push(`${path} ${typeof value} ${String(value).slice(0, 300)}`);
      return;
    }
    if (seen.has(value)) { lines.push(`${path} is ${seen.get(value)}`); return; }
    seen.set(value, path);
    if (typeof value === 'function') lines.push(`${path} function ${hash(Function.prototype.toString.call(value))}`);
    else lines.push(`${path} ${Object.prototype.toString.call(value)}`);
    if (value instanceof Map || value instanceof Set) lines.push(`${path} size ${value.size}`);
    if (depth > 12 || (isNode(value) && value !== document)) return;
    for (const key of Reflect.ownKeys(value)) {
      const property = Object.getOwnPropertyDescriptor(value, key), name = `${path}.${String(key)}`;
      if (books.has(name) || /^jQuery\d+$/.test(String(key))) continue;
      if ('value' in property) walk(name, property.value, depth + 1);
      else for (const way of ['get', 'set']) if (property[way]) walk(`${name} ${way}`, property[way], depth + 1);
    }
    walk(`${path} proto`, Object.getPrototypeOf(value), depth + 1);
  }
  walk('window', window, 0);
  const fields = Array.from(document.querySelectorAll('input, select, textarea, option'),
    (field) => [field.tagName, field.value, field.checked, field.selected, field.disabled, field.readOnly]);
  const scrolled = Array.from(document.querySelectorAll('*'), (e, i) => [i, e.scrollTop, e.scrollLeft])
    .filter(([, top, left]) => top || left);
  const focus = document.activeElement;
  lines.push(`document ${document.documentElement.outerHTML.replace(/<script>palaestraData.*?<\/script>/s, '')}`);
  lines.push(`fields ${JSON.stringify(fields)}`, `scrolled ${JSON.stringify(scrolled)} ${scrollX} ${scrollY}`);
  lines.push(`focus ${focus && focus.tagName} ${focus && focus.id}`, `selected ${getSelection().rangeCount}`);
  lines.push(`location ${location.href} ${document.title} ${name} ${JSON.stringify(history.state)}`);
  lines.push(`clock ${JSON.stringify(palaestraClock.state())} ${Date.now()} ${performance.now()}`);
  lines.push(`random ${Math.random()}`, `history ${history.length}`);
  lines.push(`cached ${Object.keys(jQuery.cache).length}`);
  return lines;
})()
