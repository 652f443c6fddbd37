// The accessibility tree of the page as flat rows. Roles and names are Chromium's own (computedRole,
// computedName); order, states and references are read from the document. What a click can reach but has no
// role, such as MiniWoB's links made of spans, has the role `clickable`. A page of more than MAX_ELEMENTS has one row
// that says so: the time that Chromium takes for the roles grows with the square of their number.
(() => {
  const CONTROLS = new Set(['button', 'link', 'textbox', 'searchbox', 'checkbox', 'radio', 'combobox', 'listbox',
    'option', 'tab', 'menuitem', 'spinbutton', 'slider', 'treeitem', 'switch']);
  const GROUPS = new Set(['table', 'row', 'cell', 'columnheader', 'rowheader', 'gridcell', 'list', 'listitem', 'dialog',
    'tablist', 'tabpanel', 'menu', 'tree', 'group', 'radiogroup', 'heading', 'form', 'status', 'alert', 'region']);
  const NAMED_BY_CONTENT = new Set(['cell', 'columnheader', 'rowheader', 'gridcell', 'heading']);
  const HUD = new Set(['query', 'reward-display', 'sync-task-cover', 'click-canvas']);
  const PLAIN_TAGS = new Set(['DIV', 'SPAN', 'P', 'B', 'BR', 'LABEL']);
  const MAX_ELEMENTS = 300;  // no page of MiniWoB's has a quarter as many
  let refs = new Map(), elements = [], roles = new Map();

  const squeeze = (text) => text.replace(/\s+/g, ' ').trim();
  const isHidden = (element) => element.getAttribute('aria-hidden') === 'true'
    || !element.checkVisibility({visibilityProperty: true});

  function refOf(element) {
    if (!refs.has(element)) { elements.push(element); refs.set(element, elements.length); }
    return refs.get(element);
  }

  // Asking Chromium costs, so it is asked once per element and tree, and not about what cannot have a role.
  function roleOf(element) {
    if (PLAIN_TAGS.has(element.tagName) && !element.hasAttribute('role')) return 'generic';
    if (!roles.has(element)) roles.set(element, element.computedRole);
    return roles.get(element);
  }

  function states(element, role) {
    const found = {};
    const aria = (name) => element.getAttribute('aria-' + name);
    if (element.disabled || aria('disabled') === 'true') found.disabled = true;
    if (role === 'checkbox' || role === 'radio') found.checked = element.checked;
    if (aria('expanded')) found.expanded = aria('expanded') === 'true';
    if (element instanceof HTMLTextAreaElement) found.multiline = true;
    if (role === 'tab') found.selected = aria('selected') === 'true';
    if (element instanceof HTMLSelectElement) {
      found.options = Array.from(element.options, (option) => squeeze(option.text));
      found.value = Array.from(element.selectedOptions, (option) => squeeze(option.text)).join(', ');
    } else if (role === 'textbox' || role === 'searchbox' || role === 'spinbutton' || role === 'combobox') {
      const value = element.value || '';
      if (value) found.value = element.type === 'password' ? '\u2022'.repeat(value.length) : value;
    }
    return found;
  }

  const labelsControl = (element) => element instanceof HTMLLabelElement && element.control !== null;

  // MiniWoB's file tree has no roles, only icons: a name beside a nested list is a folder, open or not.
  function branch(element) {
    const list = element.parentElement.matches('li') && element.parentElement.querySelector(':scope > ul');
    return list ? {expanded: !isHidden(list)} : {};
  }

  // The words beside a control without a name: what its smallest ancestor with any text says, as long as no
  // other control is in there.
  function hint(element) {
    for (let around = element.parentElement; around && around.id !== 'area'; around = around.parentElement) {
      if (around.querySelectorAll('input, select, textarea, button').length > 1) return '';
      const text = squeeze(around.innerText.replace(element.innerText, ''));
      if (text) return text;
    }
    return '';
  }

  // A handler of its own, or focusable without a role: then a handler further out answers the click.
  const isClickable = (element) => palaestraClock.isClickable(element)
    || (element.hasAttribute('tabindex') && roleOf(element) === 'generic');
  const isOwn = (element, role) => isClickable(element) || CONTROLS.has(role) || GROUPS.has(role);

  // The text of a clickable element, without what belongs to clickable or named elements inside it.
  function ownText(element) {
    let text = '';
    for (const child of element.childNodes) {
      if (child instanceof Text) text += child.data;
      else if (child instanceof Element && !isHidden(child) && !labelsControl(child)
        && !isOwn(child, roleOf(child))) text += ownText(child);
    }
    return text;
  }

  const isPlain = (element) => {
    for (const child of element.children) {
      if (isOwn(child, roleOf(child)) || !isPlain(child)) return false;
    }
    return true;
  };

  function visitChildren(element, depth, rows, withText) {
    for (const child of element.childNodes) {
      if (child instanceof Element) visit(child, depth, rows, withText);
      else if (withText && child instanceof Text && squeeze(child.data)) {
        rows.push([depth, 'text', squeeze(child.data), 0, {}, '']);
      }
    }
  }

  function visit(element, depth, rows, withText) {
    if (HUD.has(element.id) || isHidden(element)) return;
    const role = roleOf(element);
    if (CONTROLS.has(role) && !(role === 'tab' && element.querySelector('button, input, select, textarea'))) {
      const name = squeeze(element.computedName);
      const isField = element.matches('input, select, textarea');
      rows.push([depth, role, name, refOf(element), states(element, role), !name && isField ? hint(element) : '']);
      return;
    }
    const text = isClickable(element) ? squeeze(ownText(element)) : '';
    if (text) {
      rows.push([depth, 'clickable', text, refOf(element), branch(element), '']);
      visitChildren(element, depth + 1, rows, false);
    } else if (NAMED_BY_CONTENT.has(role) && isPlain(element)) {
      rows.push([depth, role, squeeze(element.innerText), 0, {}, '']);
    } else if (GROUPS.has(role) || role === 'tab') {
      rows.push([depth, role, squeeze(element.computedName), 0, {}, '']);
      visitChildren(element, depth + 1, rows, true);
    } else {
      visitChildren(element, depth, rows, withText && !labelsControl(element));
    }
  }

  window.palaestraTree = {
    reset() { refs = new Map(); elements = []; },
    rows() {
      const rows = [], size = document.body.getElementsByTagName('*').length;
      if (size > MAX_ELEMENTS) {
        return [[0, 'text', `the page has ${size} elements; more than ${MAX_ELEMENTS} cannot be shown`, 0, {}, '']];
      }
      roles = new Map();
      for (const child of document.body.children) visit(child, 0, rows, true);
      return rows;
    },
    element(ref) {
      const element = elements[ref - 1];
      return element && element.isConnected && !isHidden(element) ? element : null;
    },
    squeeze,
  };
})();
