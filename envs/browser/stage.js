// The stage on which MiniWoB's pages are set up, one after the other, in one document whose libraries are loaded
// once. A page's own script runs anew in a scope of its own for every episode, on a new body, under a clock at 0.
window.addEventListener('load', () => {
  palaestraClock.advance(1000);  // what the libraries put off until the document is ready
  const SETTLE_MS = 1000;  // page time that passes in each step: delays and animations of MiniWoB end within it
  const {pages, words} = window.palaestraData;
  const scripts = new Map();
  const original = {};
  for (const name of Object.keys(ui_utils)) original[name] = ui_utils[name];
  const pristineCore = Object.assign({}, core);
  const style = document.head.appendChild(document.createElement('style'));
  if (window.jQuery) jQuery.fx.off = true;
  console.log = () => {};
  palaestraClock.keepListeners();

  function clear() {
    if (window.jQuery) { jQuery(document.body).empty(); jQuery.resetUniqueId && jQuery.resetUniqueId(); }
    document.body.replaceWith(document.createElement('body'));
    palaestraClock.reset();
    palaestraTree.reset();
    window.onload = null;
    for (const name of Object.keys(window)) if (!globals.has(name)) delete window[name];
    for (const name of Object.keys(core)) if (!(name in pristineCore)) delete core[name];
    Object.assign(core, pristineCore);
    WOB_EPISODE_ID = WOB_REWARD_GLOBAL = WOB_RAW_REWARD_GLOBAL = 0;
    WOB_DONE_GLOBAL = false;
    WOB_TASK_READY = true;
    WOB_REWARD_REASON = null;
    WOB_DATA_MODE = 'default';
    window.getSelection().removeAllRanges();
  }

  function useWords(plain) {
    for (const name of Object.keys(original)) ui_utils[name] = original[name];
    if (!plain) return;
    for (const name of Object.keys(words)) if (name !== 'strings') ui_utils[name] = words[name].slice();
    let left = [];
    ui_utils.generateString = () => {
      if (left.length === 0) left = words.strings.slice();
      return left.splice(core.randi(0, left.length), 1)[0];
    };
  }

  function begin(name, seed, plain) {
    const page = pages[name];
    if (!scripts.has(name)) scripts.set(name, new Function(page.script + '\n;window.genProblem = genProblem;'));
    clear();
    useWords(plain);
    style.textContent = page.style;
    document.body.innerHTML = page.body;
    scripts.get(name).call(window);
    window.onload();
    core.EPISODE_MAX_TIME = 2 ** 31;  // the environment has limits of its own; a page must not punish a slow model
    Math.seedrandom(seed);
    core.startEpisodeReal();
    return observe();
  }

  function observe() {
    palaestraClock.advance(SETTLE_MS);
    return {
      utterance: core.getUtterance(),
      rows: WOB_DONE_GLOBAL ? [] : palaestraTree.rows(),
      done: WOB_DONE_GLOBAL,
      reward: WOB_RAW_REWARD_GLOBAL,
    };
  }

  function act(kind, ref, text) {
    const element = palaestraTree.element(ref);
    if (element === null) return {refused: `no element ${ref}`};
    if (element.disabled) return {refused: `element ${ref} is disabled`};
    const refused = {click, type, select}[kind](element, ref, text);
    return refused ? {refused} : observe();
  }

  function fire(element, Kind, types, init) {
    for (const type of types) {
      element.dispatchEvent(new Kind(type, {bubbles: true, cancelable: true, composed: true, view: window, ...init}));
    }
  }

  function click(element) {
    element.scrollIntoView({block: 'nearest'});
    const box = element.getBoundingClientRect();
    const clientX = box.x + box.width / 2, clientY = box.y + box.height / 2;
    const hit = document.elementFromPoint(clientX, clientY);
    const target = hit && element.contains(hit) ? hit : element;
    fire(target, MouseEvent, ['mouseover', 'mousemove', 'mousedown'], {clientX, clientY});
    const focused = target.closest('input, select, textarea, button, a[href], [tabindex]');
    if (focused) focused.focus();
    fire(target, MouseEvent, ['mouseup', 'click'], {clientX, clientY});
  }

  function type(element, ref, text) {
    const isText = element instanceof HTMLTextAreaElement || (element instanceof HTMLInputElement
      && ['text', 'password', 'search', 'email', 'number', 'tel', 'url', 'date', 'time'].includes(element.type));
    if (!isText) return `element ${ref} takes no text`;
    element.focus();
    if (element.disabled || element.readOnly) return '';  // focusing it opened something: the text goes nowhere
    const key = text.slice(-1) || 'Backspace';
    fire(element, KeyboardEvent, ['keydown'], {key});
    element.value = text;
    fire(element, InputEvent, ['input'], {data: text});
    fire(element, KeyboardEvent, ['keyup'], {key});
    fire(element, Event, ['change'], {});
  }

  function select(element, ref, text) {
    if (!(element instanceof HTMLSelectElement)) return `element ${ref} has no options`;
    const wanted = palaestraTree.squeeze(text);
    const option = Array.from(element.options).find((one) => palaestraTree.squeeze(one.text) === wanted);
    if (!option) return `element ${ref} has no option ${JSON.stringify(wanted)}`;
    element.focus();
    if (element.multiple) option.selected = !option.selected; else element.selectedIndex = option.index;
    fire(element, Event, ['input', 'change'], {});
  }

  window.palaestra = {begin, act};
  const globals = new Set(Object.getOwnPropertyNames(window));
});
