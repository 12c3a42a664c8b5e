'use strict';
/* The page: a setting, the forward pass of it, and what is shown of that. The setting is in the address. */

const DATA = JSON.parse(document.getElementById('data').textContent);
const INITIAL = {
  step: 'streams',
  release: '2.3',
  scene: 't2v',
  dtype: 'float32',
  bug: '',
  conventions: {},
  levels: {},
  cross: undefined,
  fps: 0,
  tap: 'proj_in',
  panel: 'words',
  block: 0,
  element: 0,
  cell: [0, 0],
  change: false,
  time: 0.2,
  token: 40,
  note: '', // why the page moved, or what the last change took with it
  home: null, // where the reader was before a bug or a convention was shown elsewhere
  folded: true, // on a narrow screen, the panel under the tabs
};
const LEVELS = ['timestep', 'sigma', 'audio_timestep', 'audio_sigma'];
const state = structuredClone(INITIAL);
const run = {}; // what was computed last: taps, base, changed, digests, recorded, wrong, ms
const wide = matchMedia('(min-width: 1101px)'); // story, model and tensor side by side
const sheet = matchMedia('(max-width: 760px)'); // a tensor opens over the page
const $ = (id) => document.getElementById(id);
const thousands = (n) => n.toLocaleString('en');
const short = (x) =>
  x === 0 ? '0' : Math.abs(x) >= 1e4 || Math.abs(x) < 1e-3 ? x.toExponential(1) : String(+x.toPrecision(4));

/** Return an element with attributes (functions are listeners) and children (text, or elements). */
function el(tag, attributes = {}, ...children) {
  const svg = /^(svg|path|rect|line|text|circle|polyline)$/.test(tag);
  const node = svg ? document.createElementNS('http://www.w3.org/2000/svg', tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === 'function') node.addEventListener(name, value);
    else if (value !== undefined && value !== null && value !== false)
      node.setAttribute(name, value === true ? '' : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}
const html = (tag, attributes, source) => {
  // only for the page's own text, which stands in DATA
  const node = el(tag, attributes);
  node.innerHTML = source;
  return node;
};

// ---- The setting ---------------------------------------------------------------------------------------------------

const caseName = ({ release, scene } = state) => `${release}/${scene}`;
const entryOf = (name) => DATA.cases[name];
const conventionsNow = () => ({ ...DATA.diffusers, ...entryOf(caseName()).conventions, ...state.conventions });
const settingOf = () => ({
  case: caseName(),
  dtype: state.dtype,
  bug: state.bug,
  conventions: state.conventions,
  levels: state.levels,
  cross: state.cross,
  fps: state.fps || undefined,
});
const untouched = () =>
  !state.bug &&
  !Object.keys(state.conventions).length &&
  !Object.keys(state.levels).length &&
  state.cross === undefined &&
  !state.fps;

/** Change the setting, compute it if it needs to be, and show it. */
function set(changes) {
  const computes = Object.keys(changes).some((key) => /release|scene|dtype|bug|conventions|levels|cross|fps/.test(key));
  const scene = changes.scene || state.scene;
  if ('release' in changes && !entryOf(`${changes.release}/${scene}`)) changes.scene = 't2v';
  const moves = WHERE_SHOWN.some((key) => key in changes && changes[key] !== state[key]);
  const perturbed = entryOf(caseName({ ...state, ...changes })).inputs.spatio_temporal_guidance_blocks;
  if (moves && perturbed && !('step' in changes)) changes.block = perturbed[0];
  if (computes && !('note' in changes)) changes.note = noteOn(changes, moves, scene);
  if (WHERE_SHOWN.some((key) => key in changes)) state.home = isShown(changes) ? state.home || placeNow() : null;
  Object.assign(state, changes);
  if (computes) compute();
  if (changes.bug) showFirst();
  else if ('block' in changes && !('tap' in changes)) state.tap = inBlock(state.tap, state.block);
  if (!tensorOf(state.tap)) state.tap = 'proj_in';
  show();
  writeAddress();
  if (changes.bug) reveal(state.tap);
  const lit = changes.release && document.querySelector('.chip[data-lit]');
  if (lit && state.panel === 'releases' && !state.note) reveal(lit.dataset.tap);
}

const WHERE_SHOWN = ['release', 'scene', 'dtype'];
const placeNow = () => Object.fromEntries(WHERE_SHOWN.map((key) => [key, state[key]]));
const isShown = ({ bug, conventions = {} }) => Boolean(bug || Object.keys(conventions).length);
const inBlock = (tap, block) => tap.replace(/^transformer_blocks\.\d+/, `transformer_blocks.${block}`);

/** Say why a change moves the page, and what it takes with it. `scene` is the one that was asked for. */
function noteOn(changes, moves, scene) {
  const next = { ...state, ...changes };
  const place = caseName(next) + (next.dtype === state.dtype ? '' : `, ${next.dtype}`);
  const label = (name) => DATA.scene.find((x) => x.name === name).label;
  const undoes = !untouched() && 'levels' in changes && !(state.bug && changes.bug);
  const { case: recorded } = DATA.bug.find(({ name }) => name === state.bug) || {};
  const notes = [
    undoes && (state.bug ? `The bug is out: it is shown in ${recorded} alone.` : 'Your earlier changes are undone.'),
    moves && changes.bug && `Shown in ${place}, where the audit was recorded.`,
    moves && !changes.bug && isShown(changes) && `Shown in ${place}, where it makes a difference.`,
    changes.step && (next.release !== state.release || next.dtype !== state.dtype) && `This step is shown in ${place}.`,
    next.scene !== scene && `There is no case “${label(scene)}” of ${next.release} here.`,
  ];
  return notes.filter(Boolean).join(' ');
}

/** Take out what the reader has changed, and go back to where that began. */
const takeBack = () => set({ ...pristine(), ...state.home, note: state.bug ? 'The bug is out.' : '' });

/** Put a bug in, in the case of which its audit is. */
function putIn({ name, case: shown }, more = {}) {
  const [release, scene] = shown.split('/');
  set({ ...pristine(), ...more, release, scene, bug: name, dtype: 'float32' });
}

/** Return the first tensor that is there and has changed. Those that are missing are said apart, as in an audit. */
function firstChanged() {
  const changed = [...run.changed.keys()];
  return changed.find((tap) => run.taps.has(tap)) || changed[0];
}

/** Return a tensor, or, where a bug leaves it out, the right one. */
const tensorOf = (tap) => run.taps.get(tap) || (run.changed.has(tap) && run.before.get(tap));

/** Say how a tensor has changed. */
function howMoved(tap) {
  const moved = run.changed.get(tap);
  const [x, right] = [run.taps.get(tap), run.before.get(tap)];
  const shape = (t) => `(${t.shape.map(thousands).join(', ')})`;
  if (!x) return state.bug ? 'missing: the bug leaves it out' : 'missing';
  if (moved === Infinity) return `another shape: ${shape(x)} in place of ${shape(right)}`;
  const most = tap === 'video_coords' ? ', of which pixels are the most' : '';
  return `${state.bug ? 'wrong' : 'moved'} by ${short(moved)} of its size${most}`;
}

/** Open the first tensor that is wrong, at its difference. */
function showFirst() {
  const tap = firstChanged();
  if (tap) Object.assign(state, { tap, block: blockOf(tap), change: true, cell: [0, 0] });
}
const blockOf = (tap) => Number((/^transformer_blocks\.(\d+)/.exec(tap) || [0, state.block])[1]);

function reveal(tap) {
  const chip = document.querySelector(`.chip[data-tap="${tap}"]`);
  if (!chip) return;
  if (wide.matches) chip.closest('.band').scrollIntoView({ block: 'start' });
  else chip.scrollIntoView({ block: 'center' });
}
const pristine = () => ({ bug: '', conventions: {}, levels: {}, cross: undefined, fps: 0 });

function writeAddress() {
  const kept = new URLSearchParams();
  for (const key of ['step', 'release', 'scene', 'dtype', 'bug', 'tap', 'panel', 'block', 'fps']) {
    if (state[key] !== INITIAL[key] || key === 'step') kept.set(key, state[key]);
  }
  if (entryOf(caseName()).inputs.spatio_temporal_guidance_blocks) kept.set('block', state.block);
  if (state.cross !== undefined) kept.set('cross', state.cross);
  Object.entries(state.levels).forEach(([name, value]) => kept.set(name, value));
  Object.entries(state.conventions).forEach(([name, value]) => kept.set(name, value));
  history.replaceState(null, '', `#${kept}`);
}

/** Read the setting that an address names; a step brings its own, which the rest of the address changes. */
function readAddress() {
  const given = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  const step = DATA.step.find(({ id }) => id === given.step);
  const next = { ...structuredClone(INITIAL), ...(step ? ofStep(step) : {}) };
  for (const key of ['release', 'scene', 'dtype', 'bug', 'tap', 'panel']) if (given[key]) next[key] = given[key];
  if (given.fps >= 1 && given.fps <= 240) next.fps = Number(given.fps);
  for (const key of LEVELS) if (given[key] >= 0 && given[key] <= 1000) next.levels[key] = Number(given[key]);
  if (given.cross) next.cross = given.cross === 'true';
  for (const { name, values } of DATA.convention)
    if (values.some((v) => v.name === given[name])) next.conventions[name] = given[name];
  const bug = DATA.bug.find(({ name }) => name === next.bug);
  if (!bug) next.bug = '';
  else if (!given.release && !given.scene) [next.release, next.scene] = bug.case.split('/');
  if (!Object.hasOwn(PANELS, next.panel)) next.panel = 'words';
  if (Object.hasOwn(given, 'panel')) next.folded = false;
  if (!Object.hasOwn(DATA.configs, next.release)) next.release = '2.3';
  if (!Object.hasOwn(DATA.cases, `${next.release}/${next.scene}`)) next.scene = 't2v';
  const { digests, inputs } = entryOf(caseName(next));
  if (!Object.hasOwn(digests, next.dtype)) next.dtype = 'float32';
  if (/^[01]$/.test(given.block)) next.block = Number(given.block);
  else if (inputs.spatio_temporal_guidance_blocks) [next.block] = inputs.spatio_temporal_guidance_blocks;
  return next;
}

const ofStep = (step) => ({
  ...pristine(),
  step: step.id,
  release: '2.3',
  scene: step.scene || 't2v',
  dtype: 'float32',
  panel: step.panel,
  folded: Boolean(step.fold),
  tap: step.tap,
  block: 0,
  element: 0,
  cell: [0, 0],
  change: false,
});

// ---- The forward pass of it ----------------------------------------------------------------------------------------

const bases = new Map();

/** Return a case as it was recorded: the digests of its tensors, and, once they are computed here, the tensors. */
function base(name, dtype) {
  const key = `${name} ${dtype}`;
  if (!bases.has(key)) {
    const entry = entryOf(name);
    const raw = atob(entry.digests[dtype]);
    const recorded = new Map();
    const hex = Array.from(raw, (c) => c.charCodeAt(0).toString(16).padStart(2, '0')).join('');
    entry.taps.forEach((tap, i) => recorded.set(tap, hex.slice(32 * i, 32 * i + 32)));
    bases.set(key, { recorded, taps: null });
  }
  return bases.get(key);
}

/** Return the relative L2 distance of two tensors, and 0 only if all bits are the same. */
function distance(x, y) {
  if (x === undefined || `${x.shape}` !== `${y.shape}`) return Infinity;
  let error = 0,
    norm = 0,
    same = true;
  for (let i = 0; i < y.data.length; i++) {
    if (!Object.is(x.data[i], y.data[i])) same = false;
    error += (x.data[i] - y.data[i]) ** 2;
    norm += y.data[i] ** 2;
  }
  return same ? 0 : Math.sqrt(error / norm) || Number.MIN_VALUE;
}

/** Return diffusers' choices where a reader chose what the case has anyway, so that something is seen to change. */
function insteadOf() {
  const own = entryOf(caseName()).conventions;
  const chosen = Object.keys(state.conventions).filter((name) => state.conventions[name] === own[name]);
  return Object.fromEntries(chosen.map((name) => [name, DATA.diffusers[name]]).filter(([name, x]) => x !== own[name]));
}

function compute() {
  const kept = base(caseName(), state.dtype);
  const { recorded } = kept;
  const against = insteadOf();
  if (!untouched() && !kept.taps) kept.taps = computed(DATA, { case: caseName(), dtype: state.dtype });
  const t0 = performance.now();
  const taps = computed(DATA, settingOf());
  const t1 = performance.now();
  kept.taps = kept.taps || taps;
  const compared = Object.keys(against).length > 0;
  const before = compared
    ? computed(DATA, { case: caseName(), dtype: state.dtype, conventions: against })
    : kept.taps;
  const digests = digestsOf(taps, state.dtype, conventionsNow());
  const t2 = performance.now();
  const changed = new Map();
  const order = [...recorded.keys()];
  for (const tap of order) {
    const moved = distance(taps.get(tap), before.get(tap));
    if (moved) changed.set(tap, moved);
  }
  const same = order.filter((tap) => digests.get(tap) === recorded.get(tap));
  Object.assign(run, { taps, before, changed, digests, recorded, order, same, against });
  Object.assign(run, { forward: t1 - t0, hashing: t2 - t1 });
}

// ---- Names of tensors ----------------------------------------------------------------------------------------------

/** Return whether a tensor is audio's. In the exchange, what the keys and values are made of is the other stream's. */
function isAudio(tap) {
  const receiver = /(audio_to_video|video_to_audio)_attn\.(.*)/.exec(tap);
  if (!receiver) return /(^|\.)audio(_|$)|cross_attn_audio/.test(tap);
  return (receiver[1] === 'video_to_audio') !== /^(context|context_rows|norm_k|to_v|k)$/.test(receiver[2]);
}

const PARTS = [
  ['enter', 'In'],
  ['self', 'Self-attention'],
  ['text', 'Text attention'],
  ['exchange', 'Exchange'],
  ['ff', 'Feed-forward'],
  ['leave', 'Out'],
];

/** Return the part of the model in which a tap is. */
function partOf(tap) {
  const inBlock = /^transformer_blocks\.\d+\.(audio_to|video_to|audio_|)(.*)$/.exec(tap);
  if (!inBlock) return /^(audio_)?(norm_out|proj_out|sample)/.test(tap) ? 'leave' : 'enter';
  if (inBlock[1].endsWith('_to')) return 'exchange';
  return { attn1: 'self', attn2: 'text' }[inBlock[2].split('.')[0]] || 'ff';
}

/** Return the name under which text.toml describes a tap. */
function roleOf(tap) {
  let name = tap.replace(/^transformer_blocks\.\d+\./, '');
  if (name === 'video' || name === 'audio') return 'block';
  if (name.endsWith('_coords')) return name;
  name = name
    .replace(/^(video_to_audio|audio_to_video)_attn/, 'exchange')
    .replace('cross_attn_audio_rope', 'cross_attn_rope');
  name = name.replace(/^audio_/, '').replace(/^(time_embed|prompt_adaln|av_cross_attn_\w+)\./, 'adaln.');
  const known = (role) => DATA.tensor.some((x) => x.name === role);
  return known(name) ? name : name.replace(/^(attn1|attn2|exchange)\./, 'attention.');
}

/** Situations in which text.toml has other words for a tensor. */
const WHERE = {
  '2.0': () => state.release === '2.0',
  late: (tap) => state.bug === 'sequential-exchange' && tap.includes('video_to_audio'),
  'to audio': (tap) => tap.includes('video_to_audio'),
  perturbed: (tap) => /\.(audio_)?attn1\./.test(tap) && perturbs(tap),
};
/** Return whether the case leaves attention out, for guidance, in the block of a tap. */
function perturbs(tap) {
  const { inputs, release } = entryOf(caseName());
  const allowed = DATA.configs[release].perturbed_attn || conventionsNow().guidance === 'always';
  return allowed && (inputs.spatio_temporal_guidance_blocks || []).includes(blockOf(tap));
}

function about(tap) {
  const role = roleOf(tap);
  const said = DATA.tensor.filter((x) => x.name === role);
  return said.find(({ where }) => where && WHERE[where](tap)) || said.find(({ where }) => !where) || {};
}
const litRole = (tap) => (/prompt_adaln/.test(tap) ? tap.replace(/^audio_/, '') : roleOf(tap));

/** Return the parts of the model in order: for each stream, sets of taps under a heading. */
function bands() {
  const at = `transformer_blocks.${state.block}.`;
  const has = (tap) => run.order.includes(tap);
  const sub = (name, parts) => parts.split(' ').map((part) => `${at}${name}.${part}`);
  const attention = 'norm_q norm_k to_v q k sdpa to_gate_logits gate to_out';
  const rule = { own: 'own timestep', other: "the other's sigma", other_gate: 'own timestep' };
  const { model, x } = prepared(DATA, settingOf());
  const mode = model.exchangeMode(x.use_cross_timestep);
  const embed = (name) => ['sinusoid', 'emb', 'linear'].map((part) => `${name}.${part}`);
  const small = true; // drawn in one line, without captions
  const entrance = (p, name, direction, cross) => [
    ['latents to tokens', [`${p}proj_in`]],
    ['text', [`${p}caption_projection`]],
    ['positions', [`${name}_coords`, `${p}rope.cos`, `${p}rope.sin`]],
    ['positions in the exchange', [`cross_attn_${p}rope.cos`, `cross_attn_${p}rope.sin`]],
    ['rows, by own timestep', embed(`${p}time_embed`), small],
    ['text rows, by own sigma', embed(`${p}prompt_adaln`), small],
    [`exchange rows, by ${rule[mode]}`, embed(`av_cross_attn_${name}_scale_shift`), small],
    [
      `exchange gate, by ${mode === 'own' ? rule.own : rule.other}`,
      embed(`av_cross_attn_${name}_${direction}_gate`),
      small,
    ],
  ];
  const layer = (name, own, rest) => [
    ['rows and input', sub(name, own)],
    ['heads', sub(name, rest)],
  ];
  const both = (f) => [f('', 'video'), f('audio_', 'audio')];
  const found = [
    {
      id: 'enter',
      about: 'once, before all blocks',
      sides: [entrance('', 'video', 'a2v'), entrance('audio_', 'audio', 'v2a')],
    },
    {
      id: 'self',
      about: perturbs(at)
        ? 'each token keeps its own V where guidance asks for it'
        : 'each stream looks at itself',
      sides: both((p) => layer(`${p}attn1`, 'stream rows input', attention)),
    },
    {
      id: 'text',
      about: 'each stream looks at the prompt',
      sides: both((p) => layer(`${p}attn2`, 'stream rows input context_rows context', attention)),
    },
    {
      id: 'exchange',
      about:
        state.bug === 'sequential-exchange'
          ? 'audio looks at a video that has already changed: the bug'
          : 'each stream looks at the other as it was before',
      sides: ['audio_to_video_attn', 'video_to_audio_attn'].map((name) =>
        layer(name, 'stream rows input context_rows context', attention),
      ),
    },
    {
      id: 'ff',
      about: 'each token for itself',
      sides: both((p, name) => [
        ['rows and input', sub(`${p}ff`, 'stream rows input')],
        ['layers', sub(`${p}ff`, 'proj activation output')],
        ['after the block', [at + name]],
      ]),
    },
    {
      id: 'leave',
      about: 'once, after all blocks',
      sides: both((p) => [['velocities', [`${p}norm_out`, `${p}proj_out.input`, `${p}sample`]]]),
    },
  ];
  const usual = entryOf(`${state.release}/t2v`).taps;
  for (const band of found) {
    band.title = PARTS.find(([id]) => id === band.id)[1];
    band.inBlock = !['enter', 'leave'].includes(band.id);
    const wanted = band.sides.flatMap((side) => side.flatMap(([, taps]) => taps));
    band.leftOut = wanted.filter((tap) => usual.includes(tap) && !has(tap) && !isAudio(tap));
    band.sides = band.sides.map((side) =>
      side.map(([name, taps, small]) => [name, taps.filter(has), small]).filter(([, taps]) => taps.length),
    );
  }
  return found.filter((band) => band.sides.some((side) => side.length));
}

// ---- Pictures of tensors -------------------------------------------------------------------------------------------

/** Return a tensor as rows and columns, of one batch element. */
function viewOf(tap, x) {
  const [n] = x.shape;
  const batch = entryOf(caseName()).inputs.hidden_states.shape[0];
  const element = Math.min(state.element, batch - 1);
  const tokens = n > batch; // noise levels by token: all rows of a token on one line
  const rows = tokens ? n / batch : x.shape.length > 2 ? x.shape[1] : n;
  const cols = x.data.length / n / (tokens || x.shape.length === 2 ? 1 : rows);
  const whole = !tokens && x.shape.length === 2; // a line for each element
  return { rows, cols, start: whole ? 0 : element * rows * cols, data: x.data, whole };
}

let palette = null; // [paper, negative, video, audio] as [r, g, b], of the current theme
function colours() {
  if (palette) return palette;
  const style = getComputedStyle(document.documentElement);
  palette = ['--paper', '--negative', '--video', '--audio'].map((name) => {
    const hex = style.getPropertyValue(name).trim();
    return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  });
  return palette;
}

/** Draw a view: zero is the paper, positive the stream's colour, negative grey; at most width x height pixels. */
function paint(canvas, view, audio, width = Infinity, height = Infinity) {
  const [paper, negative, video, orange] = colours();
  const positive = audio ? orange : video;
  const w = Math.min(view.cols, width);
  const h = Math.min(view.rows, height);
  const image = new ImageData(w, h);
  let most = 0;
  for (let i = 0; i < view.rows * view.cols; i++) most = Math.max(most, Math.abs(view.data[view.start + i]) || 0);
  for (let y = 0, at = 0; y < h; y++) {
    for (let x = 0; x < w; x++, at += 4) {
      const value =
        view.data[view.start + Math.floor((y * view.rows) / h) * view.cols + Math.floor((x * view.cols) / w)];
      const share = most ? Math.sqrt(Math.min(1, Math.abs(value) / most)) : 0;
      const to = value < 0 ? negative : positive;
      for (let c = 0; c < 3; c++) image.data[at + c] = paper[c] + (to[c] - paper[c]) * share;
      image.data[at + 3] = 255;
    }
  }
  canvas.width = w;
  canvas.height = h;
  canvas.getContext('2d').putImageData(image, 0, 0);
}

// ---- The model, drawn ----------------------------------------------------------------------------------------------

let drawn = ''; // what the bands were last built for

function showMachine() {
  const found = bands();
  const key = JSON.stringify(found) + (state.bug === 'sequential-exchange');
  if (key !== drawn) {
    $('bands').replaceChildren(...found.map(band));
    drawn = key;
  }
  const step = DATA.step.find(({ id }) => id === state.step);
  const lit = state.panel === 'releases' ? DATA.release.find(({ name }) => name === state.release).lit : [];
  const nodes = [...document.querySelectorAll('.band')];
  nodes.forEach((node, i) => {
    node.toggleAttribute('data-now', node.id === `band-${step && step.band}`);
    node.style.setProperty('--place', 2 * i + 2);
  });
  const here = nodes.findIndex((node) => 'now' in node.dataset);
  $('story').style.setProperty('--place', here < 0 ? -1 : 2 * here + 1);
  const first = firstChanged();
  for (const chip of document.querySelectorAll('.chip')) {
    const { tap } = chip.dataset;
    const moved = run.changed.get(tap);
    const mark = moved && (state.bug ? 'wrong' : 'moved');
    chip.setAttribute('aria-pressed', tap === state.tap);
    chip.tabIndex = tap === state.tap ? 0 : -1;
    chip.setAttribute('aria-label', `${tap}${moved ? `, ${howMoved(tap)}` : ''}`);
    chip.title = `${tap}: ${about(tap).title || ''}${moved ? `; ${howMoved(tap)}` : ''}`;
    if (mark) chip.dataset.is = mark;
    else delete chip.dataset.is;
    chip.toggleAttribute('data-first', Boolean(state.bug) && tap === first);
    chip.toggleAttribute('data-lit', lit.includes(litRole(tap)) && !(state.release === '2.5' && isAudio(tap)));
    const x = run.taps.get(tap);
    chip.firstChild.style.visibility = x ? 'visible' : 'hidden';
    if (x) paint(chip.firstChild, viewOf(tap, x), isAudio(tap), 64, 22);
  }
  if (!document.querySelector('.chip[tabindex="0"]')) document.querySelector('.chip').tabIndex = 0;
}

/** Move the focus from tensor to tensor: left and right in order, up and down to the next part of the model. */
function moveAmongChips(event) {
  const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1 }[event.key];
  if (!by) return;
  const part = /Up|Down/.test(event.key);
  const here = event.currentTarget;
  const places = [...document.querySelectorAll(part ? '.band' : '.chip')];
  const i = places.indexOf(part ? here.closest('.band') : here);
  const next = places[i + by];
  const to = part && next ? next.querySelector('.chip') : next;
  event.preventDefault();
  if (!to) return;
  here.tabIndex = -1;
  to.tabIndex = 0;
  to.focus();
}

function band({ id, title, about: says, sides, inBlock, leftOut }) {
  const names = id === 'exchange' ? ['video receives', 'audio receives'] : ['video', 'audio'];
  const side = (sets, k) =>
    el(
      'div',
      { class: `side${k ? ' audio-side' : ''}` },
      el('h4', {}, names[k]),
      sets.map(([name, taps, small], i) => [
        small && !sets[i - 1][2]
          ? el('div', { class: 'name small-head' }, 'noise levels: sinusoid, embedding, offsets of the rows')
          : null,
        el(
          'div',
          { class: small ? 'set small' : 'set' },
          el('div', { class: 'name' }, name),
          el(
            'div',
            { class: 'chips' },
            taps.map((tap) => chip(tap)),
          ),
        ),
      ]),
    );
  const where = inBlock ? `block ${state.block}: ` : '';
  return el(
    'section',
    { class: 'band', id: `band-${id}`, 'aria-label': title },
    el('header', {}, el('h3', {}, title), el('p', { class: 'about' }, where + says)),
    id === 'exchange' ? crossing() : null,
    leftOut.length
      ? el('p', { class: 'fine' }, `Left out here: ${leftOut.map((tap) => tap.split('.').at(-1)).join(', ')}.`)
      : null,
    el('div', { class: 'sides' }, sides.map(side)),
  );
}

function chip(tap) {
  const alias = {
    caption_projection: 'projected',
    audio_caption_projection: 'projected',
    to_gate_logits: 'logits',
    activation: 'GELU',
    'proj_out.input': 'input',
    context_rows: /attn2/.test(tap) ? 'text rows' : 'their rows',
  };
  const label = tap
    .replace(/^transformer_blocks\.\d+\./, '')
    .replace(
      /^.*_attn\.|^(audio_)?(attn\d|ff)\.|^.*(time_embed|adaln|scale_shift|gate)\.|^(audio_|cross_attn_)*rope\.|^audio_(?=sample|norm|proj)/,
      '',
    );
  return el(
    'button',
    { class: 'chip', 'data-tap': tap, click: () => openTensor(tap), keydown: moveAmongChips },
    el('canvas', { 'aria-hidden': 'true' }),
    el('span', {}, alias[label] || label.replace(/^(video|audio)_coords/, 'coords')),
  );
}

/** Draw who reads whom in the exchange: both read what is above, and both add below. */
function crossing() {
  const late = state.bug === 'sequential-exchange';
  const says = late
    ? 'The bug: audio makes keys and values of a video that has already read audio.'
    : 'Each attention takes queries from its own stream, and keys and values from the other. Both read before either adds.';
  const { audio_num_attention_heads: heads, audio_attention_head_dim: d } = DATA.configs[state.release];
  const text = (x, y, what, more = {}) => el('text', { x, y, 'text-anchor': 'middle', ...more }, what);
  const line = (points, colour, more = {}) =>
    el('polyline', { points, fill: 'none', stroke: `var(--${colour})`, 'stroke-width': 1.6, ...more });
  /** A line that ends in an arrowhead, which points to the right (1) or left (-1), or down (0). */
  const arrow = (points, colour, to, more) => {
    const [x, y] = points.split(' ').at(-1).split(',').map(Number);
    const head = to ? `M${x} ${y} l${-6 * to} -3.5 v7 z` : `M${x} ${y} l-3.5 -6 h7 z`;
    return [line(points, colour, more), el('path', { d: head, fill: `var(--${colour})` })];
  };
  const side = (own, other, x, to, from, bad) => {
    const box = x + 62 * to; // the middle of its attention
    return [
      text(x, 10, `${own}, before`, { class: own }),
      arrow(`${x},16 ${x},154`, own, 0),
      text(x, 168, `${own}, after`, { class: own }),
      el('circle', { cx: x, cy: 26, r: 3, fill: `var(--${own})` }),
      arrow(`${x},26 ${box - 10 * to},50 ${box - 10 * to},76`, own, 0),
      bad
        ? arrow(`${from},143 ${box + 58 * to},143 ${box + 58 * to},92 ${box + 41 * to},92`, 'bad', -to, {
            'stroke-dasharray': '4 3',
          })
        : arrow(`${from},26 ${box + 14 * to},50 ${box + 14 * to},76`, other, 0),
      el('rect', { x: box - 40, y: 76, width: 80, height: 32, rx: 4, fill: 'var(--wash)', stroke: 'var(--exchange)' }),
      text(box, 89, 'attention'),
      text(box, 102, '2,048 wide', { class: 'soft' }),
      arrow(`${box},108 ${box},126 ${x + 7 * to},126`, 'exchange', -to),
      text(x + 34 * to, 121, '× gate', { class: 'soft' }),
      el('circle', { cx: x, cy: 126, r: 7, fill: 'var(--paper)', stroke: `var(--${own})`, 'stroke-width': 1.6 }),
      text(x, 130, '+'),
      text(box - 20 * to, 70, 'q', { class: 'soft' }),
      bad ? null : text(box + 29 * to, 70, 'k, v', { class: 'soft' }),
    ];
  };
  const [video, audio] = [60, 300];
  return el(
    'div',
    { class: 'cross' },
    el(
      'svg',
      { viewBox: '0 0 360 174', role: 'img', 'aria-label': says },
      side('video', 'audio', video, 1, audio, false),
      side('audio', 'video', audio, -1, video, late),
    ),
    el('p', { class: `fine ${late ? 'bad' : 'exchange'}` }, says),
    el(
      'p',
      { class: 'fine' },
      `Both attentions have audio’s heads: 32 of 64 channels, here ${heads} of ${d}. to_q, to_k and to_v bring either stream to that width; to_out leads to the width of the stream that receives.`,
    ),
  );
}

/** Show the parts of the model in their order, and how much of each has changed. */
function showMap() {
  const part = ([id, title]) => {
    const all = run.order.filter((tap) => partOf(tap) === id);
    const moved = all.filter((tap) => run.changed.has(tap)).length;
    return el(
      'button',
      {
        class: `part ${id}`,
        'data-pick': `part-${id}`,
        'data-is': moved ? (state.bug ? 'wrong' : 'moved') : null,
        click: () => $(`band-${id}`).scrollIntoView({ block: 'start' }),
      },
      el('span', {}, id === 'exchange' ? `⇄ ${title} ⇄` : title),
      moved ? el('small', {}, ` ${moved} of ${all.length}`) : null,
    );
  };
  const layers = DATA.configs[state.release].num_layers;
  keepFocus($('map'), [
    el('p', { class: 'streams fine' }, el('b', { class: 'video' }, 'video'), el('b', { class: 'audio' }, 'audio')),
    ...PARTS.map(part),
    el('p', { class: 'times fine' }, `a block: 48 times, here ${layers}`),
  ]);
}

function showBar() {
  const scenes = DATA.scene.filter(({ name }) => entryOf(`${state.release}/${name}`));
  const pick = (name, value, options, change) => {
    const select = el(
      'select',
      { id: `pick-${name}`, change: (event) => change(event.target.value) },
      options.map(([key, label]) => el('option', { value: key, selected: key === value }, label)),
    );
    return el('span', { class: 'group' }, el('label', { for: `pick-${name}` }, name), select);
  };
  const buttons = (name, value, options, change) =>
    el(
      'span',
      { class: 'group', role: 'group', 'aria-label': name },
      el('span', { class: 'name', 'aria-hidden': 'true' }, name),
      options.map((option) =>
        el(
          'button',
          {
            class: 'button',
            'aria-pressed': String(option === value),
            'data-pick': `${name}-${option}`,
            click: () => change(option),
          },
          String(option),
        ),
      ),
    );
  keepFocus($('bar'), [
    buttons('release', state.release, Object.keys(DATA.configs), (release) => set({ ...pristine(), release })),
    pick(
      'case',
      state.scene,
      scenes.map(({ name, label }) => [name, label]),
      (scene) => set({ ...pristine(), scene }),
    ),
    pick(
      'dtype',
      state.dtype,
      ['float32', 'bfloat16', 'float16'].map((x) => [x, x]),
      (dtype) => set({ dtype }),
    ),
    buttons('block', state.block, [0, 1], (block) =>
      set({ block }),
    ),
  ]);
}

/** Replace the children of a node, and give the focus back to the control that had it. */
function keepFocus(node, children) {
  const held = node.contains(document.activeElement) ? document.activeElement : null;
  const key = held && (held.id ? `#${held.id}` : held.dataset.pick ? `[data-pick="${held.dataset.pick}"]` : null);
  node.replaceChildren(...children.filter(Boolean));
  const again = key && node.querySelector(key);
  if (again) again.focus({ preventScroll: true });
}

function showStatus() {
  const first = firstChanged();
  const count = run.changed.size;
  const lost = [...run.changed.keys()].filter((tap) => !run.taps.has(tap)).length;
  const scene = DATA.scene.find(({ name }) => name === state.scene);
  const link = first && el('button', { class: 'button', 'data-pick': 'first', click: () => openTensor(first) }, first);
  const off = (tap) => short(run.changed.get(tap) || 0);
  const ends = `Velocities ${state.bug ? 'are off' : 'move'} by ${off('sample')} (video) and ${off('audio_sample')} (audio), relative L2.`;
  const where = `${caseName()}, ${state.dtype}: `;
  const than = Object.values(run.against).map((x) => `<code>${x}</code>`);
  const verb = state.bug ? 'are wrong' : than.length ? `differ from ${than}, diffusers’ choice` : 'change';
  const none = untouched() ? '' : ' Nothing changes here: the same bits at every tensor.';
  const note = state.note ? el('span', { class: 'fine' }, ` ${state.note}`) : null;
  const undo = untouched()
    ? null
    : el('button', { class: 'button', 'data-pick': 'reset', click: takeBack }, 'Undo');
  $('status').toggleAttribute('data-touched', !untouched());
  if (!count) keepFocus($('status'), [document.createTextNode(`${where}${scene.says}.${none} `), note, undo]);
  else
    keepFocus($('status'), [
      html('span', {}, `${where}<b>${count} of ${run.order.length}</b> tensors ${verb}${lost ? ` (${lost} are missing)` : ''}, first `),
      link,
      document.createTextNode(`. ${ends} `),
      note,
      undo,
      state.bug
        ? el(
            'p',
            { class: 'said' },
            el('b', {}, 'ltx2ref audit: '),
            DATA.bug.find(({ name }) => name === state.bug).sentence,
          )
        : null,
    ]);
}

// ---- The seal ------------------------------------------------------------------------------------------------------

function showSeal() {
  const entry = entryOf(caseName());
  const [whose] = entry.implementation.split(' ');
  const n = run.order.length;
  const good = run.same.length === n;
  const own = !untouched() && !state.bug && !good;
  $('seal').dataset.is = good ? 'good' : own ? 'own' : 'bad';
  const long = !sheet.matches;
  const bits = `${whose}${whose.endsWith('s') ? "'" : "'s"} bits`;
  $('seal').textContent = own
    ? `${n - run.same.length} of ${n} tensors moved${long ? ': your own setting, of which there is no recording' : ''}`
    : long
      ? `${run.same.length} of ${n} tensors have ${bits}`
      : `${run.same.length} of ${n}: ${bits}`;
  $('seal-more').textContent =
    `The seal compares a digest (SHA-256 of all bits) of each tensor of ${caseName()} in ${state.dtype} with what ${entry.implementation} ` +
    `left under exact arithmetic. Computed just now, here: forward ${run.forward.toFixed(0)} ms, digests ${run.hashing.toFixed(0)} ms. Green: the same bits. Red: a bug. Grey: your own setting, of which there is no recording.`;
}

// ---- One tensor ----------------------------------------------------------------------------------------------------

function openTensor(tap) {
  set({ tap, block: blockOf(tap), cell: [0, 0], change: false });
  $('inspector').dataset.open = '';
  document.body.classList.toggle('sheet', sheet.matches);
}

function closeTensor() {
  delete $('inspector').dataset.open;
  document.body.classList.remove('sheet');
  const chip = document.querySelector('.chip[aria-pressed="true"]');
  if (chip) chip.focus();
}

function showInspector() {
  const { tap } = state;
  const said = about(tap);
  const x = tensorOf(tap);
  const moved = run.changed.get(tap);
  const isThere = run.taps.has(tap);
  const entry = entryOf(caseName());
  const batch = entry.inputs.hidden_states.shape[0];
  const shapes = DATA.real[state.release];
  let real = shapes[tap.replace(/^transformer_blocks\.\d+/, 'transformer_blocks.0')];
  const byToken = x.shape[0] > batch; // a noise level for each token gives rows to each token
  if (real && byToken) real = [shapes[isAudio(tap) ? 'audio_proj_in' : 'proj_in'][1], ...real.slice(1)];
  const shape = (s) => `(${s.map(thousands).join(', ')})`;
  const same = run.digests.get(tap) === run.recorded.get(tap);
  const differs = state.change && Number.isFinite(moved);
  const shown = differs ? { ...x, data: x.data.map((v, i) => v - run.before.get(tap).data[i]) } : x;
  const view = viewOf(tap, shown);
  const [row, col] = [Math.min(state.cell[0], view.rows - 1), Math.min(state.cell[1], view.cols - 1)];
  const canvas = el('canvas', { 'aria-hidden': 'true' });
  const marker = el('i', {});
  paint(canvas, view, isAudio(tap));
  canvas.style.height = `${Math.max(28, Math.min(300, Math.round((288 * view.rows) / view.cols)))}px`;
  Object.assign(marker.style, {
    left: `${(100 * col) / view.cols}%`,
    top: `${(100 * row) / view.rows}%`,
    width: `${100 / view.cols}%`,
    height: `${100 / view.rows}%`,
  });
  const go = (r, c) =>
    set({ cell: [Math.max(0, Math.min(view.rows - 1, r)), Math.max(0, Math.min(view.cols - 1, c))] });
  const heat = el(
    'div',
    {
      class: 'heat',
      tabindex: 0,
      role: 'application',
      id: 'heat',
      'aria-label': `${tap}: ${view.rows} rows, ${view.cols} columns. Arrow keys move the cell.`,
      click: (event) => {
        const box = canvas.getBoundingClientRect();
        go(
          Math.floor(((event.clientY - box.top) / box.height) * view.rows),
          Math.floor(((event.clientX - box.left) / box.width) * view.cols),
        );
      },
      keydown: (event) => {
        const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
        if (!step) return;
        event.preventDefault();
        go(row + step[0], col + step[1]);
      },
    },
    canvas,
    marker,
  );
  const at = (r, c) => view.data[view.start + r * view.cols + c];
  const values = Array.from({ length: view.rows * view.cols }, (_, i) => view.data[view.start + i]);
  const size = values.reduce((sum, v) => sum + v * v, 0) / values.length;
  const top = Math.max(0, Math.min(view.rows - 6, row - 2));
  const left = Math.max(0, Math.min(view.cols - 4, col - 1));
  const rowsShown = Array.from({ length: Math.min(6, view.rows) }, (_, i) => top + i);
  const colsShown = Array.from({ length: Math.min(4, view.cols) }, (_, i) => left + i);
  const table = el(
    'table',
    {},
    el(
      'thead',
      {},
      el(
        'tr',
        {},
        el('th', {}, ''),
        colsShown.map((c) => el('th', { scope: 'col' }, String(c))),
      ),
    ),
    el(
      'tbody',
      {},
      rowsShown.map((r) =>
        el(
          'tr',
          {},
          el('th', { scope: 'row' }, String(r)),
          colsShown.map((c) => el('td', { 'data-at': r === row && c === col }, at(r, c).toPrecision(4))),
        ),
      ),
    ),
  );
  const term = (name, ...value) => [el('dt', {}, name), el('dd', {}, ...value)];
  keepFocus($('inspector'), [
    el('button', { class: 'button close', 'data-pick': 'close', click: closeTensor }, 'Close'),
    el('h2', {}, said.title || tap),
    el('p', { class: 'name' }, tap),
    el('div', { class: 'formula' }, said.formula || ''),
    el(
      'dl',
      {},
      term(
        'in code',
        el('code', {}, said.code || ''),
        ' in ',
        said.href ? el('a', { href: said.href }, said.file) : el('code', {}, `ltx2ref/${said.file}`),
      ),
      term('shape', `${shape(x.shape)}  ${said.axes || ''}`),
      real ? term(`in ${state.release}`, `${shape(real)} for 121 frames of 768 x 512`) : [],
      term(
        'bits',
        same ? `those of ${entry.implementation}` : moved ? howMoved(tap) : 'not those recorded',
      ),
    ),
    el(
      'div',
      { class: 'go' },
      batch > 1 && !view.whole
        ? Array.from({ length: batch }, (_, i) =>
            el(
              'button',
              {
                class: 'button',
                'data-pick': `element-${i}`,
                'aria-pressed': String(state.element === i),
                click: () => set({ element: i }),
              },
              `batch ${i}`,
            ),
          )
        : [],
      moved && Number.isFinite(moved)
        ? el(
            'button',
            {
              class: 'button',
              'data-pick': 'change',
              'aria-pressed': String(state.change),
              click: () => set({ change: !state.change }),
            },
            'show the change',
          )
        : null,
    ),
    differs || !isThere
      ? el(
          'p',
          { class: 'shown' },
          differs ? `Shown: the difference from ${state.bug ? 'the right tensor' : 'the tensor before'}` : 'Shown: the right tensor',
        )
      : null,
    heat,
    el(
      'p',
      { class: 'fine', 'aria-live': 'polite' },
      `${place(tap, view, row, col)}: `,
      el('b', {}, String(at(row, col))),
    ),
    table,
    el(
      'p',
      { class: 'fine' },
      `Root mean square ${differs ? 'of the difference ' : ''}${short(Math.sqrt(size))}. The background is 0, ${isAudio(tap) ? 'orange' : 'blue'} is positive, grey negative. Digest of the ${isThere ? '' : 'right '}tensor: ${(run.digests.get(tap) || run.recorded.get(tap)).slice(0, 12)}…`,
    ),
  ]);
}

const ROW_NAMES = {
  time_embed: ['self-attention', 'feed-forward', 'text attention'].flatMap((layer) =>
    ['shift', 'scale', 'gate'].map((kind) => `${kind} of ${layer}`),
  ),
  prompt_adaln: ['shift of the text', 'scale of the text'],
  scale_shift: ['scale, to video', 'shift, to video', 'scale, to audio', 'shift, to audio'],
  gate: ['gate of the exchange'],
};

/** Return in words where a cell is. */
function place(tap, view, row, col) {
  const x = prepared(DATA, { case: caseName() }).x;
  const video = x.hidden_states.shape[1];
  const audio = x.audio_hidden_states.shape[1];
  const { shape } = tensorOf(tap);
  const heads = shape.length === 4 && !tap.endsWith('coords') ? shape[3] : 0;
  let line = `row ${row}`;
  if (tap.endsWith('_coords'))
    return `axis ${'tyx'[row]}, token ${col >> 1}, ${col % 2 ? 'end' : 'start'}, ${row ? 'pixels' : 'seconds'}`;
  if (view.whole) line = `batch element ${row}`;
  else if (view.rows === video)
    line = x.height
      ? `video token ${row} (frame ${Math.floor(row / (x.height * x.width))}, ${Math.floor(row / x.width) % x.height} down, ${row % x.width} across)`
      : `video token ${row}`;
  else if (view.rows === audio) line = `audio token ${row}`;
  else if (/encoder|context|caption|attn2\.(k|norm_k|to_v)$/.test(tap)) line = `word ${row}`;
  else if (tap.endsWith('rows'))
    line =
      ['shift', 'scale', 'gate'][row] &&
      (/_to_/.test(tap) ? ['scale', 'shift', 'gate'] : ['shift', 'scale', 'gate'])[row];
  const kind = /(time_embed|prompt_adaln|scale_shift|gate)\.linear$/.exec(tap);
  if (kind) {
    const dim = run.taps.get(isAudio(tap) ? 'audio_proj_in' : 'proj_in').shape[2];
    return `${line}, ${ROW_NAMES[kind[1]][Math.floor(col / dim)]}, column ${col % dim}`;
  }
  return heads ? `${line}, head ${Math.floor(col / heads)}, ${col % heads}` : `${line}, column ${col}`;
}

// ---- Panels --------------------------------------------------------------------------------------------------------

const PANELS = {
  words: ['Words', panelWords],
  releases: ['Releases', panelReleases],
  noise: ['Noise levels', panelNoise],
  clock: ['Clock', panelClock],
  rotation: ['Rotation', panelRotation],
  bugs: ['Bugs', panelBugs],
  conventions: ['Conventions', panelConventions],
  depth: ['Depth', panelDepth],
};

function showPanel() {
  const names = Object.keys(PANELS);
  $('instrument').toggleAttribute('data-folded', state.folded);
  keepFocus(
    $('tabs'),
    names.map((name, i) =>
      el(
        'button',
        {
          role: 'tab',
          id: `tab-${name}`,
          'aria-selected': String(name === state.panel),
          'aria-controls': 'panel',
          'aria-expanded': name === state.panel && !wide.matches ? String(!state.folded) : null,
          tabindex: name === state.panel ? 0 : -1,
          click: () => set({ panel: name, folded: !wide.matches && name === state.panel && !state.folded }),
          keydown: (event) => {
            const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
            if (!by) return;
            set({ panel: names[(i + by + names.length) % names.length], folded: false });
            $(`tab-${state.panel}`).focus();
          },
        },
        PANELS[name][0],
      ),
    ),
  );
  $('panel').setAttribute('aria-labelledby', `tab-${state.panel}`);
  keepFocus($('panel'), PANELS[state.panel][1]().flat());
}

function panelWords() {
  return [
    el(
      'dl',
      { class: 'words' },
      DATA.word.flatMap(({ name, says }) => [el('dt', {}, name), html('dd', {}, says)]),
    ),
  ];
}

function panelReleases() {
  return [
    ...DATA.release.map(({ name, says }) =>
      el(
        'div',
        {},
        el(
          'div',
          { class: 'go' },
          el(
            'button',
            {
              class: 'button',
              'data-pick': `panel-${name}`,
              'aria-pressed': String(state.release === name),
              click: () => set({ ...pristine(), release: name }),
            },
            `Release ${name}`,
          ),
        ),
        html('p', {}, says),
      ),
    ),
    el('p', { class: 'fine' }, 'What the chosen release has, or changed, has a violet frame in the model.'),
  ];
}

const slider = (id, label, kind, value, min, max, step, change, more = '') =>
  el(
    'div',
    { class: 'slider' },
    el('label', { for: id }, el('span', { class: kind }, label)),
    el('output', { for: id }, String(value)),
    el('input', {
      type: 'range',
      id,
      class: kind,
      min,
      max,
      step,
      value,
      input: (event) => change(Number(event.target.value)),
    }),
    more ? el('span', { class: 'fine' }, more) : null,
  );

function panelNoise() {
  const { model, x } = prepared(DATA, { ...settingOf(), bug: '' });
  const value = (name) => {
    const level = x[name];
    const n = level.data.length / level.shape[0];
    return Math.max(...level.data.slice(0, n));
  };
  const [byOwn, byOther] = {
    own: [', its part of the exchange', ''],
    other: ['', '$’s part of the exchange'],
    other_gate: [', its rows of the exchange', '$’s gate of the exchange'],
  }[model.exchangeMode(x.use_cross_timestep)];
  const bySigma = (name, other) => {
    const prompt = run.order.includes('prompt_adaln.linear') ? `the prompt as ${name} reads it` : '';
    const driven = [prompt, byOther.replace('$', other)].filter(Boolean).join(', and ');
    return driven ? `drives ${driven}` : `not used in ${state.release}, unless use_cross_timestep is on`;
  };
  const says = {
    timestep: `drives what video does by itself${byOwn}, and its output`,
    sigma: bySigma('video', 'audio'),
    audio_timestep: `drives what audio does by itself${byOwn}, and its output`,
    audio_sigma: bySigma('audio', 'video'),
  };
  const known = LEVELS.filter((name) => x[name]);
  return [
    ...known.map((name) =>
      slider(
        `level-${name}`,
        name.startsWith('audio') ? name.replace('_', ' ') : `video ${name}`,
        name.startsWith('audio') ? 'audio' : 'video',
        value(name),
        0,
        1000,
        0.25,
        (level) => later(() => set({ levels: { ...state.levels, [name]: level } })),
        says[name],
      ),
    ),
    el(
      'label',
      { class: 'check' },
      el('input', {
        type: 'checkbox',
        id: 'cross',
        checked: Boolean(x.use_cross_timestep),
        change: (event) => set({ cross: event.target.checked }),
      }),
      el(
        'span',
        {},
        el('code', {}, 'use_cross_timestep'),
        ': the exchange follows the other stream’s sigma in place of its own timestep',
      ),
    ),
    el(
      'p',
      { class: 'fine' },
      'The sliders set the first element of the batch. In image to video, given tokens stay at 0.',
    ),
    el(
      'div',
      { class: 'go' },
      entryOf(`${state.release}/i2v`)
        ? el(
            'button',
            {
              class: 'button',
              'data-pick': 'i2v',
              'aria-pressed': String(state.scene === 'i2v'),
              click: () =>
                set({ ...pristine(), scene: state.scene === 'i2v' ? 't2v' : 'i2v', tap: 'time_embed.linear' }),
            },
            'An image is given',
          )
        : null,
    ),
  ];
}

let waiting = null; // the newest of several changes between two frames
function later(change) {
  if (!waiting)
    requestAnimationFrame(() => {
      const now = waiting;
      waiting = null;
      now();
    });
  waiting = change;
}

/** Return the distinct [start, end] of a stream's tokens on the time axis. */
function spans(tap) {
  const x = run.taps.get(tap);
  const T = x.shape[2];
  const found = [];
  for (let t = 0; t < T; t++) {
    const pair = [x.data[2 * t], x.data[2 * t + 1]];
    if (!found.length || found[found.length - 1][0] !== pair[0]) found.push(pair);
  }
  return found;
}

function panelClock() {
  const video = spans('video_coords');
  const audio = spans('audio_coords');
  const end = Math.max(video.at(-1)[1], audio.at(-1)[1]);
  const width = 340;
  const x = (s) => 6 + (s / end) * (width - 12);
  const now = Math.min(state.time, end);
  const lane = (list, y, kind, label) => [
    el('text', { x: 6, y: y - 5, class: 'soft' }, label),
    list.map(([a, b], i) =>
      el('rect', {
        x: x(a),
        y,
        width: Math.max(0.8, x(b) - x(a) - 0.8),
        height: 22,
        fill: `var(--${kind})`,
        'fill-opacity': covers(list, i) ? 1 : 0.28,
      }),
    ),
    list.map(([a, b]) =>
      el('line', { x1: x((a + b) / 2), x2: x((a + b) / 2), y1: y + 22, y2: y + 27, stroke: `var(--${kind})` }),
    ),
  ];
  const covers = (list, i) => list[i][0] <= now && (now < list[i][1] || (i === list.length - 1 && now === list[i][1]));
  const step = [0.1, 0.2, 0.5, 1].find((apart) => (apart / end) * width > 44) || 2; // units: a label is some 30 wide
  const ticks = Array.from({ length: Math.floor(end / step + 1e-9) + 1 }, (_, i) => i * step);
  const at = (list) => list.findIndex((_, i) => covers(list, i));
  const v = at(video);
  const a = at(audio);
  const said = (list, i, name, none) =>
    i < 0
      ? none
      : `${name} ${i}, from ${list[i][0].toFixed(2)} to ${list[i][1].toFixed(2)} s, position ${((list[i][0] + list[i][1]) / 2).toFixed(3)} s`;
  const fps = prepared(DATA, settingOf()).x.fps || 24;
  return [
    el(
      'svg',
      {
        viewBox: `0 0 ${width} 128`,
        role: 'img',
        'aria-label': 'Video frames and audio tokens on one axis of seconds',
      },
      lane(video, 18, 'video', `video: ${video.length} frame groups`),
      lane(audio, 70, 'audio', `audio: ${audio.length} tokens, 25 a second`),
      ticks.map((s) =>
        el(
          'text',
          { x: x(s), y: 118, class: 'soft', 'text-anchor': s ? 'middle' : 'start' },
          s ? `${+s.toFixed(1)} s` : '0',
        ),
      ),
      [18, 70].map((y) =>
        el('line', { x1: x(now), x2: x(now), y1: y, y2: y + 27, stroke: 'var(--exchange)', 'stroke-width': 2 }),
      ),
    ),
    slider('time', 'time', 'exchange', +now.toFixed(2), 0, Math.ceil(end * 100 - 1e-3) / 100, 0.01, (time) => later(() => set({ time }))),
    el(
      'p',
      { class: 'fine', 'aria-live': 'polite' },
      `At ${now.toFixed(2)} s: ${said(video, v, 'video tokens of frame group', 'no video')}; ${said(audio, a, 'audio token', 'no audio')}.`,
    ),
    slider(
      'fps',
      'frames a second',
      'video',
      fps,
      8,
      60,
      1,
      (value) => later(() => set({ fps: value })),
      'moves video’s seconds, and not audio’s',
    ),
    el(
      'div',
      { class: 'go' },
      entryOf(`${state.release}/121-frames`)
        ? el(
            'button',
            {
              class: 'button',
              'data-pick': 'long',
              'aria-pressed': String(state.scene === '121-frames'),
              click: () =>
                set({ ...pristine(), scene: state.scene === '121-frames' ? 't2v' : '121-frames', tap: 'video_coords' }),
            },
            '121 frames',
          )
        : null,
    ),
    el(
      'p',
      { class: 'fine' },
      'Ticks under the bars are positions: the middle of each token. They are divided by 20 seconds, whatever the length of the clip.',
    ),
  ];
}

function panelRotation() {
  const T = run.taps.get('rope.cos').shape[1];
  const Ta = run.taps.get('audio_rope.cos').shape[1];
  const token = Math.min(state.token, T - 1);
  const place = run.taps.get('video_coords');
  const heard = run.taps.get('audio_coords');
  const middle = (x, count, t, axis) => (x.data[2 * (axis * count + t)] + x.data[2 * (axis * count + t) + 1]) / 2;
  const seconds = middle(place, T, token, 0);
  const away = Array.from({ length: Ta }, (_, t) => Math.abs(middle(heard, Ta, t, 0) - seconds));
  const audioToken = away.indexOf(Math.min(...away));
  const dials = (name, kind, t, axes) => {
    const cos = run.taps.get(`${name}.cos`);
    const sin = run.taps.get(`${name}.sin`);
    const [, , heads, R] = cos.shape;
    const planes = heads * R;
    const n = Math.floor(planes / axes.length);
    const pad = planes - n * axes.length;
    const size = 36;
    return el(
      'svg',
      {
        viewBox: `0 0 ${7 * size + 50} ${heads * 52 + 2}`,
        width: 7 * size + 50,
        role: 'img',
        'aria-label': `${name}: ${heads} heads of ${R} planes`,
      },
      Array.from({ length: heads }, (_, h) => [
        el('text', { x: 0, y: h * 52 + 21, class: 'soft' }, `head ${h}`),
        Array.from({ length: R }, (_, r) => {
          const i = (t * heads + h) * R + r;
          const j = h * R + r - pad;
          const x = 62 + r * size;
          const y = h * 52 + 17;
          const label = j < 0 ? '·' : axes[j % axes.length];
          return [
            el('circle', { cx: x, cy: y, r: 15, fill: 'none', stroke: 'var(--line)' }),
            el('line', {
              x1: x,
              y1: y,
              x2: x + 15 * cos.data[i],
              y2: y - 15 * sin.data[i],
              stroke: `var(--${kind})`,
              'stroke-width': 2,
            }),
            el('text', { x, y: y + 28, 'text-anchor': 'middle', class: 'soft' }, label),
          ];
        }),
      ]),
    );
  };
  return [
    slider('token', 'token', '', token, 0, T - 1, 1, (value) => later(() => set({ token: value }))),
    el(
      'p',
      { class: 'fine' },
      `Video token ${token}: ${seconds.toFixed(3)} s, ${middle(place, T, token, 1)} px down, ${middle(place, T, token, 2)} px across. The nearest audio token, ${audioToken}: ${middle(heard, Ta, audioToken, 0).toFixed(3)} s.`,
    ),
    el('h3', { class: 'video', style: 'font-size: 14px' }, 'video, self-attention'),
    dials('rope', 'video', token, ['t', 'y', 'x']),
    el('h3', { class: 'audio', style: 'font-size: 14px' }, 'audio, self-attention'),
    dials('audio_rope', 'audio', audioToken, ['t']),
    el('h3', { class: 'exchange', style: 'font-size: 14px' }, 'the exchange: video, then audio, by time'),
    dials('cross_attn_rope', 'video', token, ['t']),
    dials('cross_attn_audio_rope', 'audio', audioToken, ['t']),
    el(
      'p',
      { class: 'fine' },
      'Each hand is one plane’s angle. t, y and x are the axes of time, height and width; · is a plane that is left over. Angles are u f: u is the position, scaled to -1 to 1, and f grows from π/2 in the first plane to 10,000 π/2 in the last one.',
    ),
  ];
}

const opened = new Set([DATA.bug[0].place]); // groups of bugs

function panelBugs() {
  const button = (bug) => {
    const isIn = state.bug === bug.name;
    return el(
      'div',
      { class: 'bug', 'data-in': isIn },
      el(
        'button',
        {
          'aria-pressed': String(isIn),
          'data-pick': `bug-${bug.name}`,
          click: () => (isIn ? takeBack() : putIn(bug)),
        },
        bug.says,
        el('code', {}, bug.name),
      ),
    );
  };
  const group = (place) => {
    const bugs = DATA.bug.filter((bug) => bug.place === place);
    const open = opened.has(place) || bugs.some(({ name }) => name === state.bug);
    const toggle = (event) => opened[event.target.open ? 'add' : 'delete'](place);
    return el(
      'details',
      { open, toggle },
      el('summary', { 'data-pick': `place-${place}` }, `${place} `, el('small', {}, String(bugs.length))),
      bugs.map(button),
    );
  };
  return [
    html(
      'p',
      { class: 'fine' },
      'Each was found in a port. Put one in, and what <code>ltx2ref audit --arithmetic exact</code> says about such a port stands above the model. Press again to take it out.',
    ),
    ...[...new Set(DATA.bug.map(({ place }) => place))].map(group),
  ];
}

/** Choose a convention, in a case where it makes a difference. */
function choose({ name, shows, dtype }, value) {
  const [release, scene] = shows.split('/');
  const isHere = caseName() === shows && state.dtype === dtype;
  const own = entryOf(caseName()).conventions[name];
  const { [name]: _, ...others } = state.conventions;
  if (isHere && value === own && value === DATA.diffusers[name]) set({ conventions: others });
  else if (isHere) set({ conventions: { ...others, [name]: value } });
  else if (value === conventionsNow()[name]) set({ note: `${name}=${value} is what ${caseName()} has; choose another.` });
  else set({ ...pristine(), release, scene, dtype, conventions: { [name]: value } });
}

function panelConventions() {
  const now = conventionsNow();
  return [
    el(
      'p',
      { class: 'fine' },
      `Implementations differ in six places. Marked is what ${caseName()} was recorded with, by ${entryOf(caseName()).implementation}, and what you choose. A choice goes to a case where it shows; the line above the model says what changes first.`,
    ),
    ...DATA.convention.map(({ name, says, values, case: shows, dtype }) =>
      el(
        'fieldset',
        {},
        el('legend', {}, el('code', {}, name)),
        el('p', { class: 'fine' }, says),
        values.map((value) =>
          el(
            'label',
            { class: 'choice' },
            el('input', {
              type: 'radio',
              name,
              id: `${name}-${value.name}`,
              checked: now[name] === value.name,
              click: () => choose({ name, shows, dtype }, value.name),
            }),
            el('span', {}, el('code', {}, value.name), ` ${value.who}`),
          ),
        ),
      ),
    ),
  ];
}

// ---- Depth: an error of one bit over 48 blocks ---------------------------------------------------------------------

const DEPTH = 48;
const depth = { running: false, lines: {} };

/** Return arguments of one batch element. */
function single(x) {
  return Object.fromEntries(
    Object.entries(x).map(([name, value]) => {
      if (!value || !value.shape) return [name, value];
      const [batch, ...rest] = value.shape;
      return [name, { ...value, shape: [1, ...rest], data: value.data.slice(0, value.data.length / batch) }];
    }),
  );
}

/** Return latents whose first number is moved by one unit in the last place of a dtype. */
function nudged(latents, dtype) {
  const data = latents.data.slice();
  const view = new DataView(new ArrayBuffer(4));
  view.setFloat32(0, data[0]);
  view.setUint32(0, view.getUint32(0) + (dtype === 'float32' ? 1 : 0x10000));
  data[0] = view.getFloat32(0);
  return { ...latents, data };
}

/** Yield for each block how far both streams are from those of a model whose input differs in one bit. */
function* growth(dtype, layers = DEPTH) {
  const runs = [false, true].map((moved) => {
    const { model, x } = prepared(DATA, { case: '2.3/t2v', dtype, layers });
    const one = single(x);
    if (moved) one.hidden_states = nudged(one.hidden_states, dtype);
    const conditioning = model.streams.map((s, k) => model.enter(s, model.given(s, model.streams[1 - k], one)));
    return { model, conditioning, xs: conditioning.map((c) => c.x) };
  });
  for (let i = 0; i < layers; i++) {
    for (const each of runs) each.xs = each.model.block(i, each.conditioning, each.xs);
    yield [0, 1].map((k) => distance(runs[1].xs[k], runs[0].xs[k]));
  }
}

function runDepth() {
  if (depth.running) return;
  depth.running = true;
  const todo = ['float32', 'bfloat16'].map((dtype) => [dtype, growth(dtype)]);
  depth.lines = { float32: [], bfloat16: [] };
  const work = () => {
    const until = performance.now() + 30;
    while (todo.length && performance.now() < until) {
      const { value, done } = todo[0][1].next();
      if (done) todo.shift();
      else depth.lines[todo[0][0]].push(value);
    }
    if (state.panel === 'depth') showPanel();
    if (todo.length) setTimeout(work);
    else {
      depth.running = false;
      depth.done = true;
    }
  };
  work();
}

function panelDepth() {
  if (!depth.done && !depth.running) setTimeout(runDepth);
  const width = 340;
  const height = 230;
  const x = (i) => 62 + (i / DEPTH) * (width - 72);
  const y = (e) => 30 + Math.min(1, Math.max(0, -Math.log10(e || 1e-8) / 8)) * (height - 62);
  const line = (dtype, k) => {
    const found = depth.lines[dtype] || [];
    const seen = found.map((e, i) => [x(i + 1), y(e[k])].map((v) => v.toFixed(1)).join(',')).join(' ');
    return el('polyline', {
      points: seen,
      fill: 'none',
      stroke: `var(--${k ? 'audio' : 'video'})`,
      'stroke-width': 2,
      'stroke-dasharray': dtype === 'float32' ? '1 3' : null,
      'stroke-linecap': 'round',
    });
  };
  const after = (dtype) => {
    const found = depth.lines[dtype] || [];
    const ends = (found.at(-1) || []).map((e) => `${short(100 * e)} %`).join(' and ');
    return found.length < DEPTH ? `${dtype} is being computed` : `in ${dtype} after ${DEPTH} blocks ${ends}`;
  };
  const name = (dtype) => {
    const [place] = (depth.lines[dtype] || []).slice(30);
    return place && el('text', { x: x(31), y: y(Math.max(...place)) - 9, 'text-anchor': 'middle' }, dtype);
  };
  return [
    el(
      'p',
      {},
      'One number of the video latents is moved by one unit in the last place. This is how far each stream then is from what it was without that, after each of 48 blocks, computed now.',
    ),
    el(
      'svg',
      {
        viewBox: `0 0 ${width} ${height}`,
        role: 'img',
        'aria-label': 'Distance by block, in percent of the stream, for both streams in float32 and bfloat16',
      },
      el('text', { x: 0, y: 12, class: 'soft' }, 'distance, in percent of the stream’s own norm'),
      ['100 %', '1 %', '0.01 %', '1e-4 %', '1e-6 %'].map((label, i) => [
        el('line', { x1: 62, x2: width - 10, y1: y(100 ** -i), y2: y(100 ** -i), stroke: 'var(--line)' }),
        el('text', { x: 56, y: y(100 ** -i) + 4, 'text-anchor': 'end', class: 'soft' }, label),
      ]),
      [1, 12, 24, 36, 48].map((i) =>
        el('text', { x: x(i), y: height - 14, 'text-anchor': 'middle', class: 'soft' }, String(i)),
      ),
      el('text', { x: x(24), y: height - 1, 'text-anchor': 'middle', class: 'soft' }, 'after block'),
      ['float32', 'bfloat16'].flatMap((dtype) => [line(dtype, 0), line(dtype, 1), name(dtype)]).filter(Boolean),
    ),
    el(
      'p',
      { class: 'legend' },
      html('span', {}, '<b class="video">video</b>'),
      html('span', {}, '<b class="audio">audio</b>'),
      el('span', {}, '— bfloat16'),
      el('span', {}, '··· float32'),
    ),
    el(
      'p',
      { class: 'fine', 'aria-live': 'off' },
      `Video and audio: ${after('float32')}; ${after('bfloat16')} (relative L2).`,
    ),
    el(
      'p',
      { class: 'fine' },
      'In this narrow model with random weights, one bit of one number moves the whole bfloat16 result by a few percent of its size (a trained model has another figure). Two right implementations that only add in another order are that far apart, a tolerance on the output has to be wider, and small bugs fit into it. So tensors are compared one by one, and best of all by their bits.',
    ),
  ];
}

// ---- The guided path -----------------------------------------------------------------------------------------------

function goTo(i) {
  set(ofStep(DATA.step[i]));
  $('step').focus({ preventScroll: true });
  $('story').scrollTop = 0;
  arrive();
}

/** Scroll to the section of a step. On a narrow screen its text stands right above that. */
function arrive(behavior = 'auto') {
  const { band: name } = DATA.step.find(({ id }) => id === state.step) || {};
  if (name && wide.matches) $(`band-${name}`).scrollIntoView({ block: 'start', behavior });
  else if (wide.matches) scrollTo({ top: 0, behavior });
  else $('story').scrollIntoView({ block: 'start', behavior });
}

let told = '';
function showStory() {
  const i = DATA.step.findIndex(({ id }) => id === state.step);
  const step = DATA.step[i];
  const key = state.step + (state.bug === (step.try || {}).bug);
  if (key === told) return;
  told = key;
  keepFocus(
    $('steps'),
    DATA.step.map((each, k) =>
      el(
        'li',
        {},
        el(
          'button',
          {
            'aria-current': k === i ? 'step' : null,
            'aria-label': `Step ${k + 1}: ${each.title}`,
            'data-pick': `step-${k}`,
            title: each.title,
            click: () => goTo(k),
          },
          String(k + 1),
        ),
      ),
    ),
  );
  const trial = step.try;
  const isIn = trial && state.bug === trial.bug;
  keepFocus($('step'), [
    el('p', { class: 'fine' }, `Step ${i + 1} of ${DATA.step.length}`),
    el('h2', {}, step.title),
    html('p', {}, step.text),
    el(
      'div',
      { class: 'go' },
      trial
        ? el(
            'button',
            {
              class: 'button bad',
              'data-pick': 'try',
              click: () => {
                if (isIn) takeBack();
                else putIn(DATA.bug.find(({ name }) => name === trial.bug), { panel: 'bugs' });
                $('story').scrollTop = 0;
              },
            },
            isIn ? 'Take the bug out' : trial.label,
          )
        : null,
      i + 1 < DATA.step.length
        ? el(
            'button',
            { class: 'button main', 'data-pick': 'next', click: () => goTo(i + 1) },
            `Next: ${DATA.step[i + 1].title}`,
          )
        : null,
      i ? el('button', { class: 'button', 'data-pick': 'back', click: () => goTo(i - 1) }, 'Back') : null,
    ),
  ]);
}

// ---- All of it -----------------------------------------------------------------------------------------------------

function show() {
  showStory();
  showBar();
  showStatus();
  showMachine();
  showMap();
  showSeal();
  showInspector();
  showPanel();
  const stuck = [document.querySelector('.top'), ...['head', 'status'].map($)].filter(
    (node) => getComputedStyle(node).position === 'sticky',
  );
  const under = stuck.reduce((sum, node) => sum + node.offsetHeight, 0);
  document.documentElement.style.setProperty('--under', `${under}px`);
}

function start() {
  Object.assign(state, readAddress());
  compute();
  if (state.bug && !/[#&]tap=/.test(location.hash)) showFirst();
  if (!tensorOf(state.tap)) state.tap = 'proj_in';
  show();
  if (location.hash) arrive('instant');
  if (state.bug) reveal(state.tap);
}

addEventListener('hashchange', start);
wide.addEventListener('change', show);
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => {
  palette = null;
  show();
});
addEventListener('keydown', (event) => {
  if (event.key === 'Escape' && 'open' in $('inspector').dataset) closeTensor();
});
$('seal').addEventListener('click', () => {
  $('seal').dataset.is = 'busy';
  $('seal').textContent = 'Computing again…';
  setTimeout(() => {
    compute();
    show();
    $('seal').append(`, again, in ${(run.forward + run.hashing).toFixed(0)} ms`);
  }, 100);
});
start();
document.documentElement.dataset.ready = performance.now().toFixed(0); // milliseconds to the first result
