"""The streams of one connection: which number is whose, and what a `Chunks` message tells them."""

from __future__ import annotations

from penstock.actors.protocol import Chunks
from penstock.clients.errors import ProtocolError
from penstock.clients.inbox import Inbox, Track


class Streams:
    """Numbers and the count of messages are those of the present connection: `clear` begins another."""

    __slots__ = ("_tracks", "received")

    def __init__(self) -> None:
        self._tracks: dict[int, Track] = {}
        self.received = 0  # number of the last message

    def __len__(self) -> int:
        return len(self._tracks)

    def clear(self) -> None:
        self._tracks.clear()
        self.received = 0

    def attach(self, stream: int, track: Track) -> None:
        self._tracks[stream], track.stream = track, stream

    def detach(self, inbox: Inbox) -> None:
        """The request is over: what may still come for it is of no interest."""
        for track in inbox.tracks:
            if self._tracks.get(track.stream) is track:
                del self._tracks[track.stream]

    def take(self, message: Chunks, now: float) -> list[Inbox] | None:
        """Hand out the rows, details and ends. Returns whose readers wait for that, or nothing at all if a message before this one was
        lost. Raises `ProtocolError` if the columns do not fit together. The hot path: a few hundred nanoseconds a row."""
        if message.number != self.received + 1:
            return None
        self.received = message.number
        news: list[Inbox] = []
        tracks, ids, at = self._tracks, message.ids, 0
        streams, counts = memoryview(message.streams).cast("i"), memoryview(message.counts).cast("i")
        for stream, count, text in zip(streams, counts, message.texts, strict=True):
            end = at + 4 * count
            track = tracks.get(stream)
            if track is not None and track.reason is None:
                if count:
                    track.ids.frombytes(ids[at:end])
                if text and (count or track.ids or not track.texts):  # else an echo that is here already
                    track.texts.append(text)
                if not track.fresh:
                    track.fresh = True
                    inbox = track.inbox
                    inbox.fresh.append(track)
                    if inbox.first is None:
                        inbox.first = now
                    if inbox.waiting:
                        news.append(inbox)
            at = end
        if at != len(ids):
            raise ProtocolError(f"{len(ids)} bytes of ids for {at // 4} tokens")
        for stream, *rows in message.details:
            if (track := tracks.get(stream)) is not None:
                track.inbox.detail(track, rows)
        for stream, reason, facts in message.ends:
            if (track := tracks.pop(stream, None)) is not None:
                track.inbox.end(track, reason, facts)
                if track.inbox.waiting:
                    news.append(track.inbox)
        return news
