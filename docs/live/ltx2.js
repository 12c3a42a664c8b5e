'use strict';
/* The LTX-2 transformer in plain JavaScript, releases 2.0, 2.3 and 2.5, under exact arithmetic (docs/arithmetic.md):
 * every operation computes in float64 with sums in one order, and rounds once to the dtype of its result. So it has
 * diffusers' bits in any browser. Names are those of ltx2ref/*.py, parameter and tap names those of diffusers.
 *
 * A tensor is { shape, data }, row-major; its rows run along the last dimension. In an operation, a tensor of fewer
 * rows broadcasts: each of its rows stands for as many rows of the largest tensor (a batch element's for its tokens, a
 * parameter's for all), and a row of one column for all columns.
 *
 *    B  batch    T  tokens of a stream    S  text tokens    D  width of a stream    K  modulation rows
 *    H  heads    R  rotation planes of a head               P  position axes: video 3, audio 1
 */

// ---- Rounding: to nearest, ties to even ----------------------------------------------------------------------------

const one = new Float32Array(1), bits = new Uint32Array(one.buffer);
const float32 = Math.fround;

/** Round to bfloat16, through float32. */
function bfloat16(x) {
  one[0] = x;
  if (x !== x) return NaN;
  bits[0] += 0x7fff + (bits[0] >>> 16 & 1);
  bits[0] &= 0xffff0000;
  return one[0];
}

/** Round to float16, through float32. */
function float16(x) {
  const wide = float32(x), size = Math.abs(wide);
  if (x !== x) return NaN;
  if (size >= 65520) return Math.sign(wide) * Infinity;
  one[0] = size;
  const unit = 2 ** (Math.max((bits[0] >>> 23) - 127, -14) - 10);
  const anchor = 1.5 * 2 ** 52; // numbers of this size have no fraction, so adding it rounds to whole units
  return (wide / unit + anchor - anchor) * unit || wide * 0; // keeps -0
}

const ROUND = { float32, bfloat16, float16 };
const LOWEST = { float32: -(2 - 2 ** -23) * 2 ** 127, bfloat16: -(2 - 2 ** -7) * 2 ** 127, float16: -65504 };

// ---- Tensors -------------------------------------------------------------------------------------------------------

const tensor = (shape, data) => ({ shape, data });
const last = (x) => x.shape[x.shape.length - 1];
const rowsOf = (x) => x.data.length / last(x);
const reshape = (x, ...shape) => tensor(shape, x.data);

const rowOf = (table, k) => tensor([last(table)], table.data.subarray(k * last(table), (k + 1) * last(table)));

/** Return columns `from` to `from + n` of each row. */
function columns(x, from, n) {
  const width = last(x), data = new Float64Array(rowsOf(x) * n);
  for (let i = 0; i < data.length; i += n) {
    const at = i / n * width + from;
    data.set(x.data.subarray(at, at + n), i);
  }
  return tensor([...x.shape.slice(0, -1), n], data);
}

/** Return f of the elements of up to three tensors, rounded once. */
function each(round, f, ...xs) {
  const [a, b, c] = [0, 1, 2].map((k) => xs[k] || xs[0]);
  const largest = xs.reduce((x, y) => (y.data.length > x.data.length ? y : x)), width = last(largest);
  const rows = rowsOf(largest), data = new Float64Array(rows * width);
  const start = (x, i) => Math.floor(i * rowsOf(x) / rows) * last(x);
  const [stepA, stepB, stepC] = [a, b, c].map((x) => (last(x) === 1 ? 0 : 1));
  for (let i = 0, n = 0; i < rows; i++) {
    const atA = start(a, i), atB = start(b, i), atC = start(c, i);
    for (let j = 0; j < width; j++, n++) {
      data[n] = round(f(a.data[atA + j * stepA], b.data[atB + j * stepB], c.data[atC + j * stepC]));
    }
  }
  return tensor(largest.shape, data);
}

const add = (a, b) => a + b, mul = (a, b) => a * b;

/** Return the sum of x[0..n), which it overwrites: the last half is added to the first half until one is left. */
function fold(x, n) {
  while (n > 1) {
    const h = n >> 1;
    for (let i = 0; i < h; i++) x[i] += x[n - h + i];
    n -= h;
  }
  return x[0];
}

// ---- Functions of one number ---------------------------------------------------------------------------------------

function sigmoid(x) {
  const e = Math.exp(-Math.abs(x));
  return x >= 0 ? 1 / (1 + e) : e / (1 + e);
}
const silu = (x) => x * sigmoid(x);
const geluTanh = (x) => x * sigmoid(2 * Math.sqrt(2 / Math.PI) * (x + 0.044715 * x * x * x));

// ---- Sizes and conventions -----------------------------------------------------------------------------------------

/** What diffusers does where implementations differ; docs/divergences.md has the others. */
const DIFFUSERS = {
  rotation_dtype: 'float32', positions_dtype: 'float32', text_mask_bias: 'linear', self_mask_bias: 'linear',
  exchange: 'argument', guidance: 'configured',
};

/** Return the two streams' sizes, and the names of what is theirs alone. */
function streams(config) {
  const stream = (prefix, own) => {
    const get = (name) => config[prefix + name], heads = get('num_attention_heads');
    return {
      ...own, prefix, heads, headDim: get('attention_head_dim'), dim: heads * get('attention_head_dim'),
      outChannels: get('out_channels') || get('in_channels'), gated: get('gated_attn'), ffBias: get('ff_bias'),
      modulatedQueries: get('cross_attn_mod'), numRows: get('cross_attn_mod') ? 9 : 6,
    };
  };
  return [
    stream('', {
      name: 'video', maxPosition: [20, 2048, 2048], receives: 0, exchangeAttn: 'audio_to_video_attn',
      exchangeTable: 'video_a2v_cross_attn_scale_shift_table', exchangeEmbed: 'av_cross_attn_video_scale_shift',
      gateEmbed: 'av_cross_attn_video_a2v_gate', rope: 'rope', exchangeRope: 'cross_attn_rope',
    }),
    stream('audio_', {
      name: 'audio', maxPosition: [20], receives: 2, exchangeAttn: 'video_to_audio_attn',
      exchangeTable: 'audio_a2v_cross_attn_scale_shift_table', exchangeEmbed: 'av_cross_attn_audio_scale_shift',
      gateEmbed: 'av_cross_attn_audio_v2a_gate', rope: 'audio_rope', exchangeRope: 'cross_attn_audio_rope',
    }),
  ];
}

/** The model. `source(name, shape)` returns a parameter's numbers; `tap(name, tensor)` is shown every tensor. */
class LTX2 {
  constructor(config, dtype, source, conventions = {}) {
    Object.assign(this, { config, dtype, source, r: ROUND[dtype], conventions: { ...DIFFUSERS, ...conventions } });
    this.parameters = new Map();
    this.streams = streams(config);
    this.hasTextTables = config.cross_attn_mod || config.audio_cross_attn_mod;
    this.tap = (name, x) => x;
  }

  parameter(name, ...shape) {
    if (!this.parameters.has(name)) {
      this.parameters.set(name, tensor(shape, this.source(name, shape).map(this.r)));
    }
    return this.parameters.get(name);
  }

  each(f, ...xs) { return each(this.r, f, ...xs); }

  /** The bias is added before the one rounding. */
  linear(name, x, out, hasBias = true) {
    const n = last(x), weight = this.parameter(`${name}.weight`, out, n).data;
    const bias = hasBias && this.parameter(`${name}.bias`, out).data;
    const terms = new Float64Array(n), data = new Float64Array(rowsOf(x) * out);
    for (let i = 0, at = 0; i < data.length; at += n) {
      for (let j = 0; j < out; j++, i++) {
        for (let k = 0; k < n; k++) terms[k] = x.data[at + k] * weight[j * n + k];
        data[i] = this.r(bias ? fold(terms, n) + bias[j] : fold(terms, n));
      }
    }
    return tensor([...x.shape.slice(0, -1), out], data);
  }

  // ---- rope.py: positions, and the rotation of queries and keys by them --------------------------------------------

  /** Return patch bounds (1, 3, T, 2): seconds, pixels down and pixels across, in (frame, row, column) order. */
  videoPositions([frames, height, width], fps) {
    const tokens = frames * height * width, sizes = this.config.vae_scale_factors, data = new Float64Array(6 * tokens);
    for (let axis = 0, n = 0; axis < 3; axis++) {
      for (let t = 0; t < tokens; t++) {
        const index = [Math.floor(t / (height * width)), Math.floor(t / width) % height, t % width][axis];
        for (const bound of [index * sizes[axis], (index + 1) * sizes[axis]]) {
          data[n++] = axis ? bound : float32(Math.max(bound + this.config.causal_offset - sizes[0], 0) / fps);
        }
      }
    }
    return tensor([1, 3, tokens, 2], data);
  }

  /** Return patch bounds (1, 1, T, 2) in seconds. */
  audioPositions(frames) {
    const { audio_scale_factor: size, causal_offset: offset, audio_hop_length, audio_sampling_rate } = this.config;
    const mel = Array.from({ length: 2 * frames }, (_, n) => Math.max(((n >> 1) + n % 2) * size + offset - size, 0));
    const seconds = (x) => float32(float32(x * audio_hop_length) / audio_sampling_rate);
    return tensor([1, 1, frames, 2], Float64Array.from(mel, seconds));
  }

  /** Return the middle of a patch, rounded to the dtype that coordinates have. */
  middle(start, end, round) { return round(round(start + end) / 2); }

  /** Return n frequencies from pi / 2 to theta * pi / 2: radians from relative position 0 to 1. */
  frequencies(n) {
    const { rope_theta: theta, rope_double_precision } = this.config, round = rope_double_precision ? Number : float32;
    const step = 1 / (n - 1);
    const linspace = (i) => (n === 1 ? 0 : round(i < n >> 1 ? step * i : 1 - step * (n - 1 - i)));
    return Array.from({ length: n }, (_, i) => float32(round(round(round(theta ** linspace(i)) * Math.PI) / 2)));
  }

  /** Return [frequency, axis] of plane j of D/2: frequency-major, with zeros (null) on the left. */
  plane(j, n, axes, planes) {
    const i = j - (planes - n * axes);
    return i < 0 ? null : [Math.floor(i / axes), i % axes];
  }

  /** Return cosines and sines (B, T, H, R) of D/2 angles, spread over all heads. `coords.round` is their dtype's. */
  rotation(coords, stream) {
    const [batch, given, T] = coords.shape, round = coords.round || float32, axes = stream.maxPosition.length;
    const bounds = coords.shape.length === 4 ? 2 : 1, planes = stream.dim / 2, n = Math.floor(planes / axes);
    const freqs = this.frequencies(n), angles = new Float64Array(batch * T * planes);
    const relative = (b, axis, t) => {
      const at = ((b * given + axis) * T + t) * bounds;
      const middle = bounds === 2 ? this.middle(coords.data[at], coords.data[at + 1], round) : coords.data[at];
      return round(round(round(middle / stream.maxPosition[axis]) * 2) - 1);
    };
    for (let b = 0, i = 0; b < batch; b++) {
      for (let t = 0; t < T; t++) {
        const u = stream.maxPosition.map((_, axis) => relative(b, axis, t));
        for (let j = 0; j < planes; j++, i++) {
          const plane = this.plane(j, n, axes, planes);
          angles[i] = plane ? float32(u[plane[1]] * freqs[plane[0]]) : 0;
        }
      }
    }
    const table = this.conventions.rotation_dtype === 'model' ? this.r : Number;
    const shape = [batch, T, stream.heads, planes / stream.heads];
    return [Math.cos, Math.sin].map((f) => tensor(shape, angles.map((x) => table(float32(f(x))))));
  }

  /** Rotate the planes of x (B, T, H, 2R): channels r and r + R of a head, or 2r and 2r + 1 if interleaved. */
  applyRope(x, [cos, sin]) {
    const R = last(cos), split = this.config.rope_type === 'split', data = new Float64Array(x.data.length);
    const wide = this.conventions.rotation_dtype === 'model' ? this.r : float32;
    const second = split ? Number : wide; // the split layout adds the second product without rounding it
    for (let i = 0, t = 0; i < data.length; i += 2 * R) {
      for (let r = 0; r < R; r++, t++) {
        const at = split ? i + r : i + 2 * r, to = split ? at + R : at + 1;
        const c = cos.data[t % cos.data.length], s = sin.data[t % sin.data.length], a = x.data[at], b = x.data[to];
        data[at] = this.r(wide(wide(a * c) - second(b * s)));
        data[to] = this.r(wide(wide(b * c) + second(a * s)));
      }
    }
    return tensor(x.shape, data);
  }

  // ---- embeddings.py: noise levels and the text --------------------------------------------------------------------

  /** Return 128 cosines and then 128 sines of each noise level (B, T|1). */
  sinusoid(timestep) {
    const frequency = (_, i) => float32(Math.exp(float32(float32(-Math.log(10000) * i) / 128)));
    const freqs = Array.from({ length: 128 }, frequency);
    const data = new Float64Array(timestep.data.length * 256);
    timestep.data.forEach((level, n) => freqs.forEach((f, i) => {
      const phase = float32(float32(level) * f);
      data[n * 256 + i] = this.r(float32(Math.cos(phase)));
      data[n * 256 + 128 + i] = this.r(float32(Math.sin(phase)));
    }));
    return tensor([...timestep.shape, 256], data);
  }

  /** Return the offsets of K rows (B, T|1, K*D), and the embedding (B, T|1, D), of sinusoids. */
  timestepEmbedding(name, phases, dim, numRows) {
    const at = `${name}.emb.timestep_embedder`, flat = (x) => reshape(x, rowsOf(x), last(x));
    const hidden = this.each(silu, this.linear(`${at}.linear_1`, phases, dim));
    const embedding = this.linear(`${at}.linear_2`, hidden, dim);
    const offsets = this.linear(`${name}.linear`, this.each(silu, embedding), numRows * dim);
    this.tap(`${name}.emb`, flat(embedding));
    this.tap(`${name}.linear`, flat(offsets));
    return { offsets, embedding };
  }

  /** AdaLayerNormSingle: the same for noise levels (B, T|1). One such layer serves all blocks. */
  adaln(name, timestep, dim, numRows) {
    const phases = this.sinusoid(timestep);
    this.tap(`${name}.sinusoid`, reshape(phases, rowsOf(phases), 256));
    return this.timestepEmbedding(name, phases, dim, numRows);
  }

  /** Project the text to the width of a stream, as 2.0 does. */
  textProjection({ prefix, dim }, text) {
    const at = `${prefix}caption_projection`;
    const hidden = this.each(geluTanh, this.linear(`${at}.linear_1`, text, dim));
    return this.tap(at, this.linear(`${at}.linear_2`, hidden, dim));
  }

  // ---- modulation.py -----------------------------------------------------------------------------------------------

  /** Six operations, each in float32, and then the model's dtype. */
  rmsNorm(x, weight = null) {
    const n = last(x), squares = new Float64Array(n), data = new Float64Array(x.data.length);
    for (let i = 0; i < data.length; i += n) {
      for (let j = 0; j < n; j++) squares[j] = float32(x.data[i + j] * x.data[i + j]);
      const scale = float32(1 / Math.sqrt(float32(float32(fold(squares, n) / n) + 1e-6)));
      for (let j = 0; j < n; j++) {
        const y = float32(x.data[i + j] * scale);
        data[i + j] = this.r(weight ? float32(y * weight.data[j]) : y);
      }
    }
    return tensor(x.shape, data);
  }

  layerNorm(x) {
    const n = last(x), terms = new Float64Array(n), data = new Float64Array(x.data.length);
    for (let i = 0; i < data.length; i += n) {
      terms.set(x.data.subarray(i, i + n));
      const mean = fold(terms, n) / n;
      for (let j = 0; j < n; j++) terms[j] = (x.data[i + j] - mean) * (x.data[i + j] - mean);
      const root = Math.sqrt(fold(terms, n) / n + 1e-6);
      for (let j = 0; j < n; j++) data[i + j] = this.r((x.data[i + j] - mean) / root);
    }
    return tensor(x.shape, data);
  }

  modulate(x, shift, scale) { return this.each(add, this.each(mul, x, this.each((s) => 1 + s, scale)), shift); }

  residual(x, gate, y) { return this.each(add, x, this.each(mul, gate, y)); }

  /** Add rows of a learned table (K, D) to offsets (B, T|1, K'*D), and return them, each (B, T|1, D). */
  rows(table, first, count, offsets, offsetFirst = first) {
    const dim = last(table);
    return Array.from({ length: count }, (_, k) => this.each(add,
      columns(offsets, (offsetFirst + k) * dim, dim), rowOf(table, first + k)));
  }

  /** Show rows as one tap (B * T|1, K, D). */
  tapRows(name, ...rows) {
    const n = Math.max(...rows.map(rowsOf)), dim = last(rows[0]), data = new Float64Array(n * rows.length * dim);
    rows.forEach((x, k) => {
      for (let i = 0; i < n; i++) {
        const at = Math.floor(i * rowsOf(x) / n) * dim;
        data.set(x.data.subarray(at, at + dim), (i * rows.length + k) * dim);
      }
    });
    this.tap(name, tensor([n, rows.length, dim], data));
  }

  // ---- attention.py ------------------------------------------------------------------------------------------------

  /** Normalise queries or keys over all heads together. */
  normHeads(x, weight, heads) { return this.rmsNorm(x, weight); }

  /** Scaled dot product attention, one operation with one rounding: q (B, T, H, d), k and v (B, S, H, d). */
  sdpa(q, k, v, bias) {
    const [batch, T, heads, d] = q.shape, S = k.shape[1], D = heads * d, scale = 1 / Math.sqrt(d);
    const data = new Float64Array(q.data.length), terms = new Float64Array(Math.max(S, d)), p = new Float64Array(S);
    for (let i = 0; i < batch * T; i++) {
      const first = Math.floor(i / T) * S, masked = bias ? Math.floor(i * rowsOf(bias) / (batch * T)) * S : 0;
      for (let head = 0; head < D; head += d) {
        let max = -Infinity;
        for (let s = 0; s < S; s++) {
          for (let c = 0; c < d; c++) terms[c] = q.data[i * D + head + c] * k.data[(first + s) * D + head + c];
          p[s] = fold(terms, d) * scale + (bias ? bias.data[masked + s] : 0);
          max = Math.max(max, p[s]);
        }
        for (let s = 0; s < S; s++) terms[s] = p[s] = max === -Infinity ? 0 : Math.exp(p[s] - max);
        const sum = fold(terms, S) || 1;
        for (let c = 0; c < d; c++) {
          for (let s = 0; s < S; s++) terms[s] = p[s] / sum * v.data[(first + s) * D + head + c];
          data[i * D + head + c] = this.r(fold(terms, S));
        }
      }
    }
    return tensor(q.shape, data);
  }

  /** Attend from x (B, T, D) to context (B, S, D'). `keep` (B): 1 is attention, 0 each token's own value. */
  attention(name, x, context, { heads, headDim, gated, out = last(x), ropes, mask, keep }) {
    const inner = heads * headDim, split = (y) => reshape(y, y.shape[0], y.shape[1], heads, headDim);
    const normed = (kind, y) => this.tap(`${name}.norm_${kind}`, this.normHeads(
      this.linear(`${name}.to_${kind}`, y, inner), this.parameter(`${name}.norm_${kind}.weight`, inner), heads));
    let q = split(normed('q', x)), k = split(normed('k', context));
    const v = split(this.tap(`${name}.to_v`, this.linear(`${name}.to_v`, context, inner)));
    if (ropes) [q, k] = [this.applyRope(q, ropes[0]), this.applyRope(k, ropes[1])];
    this.tap(`${name}.q`, q);
    this.tap(`${name}.k`, k);
    let y = this.tap(`${name}.sdpa`, this.sdpa(q, k, v, mask));
    if (keep) y = this.each((a, b, w) => a + w * (b - a), v, y, reshape(keep, keep.data.length, 1));
    if (gated) {
      const logits = this.tap(`${name}.to_gate_logits`, this.linear(`${name}.to_gate_logits`, x, heads));
      const gate = this.tap(`${name}.gate`, this.each((s) => 2 * s, this.each(sigmoid, logits)));
      y = this.each(mul, y, reshape(gate, ...gate.shape, 1));
    }
    return this.tap(`${name}.to_out`, this.linear(`${name}.to_out.0`, reshape(y, ...x.shape.slice(0, 2), inner), out));
  }

  gelu(x) { return geluTanh(x); }

  feedForward(name, x, { dim, ffBias }) {
    const hidden = this.tap(`${name}.proj`, this.linear(`${name}.net.0.proj`, x, 4 * dim, ffBias));
    const activation = this.tap(`${name}.activation`, this.each(this.gelu, hidden));
    return this.tap(`${name}.output`, this.linear(`${name}.net.2`, activation, dim, ffBias));
  }

  // ---- block.py: `s` is a stream's sizes, `c` its conditioning, `at` begins the names of a block -------------------

  selfAttention(at, s, c, x, keep) {
    const name = `${at}${s.prefix}attn1`, table = this.parameter(`${at}${s.prefix}scale_shift_table`, s.numRows, s.dim);
    this.tap(`${name}.stream`, x);
    const [shift, scale, gate] = this.rows(table, 0, 3, c.offsets);
    this.tapRows(`${name}.rows`, shift, scale, gate);
    const h = this.tap(`${name}.input`, this.modulate(this.rmsNorm(x), shift, scale));
    const options = { ...s, ropes: [c.rope, c.rope], mask: c.selfMask, keep };
    return this.residual(x, gate, this.attention(name, h, h, options));
  }

  textAttention(at, s, c, x) {
    const name = `${at}${s.prefix}attn2`, table = this.parameter(`${at}${s.prefix}scale_shift_table`, s.numRows, s.dim);
    this.tap(`${name}.stream`, x);
    let h = this.rmsNorm(x), gate = tensor([1], new Float64Array([1])); // in 2.0 nothing is modulated or gated
    if (s.modulatedQueries) {
      const used = this.rows(table, 6, 3, c.offsets), [shift, scale] = used;
      this.tapRows(`${name}.rows`, ...used);
      h = this.modulate(h, shift, scale);
      [, , gate] = used;
    }
    const text = this.textContext(at, name, s, c);
    this.tap(`${name}.input`, h);
    this.tap(`${name}.context`, text);
    return this.residual(x, gate, this.attention(name, h, text, { ...s, mask: c.textMask }));
  }

  textContext(at, name, s, c) {
    if (!this.hasTextTables) return c.text;
    const table = this.parameter(`${at}${s.prefix}prompt_scale_shift_table`, 2, s.dim);
    if (!c.textOffsets) return this.modulate(c.text, rowOf(table, 0), rowOf(table, 1));
    const [shift, scale] = this.rows(table, 0, 2, c.textOffsets);
    this.tapRows(`${name}.context_rows`, shift, scale);
    return this.modulate(c.text, shift, scale);
  }

  /** Modulate a stream, normalised, as the queries or the context of a direction (0: to video, 2: to audio). */
  forExchange(at, s, c, h, direction) {
    const [scale, shift] = this.rows(this.exchangeTable(at, s), direction, 2, c.exchangeOffsets); // scale first
    return this.modulate(h, shift, scale);
  }

  exchangeTable(at, s) { return this.parameter(`${at}${s.exchangeTable}`, 5, s.dim); }

  /** Return what stream s receives from the other one: `query` is its own, `context` the other's. */
  received(at, s, c, x, query, context, theirs) {
    const name = at + s.exchangeAttn, { heads, headDim } = this.streams[1]; // at audio's size, both ways
    const other = this.streams.find((stream) => stream.name !== s.name), table = this.exchangeTable(at, s);
    const [gate] = this.rows(table, 4, 1, c.exchangeGateOffset, 0), ropes = [c.exchangeRope, theirs.exchangeRope];
    this.tap(`${name}.stream`, x);
    this.tapRows(`${name}.rows`, ...this.rows(table, s.receives, 2, c.exchangeOffsets), gate);
    const theirRows = this.rows(this.exchangeTable(at, other), s.receives, 2, theirs.exchangeOffsets);
    this.tapRows(`${name}.context_rows`, ...theirRows);
    this.tap(`${name}.input`, query);
    this.tap(`${name}.context`, context);
    const options = { heads, headDim, gated: s.gated, out: s.dim, ropes };
    return this.each(mul, gate, this.attention(name, query, context, options));
  }

  /** Let each stream attend to the other. Both directions read the streams as they were before. */
  exchange(at, [vc, ac], [vx, ax]) {
    const [video, audio] = this.streams, vh = this.rmsNorm(vx), ah = this.rmsNorm(ax);
    const part = (s, c, h, to) => this.forExchange(at, s, c, h, to.receives);
    const toVideo = this.received(at, video, vc, vx, part(video, vc, vh, video), part(audio, ac, ah, video), ac);
    const toAudio = this.received(at, audio, ac, ax, part(audio, ac, ah, audio), part(video, vc, vh, audio), vc);
    return [this.each(add, vx, toVideo), this.each(add, ax, toAudio)];
  }

  feedForwardLayer(at, s, c, x) {
    const name = `${at}${s.prefix}ff`, table = this.parameter(`${at}${s.prefix}scale_shift_table`, s.numRows, s.dim);
    this.tap(`${name}.stream`, x);
    const [shift, scale, gate] = this.rows(table, 3, 3, c.offsets);
    this.tapRows(`${name}.rows`, shift, scale, gate);
    const h = this.tap(`${name}.input`, this.modulate(this.rmsNorm(x), shift, scale));
    return this.residual(x, gate, this.feedForward(name, h, s));
  }

  /** Return both streams after a block. */
  block(i, conditioning, xs, { keep, isolated } = {}) {
    const at = `transformer_blocks.${i}.`, both = (f) => this.streams.map((s, k) => f(s, conditioning[k], xs[k]));
    xs = both((s, c, x) => this.selfAttention(at, s, c, x, keep));
    xs = both((s, c, x) => this.textAttention(at, s, c, x));
    if (!isolated) xs = this.exchange(at, conditioning, xs);
    xs = both((s, c, x) => this.feedForwardLayer(at, s, c, x));
    return both((s, c, x) => this.tap(at + s.name, x));
  }

  // ---- model.py ----------------------------------------------------------------------------------------------------

  /** Return the tokens of a stream, and what its blocks take unchanged. */
  enter(s, given) {
    const { config } = this, { prefix, dim } = s;
    const x = this.tokens(s, given);
    const { offsets, embedding } = this.adaln(`${prefix}time_embed`, given.timestep, dim, s.numRows);
    const gateFactor = config.cross_attn_timestep_scale_multiplier / config.timestep_scale_multiplier;
    const fromSigma = this.hasTextTables && config.use_prompt_adaln_single;
    const gateTimestep = each(float32, (t) => t * gateFactor, given.exchangeGateTimestep);
    const { rope, exchangeRope } = this.ropes(s, given.coords);
    return {
      x, embedding, offsets, rope, exchangeRope,
      text: config.use_prompt_embeddings ? this.textProjection(s, given.text) : given.text,
      textOffsets: fromSigma ? this.adaln(`${prefix}prompt_adaln`, given.sigma, dim, 2).offsets : null,
      textMask: given.textMask,
      selfMask: given.selfMask,
      exchangeOffsets: this.adaln(s.exchangeEmbed, given.exchangeTimestep, dim, 4).offsets,
      exchangeGateOffset: this.adaln(s.gateEmbed, gateTimestep, dim, 1).offsets,
    };
  }

  /** Project latents to tokens. In 2.5 a learned vector marks the tokens of keyframes. */
  tokens(s, { latent, keyframes }) {
    const x = this.tap(`${s.prefix}proj_in`, this.linear(`${s.prefix}proj_in`, latent, s.dim));
    if (!keyframes || !this.config.use_keyframes_abs_pos_embedding) return x;
    const moved = this.each(add, x, this.parameter('keyframes_abs_pos_embedding', 1, s.dim));
    return each(Number, (mask, a, b) => (mask > 0 ? b : a), keyframes, x, moved);
  }

  /** Return the rotations of self-attention, and of the exchange: over time alone, at audio's width and heads. */
  ropes(s, coords) {
    const named = (name, tables) => tables.map((x, i) => this.tap(`${name}.${['cos', 'sin'][i]}`, x));
    return {
      rope: named(s.rope, this.rotation(coords, s)),
      exchangeRope: named(s.exchangeRope, this.rotation(coords, { ...this.streams[1], exchangeOf: s.name })),
    };
  }

  /** Return the velocity (B, T, C) of each token. Both rows get the same embedding. */
  leave({ prefix, dim, outChannels }, x, embedding) {
    const table = this.parameter(`${prefix}scale_shift_table`, 2, dim);
    const [shift, scale] = [0, 1].map((k) => this.each(add, embedding, rowOf(table, k)));
    const normed = this.tap(`${prefix}norm_out`, this.layerNorm(x));
    const h = this.tap(`${prefix}proj_out.input`, this.modulate(normed, shift, scale));
    return this.tap(`${prefix}sample`, this.tap(`${prefix}proj_out`, this.linear(`${prefix}proj_out`, h, outChannels)));
  }

  /** Predict both velocities from what each stream is given in full. */
  velocities(given, perturbedBlocks, keep, isolated) {
    const conditioning = this.streams.map((s, k) => this.enter(s, given[k]));
    let xs = conditioning.map((c) => c.x);
    for (let i = 0; i < this.config.num_layers; i++) {
      xs = this.block(i, conditioning, xs, { keep: perturbedBlocks.includes(i) ? keep : null, isolated });
    }
    return this.streams.map((s, k) => this.leave(s, xs[k], conditioning[k].embedding));
  }

  // ---- interface.py: the documented arguments become two streams, by one convention or another ---------------------

  /** Return both velocities. `x` has the documented arguments by name; numbers are rounded to the dtypes they have. */
  forward(x, tap = (name, value) => value) {
    this.tap = (name, value) => { tap(name, value); return value; };
    const guided = this.config.perturbed_attn || this.conventions.guidance === 'always';
    const keep = this.each(Number, x.perturbation_mask || tensor([1], new Float64Array(1)));
    const given = this.streams.map((s, k) => this.given(s, this.streams[1 - k], x));
    return this.velocities(given, (guided && x.spatio_temporal_guidance_blocks) || [], keep, x.isolate_modalities);
  }

  /** Return what one stream is given: every noise level is chosen, every mask is a bias, coordinates are there. */
  given(s, other, x) {
    const own = (name) => x[s.prefix + name], levels = (t) => t && reshape(t, t.shape[0], t.data.length / t.shape[0]);
    const timestep = own('timestep') || x.timestep, otherSigma = x[`${other.prefix}sigma`] || x.sigma;
    const rule = this.exchangeMode(x.use_cross_timestep), latent = own('hidden_states');
    return {
      latent, text: own('encoder_hidden_states'), coords: this.coordinates(s, x, latent.shape[0]),
      timestep: levels(timestep), sigma: levels(own('sigma') || x.sigma),
      exchangeTimestep: levels(rule === 'other' ? otherSigma : timestep),
      exchangeGateTimestep: levels(rule === 'own' ? timestep : otherSigma),
      textMask: this.textMask(own('encoder_attention_mask')),
      selfMask: s.prefix ? null : this.selfMask(x.video_self_attention_mask),
      keyframes: s.prefix ? null : x.video_keyframes_mask,
    };
  }

  exchangeMode(useCrossTimestep) {
    const { exchange } = this.conventions;
    return exchange !== 'argument' ? exchange : useCrossTimestep ? 'other' : 'own';
  }

  /** Return patch bounds (B, P, T, 2): those that are given, or those of the grid. */
  coordinates(s, x, batch) {
    const name = `${s.name}_coords`;
    if (x[name]) return this.tap(name, x[name]);
    const made = s.prefix ? this.audioPositions(x.audio_num_frames)
      : this.videoPositions([x.num_frames, x.height, x.width], x.fps || 24);
    const narrow = !s.prefix && this.conventions.positions_dtype === 'model';
    const data = new Float64Array(batch * made.data.length);
    for (let b = 0; b < batch; b++) data.set(narrow ? made.data.map(this.r) : made.data, b * made.data.length);
    return this.tap(name, { ...tensor([batch, ...made.shape.slice(1)], data), round: narrow ? this.r : float32 });
  }

  /** A mask (B, S) multiplies; one of three dimensions is a bias, or, if bool, True where a key is seen. */
  textMask(mask) {
    if (!mask) return null;
    if (mask.shape.length === 2) return this.attentionBias(mask, this.conventions.text_mask_bias);
    return mask.bool ? each(Number, (m) => (m ? 0 : -Infinity), mask) : this.each(Number, mask);
  }

  selfMask(mask) { return mask ? this.attentionBias(mask, this.conventions.self_mask_bias) : null; }

  /** Return what a mask, 1 to keep and 0 to mask, adds to the logits. */
  attentionBias(mask, kind) {
    const lowest = LOWEST[this.dtype], tiny = this.dtype === 'float16' ? 2 ** -14 : 2 ** -126;
    const log = (m) => (m > 0 ? this.r(float32(Math.log(Math.max(m, tiny)))) : lowest);
    if (kind === 'log') return each(Number, log, mask);
    return each(this.r, (m) => this.r(1 - this.r(m)) * (kind === 'lowest' ? lowest : -10000), mask);
  }
}

// ---- generator.py: weights and inputs that any language can rebuild ------------------------------------------------

/** Return `count` float32 numbers, uniform in [-scale, scale), that depend on a name and a seed. */
function uniform(name, count, scale = Math.sqrt(3), seed = 0) {
  let start = 0x811c9dc5;
  for (const byte of new TextEncoder().encode(`${seed}/${name}`)) start = Math.imul(start ^ byte, 0x01000193);
  return Float64Array.from({ length: count }, (_, index) => {
    let x = Math.imul(index, 0x9e3779b9) + start | 0;
    x = Math.imul(x ^ x >>> 16, 0x85ebca6b);
    x = Math.imul(x ^ x >>> 13, 0xc2b2ae35);
    x = (x ^ x >>> 16) >>> 0;
    return float32(((x >>> 8) - 2 ** 23) * 2 ** -23 * float32(scale));
  });
}

/** Return the source of generated parameters: none is zero, and activations are large. */
function generated(seed) {
  const scaleOf = (name, inputs) => {
    if (/norm_[qk]\.weight$/.test(name)) return 1.5;
    if (name.endsWith('net.0.proj.weight')) return 2 * Math.sqrt(3) / Math.sqrt(inputs);
    if (name.endsWith('.weight')) return Math.sqrt(3) / Math.sqrt(inputs);
    return name.endsWith('.bias') ? 0.25 : 0.5;
  };
  return (name, shape) => uniform(name, shape.reduce(mul), scaleOf(name, shape[shape.length - 1]), seed);
}

// ---- Digests: SHA-256, of which the first 16 bytes identify a tensor -----------------------------------------------

const PRIMES = [];
for (let n = 2; PRIMES.length < 64; n++) if (PRIMES.every((p) => n % p)) PRIMES.push(n);
const fraction = (x) => (x - Math.floor(x)) * 2 ** 32 | 0;
const ROUND_CONSTANTS = Int32Array.from(PRIMES, (p) => fraction(Math.cbrt(p)));
const START = PRIMES.slice(0, 8).map((p) => fraction(Math.sqrt(p)));

function sha256(bytes) {
  const padded = new Uint8Array((bytes.length + 72) & ~63), view = new DataView(padded.buffer), w = new Int32Array(64);
  padded.set(bytes);
  padded[bytes.length] = 0x80;
  view.setUint32(padded.length - 4, bytes.length * 8); // up to 512 MB
  const state = Int32Array.from(START), turn = (x, n) => x >>> n | x << 32 - n;
  for (let at = 0; at < padded.length; at += 64) {
    for (let i = 0; i < 16; i++) w[i] = view.getInt32(at + 4 * i);
    for (let i = 16; i < 64; i++) {
      const a = w[i - 15], b = w[i - 2];
      w[i] = w[i - 16] + w[i - 7] + (turn(a, 7) ^ turn(a, 18) ^ a >>> 3) + (turn(b, 17) ^ turn(b, 19) ^ b >>> 10);
    }
    let [a, b, c, d, e, f, g, h] = state;
    for (let i = 0; i < 64; i++) {
      const t1 = h + (turn(e, 6) ^ turn(e, 11) ^ turn(e, 25)) + (e & f ^ ~e & g) + ROUND_CONSTANTS[i] + w[i] | 0;
      const t2 = (turn(a, 2) ^ turn(a, 13) ^ turn(a, 22)) + (a & b ^ a & c ^ b & c) | 0;
      h = g; g = f; f = e; e = d + t1 | 0; // not as one assignment of tuples: this loop is most of a digest's time
      d = c; c = b; b = a; a = t1 + t2 | 0;
    }
    [a, b, c, d, e, f, g, h].forEach((x, i) => { state[i] += x; });
  }
  return Array.from(state, (x) => (x >>> 0).toString(16).padStart(8, '0')).join('');
}

/** Return the digest of a tensor in a dtype, as 32 hexadecimal digits: docs/arithmetic.md defines it. */
function digest({ shape, data }, dtype) {
  const head = new TextEncoder().encode(`${dtype} ${shape.join(',')}\n`), size = dtype === 'float32' ? 4 : 2;
  const bytes = new Uint8Array(head.length + data.length * size), view = new DataView(bytes.buffer);
  bytes.set(head);
  for (let i = 0, at = head.length; i < data.length; i++, at += size) {
    const x = data[i];
    one[0] = x;
    if (x !== x) bits[0] = 0x7fc00000;
    if (dtype === 'float32') view.setUint32(at, bits[0], true);
    else view.setUint16(at, dtype === 'bfloat16' ? bits[0] >>> 16 : halfBits(x), true);
  }
  return sha256(bytes).slice(0, 32);
}

function halfBits(x) {
  if (x !== x) return 0x7e00;
  const sign = x < 0 || Object.is(x, -0) ? 0x8000 : 0, size = Math.abs(x);
  if (size === Infinity) return sign | 0x7c00;
  if (size < 2 ** -14) return sign | size * 2 ** 24;
  one[0] = size;
  return sign | (bits[0] >>> 13) - (112 << 10);
}

/** Return the dtype of a tap: positions and rotations are float32 in every model, except by ltx-core's conventions. */
function tapDtype(name, dtype, { positions_dtype, rotation_dtype } = DIFFUSERS) {
  if (name === 'audio_coords') return 'float32';
  if (name === 'video_coords') return positions_dtype === 'model' ? dtype : 'float32';
  return /\.(cos|sin)$/.test(name) && rotation_dtype !== 'model' ? 'float32' : dtype;
}

if (typeof module !== 'undefined') {
  module.exports = {
    LTX2, ROUND, DIFFUSERS, tensor, reshape, each, fold, columns, uniform, generated, sha256, digest, tapDtype,
  };
}
