// What the HTML blocks of the page do; cvlab/page/html.py and picture.py write that HTML. Gradio runs this once for
// each block, with its `element`, `watch` (runs a function after a change of the HTML) and `trigger` (sends an event).

const root = document.documentElement, opened = {};
if (element.closest('#answer, #told, #fetched')) element.setAttribute('aria-live', 'polite');
const fade = value => {
  root.style.setProperty('--fade', value / 100);
  document.querySelectorAll('.fade input').forEach(each => { each.value = value; });
};
// The outlines of the classes that are turned off stay so, whatever is drawn next; each lies on a black line.
const off = root.outlinesOff ??= new Set();
const outlines = within => within.querySelectorAll('.legend input').forEach(box => {
  box.checked = !off.has(box.name);
  box.closest('figure').querySelectorAll('path.' + box.value.replaceAll(' ', '.')).forEach(path => {
    for (const line of [path, path.previousElementSibling]) line.style.display = box.checked ? '' : 'none';
  });
});
const openTab = name => {
  const tab = [...document.querySelectorAll('[role=tab]')].find(each => each.innerText.trim() == name);
  tab?.click();
  return tab;
};
// Of the pictures that follow a slider, the one that it has come to.
const flip = slider => slider.nextElementSibling.querySelectorAll('figure').forEach((each, i) => {
  each.hidden = i != slider.value;
  if (!each.hidden) slider.setAttribute('aria-valuetext', each.innerText);
});
const drawn = () => {
  // The address bar holds the link to what is shown; a theme that was asked for stays in it.
  const link = element.querySelector('.question-link'), theme = new URLSearchParams(location.search).get('__theme');
  if (link) history.replaceState(null, '', link.getAttribute('href') + (theme ? '&__theme=' + theme : ''));
  // The sliders stay where the visitor put them, and what was unfolded stays open.
  const slider = element.querySelector('.fade input'), set = root.style.getPropertyValue('--fade');
  if (slider) set ? slider.value = 100 * set : fade(slider.value);
  element.querySelectorAll('details').forEach(each => { each.open = opened[each.dataset.name]; });
  outlines(element);
  element.querySelector('a.download')?.click();
  element.querySelectorAll('.flip').forEach(flip);
  // The lesson: its step is marked; a screen reader, and the keyboard, go on where something came of the last click.
  const title = element.querySelector('[data-step]');
  if (!title) return;
  document.querySelectorAll('.steps button').forEach((each, i) => {
    i == title.dataset.step ? each.setAttribute('aria-current', 'step') : each.removeAttribute('aria-current');
  });
  if (root.learning) {
    const begins = root.learning == 'step', came = begins ? title : element.querySelector('.told[tabindex], .picker');
    came?.focus({preventScroll: true});
    (begins ? title : element.querySelector('.told'))?.scrollIntoView({block: 'nearest'});
  }
  root.learning = '';
};
watch('value', drawn);
drawn();
element.addEventListener('toggle', event => { opened[event.target.dataset.name] = event.target.open; }, true);

// A click or a drag on a picker, or Enter at the cross that the arrow keys move, becomes the event "select".
let start = null;
const choose = points => {
  if (element.closest('#lesson')) root.learning = 'click';
  trigger('select', {points});
};
const pickerOf = event => event.target.closest('.picker');
const place = (picker, event) => {
  const box = picker.getBoundingClientRect(), side = +picker.dataset.side;
  const within = share => Math.min(side - 1, Math.max(0, Math.floor(share * side)));
  return [within((event.clientX - box.left) / box.width), within((event.clientY - box.top) / box.height)];
};
const mark = picker => {
  const cross = picker.querySelector('i'), side = +picker.dataset.side;
  cross.style.left = (+picker.dataset.x + 0.5) / side * 100 + '%';
  cross.style.top = (+picker.dataset.y + 0.5) / side * 100 + '%';
};
element.addEventListener('pointerdown', event => {
  if (pickerOf(event)) start = place(pickerOf(event), event);
});
element.addEventListener('pointercancel', () => { start = null; });
element.addEventListener('pointerup', event => {
  if (pickerOf(event) && start) choose([start, place(pickerOf(event), event)]);
  start = null;
});
element.addEventListener('focusin', event => { if (pickerOf(event)) mark(pickerOf(event)); });
element.addEventListener('keydown', event => {
  const picker = pickerOf(event);
  const step = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
  if (!picker) return;
  const side = +picker.dataset.side, far = event.shiftKey ? 1 : Math.max(1, Math.round(side / 32));
  if (event.key in step) {
    const [x, y] = step[event.key];
    picker.dataset.x = Math.min(side - 1, Math.max(0, +picker.dataset.x + far * x));
    picker.dataset.y = Math.min(side - 1, Math.max(0, +picker.dataset.y + far * y));
    mark(picker);
  } else if (event.key == 'Enter' || event.key == ' ') {
    choose([[+picker.dataset.x, +picker.dataset.y]]);
  } else return;
  event.preventDefault();
});

// The lesson: a button asks for what stands in data-do, and opens the tab that data-open names.
element.addEventListener('click', event => {
  const button = event.target.closest('.do');
  if (!button) return;
  if (element.closest('#lesson') && !button.dataset.open) root.learning = button.dataset.do.split(' ')[0];
  if (button.dataset.do) trigger('select', {do: button.dataset.do});
  if (button.dataset.open) openTab(button.dataset.open);
});

// A row of "Many pictures", its picture or its button opens the picture in the other tabs.
element.addEventListener('click', event => {
  const button = event.target.closest('.open');
  const open = button ?? event.target.closest('tr, .pic')?.closest('tr, figure')?.querySelector('.open');
  if (!open || !button && String(getSelection())) return;  // text of a row is being copied
  trigger('select', {number: +open.dataset.number});
  openTab('Predict').focus();
  scrollTo(0, 0);
});

// Buttons: to ask for the verdict; to copy the text that follows (outside https only the older way works).
element.addEventListener('click', async event => {
  const ask = event.target.closest('.ask'), button = event.target.closest('.copy');
  if (ask) {
    ask.textContent = 'Checking …';
    trigger('select');
  }
  const index = event.target.closest('[data-index]')?.dataset.index;
  if (index) trigger('select', {index: +index});
  if (!button) return;
  const text = button.nextElementSibling;
  try { await navigator.clipboard.writeText(text.textContent); } catch {
    getSelection().selectAllChildren(text);
    document.execCommand('copy');
  }
  button.textContent = 'Copied';
});

// Live: a frame of the camera is sent when the one before it is answered.
if (element.closest('#live')) {
  const video = document.createElement('video'), canvas = document.createElement('canvas');
  let frame = '';
  video.muted = video.playsInline = true;
  const name = () => { element.querySelector('.live').textContent = video.srcObject ? 'Stop' : 'Live camera'; };
  const send = () => {
    if (!video.srcObject) return;
    const by = Math.min(1, 640 / Math.max(video.videoWidth, video.videoHeight));
    canvas.width = video.videoWidth * by;
    canvas.height = video.videoHeight * by;
    canvas.getContext('2d').drawImage(video, 0, 0, canvas.width, canvas.height);
    frame = canvas.toDataURL('image/jpeg', 0.85);
    trigger('select', {frame, scale: element.querySelector('[data-scale]')?.dataset.scale ?? ''});
  };
  watch('value', () => {
    const photos = element.querySelector('.photos');
    photos?.style.setProperty('--photo', `url(${frame})`);
    photos?.style.setProperty('--ratio', canvas.width / canvas.height);
    name();
    requestAnimationFrame(send);
  });
  element.addEventListener('click', async event => {
    if (!event.target.closest('.live')) return;
    if (video.srcObject) {
      video.srcObject.getTracks().forEach(track => track.stop());
      video.srcObject = null;
    } else try {
      video.srcObject = await navigator.mediaDevices.getUserMedia({video: {facingMode: 'environment'}});
      await video.play();
      send();
    } catch (error) { return event.target.textContent = 'The camera cannot be used: ' + error.message; }
    name();
  });
}

// Once for the whole page.
if (window.cvlab) return;
window.cvlab = true;
const on = (kind, act) => document.addEventListener(kind, act), make = name => document.createElement(name);
on('input', event => {
  if (event.target.closest('.fade')) fade(event.target.value);
  if (event.target.closest('.flip')) flip(event.target);
});
on('change', event => {
  const box = event.target.closest('.legend input');
  if (!box) return;
  off[box.checked ? 'delete' : 'add'](box.name);
  outlines(document);
});

// A teacher's link to the page ends in #lesson: its tab is opened once it is there.
if (location.hash == '#lesson') {
  const waiting = setInterval(() => { if (openTab('Lesson')) clearInterval(waiting); }, 200);
}

// The head of a column sorts the rows of its table, by numbers where there are some.
on('click', event => {
  const head = event.target.closest('.sort')?.parentNode;
  if (!head) return;
  const body = head.closest('table').tBodies[0], at = head.cellIndex, up = head.ariaSort != 'ascending' ? 1 : -1;
  const text = row => row.cells[at].textContent;
  const rows = [...body.rows].sort((a, b) => up * (text(a) - text(b) || text(a).localeCompare(text(b))));
  for (const each of head.parentNode.cells) each.ariaSort = null;
  head.ariaSort = up > 0 ? 'ascending' : 'descending';
  body.append(...rows);
});

// The pictures of a folder keep its name, which may be their class: daisy/12.jpg is sent as daisy_12.jpg.
document.addEventListener('change', event => {
  if (!event.target.webkitdirectory) return;
  const named = new DataTransfer(), name = file => file.webkitRelativePath.split('/').slice(-2).join('_');
  for (const file of event.target.files) named.items.add(new File([file], name(file), {type: file.type}));
  event.target.files = named.files;
}, true);

// A picture that is dropped or pasted is the photo, except on a field for pictures.
const send = (event, files) => {
  const input = document.querySelector('#strip input[type=file]');
  if (!files?.length || !input || event.target.closest?.('.image-container, .gradio-container input, textarea')) return;
  input.files = files;
  input.dispatchEvent(new Event('change', {bubbles: true}));
  event.preventDefault();
};
on('dragover', event => event.preventDefault());
on('drop', event => send(event, event.dataTransfer.files));
on('paste', event => send(event, event.clipboardData.files));

// The arrow keys move among the tabs; the tab that is chosen scrolls into sight.
on('keydown', event => {
  const tab = event.target.closest?.('[role=tab]'), to = {ArrowLeft: 'previous', ArrowRight: 'next'}[event.key];
  if (tab && to) tab[to + 'ElementSibling']?.focus();
});
for (const kind of ['keyup', 'click']) on(kind, event => {
  event.target.closest?.('[role=tab]')?.scrollIntoView({block: 'nearest', inline: 'center'});
});

// "Enlarge": the picture alone, with buttons to zoom and to save it with its caption.
on('click', event => {
  const figure = event.target.closest('.enlarge')?.closest('figure');
  if (!figure) return;
  const view = make('dialog'), tools = make('div'), copy = figure.cloneNode(true);
  let zoom = 1;
  const tool = (name, act) => {
    const button = make('button');
    button.textContent = name;
    button.addEventListener('click', act);
    tools.append(button);
  };
  const larger = by => { zoom = Math.min(8, Math.max(1, zoom * by)); view.style.setProperty('--zoom', zoom); };
  tool('Close', () => view.close());
  tool('Larger', () => larger(1.5));
  tool('Smaller', () => larger(1 / 1.5));
  tool('Save', () => save(copy));
  view.style.cssText = figure.closest('.photos').style.cssText;
  const pic = copy.querySelector('.pic');
  for (const name of ['role', 'tabindex', 'aria-label']) pic.removeAttribute(name);
  pic.classList.remove('picker');
  view.className = figure.closest('.photos').className.replace('main', '') + ' view';
  view.setAttribute('aria-label', 'The picture, enlarged');
  tools.className = 'tools';
  view.append(tools, copy);
  view.addEventListener('close', () => view.remove());
  document.querySelector('.gradio-container').append(view);
  view.showModal();
});

// Photo, heat and lines as they are shown, and the caption below, in one PNG.
const save = async figure => {
  const pic = figure.querySelector('.pic'), photo = new Image(), before = getComputedStyle(pic, '::before');
  photo.src = before.backgroundImage.slice(5, -2);
  await photo.decode();
  const scale = Math.max(1, 1024 / photo.width), width = photo.width * scale, height = photo.height * scale;
  const canvas = make('canvas'), pen = canvas.getContext('2d'), size = Math.round(width / 45);
  const lines = [''];
  pen.font = `${size}px system-ui`;
  for (const word of figure.querySelector('figcaption').innerText.replace(/Enlarge$/, '').split(/\s+/)) {
    if (pen.measureText(lines.at(-1) + word).width > width - 2 * size) lines.push('');
    lines.push(lines.pop() + word + ' ');
  }
  const classes = [...figure.querySelectorAll('.legend label')].filter(each => each.control.checked);
  canvas.width = width;
  canvas.height = height + (lines.length + classes.length + 1) * size * 1.4;
  pen.fillStyle = '#fff';
  pen.fillRect(0, 0, width, canvas.height);
  pen.fillStyle = '#000';
  pen.fillRect(0, 0, width, height);
  pen.font = `${size}px system-ui`;
  lines.push(...classes.map(each => '       ' + each.innerText));
  lines.forEach((line, i) => pen.fillText(line, size, height + (i + 1.2) * size * 1.4));
  classes.forEach((each, i) => {
    const top = height + (lines.length - classes.length + i + 1.2) * size * 1.4 - 0.6 * size;
    for (const [colour, edge] of [['#000', 0], [getComputedStyle(each).getPropertyValue('--c'), size / 8]]) {
      pen.fillStyle = colour;
      pen.fillRect(size, top + edge, 1.5 * size, size / 2 - 2 * edge);
    }
  });
  pen.globalAlpha = before.opacity;
  pen.filter = before.filter;
  pen.drawImage(photo, 0, 0, width, height);
  pen.filter = 'none';
  const heat = pic.querySelector('.heat'), shown = getComputedStyle(heat), by = width / pic.clientWidth;
  pen.globalAlpha = shown.opacity;
  pen.drawImage(heat, heat.offsetLeft * by, heat.offsetTop * by, heat.offsetWidth * by, heat.offsetHeight * by);
  for (const path of pic.querySelectorAll('path')) {
    const look = getComputedStyle(path), line = new Path2D();
    if (look.display == 'none') continue;
    line.addPath(new Path2D(path.getAttribute('d')), new DOMMatrix([width / 1000, 0, 0, height / 1000, 0, 0]));
    pen.globalAlpha = look.opacity;
    pen.fillStyle = look.fill;
    pen.strokeStyle = look.stroke;
    pen.lineWidth = parseFloat(look.strokeWidth) * by;
    pen.setLineDash((look.strokeDasharray.match(/[\d.]+/g) ?? []).map(each => each * by));
    if (look.fill != 'none') pen.fill(line, 'evenodd');
    if (look.stroke != 'none') pen.stroke(line);
  }
  const link = make('a');
  link.download = 'cvlab.png';
  link.href = canvas.toDataURL('image/png');
  link.click();
};
