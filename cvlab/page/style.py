"""Style sheet and scripts of the page; cvlab/page/figures.py writes the HTML that they are for."""

CSS = """
.gradio-container {width: 100%; max-width: 1280px !important; margin: 0 auto}
button[role=tab].selected {color: var(--primary-700) !important}
.dark button[role=tab].selected {color: var(--primary-300) !important}
.examples {display: grid; grid-template-columns: repeat(5, 1fr); gap: 6px}
.examples button {min-width: 0; flex-direction: column; padding: 4px; font-weight: normal}
.examples button img {width: 100%; height: 52px; object-fit: cover; margin: 0; border-radius: 3px}
.code.code {font-family: var(--font-mono); white-space: pre-wrap; overflow-wrap: anywhere; margin: 8px 0; padding: 12px;
  border: 1px solid var(--border-color-primary); border-radius: 4px}
.copy {padding: 4px 12px; border: 1px solid var(--border-color-primary); border-radius: 4px}
.figures {display: grid; grid-template-columns: repeat(auto-fill, minmax(136px, 1fr)); gap: 12px}
.figures.large {grid-template-columns: repeat(auto-fit, minmax(200px, 1fr))}
.figures.wide {grid-template-columns: repeat(auto-fit, minmax(min(100%, 360px), 1fr)); align-items: start}
.figures.two {grid-template-columns: 1fr 1fr; max-width: 640px}
.figures.pairs {grid-template-columns: repeat(auto-fill, minmax(280px, 1fr)); gap: 20px 16px}
.figures .pair {display: grid; grid-template-columns: 1fr 1fr; gap: 6px; align-content: start}
.figures .pair > p {grid-column: 1 / -1; margin: 0; line-height: 1.35}
.figures figure {margin: 0; min-width: 0}
.figures img {width: 100%; max-height: 70vh; object-fit: contain; border-radius: 4px}
.figures figcaption {line-height: 1.35}
.scale {display: flex; gap: 6px; align-items: center}
.scale span {flex: 1; height: 10px; border-radius: 2px; min-width: 24px}
.picker {display: block; position: relative; width: min(100%, 420px); cursor: crosshair; touch-action: pan-y;
  user-select: none; border-radius: 4px}
.picker img {width: 100%; display: block; border-radius: 4px; pointer-events: none}
.picker i {position: absolute; width: 16px; height: 16px; margin: -8px; border: 2px solid #fff; border-radius: 50%;
  outline: 2px solid #000; pointer-events: none; display: none}
.picker:focus-visible {outline: 3px solid var(--primary-500); outline-offset: 2px}
.picker:focus-visible i {display: block}
.facts.facts {border-collapse: collapse; margin: 8px 0 16px; border: 0}
.facts.facts tr {border: 0}
.facts.facts :is(th, td) {text-align: left; padding: 4px 14px 4px 0; border: 0; overflow-wrap: break-word;
  border-bottom: 1px solid var(--border-color-primary); max-width: 60vw}
.facts .bar {position: relative; display: block; width: clamp(70px, 22vw, 220px); height: 12px}
.facts .bar b {position: absolute; top: 0; bottom: 0; background: #0072b2; border-radius: 2px}
.facts .bar b.against {background: #d55e00}
.sort select {font: inherit; padding: 4px 8px; border: 1px solid var(--border-color-primary); border-radius: 4px;
  background: var(--input-background-fill); color: var(--body-text-color)}
.card {white-space: pre-wrap; overflow-wrap: anywhere; max-height: 60vh; overflow-y: auto; font-size: 0.9em}
"""

# The address bar holds the link to what is shown; a theme that was asked for stays in it.
LINK_JS = """
watch('value', () => {
  const link = element.querySelector('a'), theme = new URLSearchParams(location.search).get('__theme');
  if (link) history.replaceState(null, '', link.getAttribute('href') + (theme ? '&__theme=' + theme : ''));
});
"""

# A click or a drag on a picker, or Enter at the cross that the arrow keys move, becomes the event "select".
PICKER_JS = """
let points = null;
const of = event => event.target.closest('.picker');
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
element.addEventListener('pointerdown', event => { if (of(event)) points = [place(of(event), event)]; });
element.addEventListener('pointermove', event => { if (of(event) && points) points.push(place(of(event), event)); });
element.addEventListener('pointercancel', () => { points = null; });
element.addEventListener('pointerup', event => {
  if (of(event) && points) trigger('select', {points: [...points, place(of(event), event)]});
  points = null;
});
element.addEventListener('focusin', event => { if (of(event)) mark(of(event)); });
element.addEventListener('keydown', event => {
  const picker = of(event), step = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
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
"""

# A list whose values are orders, "2,0,1": the figures after it are put into the one that is chosen.
SORT_JS = """
element.addEventListener('change', event => {
  const gallery = element.querySelector('.figures');
  gallery.asDrawn ??= [...gallery.children];
  gallery.append(...event.target.value.split(',').map(i => gallery.asDrawn[i]));
});
"""

# A button that copies the text that follows it; outside https only the older way works.
COPY_JS = """
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
"""
