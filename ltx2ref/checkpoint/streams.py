"""Streams: which parameters are video's, which are audio's, and which serve the exchange between them."""

from collections.abc import Iterable
from typing import Literal

StreamName = Literal["video", "audio"]
BOTH_STREAMS: tuple[StreamName, StreamName] = ("video", "audio")
# The parameters of the exchange, by how their names begin, inside a block or outside. They need both streams.
OF_EXCHANGE = (
    "av_cross_attn_",
    "audio_to_video_attn.",
    "video_to_audio_attn.",
    "video_a2v_cross_attn_",
    "audio_a2v_cross_attn_",
)


def needs(name: str) -> tuple[StreamName, ...]:
    """Return the streams that have to be there for a parameter to be used, by its name in the model."""
    own = name.split(".", 2)[2] if name.startswith("transformer_blocks.") and name.count(".") > 1 else name
    if own.startswith(OF_EXCHANGE):
        return BOTH_STREAMS
    return ("audio",) if own.startswith("audio_") else ("video",)


def is_needed(name: str, streams: Iterable[str]) -> bool:
    """Tell whether a model of these streams has a parameter."""
    return set(needs(name)) <= set(streams)


def streams_of(names: Iterable[str]) -> tuple[StreamName, ...]:
    """Return the streams that have parameters of their own among these names."""
    found = set(map(needs, names))
    return tuple(stream for stream in BOTH_STREAMS if (stream,) in found)


def require_streams(streams: str | None) -> None:
    """Raise `ValueError` unless `streams` is "video", "audio" or None."""
    if streams not in (*BOTH_STREAMS, None):
        raise ValueError(f'streams: expected "video" or "audio", or None for all that there are, got {streams!r}')
