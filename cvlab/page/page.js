// What the HTML blocks of the page do; cvlab/page/html.py writes that HTML. Gradio runs this once for each block, with
// its `element`, `watch`, which runs a function after the HTML has changed, and `trigger`, which sends an event.

// The address bar holds the link to what is shown; a theme that was asked for stays in it.
watch('value', () => {
  const link = element.querySelector('.settings-link'), theme = new URLSearchParams(location.search).get('__theme');
  if (link) history.replaceState(null, '', link.getAttribute('href') + (theme ? '&__theme=' + theme : ''));
});

// A click or a drag on a picker, or Enter at the cross that the arrow keys move, becomes the event "select".
let points = null;
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
  if (pickerOf(event)) points = [place(pickerOf(event), event)];
});
element.addEventListener('pointermove', event => {
  if (pickerOf(event) && points) points.push(place(pickerOf(event), event));
});
element.addEventListener('pointercancel', () => { points = null; });
element.addEventListener('pointerup', event => {
  if (pickerOf(event) && points) trigger('select', {points: [...points, place(pickerOf(event), event)]});
  points = null;
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
    trigger('select', {points: [[+picker.dataset.x, +picker.dataset.y]]});
  } else return;
  event.preventDefault();
});

// A list whose values are orders, "2,0,1": the figures after it are put into the one that is chosen.
element.addEventListener('change', event => {
  if (!event.target.closest('.sort')) return;
  const gallery = element.querySelector('.figures');
  gallery.asDrawn ??= [...gallery.children];
  gallery.append(...event.target.value.split(',').map(i => gallery.asDrawn[i]));
});

// A button that copies the text that follows it; outside https only the older way works.
element.addEventListener('click', async event => {
  const button = event.target.closest('.copy');
  if (!button) return;
  const text = button.nextElementSibling;
  try { await navigator.clipboard.writeText(text.textContent); } catch {
    getSelection().selectAllChildren(text);
    document.execCommand('copy');
  }
  button.textContent = 'Copied';
});
