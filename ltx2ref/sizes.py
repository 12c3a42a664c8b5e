"""The sizes of the model, and what the three releases differ in.

Two streams of tokens, video and audio, pass through the same blocks. In a block each stream attends to itself
(self-attention) and to a text (text attention), then the two attend to each other (the exchange), and each passes
through a feed-forward layer. Vectors that depend on the noise level modulate all of these: one vector is a *row*.
Either stream may be absent: it has no tokens then, and the other one is alone in all blocks, without an exchange.

Shapes are written with these letters:

    B  batch                     D  width of a stream            H  attention heads, the same in both streams
    T  tokens of a stream        C  latent channels of a token   R  rotation planes of a head: half its size
    S  tokens of the text        E  channels of the text         P  axes of a position: video 3, audio 1
    K  rows of modulation

`T|1` means one entry for each token, or one for all tokens.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple


class StreamSizes(NamedTuple):
    """The sizes of one stream, video or audio."""

    in_channels: int
    out_channels: int
    num_heads: int
    head_dim: int
    dim: int  # D = num_heads * head_dim
    text_dim: int  # channels of the text as it enters the model
    max_position: tuple[int, ...]  # of each axis: seconds, and for video also pixels down and pixels across
    gated_attn: bool
    modulated_queries: bool
    ff_bias: bool

    @property
    def num_rows(self) -> int:
        """K of a main table: three rows each for self-attention, feed-forward and, if modulated, text attention."""
        return 9 if self.modulated_queries else 6


@dataclass(frozen=True)
class Sizes:
    """The sizes and switches of one transformer, by the names of diffusers' `config.json`. `Sizes()` is release 2.0.

    Names that begin with `audio_` are audio's, and their twins without it are video's.
    """

    in_channels: int = 128
    out_channels: int | None = 128  # None: the same as in_channels
    num_attention_heads: int = 32
    attention_head_dim: int = 128
    cross_attention_dim: int = 4096  # always the width of the stream
    vae_scale_factors: tuple[int, int, int] = (8, 32, 32)  # of video: frames, pixels down, pixels across for one token
    gated_attn: bool = False  # in the attentions that write into this stream, each head has a gate of its own
    cross_attn_mod: bool = False  # in text attention, queries are modulated and the result is gated by a row
    ff_bias: bool = True
    audio_in_channels: int = 128
    audio_out_channels: int | None = 128
    audio_num_attention_heads: int = 32
    audio_attention_head_dim: int = 64
    audio_cross_attention_dim: int = 2048
    audio_scale_factor: int = 4  # mel frames for one audio token
    audio_sampling_rate: int = 16000  # samples a second
    audio_hop_length: int = 160  # samples from one mel frame to the next
    audio_gated_attn: bool = False
    audio_cross_attn_mod: bool = False
    audio_ff_bias: bool = True
    num_layers: int = 48
    caption_channels: int = 3840  # channels of the text, if it is projected inside the model
    rope_type: str = "split"  # or "interleaved", which no checkpoint has
    rope_theta: float = 10000.0
    rope_double_precision: bool = True
    causal_offset: int = 1  # video frames, and mel frames, that the first token spans: later ones span 8, and 4
    timestep_scale_multiplier: float = 1000  # noise levels enter multiplied by this: 0 to 1000
    cross_attn_timestep_scale_multiplier: float = 1000  # the exchange's gate takes its noise level on this scale
    use_prompt_embeddings: bool = True  # the text is projected inside the model, once for each stream
    use_prompt_adaln_single: bool = True  # the text's modulation, if there is any, depends on the noise level
    use_keyframes_abs_pos_embedding: bool = False  # in video, a learned vector marks the tokens of keyframes
    perturbed_attn: bool = False  # spatio-temporal guidance, which attention.py explains, is allowed

    @property
    def video(self) -> StreamSizes:
        return self.stream("", max_position=(20, 2048, 2048))

    @property
    def audio(self) -> StreamSizes:
        return self.stream("audio_", max_position=(20,))

    def stream(self, prefix: str, max_position: tuple[int, ...]) -> StreamSizes:
        def own(name: str) -> int:
            size: int = getattr(self, prefix + name)
            return size

        dim = own("num_attention_heads") * own("attention_head_dim")
        return StreamSizes(
            in_channels=own("in_channels"),
            out_channels=own("out_channels") or own("in_channels"),
            num_heads=own("num_attention_heads"),
            head_dim=own("attention_head_dim"),
            dim=dim,
            text_dim=self.caption_channels if self.use_prompt_embeddings else dim,
            max_position=max_position,
            gated_attn=bool(own("gated_attn")),
            modulated_queries=bool(own("cross_attn_mod")),
            ff_bias=bool(own("ff_bias")),
        )

    @property
    def has_text_tables(self) -> bool:
        """Whether keys and values of the text are modulated: in both streams, as soon as one has `cross_attn_mod`."""
        return self.cross_attn_mod or self.audio_cross_attn_mod


RELEASE_2_0 = Sizes()
RELEASE_2_3 = replace(
    RELEASE_2_0,
    use_prompt_embeddings=False,  # the text comes projected, at the width of each stream
    gated_attn=True,
    audio_gated_attn=True,
    cross_attn_mod=True,
    audio_cross_attn_mod=True,
    perturbed_attn=True,
)
RELEASE_2_5 = replace(
    RELEASE_2_3,
    ff_bias=False,  # of video alone: audio's feed-forward keeps its biases
    use_keyframes_abs_pos_embedding=True,
)
