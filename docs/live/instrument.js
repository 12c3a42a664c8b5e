'use strict';
/* What the page can be set to, and the forward pass of a setting. A setting is
 *
 *     { case, dtype, bug, conventions, levels: { timestep, audio_timestep, sigma, audio_sigma }, cross, fps }
 *
 * of which everything but the case may be absent. `data` is what scripts/make_live.py embeds.
 */

const parts =
  typeof LTX2 === 'undefined'
    ? { ...require('./ltx2.js'), ...require('./bugs.js') }
    : { LTX2, DIFFUSERS, tensor, uniform, generated, digest, tapDtype, BUGS };

const weights = new Map(); // generated once for each name, shape and seed
function cached(seed) {
  const draw = parts.generated(seed);
  return (name, shape) => {
    const key = `${seed} ${name} ${shape}`;
    if (!weights.has(key)) weights.set(key, draw(name, shape));
    return weights.get(key);
  };
}

/** Return the arguments of a recorded case. Numbers are drawn by the generator, or stand in the data. */
function argumentsOf(data, name) {
  const found = {};
  for (const [key, x] of Object.entries(data.cases[name].inputs)) {
    if (x === null || typeof x !== 'object' || Array.isArray(x)) found[key] = x;
    else {
      const count = x.shape.reduce((a, b) => a * b, 1);
      const numbers = x.draw ? parts.uniform(x.draw, count, Math.sqrt(3), data.seed) : Float64Array.from(x.values);
      if (x.halved)
        numbers.forEach((u, i) => {
          numbers[i] = Math.min(1, Math.max(0, Math.fround(u * 0.5 + 0.5)));
        });
      found[key] = { ...parts.tensor(x.shape, numbers), bool: x.bool };
    }
  }
  return found;
}

/** Return noise levels of which the first batch element's are set; given tokens keep their share of it. */
function withLevel(levels, sigma, value) {
  const n = levels.data.length / levels.shape[0];
  const data = levels.data.slice();
  for (let i = 0; i < n; i++) data[i] = Math.fround((n === 1 ? 1 : data[i] / sigma.data[0]) * value);
  return { ...levels, data };
}

/** Return the model of a setting, and its arguments. */
function prepared(data, setting) {
  const { dtype = 'float32', levels = {}, layers } = setting;
  const entry = data.cases[setting.case];
  const bug = parts.BUGS[setting.bug] || {};
  const more = layers ? { num_layers: layers } : {};
  const config = { ...data.configs[entry.release], ...entry.change, ...more, ...bug.config };
  const model = new parts.LTX2(config, dtype, cached(data.seed), { ...entry.conventions, ...setting.conventions });
  const x = argumentsOf(data, setting.case);
  const sigma = { timestep: x.sigma, audio_timestep: x.audio_sigma };
  for (const [key, value] of Object.entries(levels)) x[key] = withLevel(x[key], sigma[key] || x[key], value);
  if (setting.cross !== undefined) x.use_cross_timestep = setting.cross;
  if (setting.fps) x.fps = setting.fps;
  Object.assign(model, bug.model);
  for (const key of Object.keys(x)) {
    if (key.endsWith('hidden_states')) x[key] = { ...x[key], data: x[key].data.map(model.r) };
  }
  return { model, x: { ...x, ...(bug.inputs ? bug.inputs(x) : {}) } };
}

/** Run a setting, and return every tap by name, in the order of the computation. */
function computed(data, setting) {
  const { model, x } = prepared(data, setting);
  const taps = new Map();
  model.forward(x, (name, value) => taps.set(name, value));
  return taps;
}

/** Return the digest of each tap. */
function digestsOf(taps, dtype = 'float32', conventions = parts.DIFFUSERS) {
  return new Map([...taps].map(([name, x]) => [name, parts.digest(x, parts.tapDtype(name, dtype, conventions))]));
}

if (typeof module !== 'undefined') module.exports = { prepared, computed, digestsOf };
