'use strict';
/* Real porting bugs, each a change of the configuration, of the arguments, or of methods of LTX2: the same bugs under
 * the same names as in tests/support/mutants.py, where Python makes them.
 */

const right = typeof LTX2 === 'undefined' ? require('./ltx2.js') : { LTX2, ROUND, tensor, reshape, each, fold };
const { prototype: correct } = right.LTX2;

/** Return the noise levels of a batch element as one number each. */
const collapsed = (level, f) =>
  right.tensor(
    [level.shape[0], 1],
    Float64Array.from({ length: level.shape[0] }, (_, b) => {
      const n = level.data.length / level.shape[0];
      return f(level.data.slice(b * n, (b + 1) * n));
    }),
  );
const lastOf = (x) => x[x.length - 1];
const meanOf = (x) => Math.fround(right.fold(x, x.length) / x.length);

/** Return coordinates whose seconds are multiplied. */
const stretched = (coords, factor) => {
  const [, axes, T, bounds = 1] = coords.shape;
  const seconds = Math.fround(factor);
  const data = coords.data.map((x, i) => (Math.floor(i / (T * bounds)) % axes ? x : Math.fround(x * seconds)));
  return { ...coords, data };
};

/** The complementary error function: a series, or, for large x, a continued fraction. */
function erfc(x) {
  if (x < 2.5) {
    let term = (2 / Math.sqrt(Math.PI)) * x * Math.exp(-x * x),
      sum = 0;
    for (let n = 1; Math.abs(term) > Math.abs(sum) * 1e-18; n++) {
      sum += term;
      term *= (2 * x * x) / (2 * n + 1);
    }
    return 1 - sum;
  }
  let tail = x;
  for (let n = 200; n > 0; n--) tail = x + n / 2 / tail;
  return Math.exp(-x * x) / Math.sqrt(Math.PI) / tail;
}

/** A layer norm in bfloat16 that rounds after each addition. */
function layerNormInBfloat16(x) {
  const n = x.shape[x.shape.length - 1];
  const { bfloat16 } = right.ROUND;
  const data = new Float64Array(x.data.length);
  const mean = (terms) => bfloat16(terms.reduce((sum, term) => bfloat16(sum + term), 0) / n);
  for (let i = 0; i < data.length; i += n) {
    const narrow = x.data.slice(i, i + n).map(bfloat16);
    const middle = mean(narrow);
    const centred = narrow.map((y) => bfloat16(y - middle));
    const scale = bfloat16(1 / Math.sqrt(bfloat16(mean(centred.map((y) => bfloat16(y * y))) + 1e-6)));
    data.set(
      centred.map((y) => this.r(bfloat16(y * scale))),
      i,
    );
  }
  return right.tensor(x.shape, data);
}

const BUGS = {
  'gate-multiplier-1': { config: { cross_attn_timestep_scale_multiplier: 1 } },
  'swapped-modality-sigma': { inputs: (x) => ({ use_cross_timestep: !x.use_cross_timestep }) },
  'sigma-ignored': {
    inputs: (x) => ({ sigma: collapsed(x.timestep, lastOf), audio_sigma: collapsed(x.audio_timestep, lastOf) }),
  },
  'per-token-timestep-averaged': {
    inputs: (x) => ({ timestep: collapsed(x.timestep, meanOf), audio_timestep: collapsed(x.audio_timestep, meanOf) }),
  },
  'rope-float32-frequencies': { config: { rope_double_precision: false } },
  'rope-bf16-positions': {
    model: {
      rotation(coords, stream) {
        const { bfloat16 } = right.ROUND;
        return correct.rotation.call(this, { ...coords, data: coords.data.map(bfloat16), round: bfloat16 }, stream);
      },
    },
  },
  'rope-axis-major': {
    model: {
      plane(j, n, axes, planes) {
        const i = j - (planes - n * axes);
        return i < 0 ? null : [i % n, Math.floor(i / n)];
      },
    },
  },
  'rope-right-padding': {
    model: { plane: (j, n, axes) => (j < n * axes ? [Math.floor(j / axes), j % axes] : null) },
  },
  'rope-shared-heads': {
    model: {
      rotation(coords, stream) {
        return correct.rotation.call(this, coords, stream).map((x) => {
          const [, , heads, R] = x.shape;
          return right.tensor(
            x.shape,
            x.data.map((_, i) => x.data[Math.floor(i / (heads * R)) * heads * R + (i % R)]),
          );
        });
      },
    },
  },
  'rope-patch-start': { model: { middle: (start) => start } },
  'fps-dropped': {
    model: {
      rotation(coords, stream) {
        return correct.rotation.call(
          this,
          stream.maxPosition.length === 3 ? stretched(coords, 25 / 24) : coords,
          stream,
        );
      },
    },
  },
  'fps-dropped-from-exchange': {
    model: {
      rotation(coords, stream) {
        return correct.rotation.call(this, stream.exchangeOf === 'video' ? stretched(coords, 25 / 24) : coords, stream);
      },
    },
  },
  'max-pos-frames': {
    model: {
      rotation(coords, stream) {
        return correct.rotation.call(
          this,
          stream.maxPosition.length === 3 ? stretched(coords, 25 / 8) : coords,
          stream,
        );
      },
    },
  },
  'mask-as-bool': {
    model: {
      textMask(mask) {
        return mask && this.each(Number, mask);
      },
    },
  },
  'mask-ignored': { inputs: () => ({ encoder_attention_mask: null, audio_encoder_attention_mask: null }) },
  'stg-wrong-block': {
    inputs: (x) => ({ spatio_temporal_guidance_blocks: (x.spatio_temporal_guidance_blocks || []).map((i) => i - 1) }),
  },
  'stg-without-gate': {
    model: {
      attention(name, x, context, options) {
        const gated = options.gated && !options.keep;
        return correct.attention.call(this, name, x, context, { ...options, gated });
      },
    },
  },
  'keyframes-unapplied': { inputs: () => ({ video_keyframes_mask: null }) },
  'ff-bias-dropped': {
    model: {
      feedForward(name, x, s) {
        return correct.feedForward.call(this, name, x, { ...s, ffBias: s.ffBias && !s.prefix });
      },
    },
  },
  'gelu-erf': { model: { gelu: (x) => x * (0.5 * erfc(-x / Math.sqrt(2))) } },
  'output-norm-bf16': { model: { layerNorm: layerNormInBfloat16 } },
  'qk-norm-per-head': {
    model: {
      normHeads(x, weight, heads) {
        const [batch, T, D] = x.shape;
        const normed = this.rmsNorm(right.reshape(x, batch, T, heads, D / heads));
        return this.each((w, y) => w * y, weight, right.reshape(normed, ...x.shape));
      },
    },
  },
  'scale-shift-swapped': {
    model: {
      forExchange(at, s, c, h, direction) {
        const [shift, scale] = this.rows(this.exchangeTable(at, s), direction, 2, c.exchangeOffsets);
        return this.modulate(h, shift, scale);
      },
    },
  },
  'a2v-v2a-swapped': {
    model: {
      forExchange(at, s, c, h, direction) {
        return correct.forExchange.call(this, at, s, c, h, 2 - direction);
      },
    },
  },
  'sequential-exchange': {
    model: {
      exchange(at, [vc, ac], [vx, ax]) {
        const [video, audio] = this.streams;
        const part = (s, c, x, to) => this.forExchange(at, s, c, this.rmsNorm(x), to.receives);
        vx = this.each(
          (a, b) => a + b,
          vx,
          this.received(at, video, vc, vx, part(video, vc, vx, video), part(audio, ac, ax, video), ac),
        );
        ax = this.each(
          (a, b) => a + b,
          ax,
          this.received(at, audio, ac, ax, part(audio, ac, ax, audio), part(video, vc, vx, audio), vc),
        );
        return [vx, ax];
      },
    },
  },
};

if (typeof module !== 'undefined') module.exports = { BUGS };
