'use strict';
/* Run docs/live/ltx2.js on the conformance kit, at its exact level, under Node.js 18 or later, without packages.
 *
 *     ltx2ref kit export kit
 *     node scripts/js_port.js kit results
 *     ltx2ref kit check results --level exact
 *
 * A component is given what diffusers had at that point; a model is run as a whole.
 */

const fs = require('fs');
const path = require('path');
const { LTX2, tensor, reshape, digest, tapDtype } = require('../docs/live/ltx2.js');

// ---- safetensors ---------------------------------------------------------------------------------------------------

const READ = {
  F32: (view, at) => view.getFloat32(at, true),
  F64: (view, at) => view.getFloat64(at, true),
  I64: (view, at) => Number(view.getBigInt64(at, true)),
  BOOL: (view, at) => view.getUint8(at),
  U16: (view, at) => asFloat32(view.getUint16(at, true)), // the bits of a bfloat16
  F16: (view, at) => asFloat16(view.getUint16(at, true)),
};
const SIZE = { F32: 4, F64: 8, I64: 8, BOOL: 1, U16: 2, F16: 2 };
const scratch = new DataView(new ArrayBuffer(4));

function asFloat32(upper) {
  scratch.setUint32(0, upper * 0x10000);
  return scratch.getFloat32(0);
}

function asFloat16(half) {
  const exponent = (half >> 10) & 31;
  const fraction = half & 1023;
  const sign = half & 0x8000 ? -1 : 1;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? (1024 + fraction) * 2 ** (exponent - 25) : fraction * 2 ** -24);
}

function load(file) {
  const raw = fs.readFileSync(file);
  const start = 8 + Number(raw.readBigUInt64LE());
  const found = {};
  const view = new DataView(raw.buffer, raw.byteOffset + start);
  for (const [
    name,
    {
      dtype,
      shape,
      data_offsets: [from, to],
    },
  ] of Object.entries(JSON.parse(raw.subarray(8, start)))) {
    if (name === '__metadata__') continue;
    const data = Float64Array.from({ length: (to - from) / SIZE[dtype] }, (_, i) =>
      READ[dtype](view, from + i * SIZE[dtype]),
    );
    found[name] = { ...tensor(shape, data), bool: dtype === 'BOOL' };
  }
  return found;
}

function save(file, tensors) {
  const header = {};
  const parts = [];
  let at = 0;
  for (const [name, { shape, data }] of tensors) {
    header[name] = { dtype: 'F32', shape, data_offsets: [at, (at += 4 * data.length)] };
    parts.push(Buffer.from(Float32Array.from(data).buffer));
  }
  let text = JSON.stringify(header);
  text += ' '.repeat(-Buffer.byteLength(text) & 7);
  const size = Buffer.alloc(8);
  size.writeBigUInt64LE(BigInt(Buffer.byteLength(text)));
  fs.mkdirSync(path.dirname(file), { recursive: true });
  fs.writeFileSync(file, Buffer.concat([size, Buffer.from(text), ...parts]));
}

// ---- the kit -------------------------------------------------------------------------------------------------------

/** Return what the kit gives an exchange or a block for a stream, as `enter` would. */
function conditioning(model, s, x) {
  const batch = x['rope.cos'].shape[0];
  const rope = (at) => [x[`${at}.cos`], x[`${at}.sin`]];
  const offsets = (layer) => {
    const found = x[`${layer}.linear`];
    return found && reshape(found, batch, found.shape[0] / batch, found.shape[1]);
  };
  return {
    text: x[`${s.prefix}encoder_hidden_states`],
    offsets: offsets(`${s.prefix}time_embed`),
    rope: rope(s.rope),
    exchangeRope: rope(s.exchangeRope),
    textOffsets: offsets(`${s.prefix}prompt_adaln`),
    textMask: model.textMask(x[`${s.prefix}encoder_attention_mask`]),
    exchangeOffsets: offsets(s.exchangeEmbed),
    exchangeGateOffset: offsets(s.gateEmbed),
  };
}

const OPERATIONS = {
  model: (m, x, { arguments: more }) => {
    m.forward({ ...x, ...more }, m.tap);
  },
  positions: (m, x, { module, arguments: given }) => {
    const s = m.streams.find(({ name }) => `${name}_coords` === module);
    m.coordinates(s, given, given.batch);
  },
  rope: (m, x) => {
    for (const s of m.streams) if (x[`${s.name}_coords`]) m.ropes(s, x[`${s.name}_coords`]);
  },
  sinusoid: (m, x, { module }) => {
    const phases = m.sinusoid(x.timestep);
    m.tap(`${module}.sinusoid`, reshape(phases, phases.data.length / 256, 256));
  },
  'timestep embedding': (m, x, { module }) => {
    const dim = m.known[`${module}.emb.timestep_embedder.linear_1.bias`].shape[0];
    m.timestepEmbedding(module, x[`${module}.sinusoid`], dim, m.known[`${module}.linear.bias`].shape[0] / dim);
  },
  rows: (m, x, { module, arguments: { sources } }) => {
    m.tapRows(
      module,
      ...sources.flatMap(({ table, offsets, rows: [from, to], offset_rows: [first] }) => {
        const learned = m.known[table];
        return m.rows(m.parameter(table, ...learned.shape), from, to - from, x[offsets], first);
      }),
    );
  },
  rotation: (m, x, { module, inputs }) => {
    const [vectors, cos, sin] = inputs.map((name) => x[name]);
    const shape = cos.shape.slice(0, 3);
    m.tap(module, m.applyRope(reshape(vectors, ...shape, vectors.shape[2] / shape[2]), [cos, sin]));
  },
  attention: (m, x, { module, arguments: given }) => {
    const input = x[`${module}.input`];
    const s = m.streams[Number(module.includes('audio'))];
    const mask = x[given.mask];
    const inner = m.known[`${module}.to_q.bias`].shape[0];
    const ropes = given.ropes.map((at) => at && [x[`${at}.cos`], x[`${at}.sin`]]);
    m.attention(module, input, x[`${module}.context`] || input, {
      heads: s.heads,
      headDim: inner / s.heads,
      gated: `${module}.to_gate_logits.bias` in m.known,
      ropes: ropes[0] && ropes,
      keep: x.perturbation_mask,
      mask: given.mask === 'video_self_attention_mask' ? m.selfMask(mask) : m.textMask(mask),
    });
  },
  'feed-forward': (m, x, { module }) => {
    const s = m.streams[Number(module.includes('audio'))];
    m.feedForward(module, x[`${module}.input`], s);
  },
  'text projection': (m, x, { module }) => {
    const s = m.streams[Number(module.startsWith('audio'))];
    m.textProjection(s, x[`${s.prefix}encoder_hidden_states`]);
  },
  tokens: (m, x, { module }) => {
    const moved = m.tokens(m.streams[0], { latent: x.hidden_states, keyframes: x.video_keyframes_mask });
    m.tap(module, moved);
  },
  exchange: (m, x, { module }) => {
    const cs = m.streams.map((s) => conditioning(m, s, x));
    const xs = m.streams.map((s) => x[`${module}${s.exchangeAttn}.stream`]);
    m.exchange(module, cs, xs).forEach((y, k) => m.tap(`${module}${m.streams[k].prefix}ff.stream`, y));
  },
  block: (m, x, { arguments: { block } }) => {
    const cs = m.streams.map((s) => conditioning(m, s, x));
    const xs = m.streams.map((s) => x[`transformer_blocks.${block - 1}.${s.name}`]);
    m.block(block, cs, xs, { keep: x.perturbation_mask });
  },
  output: (m, x, { module, inputs }) => {
    const s = m.streams[Number(module.startsWith('audio'))];
    const [stream, embedding] = inputs.map((name) => x[name]);
    const batch = stream.shape[0];
    m.leave(s, stream, reshape(embedding, batch, embedding.shape[0] / batch, s.dim));
  },
};

/** Compute a case in a dtype, and return its taps. */
function compute(entry, file, dtype) {
  const under = (folder) =>
    Object.fromEntries(
      Object.keys(file)
        .filter((name) => name.startsWith(folder))
        .map((name) => [name.slice(folder.length), file[name]]),
    );
  const weights = under(`${dtype}/weights/`);
  const inputs = { ...under(`${dtype}/inputs/`), ...under(`${dtype}/exact/inputs/`) };
  const source = (name) => {
    if (!(name in weights)) throw new Error(`${entry.id}: no weight ${name}`);
    return weights[name].data;
  };
  const model = new LTX2(entry.config, dtype, source, entry.conventions);
  const taps = new Map();
  model.known = weights;
  model.tap = (name, x) => {
    taps.set(name, x);
    return x;
  };
  OPERATIONS[entry.operation](model, inputs, entry);
  return taps;
}

function main(kit, results) {
  if (!kit || !results) {
    console.error('usage: node scripts/js_port.js KIT RESULTS');
    process.exit(2);
  }
  for (const entry of JSON.parse(fs.readFileSync(path.join(kit, 'kit.json'), 'utf8')).cases) {
    const file = load(path.join(kit, entry.file));
    for (const [dtype, { results: name, digests }] of Object.entries(entry.exact)) {
      const taps = compute(entry, file, dtype);
      const wanted = Object.keys(digests);
      const missing = wanted.filter((tap) => !taps.has(tap));
      if (missing.length) throw new Error(`${entry.id} ${dtype}: no ${missing}; there are ${[...taps.keys()]}`);
      save(
        path.join(results, name),
        wanted.map((tap) => [tap, taps.get(tap)]),
      );
    }
  }
}

if (require.main === module) main(...process.argv.slice(2));
module.exports = { load, compute, digest, tapDtype };
